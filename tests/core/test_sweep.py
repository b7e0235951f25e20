"""What is next of a sweep, told from directories that stand where training would have left them."""

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from children import start, wait_until

from lighthouse_core.config import load_recipe
from lighthouse_core.config.sweep import Sweep, load_sweep
from lighthouse_core.errors import RecipeError, RunError
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.recovery import plan_recovery
from lighthouse_core.runs.run import Run
from lighthouse_core.seal import damage, seal
from lighthouse_core.sweep import Runner, branch, check, claim, clear, collect, lock, next_command, places, waits
from lighthouse_core.sweep import runner as running

RECIPE = Path("recipes/quickstart.toml").resolve()
SWEEP = """
recipe = "base.toml"
set = ["training.steps=10", "checkpoint.keep=0"]

[evaluate]
tokens = 512
only = "loss"

[runs.dense]
set = ["lighthouse.enabled=false"]

[runs.random]
recover = 5

[runs.random-annealed]
stage_1 = "random"
recover = 5
recover_set = ['recover.decay="linear"']
"""


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "base.toml").write_text(RECIPE.read_text())
    (tmp_path / "sweep.toml").write_text(SWEEP)
    return load_sweep(tmp_path / "sweep.toml")


def save(run: Run, step: int) -> None:
    folder = run.checkpoint_dir(step)
    folder.mkdir(parents=True)
    (folder / "weights").write_text(str(step))
    seal(folder)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "stage": run.stage, "loss": 1.0}) + "\n")


def evaluated(path: Path, which: str) -> None:
    (path / "eval" / which).mkdir(parents=True)
    (path / "eval" / which / "results.json").write_text('{"tokens": 512, "sequences": 16}')


def begin(sweep, tmp_path, name, *settings):
    recipe = load_recipe(tmp_path / "base.toml", [*sweep.set, *settings, f'output.dir="{tmp_path}/runs"'])
    return create_run(recipe, "base", name)


def test_a_run_goes_through_its_stages(sweep, tmp_path):
    base, output = tmp_path / "base.toml", tmp_path / "runs"

    def command():
        return next_command(sweep, base, "random", output)

    assert command()[:4] == ["pretrain", str(base), "--name", "random"]
    assert "training.steps=10" in command() and f'output.dir="{output}"' in command()
    run = begin(sweep, tmp_path, "random")
    # There is nothing to go on from.
    assert command()[:4] == ["pretrain", str(base), "--name", "random"]
    save(run, 4)
    assert command() == ["pretrain", "--resume", str(run.path)]
    save(run, 10)
    assert command()[:4] == ["eval", str(run.path), "--out", str(run.path / "eval/switch")]
    evaluated(run.path, "switch")
    report = run.path / "eval/switch/results.json"
    report.write_text('{"tokens": 5')
    assert command()[0] == "eval"
    report.write_text("{}")
    assert command() == ["recover", str(run.path), "--steps", "5"]
    run.write_recovery(plan_recovery(run, 5))
    assert command() == ["recover", str(run.path)]
    save(Run(run.path), 15)
    assert command()[:4] == ["eval", str(run.path), "--out", str(run.path / "eval/end")]
    assert command()[-2:] == ["--only", "loss"]
    evaluated(run.path, "end")
    assert command() is None


def test_a_dense_run_is_evaluated_once(sweep, tmp_path):
    run = begin(sweep, tmp_path, "dense", "lighthouse.enabled=false")
    save(run, 10)
    command = next_command(sweep, tmp_path / "base.toml", "dense", tmp_path / "runs")
    assert command[:4] == ["eval", str(run.path), "--out", str(run.path / "eval/end")]


def test_a_second_recovery_begins_where_the_first_stage_ended(sweep, tmp_path):
    base, output = tmp_path / "base.toml", tmp_path / "runs"
    assert waits(sweep, "random-annealed", output) and not waits(sweep, "random", output)
    run = begin(sweep, tmp_path, "random")
    save(run, 10)
    run.write_recovery(plan_recovery(run, 5))
    save(Run(run.path), 15)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "sta')
    assert not waits(sweep, "random-annealed", output)
    command = next_command(sweep, base, "random-annealed", output)
    assert not (output / "random-annealed").exists()
    other = branch(run, output / "random-annealed")
    assert next_command(sweep, base, "random-annealed", output) == command
    assert not other.recovering and other.checkpoint_steps() == [10] and damage(other.checkpoint_dir(10)) is None
    assert [json.loads(line)["step"] for line in (other.path / "metrics.jsonl").read_text().splitlines()] == [10]
    assert other.ledger["stages"] == run.ledger["stages"][:1]
    # What the other one measured at the switch holds for it, too.
    assert command == ["recover", str(other.path), "--steps", "5", "--set", 'recover.decay="linear"']
    # What becomes of one is nothing to the other.
    (run.checkpoint_dir(10) / "weights").unlink()
    assert damage(other.checkpoint_dir(10)) is None


def test_a_recovery_begins_at_an_earlier_step_of_a_run_in_training(sweep, tmp_path):
    text = SWEEP.replace("steps=10", 'steps=10", "checkpoint.interval=50').replace('"random"\n', '"random"\nat = 8\n')
    (tmp_path / "sweep.toml").write_text(text)
    sweep, output = load_sweep(tmp_path / "sweep.toml"), tmp_path / "runs"
    assert "checkpoint.also=[8]" in next_command(sweep, tmp_path / "base.toml", "random", output)
    own = sweep.model_copy(update={"set": (*sweep.set, "checkpoint.also=[2]")})
    assert "checkpoint.also=[2, 8]" in next_command(own, tmp_path / "base.toml", "random", output)
    run = begin(sweep, tmp_path, "random")
    save(run, 4)
    # Begun before there was such a run in the sweep: it saves that step, too.
    resume = next_command(sweep, tmp_path / "base.toml", "random", output)
    assert resume == ["pretrain", "--resume", str(run.path), "--set", "checkpoint.also=[8]"]
    assert waits(sweep, "random-annealed", output)
    save(run, 9)
    with pytest.raises(RunError, match=r"past step 8, from which random-annealed should begin"):
        check(sweep, tmp_path / "base.toml", output)
    save(run, 8)
    check(sweep, tmp_path / "base.toml", output)
    assert not waits(sweep, "random-annealed", output)
    run.note(steps=8, seconds=1.0, data="00ff")
    with run.lock():
        other = branch(run, output / "random-annealed", sweep.runs["random-annealed"].at)
        assert other.ledger["stages"] == [{"stage": "lighthouse", "start": 0, "end": 8, "data": "00ff"}]
    save(run, 10)
    assert other.checkpoint_steps() == [8] and other.ledger["stages"][0]["end"] == 8
    assert run.ledger["stages"][0]["end"] == 10
    command = next_command(sweep, tmp_path / "base.toml", "random-annealed", output)
    assert command[:4] == ["recover", str(other.path), "--steps", "5"]
    plan = plan_recovery(other, 5, overrides=['recover.decay="linear"'])
    assert (plan.start, plan.end, plan.stopped_early) == (8, 13, False)
    other.write_recovery(plan)
    check(sweep, tmp_path / "base.toml", output)
    (tmp_path / "sweep.toml").write_text(text.replace("at = 8", "at = 4"))
    with pytest.raises(RunError, match="at = 8, and the sweep asks for 4"):
        check(load_sweep(tmp_path / "sweep.toml"), tmp_path / "base.toml", output)


GROWN = """
recipe = "base.toml"
set = ["training.steps=10", "checkpoint.keep=0", 'lighthouse.method="chunked"']

[runs.grown]
set = ["lighthouse.phases=[{share=2, window=64}, {share=3, window=128}, {share=5, window=256}]"]
recover = 5

[runs.dense-last]
stage_1 = "grown"
at = 5
set = ["lighthouse.phases=[{share=2, window=64}, {share=3, window=128}, {share=5, enabled=false}]"]
"""


def test_a_run_goes_on_with_another_ones_stage_1_in_other_phases(tmp_path):
    (tmp_path / "base.toml").write_text(RECIPE.read_text())
    (tmp_path / "sweep.toml").write_text(GROWN)
    sweep, base, output = load_sweep(tmp_path / "sweep.toml"), tmp_path / "base.toml", tmp_path / "runs"
    assert "checkpoint.also=[5]" in next_command(sweep, base, "grown", output)
    run = begin(sweep, tmp_path, "grown", *sweep.runs["grown"].set)
    save(run, 4)
    assert waits(sweep, "dense-last", output)
    save(run, 5)
    save(run, 7)
    assert not waits(sweep, "dense-last", output)
    resume = ["pretrain", "--resume", str(output / "dense-last")]
    assert next_command(sweep, base, "dense-last", output) == resume
    wanted = sweep.runs["dense-last"]
    other = branch(run, output / "dense-last", wanted.at, wanted.set)
    assert next_command(sweep, base, "dense-last", output) == resume
    check(sweep, base, output)
    assert other.checkpoint_steps() == [5] and (other.start, other.end) == (0, 10)
    assert [json.loads(line)["step"] for line in (other.path / "metrics.jsonl").read_text().splitlines()] == [4, 5]
    assert [phase.described() for phase in other.recipe.phases] == [
        "chunked, window 64",
        "chunked, window 128",
        "dense",
    ]
    assert other.recipe.model_copy(update={"lighthouse": run.recipe.lighthouse}) == run.recipe
    save(other, 10)
    assert next_command(sweep, base, "dense-last", output) is None
    check(sweep, base, output)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            "at = 5",
            "at = 4",
            "at = 4 is no step that a phase of the run grown ends with before the last one: phases end ",
        ),
        ("at = 5", "", "at = 0 is no step that a phase"),
        ("at = 5", "at = 10", "at = 10 is no step that a phase of the run grown"),
        (
            "share=3, window=128}, {share=5, enabled",
            "share=4, window=128}, {share=5, enabled",
            "its own lighthouse.phases",
        ),
        (
            "window=128}, {share=5, enabled",
            "window=96}, {share=5, enabled",
            "phase 2 is another than that of the run grown",
        ),
        (
            "{share=2, window=64}, {share=3, window=128}, {share=5, enabled",
            "{share=5, window=64}, {share=5, enabled",
            "phase 1 is another than",
        ),
        (
            "enabled=false}]",
            'enabled=false}]", "training.seed=2',
            "only lighthouse.phases can be set: the rest is of",
        ),
        (
            "{share=5, enabled=false}",
            "{share=5, method='pyramid', window=64}",
            "pad documents to 16 tokens and those of the run grown to 1",
        ),
    ],
)
def test_other_phases_share_what_is_common(tmp_path, before, after, words):
    text = GROWN.replace('"chunked"\'', '"chunked"\', \'data.packing="documents"\'')
    assert text.count(before) == 1 and 'packing="documents"' in text
    (tmp_path / "base.toml").write_text(RECIPE.read_text())
    (tmp_path / "sweep.toml").write_text(text.replace(before, after))
    with pytest.raises(RecipeError, match=words):
        load_sweep(tmp_path / "sweep.toml")


def test_a_dense_run_has_recoveries_too(sweep, tmp_path):
    text = SWEEP + '[runs.decayed]\nstage_1 = "dense"\nrecover = 5\nrecover_set = [\'recover.decay="linear"\']\n'
    (tmp_path / "sweep.toml").write_text(text)
    sweep, base, output = load_sweep(tmp_path / "sweep.toml"), tmp_path / "base.toml", tmp_path / "runs"
    run = begin(sweep, tmp_path, "dense", "lighthouse.enabled=false")
    save(run, 10)
    other = branch(run, output / "decayed")
    assert next_command(sweep, base, "decayed", output)[0] == "recover"
    other.write_recovery(plan_recovery(other, 5, overrides=['recover.decay="linear"']))
    save(Run(other.path), 15)
    command = next_command(sweep, base, "decayed", output)
    assert command[:4] == ["eval", str(other.path), "--out", f"{other.path}/eval/end"]
    check(sweep, base, output)


def test_a_stage_1_for_others_is_evaluated_at_the_switch_alone(sweep, tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP.replace("[runs.random]\nrecover = 5", "[runs.random]"))
    sweep, base, output = load_sweep(tmp_path / "sweep.toml"), tmp_path / "base.toml", tmp_path / "runs"
    run = begin(sweep, tmp_path, "random")
    save(run, 10)
    command = next_command(sweep, base, "random", output)
    assert command[:4] == ["eval", str(run.path), "--out", f"{run.path}/eval/switch"]
    evaluated(run.path, "switch")
    assert next_command(sweep, base, "random", output) is None
    # What no other run begins from ends here.
    (tmp_path / "sweep.toml").write_text((tmp_path / "sweep.toml").read_text().partition("[runs.random-annealed]")[0])
    command = next_command(load_sweep(tmp_path / "sweep.toml"), base, "random", output)
    assert command[:4] == ["eval", str(run.path), "--out", f"{run.path}/eval/end"]


def test_what_a_recovery_keeps_of_its_own_checkpoints_is_free(sweep, tmp_path):
    text = SWEEP.replace("'recover.decay=\"linear\"'", "'checkpoint.keep=2'")
    (tmp_path / "sweep.toml").write_text(text)
    assert load_sweep(tmp_path / "sweep.toml").runs["random-annealed"].recover_set == ("checkpoint.keep=2",)


def test_a_branch_that_was_cut_off_is_made_anew(sweep, tmp_path):
    run = begin(sweep, tmp_path, "random")
    save(run, 10)
    claim(tmp_path / "runs/.b.branching")
    (tmp_path / "runs/.b.branching/checkpoints").mkdir(parents=True)
    assert branch(run, tmp_path / "runs/b").checkpoint_steps() == [10]
    assert not list((tmp_path / "runs").glob(".*"))


def test_what_was_cut_off_before_its_first_checkpoint_is_removed(sweep, tmp_path):
    path = tmp_path / "runs/random"
    assert not clear(path)
    claim(path)
    run = begin(sweep, tmp_path, "random")
    with run.lock(), pytest.raises(RunError, match="trained by another process"):
        clear(path)
    assert clear(path) and not path.exists()
    claim(path)
    run = begin(sweep, tmp_path, "random")
    (path / "recipe.toml").unlink()
    assert clear(path) and not path.exists()
    run = begin(sweep, tmp_path, "random")
    save(run, 4)
    assert not clear(path) and run.checkpoint_steps() == [4]


def test_what_is_added_until_the_run_is_held_is_not_removed(sweep, tmp_path, monkeypatch):
    path = tmp_path / "runs/random"
    claim(path)
    begin(sweep, tmp_path, "random")
    lock = Run.lock

    @contextmanager
    def late(run):
        (path / "thesis.tex").touch()
        with lock(run):
            yield

    monkeypatch.setattr(Run, "lock", late)
    with pytest.raises(RunError, match="holds thesis"):
        clear(path)
    assert (path / "thesis.tex").exists()


def test_links_of_weights_and_biases_are_removed_and_what_they_lead_to_stays(sweep, tmp_path):
    path = tmp_path / "runs/random"
    claim(path)
    begin(sweep, tmp_path, "random")
    (path / "wandb/run-1").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept.txt").touch()
    (path / "wandb/latest-run").symlink_to(tmp_path / "outside")
    assert clear(path) and not path.exists() and (tmp_path / "outside/kept.txt").exists()


def test_what_is_no_run_is_not_removed(tmp_path):
    (tmp_path / "runs/random").mkdir(parents=True)
    (tmp_path / "runs/random/thesis.tex").touch()
    with pytest.raises(RunError, match="not of this sweep"):
        clear(tmp_path / "runs/random")
    assert (tmp_path / "runs/random/thesis.tex").exists()


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("training.steps=10", "training.stebs=10", "training.steps"),
        ("recover = 5\n\n", "recovers = 5\n\n", "runs.random.recovers"),
        ('stage_1 = "random"', 'stage_1 = "nothing"', "stage_1 names 'nothing', which is no run of the sweep"),
        (
            'stage_1 = "random"',
            'stage_1 = "random-annealed"',
            "the stage 1 of random-annealed is that of random-annealed",
        ),
        ('stage_1 = "random"', 'stage_1 = "random"\nset = ["training.seed=2"]', "only lighthouse.phases can be set"),
        ('only = "loss"', 'only = "loss,context"', "evaluate.context .2048. is not below evaluate.tokens .512."),
        ("[evaluate]\ntokens = 512", "[evaluate]", "evaluate.tokens"),
        ("recipe = ", "recipe ", "cannot read"),
        ('"checkpoint.keep=0"', '"checkpoint.keep=2"', "random-annealed: stage_1 needs checkpoint.keep=0"),
        ("recover = 5\n\n", "recover = 5\nrecover_set = ['checkpoint.keep=2']\n\n", "stage_1 needs checkpoint.keep=0"),
        (
            'recover.decay="linear"',
            "recover.steps=7",
            "random-annealed: recover_set: the steps of a recovery are its recover",
        ),
        ('stage_1 = "random"', 'stage_1 = "random"\nat = 50', "the run random ends at step 10, before 50"),
        ("recover = 5\n\n", "recover = 5\nat = 5\n\n", "random: at is a step of"),
        (
            'enabled=false"]',
            'enabled=false", "schedule.warmup_steps=0", "schedule.decay_steps=3"]\nrecover = 5',
            "dense: recover must be 0 where sched",
        ),
        ('only = "loss"', 'only = "loss, Lose"', "evaluate.only knows .* not 'Lose'"),
        ('only = "loss"', 'at_switch = "loss,"', "evaluate.at_switch knows"),
        ('only = "loss"', "context = 3", "evaluate.context.* multiple of 2"),
        ('only = "loss"', 'onyl = "loss"', "unknown key evaluate.onyl; did you mean evaluate.only"),
        ("[runs.dense]", "[runs.dense]\nrecovr = 1", "unknown key runs.dense.recovr; did you mean runs.dense.recover"),
        ("[runs.dense]", "[rums.dense]", "unknown key rums; did you mean runs"),
        ("tokens = 512", "token = 512", "unknown key evaluate.token; did you mean evaluate.tokens"),
        ('only = "loss"', 'only = "loss,switch"', "run .*: evaluate.only has switch, and the run ends dense"),
        ('only = "loss"', "context = 0", "evaluate.context"),
        ('only = "loss"', "trials = 0", "evaluate.trials"),
        ('only = "loss"', 'set = ["data.validation=0.5"]', "evaluate.set"),
        ('only = "loss"', 'recipe = "nowhere.toml"', "evaluate.recipe: cannot read"),
        ("tokens = 512", "tokens = 1000000", "evaluate.tokens .1000000. is above training.seq_len"),
        ("[runs.dense]", '[runs."a/b"]', "runs.a/b"),
        ("[runs.dense]", "[runs.-o]", "runs.-o"),
    ],
)
def test_what_a_sweep_cannot_be(sweep, tmp_path, before, after, words):
    assert before in SWEEP
    (tmp_path / "sweep.toml").write_text(SWEEP.replace(before, after, 1))
    with pytest.raises(RecipeError, match=words):
        load_sweep(tmp_path / "sweep.toml")


def test_held_out_text_of_another_recipe(sweep, tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below/text.toml").write_text(RECIPE.read_text())
    text = SWEEP.replace('"base.toml"', '"../base.toml"')
    more = 'only = ""\nrecipe = "text.toml"\nset = ["data.validation=0.5"]'
    (tmp_path / "below/sweep.toml").write_text(text.replace('only = "loss"', more))
    save(begin(sweep, tmp_path, "random"), 10)
    other = load_sweep(tmp_path / "below/sweep.toml")
    command = next_command(other, tmp_path / "base.toml", "random", tmp_path / "runs")
    where = command.index("--recipe")
    assert command[where : where + 4] == [
        "--recipe",
        str(tmp_path / "below/text.toml"),
        "--set",
        "data.validation=0.5",
    ]


def test_a_sweep_that_is_as_it_was(sweep, tmp_path):
    check(sweep, tmp_path / "base.toml", tmp_path / "runs")
    run = begin(sweep, tmp_path, "random")
    save(run, 10)
    evaluated(run.path, "switch")
    other = branch(run, tmp_path / "runs/random-annealed")
    # What another command line may change meanwhile.
    run.change(["training.local_batch_size=1", "checkpoint.interval=7", "recover.steps=9"])
    run.write_recipe()
    check(sweep, tmp_path / "base.toml", tmp_path / "runs")
    run.write_recovery(plan_recovery(run, 5))
    other.write_recovery(plan_recovery(other, 5, overrides=['recover.decay="linear"']))
    save(Run(run.path), 15)
    check(sweep, tmp_path / "base.toml", tmp_path / "runs")


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("training.steps=10", "training.steps=11", "runs/random has training.steps = 10, and .* 11"),
        ("[runs.random]", '[runs.random]\nset = ["lighthouse.topk=32"]', "lighthouse.topk"),
        ("recover = 5\n\n", "recover = 6\n\n", "runs/random has recover.steps = 5, and .* 6"),
        ("recover = 5\nrec", "recover = 7\nrec", "runs/random-annealed has recover.steps = 5, and .* 7"),
        ('decay="linear"', 'decay="none"', "runs/random-annealed has recover.decay"),
        ("tokens = 512", "tokens = 256", "evaluate.tokens .switch. = 512"),
        ("tokens = 512", "tokens = 512\nsequences = 3", "evaluate.sequences .switch. = 16"),
    ],
)
def test_a_sweep_that_has_changed(sweep, tmp_path, before, after, words):
    run = begin(sweep, tmp_path, "random")
    save(run, 10)
    evaluated(run.path, "switch")
    other = branch(run, tmp_path / "runs/random-annealed")
    run.write_recovery(plan_recovery(run, 5))
    other.write_recovery(plan_recovery(other, 5, overrides=['recover.decay="linear"']))
    assert before in SWEEP
    (tmp_path / "sweep.toml").write_text(SWEEP.replace(before, after, 1))
    with pytest.raises(RunError, match=words):
        check(load_sweep(tmp_path / "sweep.toml"), tmp_path / "base.toml", tmp_path / "runs")


def measured(run, **data) -> None:
    folder = run.path / "eval/switch"
    report = {"tokens": 512, "sequences": 16, "data": {"source": "python-sources", **data}}
    (folder / "results.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ({"paths": ["stdlib"], "validation": 0.05}, None),
        ({"paths": ["./stdlib"], "validation": 0.05}, None),
        ({"paths": ["site-packages"], "validation": 0.05}, "evaluate: data.paths .switch."),
        ({"paths": ["stdlib"], "validation": 0.5}, "evaluate: data.validation .switch. = 0.5"),
        ({"paths": None, "validation": 0.05}, "evaluate: data.paths .switch. = null"),
        ({"source": "files", "paths": ["stdlib"], "validation": 0.05}, "evaluate: data.source .switch. = .files"),
    ],
)
def test_a_report_of_other_text_is_not_the_one_that_is_asked_for(sweep, tmp_path, before, words):
    run = begin(sweep, tmp_path, "random", "data.validation=0.05")
    save(run, 10)
    evaluated(run.path, "switch")
    measured(run, **before)
    base = tmp_path / "base.toml"
    (tmp_path / "sweep.toml").write_text(
        SWEEP.replace('"checkpoint.keep=0"', '"checkpoint.keep=0", "data.validation=0.05"')
    )
    sweep = load_sweep(tmp_path / "sweep.toml")
    if words is None:
        check(sweep, base, tmp_path / "runs")
    else:
        with pytest.raises(RunError, match=words):
            check(sweep, base, tmp_path / "runs")


@pytest.mark.parametrize(
    ("paths", "same"),
    [
        (["corpus/**/*.py"], True),
        (["{here}/corpus/**/*.py"], True),
        (["./corpus//**/*.py"], True),
        (["link/**/*.py"], True),
        (["other/**/*.py"], False),
        (["corpus/*.py"], False),
        (["corpus/**/*.py", "other/**/*.py"], False),
    ],
)
def test_a_runs_data_by_another_name(sweep, tmp_path, monkeypatch, paths, same):
    monkeypatch.chdir(tmp_path)
    for folder in ("corpus", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("corpus")
    run = begin(sweep, tmp_path, "random", 'data.source="files"', 'data.paths=["corpus/**/*.py"]')
    save(run, 10)
    setting = f"data.paths={json.dumps([path.format(here=tmp_path) for path in paths])}"
    settings = json.dumps(["training.steps=10", "checkpoint.keep=0", 'data.source="files"', setting])
    (tmp_path / "sweep.toml").write_text(SWEEP.replace('["training.steps=10", "checkpoint.keep=0"]', settings))
    now = load_sweep(tmp_path / "sweep.toml")
    if same:
        check(now, tmp_path / "base.toml", tmp_path / "runs")
    else:
        with pytest.raises(RunError, match=r"data\.paths"):
            check(now, tmp_path / "base.toml", tmp_path / "runs")


@pytest.mark.parametrize(
    ("path", "weight", "words"),
    [
        ("corpus/**/*.py", 1, None),
        ("{here}/link/**/*.py", 1, None),
        ("other/**/*.py", 1, r"data\.sources\[2\]\.paths"),
        ("corpus/**/*.py", 2, r"data\.sources\[2\]\.weight"),
    ],
)
def test_a_mixture_by_another_name(sweep, tmp_path, monkeypatch, path, weight, words):
    def mixture(path, weight):
        source = f"{{source = 'files', paths = ['{path.format(here=tmp_path)}'], weight = {weight}}}"
        return f"data.sources=[{{weight = 1}}, {source}]"

    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "link").symlink_to("corpus")
    base = tmp_path / "base.toml"
    base.write_text(base.read_text().replace('source = "python-sources"\npaths = ["stdlib"]\n', ""))
    run = begin(sweep, tmp_path, "random", mixture("corpus/**/*.py", 1), "data.validation=0.05")
    save(run, 10)
    evaluated(run.path, "switch")
    report = {"tokens": 512, "sequences": 16, "data": run.recipe.data.origin}
    (run.path / "eval/switch/results.json").write_text(json.dumps(report))
    settings = ["training.steps=10", "checkpoint.keep=0", "data.validation=0.05", mixture(path, weight)]
    (tmp_path / "sweep.toml").write_text(
        SWEEP.replace('["training.steps=10", "checkpoint.keep=0"]', json.dumps(settings))
    )
    now = load_sweep(tmp_path / "sweep.toml")
    with nullcontext() if words is None else pytest.raises(RunError, match=words):
        check(now, base, tmp_path / "runs")


def test_a_recovery_sets_only_what_its_checkpoint_does_not_decide(sweep, tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP.replace('recover.decay="linear"', "optimizer.lr=1e-4"))
    changed = load_sweep(tmp_path / "sweep.toml")
    with pytest.raises(RecipeError, match=r"run random-annealed: recover_set: .*the checkpoint decides optimizer.lr"):
        check(changed, tmp_path / "base.toml", tmp_path / "runs")


def test_a_sweep_is_held_by_one(tmp_path):
    output = tmp_path / "runs"
    with lock(output, "a"), lock(output, "b"), pytest.raises(RunError, match="another process"), lock(output, "a"):
        pass
    with lock(output, "a"):
        pass


CHILD = """
import os, pathlib, signal, sys, time
name, number = sys.argv[1:]
here = pathlib.Path(os.environ["WHERE"])

def end(*_):
    (here / f"{name}-{number}.ended").touch()
    sys.exit(143)

signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN if name == "stubborn" else end)
(here / f"{name}-{number}.begun").write_text(os.environ["PLACE"])
if name == "bad":
    sys.exit("it went wrong")
if name == "idle":
    sys.exit()
for _ in range(600 if name in ("slow", "stubborn") else 2):
    time.sleep(0.1)
(here / f"{name}-{number}").touch()
"""


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Runs of two commands each, of which only the files tell."""
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setenv("WHERE", str(tmp_path))

    def following(plan, base, name, output):
        if name == "broken":
            raise RunError("it cannot be read")
        return next(([name, str(i)] for i in (1, 2) if not (tmp_path / f"{name}-{i}").exists()), None)

    monkeypatch.setattr(running, "next_command", following)
    monkeypatch.setattr(running, "_POLL_SECONDS", 0.02)
    said = []

    def make(*names):
        plan = Sweep(recipe="base.toml", runs={name: {} for name in names})
        places = [{"PLACE": "0"}, {"PLACE": "1"}]
        command = (sys.executable, str(tmp_path / "child.py"))
        return Runner(plan, tmp_path / "base.toml", tmp_path / "runs", places, said.append, command), said

    return make


def test_a_run_on_each_place(runner, tmp_path):
    job, said = runner("a", "b", "c")
    assert job.run()
    # Which ends first is the machine's affair.
    done = [text for text in said if "done" in text]
    assert job.left == [] and sorted(done) == ["a: done", "b: done", "c: done"]
    assert {(tmp_path / f"{name}-1.begun").read_text() for name in "ab"} == {"0", "1"}
    begun = [text for text in said if "lighthouse" in text]
    assert begun[:2] == ["a: lighthouse a 1", "b: lighthouse b 1"] and len(begun) == 6
    # The third waited for a place.
    assert done[0] != "c: done" and said.index("c: lighthouse c 1") > said.index(done[0])


def test_a_run_that_fails_is_left_and_the_others_go_on(runner, tmp_path):
    job, said = runner("bad", "a")
    seen = []
    job.ended = lambda: seen.append((tmp_path / "a-1").exists())
    assert not job.run()
    # After each command that ended, also after the one that failed: a's two and this.
    assert len(seen) == 3 and seen[-1]
    assert job.failed == ["bad"] == job.left and (tmp_path / "a-2").exists()
    assert (tmp_path / "runs/bad.log").read_text() == "it went wrong\n"
    assert any(text.startswith("bad: failed: exit code 1") for text in said)


def test_time_that_is_up(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_LEAST_SECONDS", 0)
    job, _said = runner("slow", "a")
    begin = time.monotonic()
    assert not job.run(1.5)
    assert time.monotonic() - begin < 30
    assert job.left == ["slow"] and job.failed == [] and not (tmp_path / "slow-1").exists()


def test_too_little_time_begins_nothing(runner, tmp_path):
    job, said = runner("a")
    assert not job.run(5)
    assert said == job.stuck == [] and job.left == ["a"]


def after(file, act):
    def wait():
        wait_until(file.exists)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_an_interruption_reaches_every_command(runner, tmp_path):
    job, _said = runner("slow", "slow-too")
    after(tmp_path / "slow-1.begun", lambda: job.interrupt(signal.SIGINT))
    assert not job.run()
    assert job.left == ["slow", "slow-too"] and not job.failed and job.asked == signal.SIGINT
    assert (tmp_path / "slow-1.ended").exists()


def test_a_second_interruption_kills(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "SAME_REQUEST_SECONDS", 0.3)
    job, _said = runner("stubborn")

    def twice():
        job.interrupt(signal.SIGTERM)
        # This one is the same request still.
        job.interrupt(signal.SIGHUP)
        time.sleep(0.5)
        job.interrupt(signal.SIGINT)

    after(tmp_path / "stubborn-1.begun", twice)
    children = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: children.append(popen(*a, **k)) or children[-1])
    begin = time.monotonic()
    assert not job.run()
    assert 0.5 < time.monotonic() - begin < 30 and job.asked == signal.SIGTERM
    assert children[0].returncode == -signal.SIGKILL


def test_no_command_outlives_an_exception(runner, tmp_path):
    job, _said = runner("slow", "a")

    def say(text):
        if text.startswith("a: "):
            wait_until((tmp_path / "slow-1.begun").exists)
            raise RuntimeError("no more room for words")

    job.say = say
    with pytest.raises(RuntimeError, match="no more room"):
        job.run()
    assert (tmp_path / "slow-1.ended").exists() and not job._busy


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
def test_commands_end_with_a_sweep_that_is_killed(runner, tmp_path):
    runner("slow")
    script = f"""
from pathlib import Path
from lighthouse_core.config.sweep import Sweep
from lighthouse_core.sweep import runner
runner.next_command = lambda *_: ["slow", "1"]
plan = Sweep(recipe="base.toml", runs={{"slow": {{}}}})
here = Path({str(tmp_path)!r})
command = [{sys.executable!r}, str(here / "child.py")]
runner.Runner(plan, here, here / "runs", [{{"PLACE": "0"}}], print, command).run()
"""
    process = start([sys.executable, "-c", script])
    try:
        wait_until((tmp_path / "slow-1.begun").exists, process)
    finally:
        process.kill()
        process.wait(60)
    wait_until((tmp_path / "slow-1.ended").exists)


def test_a_run_that_cannot_be_read_is_left_and_the_others_go_on(runner, tmp_path):
    job, said = runner("broken", "a")
    assert not job.run()
    assert job.failed == ["broken"] == job.left and (tmp_path / "a-2").exists()
    assert "broken: failed: it cannot be read" in said


def test_a_command_that_brings_nothing_forward_is_not_repeated(runner, tmp_path):
    job, said = runner("idle")
    assert not job.run(40)
    assert job.failed == ["idle"] and sum("lighthouse idle 1" in text for text in said) == 2
    assert "would be next again" in said[-1]


def test_a_run_whose_parent_has_lost_its_checkpoint_is_stuck(sweep, tmp_path):
    run = begin(sweep, tmp_path, "random")
    save(run, 10)
    run.write_recovery(plan_recovery(run, 5))
    save(Run(run.path), 15)
    evaluated(run.path, "end")
    run.checkpoint_dir(10).rename(run.checkpoint_dir(9))
    only = sweep.model_copy(update={"runs": {name: sweep.runs[name] for name in ("random", "random-annealed")}})
    job = Runner(only, tmp_path / "base.toml", tmp_path / "runs", [{}], print)
    assert not job.run()
    assert job.stuck == job.left == ["random-annealed"] and not job.failed


def test_the_runner_clears_and_branches(sweep, tmp_path, monkeypatch):
    save(begin(sweep, tmp_path, "random"), 10)
    evaluated(tmp_path / "runs/random", "switch")
    claim(tmp_path / "runs/dense")
    begin(sweep, tmp_path, "dense", "lighthouse.enabled=false")
    said = []
    Runner(sweep, tmp_path / "base.toml", tmp_path / "runs", [{}] * 3, said.append, [sys.executable, "-c", ""]).run()
    path = tmp_path / "runs/dense"
    assert said[0] == f"dense: {path} held no checkpoint and is removed; it begins anew" and not path.exists()
    assert Run(tmp_path / "runs/random-annealed").checkpoint_steps() == [10]


def test_what_was_measured_is_collected(sweep, tmp_path):
    nothing = collect(sweep.model_copy(update={"per_gpu": 2}), "s", tmp_path / "runs")
    assert nothing["runs"] == {} and nothing["per_gpu"] == 2
    run = begin(sweep, tmp_path, "random")
    save(run, 10)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": null}\n{"step": 12, "lo')
    evaluated(run.path, "switch")
    (run.path / "eval/end").mkdir()
    (run.path / "eval/end/results.json").write_text('{"tok')
    # Unreadable.
    begin(sweep, tmp_path, "dense").path.joinpath("ledger.json").write_text("")
    found = collect(sweep, "s", tmp_path / "runs")
    assert list(found["runs"]) == ["random"]
    one = found["runs"]["random"]
    assert one["rows"] == [{"step": 10, "stage": "lighthouse", "loss": 1.0}, {"step": 11, "loss": None}]
    assert one["settings"]["recover"] == 5 and one["recipe"]["training"]["steps"] == 10
    assert list(one["evaluations"]) == ["switch"] and one["ledger"]["stages"][0]["stage"] == "lighthouse"
    json.dumps(found, allow_nan=False)


def test_places_are_gpus(monkeypatch):
    monkeypatch.setattr("lighthouse_core.job.plan.local_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places() == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places()] == ["3", "5"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(per_gpu=2)] == ["3", "5", "3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("lighthouse_core.job.plan.local_gpus", lambda: 0)
    assert places() == [{}]
