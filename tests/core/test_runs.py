"""Run directories: how they are made, found, and what a recovery may do with them."""

import fcntl
import json
import os
import re
import subprocess
import threading
import tomllib

import pytest
from tiny_recipe import RECIPE

from lighthouse_core.config import load_recipe, loads_recipe
from lighthouse_core.errors import CheckpointError, LighthouseError, RunError, UserError
from lighthouse_core.runs.create import create_run, git_commit, run_path
from lighthouse_core.runs.find import find_checkpoint, find_run
from lighthouse_core.runs.recovery import plan_recovery
from lighthouse_core.runs.run import Run, in_use
from lighthouse_core.seal import seal


@pytest.fixture
def recipe(tmp_path):
    return loads_recipe(RECIPE, [f"output.dir='{tmp_path}/runs'"])


def save(run, *steps):
    for step in steps:
        run.checkpoint_dir(step).mkdir(parents=True)
        seal(run.checkpoint_dir(step))


def stages(run):
    return [(stage["stage"], stage["start"], stage["end"]) for stage in Run(run.path).ledger["stages"]]


def refused(kind, *arguments, **options) -> LighthouseError:
    with pytest.raises(kind) as caught:
        plan_recovery(*arguments, **options)
    return caught.value


def test_a_new_run_holds_recipe_ledger_and_environment(recipe):
    run = create_run(recipe, "tiny", "first", source="recipes/tiny.toml")
    assert stages(run) == [("lighthouse", 0, 100)]
    assert Run(run.path).recipe == load_recipe(run.path / "recipe.toml") == recipe
    assert "recipes/tiny.toml" in (run.path / "recipe.toml").read_text().splitlines()[0]
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["argv"] and environment["python"] and environment["versions"]["torch"]
    assert not list(run.path.glob(".*")), "a temporary file was left"


def test_a_commit_says_whether_files_differ_from_it(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(("git", "-C", str(tmp_path), *identity, *arguments), check=True, capture_output=True)

    assert git_commit(tmp_path) is None
    git("init")
    assert git_commit(tmp_path) is None, "there is no commit yet"
    (tmp_path / "file").write_text("a")
    (tmp_path / "folder").mkdir()
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "v1")
    commit = git_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "file").write_text("b")
    assert git_commit(tmp_path) == f"{commit}-dirty"
    assert git_commit(tmp_path / "folder") is None, "a package within somebody's repository"


def test_a_dense_recipe_makes_a_dense_run(recipe):
    dense = recipe.model_copy(update={"lighthouse": recipe.lighthouse.model_copy(update={"enabled": False})})
    run = create_run(dense, "tiny", "dense")
    assert stages(run) == [("dense", 0, 100)]
    assert not run.recovering
    run.checkpoint_dir(100).mkdir(parents=True)
    seal(run.checkpoint_dir(100))
    plan = plan_recovery(run, 10)
    assert (plan.start, plan.end) == (100, 110)
    run.write_recovery(plan)
    assert run.recovering and stages(run) == [("dense", 0, 100), ("dense", 100, 110)]


def test_names(recipe):
    assert create_run(recipe, "tiny").name.startswith("tiny-2")
    create_run(recipe, "tiny", "taken")
    with pytest.raises(RunError, match="exists") as caught:
        create_run(recipe, "tiny", "taken")
    assert "no checkpoint" in caught.value.hint
    run_path(recipe, "taken").joinpath("checkpoints/step-3").mkdir(parents=True)
    with pytest.raises(RunError, match="exists") as caught:
        create_run(recipe, "tiny", "taken")
    assert "--resume taken" in caught.value.hint
    named = recipe.model_copy(update={"output": recipe.output.model_copy(update={"name": "from-recipe"})})
    assert create_run(named, "tiny").name == "from-recipe"
    assert create_run(named, "tiny", "flag").name == "flag"


@pytest.mark.parametrize("name", [".", "..", "a/b", "/tmp/x", " ", ".hidden", "-x", "a\\b", "a\n"])
def test_names_that_are_no_directory(recipe, name):
    with pytest.raises(RunError, match="cannot name a run"):
        create_run(recipe, "tiny", name)


def test_only_complete_checkpoints_count_and_in_numeric_order(recipe):
    run = create_run(recipe, "tiny", "a")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run.newest_checkpoint()
    save(run, 90, 100)
    for odd in (".step-110.saving", "step-120.damaged", "old-step-130", "step-", "step-x"):
        (run.path / "checkpoints" / odd).mkdir()
        seal(run.path / "checkpoints" / odd)
    assert run.checkpoint_steps() == [90, 100]
    assert run.newest_checkpoint().step == 100


def test_a_damaged_checkpoint_is_named_passed_over_and_set_aside(recipe):
    run = create_run(recipe, "tiny", "a")
    save(run, 80, 90, 100)
    (run.checkpoint_dir(100) / "extra").touch()
    (run.checkpoint_dir(90) / "manifest.json").write_text("{}")
    refused_words = "step-100 is damaged: extra does not belong to it"
    with pytest.raises(CheckpointError, match=refused_words):
        run.newest_checkpoint(strict=True)
    step, damaged = run.newest_checkpoint()
    assert step == 80 and list(damaged) == [100, 90] and refused_words in damaged[100]
    assert "manifest.json is damaged" in damaged[90]
    run.set_aside(damaged)
    assert run.checkpoint_steps() == [80] and run.newest_checkpoint().step == 80
    assert (run.path / "checkpoints/step-100.damaged/extra").exists()


def test_a_checkpoint_without_its_manifest_is_damaged_and_out_of_the_way(recipe):
    run = create_run(recipe, "tiny", "a")
    save(run, 80, 90)
    (run.checkpoint_dir(90) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-90 is damaged: manifest.json is missing"):
        run.newest_checkpoint(strict=True)
    step, damaged = run.newest_checkpoint()
    assert step == 80
    run.set_aside(damaged)
    assert run.checkpoint_steps() == [80] and not run.checkpoint_dir(90).exists()


def test_checkpoints_that_changed_places_are_damaged(recipe):
    run = create_run(recipe, "tiny", "a")
    save(run, 70, 80, 90)
    run.checkpoint_dir(80).rename(run.path / "other")
    run.checkpoint_dir(90).rename(run.checkpoint_dir(80))
    (run.path / "other").rename(run.checkpoint_dir(90))
    step, damaged = run.newest_checkpoint()
    assert step == 70 and "step-90 is damaged: manifest.json is that of step-80" in damaged[90]


def test_a_checkpoint_verified_ahead_is_the_newest_of_then(recipe):
    run = create_run(recipe, "tiny", "a")
    save(run, 70, 80)
    (run.checkpoint_dir(80) / "extra").touch()
    step, damaged = run.newest_checkpoint(ahead=run.verify_ahead())
    assert step == 70 and list(damaged) == [80]
    ahead = run.verify_ahead()
    save(run, 90)
    assert run.newest_checkpoint(ahead=ahead) == (90, {})


def test_nothing_to_fall_back_to_is_an_error_that_names_the_newest(recipe):
    run = create_run(recipe, "tiny", "a")
    save(run, 90, 100)
    for step in (90, 100):
        (run.checkpoint_dir(step) / "extra").touch()
    with pytest.raises(CheckpointError, match=r"every checkpoint .*step-100 is damaged: extra"):
        run.newest_checkpoint()


def test_finding_runs(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="no run under runs"):
        find_run(None)
    old, new = create_run(recipe, "tiny", "zebra"), create_run(recipe, "tiny", "ant")
    os.utime(old.path, (1000, 1000))
    (tmp_path / "runs" / "not-a-run").mkdir()
    assert find_run(None).name == find_run("latest").name == "ant"
    os.utime(new.path, (500, 500))
    assert find_run(None).name == "zebra"
    assert find_run("ant").name == find_run("runs/ant").name == find_run(new.path).name == "ant"
    with pytest.raises(RunError, match="no run zebr,") as caught:
        find_run("zebr")
    assert "zebra" in caught.value.hint
    with pytest.raises(RunError, match="is not a run"):
        find_run("runs/not-a-run")


def test_finding_checkpoints(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "runs/ant"
    create_run(recipe, "tiny", "ant").checkpoint_dir(5).mkdir(parents=True)
    for spec in ("ant", "latest", "runs/ant", here):
        assert find_checkpoint(spec).resolve() == here
        for step in ("step-5", "step-6"):
            assert find_checkpoint(f"{spec}/checkpoints/{step}").resolve() == here / "checkpoints" / step
    # A run may be called like a checkpoint.
    create_run(recipe, "tiny", "step-7")
    assert find_checkpoint("step-7").resolve() == tmp_path / "runs/step-7"
    for spec in ("bee/checkpoints/step-5", "step-5"):
        with pytest.raises(RunError, match="no run "):
            find_checkpoint(spec)
    monkeypatch.chdir(here / "checkpoints")
    for step in ("step-5", "step-6"):
        assert find_checkpoint(step) == here / "checkpoints" / step


@pytest.mark.parametrize(
    "ledger",
    [
        *("", "{", "[]", '{"version": 1}', '{"version": 1, "stages": []}', '{"version": 1, "stages": [{}]}'),
        *(
            f'{{"version": 1, "stages": [{{"stage": "dense", "start": 0, "end": 1, "sources_since_start": {one}}}]}}'
            for one in ("1", '{"a": 1}', '{"a": {"samples": 1}}', '{"a": {"samples": 1, "epoch": "b"}}')
        ),
        '{"version": 1, "stages": [{"stage": "dense", "start": 0, "end": 1, "unread": {"a": "b"}}]}',
    ],
)
def test_a_broken_ledger_is_one_error(recipe, ledger):
    run = create_run(recipe, "tiny", "a")
    (run.path / "ledger.json").write_text(ledger)
    with pytest.raises(RunError, match=r"ledger\.json"):
        Run(run.path)


def test_a_run_is_held_by_one_process_at_a_time(recipe):
    run = create_run(recipe, "tiny", "a")
    with run.lock(), pytest.raises(RunError, match="another process"), Run(run.path).lock():
        pass
    with Run(run.path).lock():
        pass


def test_a_run_that_another_process_looks_at_can_be_held(recipe):
    run = create_run(recipe, "tiny", "a")
    looked = os.open(run.path, os.O_RDONLY)
    fcntl.flock(looked, fcntl.LOCK_SH)
    # Longer than a look takes.
    timer = threading.Timer(0.02, os.close, [looked])
    timer.start()
    with run.lock():
        assert in_use(run.path)
    timer.join()


def test_a_run_of_another_user_counts_as_held(recipe, monkeypatch):
    run = create_run(recipe, "tiny", "a")
    assert not in_use(run.path)
    opened = os.open

    def refuse(path, *others, **options):
        # Whoever runs the tests may be allowed to open everything.
        if path == run.path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *others, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert in_use(run.path)


def test_a_recovery_from_plan_to_end(recipe):
    run = create_run(recipe, "tiny", "a")
    assert "no complete checkpoint" in str(refused(CheckpointError, run))
    assert "no recovery to extend" in str(refused(RunError, run, extend=5))
    save(run, 100)
    before = (run.path / "ledger.json").read_bytes()
    plan = plan_recovery(run, overrides=["training.compile=true"])
    assert (plan.start, plan.end, plan.step, plan.stopped_early) == (100, 120, 100, False)
    assert (run.path / "ledger.json").read_bytes() == before, "planning wrote"

    run.write_recovery(plan)
    assert stages(run) == [("lighthouse", 0, 100), ("dense", 100, 120)]
    assert Run(run.path).recipe.training.compile and not load_recipe(run.path / "recipe.toml").training.compile
    assert run.recipe == Run(run.path).recipe

    save(run, 110)
    again = plan_recovery(Run(run.path))
    assert (again.start, again.end, again.step) == (100, 120, 110)
    assert plan_recovery(run, steps=20).end == 120
    error = refused(RunError, run, steps=30)
    assert "20 steps, not 30" in str(error) and "--extend" in error.hint
    assert "not 21" in str(refused(RunError, run, overrides=["recover.steps=21"]))
    assert "under way" in str(refused(RunError, run, overrides=['recover.decay="linear"']))

    save(run, 120)
    error = refused(RunError, run)
    assert "complete at step 120" in str(error) and "strip" in error.hint
    run.write_recovery(plan_recovery(run, extend=7))
    assert stages(run) == [("lighthouse", 0, 100), ("dense", 100, 127)]
    assert plan_recovery(run).end == 127
    assert tomllib.loads((run.path / "recover.toml").read_text())["recover"]["steps"] == 27


def test_a_recovery_cut_off_before_its_ledger_was_written_starts_afresh(recipe):
    run = create_run(recipe, "tiny", "a")
    save(run, 100)
    (run.path / "recover.toml").write_text("not a recipe")
    assert plan_recovery(Run(run.path), steps=5).end == 105


def test_an_extension_cut_off_before_its_ledger_was_written_is_forgotten(recipe):
    run = create_run(recipe, "tiny", "a")
    save(run, 100)
    run.write_recovery(plan_recovery(run))
    ledger = (run.path / "ledger.json").read_text()
    run.write_recovery(plan_recovery(run, extend=5))
    (run.path / "ledger.json").write_text(ledger)
    assert plan_recovery(Run(run.path)).end == 120


def test_stage_1_that_stopped_early_is_recovered_from_its_newest_checkpoint(recipe):
    run = create_run(recipe, "tiny", "a")
    save(run, 40, 60)
    plan = plan_recovery(run, steps=5)
    assert (plan.start, plan.end, plan.stopped_early) == (60, 65, True)


def test_a_lost_switch_checkpoint_is_an_error(recipe):
    run = create_run(recipe, "tiny", "a")
    save(run, 40, 100)
    run.write_recovery(plan_recovery(run))
    (run.checkpoint_dir(100) / "manifest.json").unlink()
    assert "step 100" in str(refused(CheckpointError, run))


def test_no_length_is_an_error(recipe):
    run = create_run(recipe.model_copy(update={"recover": type(recipe.recover)()}), "tiny", "a")
    save(run, 100)
    assert "--steps" in refused(UserError, run).hint


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": -1}, {"extend": 0}, {"steps": 1, "extend": 1}])
def test_impossible_lengths(recipe, options):
    refused(UserError, create_run(recipe, "tiny", "a"), **options)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=1.0", "--set optimizer.lr: the checkpoint decides optimizer.lr"),
        ("training.seq_len=512", "the checkpoint decides training.seq_len"),
        ("training={compile=true, seed=1}", "the checkpoint decides training.seed"),
        ("model.dense_layers=[0]", "the checkpoint decides model.dense_layers"),
        ("lighthouse.topk=8", "the checkpoint decides lighthouse.topk"),
        ("titan.optimizer.lr=1.0", "the checkpoint decides titan.optimizer"),
        ("optimizer.lrr=1.0", "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        ("training.compil=true", "unknown key training.compil; did you mean training.compile?"),
        ("recover.decay=linear", "not a TOML value"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(recipe, override, message):
    run = create_run(recipe, "tiny", "a")
    save(run, 100)
    assert message in str(refused(UserError, run, overrides=[override]))


@pytest.mark.parametrize(
    "override",
    [
        'recover.decay="linear"',
        "training.compile=true",
        'training.activation_checkpointing="full"',
        "training.local_batch_size=2",
        "parallel.replicate=2",
        "checkpoint={interval=5, keep=0}",
        "metrics.every=1",
        "titan.comm.init_timeout_seconds=900",
        "titan.comm.train_timeout_seconds=900",
    ],
)
def test_a_setting_that_takes_effect_is_kept(recipe, override):
    run = create_run(recipe, "tiny", "a")
    save(run, 100)
    run.write_recovery(plan_recovery(run, overrides=[override]))
    assert Run(run.path).recipe == load_recipe(run.path / "recipe.toml", [override])
    assert Run(run.path).recipe != recipe
