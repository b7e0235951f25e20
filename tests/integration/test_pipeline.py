"""The main job through the command line: pretrain, recover, strip; on one process and on two."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import children
import jobs
import pytest
import torch
from forked import Done, lighthouse
from jobs import options
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lighthouse_core.evaluate import evaluate
from lighthouse_core.evaluate.load import load_checkpoint, load_directory
from lighthouse_core.job.environment import MEETING
from lighthouse_core.runs.listing import checkpoint_steps
from lighthouse_core.runs.run import Run
from lighthouse_core.runs.schedule import Decay, lr_factor
from lighthouse_core.sweep import branch

ROOT = Path(__file__).parents[2]
TINY = [*jobs.TINY, "training.steps=6", "checkpoint.interval=2", "checkpoint.keep=3", "recover.steps=4"]


class Seen(NamedTuple):
    """Of a job in progress: its processes, the addresses at which they listen, and the folder where they meet."""

    pids: list[int]
    addresses: set[str]
    meeting: Path
    mode: int


def succeed(*arguments: str, cwd: Path) -> Done:
    done = lighthouse(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def interrupt(*arguments: str, after: str, cwd: Path, look=lambda pids: None) -> str:
    """What a command says that is sent SIGINT once a line begins with `after`; first its processes are looked at."""
    with children.start([*children.LIGHTHOUSE, *arguments], cwd=cwd, stderr=subprocess.PIPE, text=True) as process:
        words = ""
        for line in process.stderr:
            words += line
            if line.startswith(after):
                look(children.tree(process.pid))
                process.send_signal(signal.SIGINT)
                break
        words += process.stderr.read()
        assert process.wait(timeout=60) == 130, words
    assert "Traceback" not in words
    return words


def rows(run: Path, key: str = "loss") -> dict[int, dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in found if key in row]
    assert len(steps) == len(set(steps))
    return {row["step"]: row for row in found if key in row}


# Names that Python, torch or we import; as a file in the working directory each is a trap.
CANARIES = [*sorted(sys.stdlib_module_names - {"__future__"}), "torch", "numpy", "lighthouse_core", "sitecustomize"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Where all these commands run: among modules of which none may be imported."""
    folder = tmp_path_factory.mktemp("workspace")
    ran = tmp_path_factory.mktemp("ran")
    for name in CANARIES:
        (folder / f"{name}.py").write_text(f"open({str(ran / name)!r}, 'w').close()\n")
    yield folder
    assert [path.name for path in ran.iterdir()] == []


def pretrain(workspace: Path, name: str, *more: str) -> Path:
    settings = options(*TINY)
    succeed("pretrain", str(ROOT / "recipes/quickstart.toml"), "--name", name, *settings, *more, cwd=workspace)
    return workspace / "runs" / name


@pytest.fixture(scope="module")
def one(workspace):
    # What is measured first changes nothing: other tests compare this run with others, one of them bit for bit.
    run = pretrain(workspace, "one", "--nproc", "1", "--measure-dense", *options("training.deterministic=true"))
    shutil.copytree(run, workspace / "runs/resumed")
    return run


@pytest.fixture(scope="module")
def recovered(workspace, one):
    succeed("recover", "one", "--set", 'recover.decay="linear"', cwd=workspace)
    return one


def test_a_run_directory_holds_everything(one):
    for name in ("recipe.toml", "environment.json", "metrics.jsonl", "ledger.json", "tb", "checkpoints/step-6"):
        assert (one / name).exists(), name
    row = rows(one)[1]
    keys = {"step", "stage", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds", "memory_gib"}
    assert keys <= set(row)
    assert row["tokens"] == 4 * 512
    assert all(row["memory_gib"] > 0.05 and row["stage"] == "lighthouse" for row in rows(one).values())


@pytest.fixture(scope="module")
def two(workspace):
    """Of two processes that were interrupted, and then went on for another step: the run, its words, the step saved,
    and what was seen of them before."""

    def look(pids: list[int]) -> None:
        meeting = Path(children.environment(pids[-1])[MEETING])
        addresses = {address for address, _ in children.listening(pids)}
        seen.append(Seen(pids, addresses, meeting.parent, meeting.parent.stat().st_mode & 0o777))

    seen: list[Seen] = []
    settings = [
        "training.steps=500",
        "checkpoint.interval=1",
        "checkpoint.async_save=true",
        "metrics.validation_every=1",
    ]
    command = ["pretrain", str(ROOT / "recipes/quickstart.toml"), "--name", "two", "--nproc", "2"]
    # The signal comes while step 6 is evaluated, and while checkpoints are saved behind the scenes.
    words = interrupt(*command, *options(*TINY, *settings), after="step 6/", cwd=workspace, look=look)
    run = workspace / "runs/two"
    saved = checkpoint_steps(run)[-1]
    assert max(rows(run)) == saved < 500
    ledger = json.loads((run / "ledger.json").read_text())
    ledger["stages"][0]["end"] = saved + 1
    (run / "ledger.json").write_text(json.dumps(ledger))
    succeed("pretrain", "--resume", "two", "--nproc", "2", cwd=workspace)
    return run, words, saved, seen[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows it in /proc")
def test_a_job_on_one_machine_is_reached_by_no_other(two):
    """Torch's own store listens everywhere, and whoever writes to it can have the processes run what they like."""
    seen = two[3]
    assert len(seen.pids) == 3 and seen.addresses and seen.addresses <= {"127.0.0.1", "::1"}
    assert seen.mode == 0o700 and not seen.meeting.exists()


def test_an_interrupted_run_saves_and_goes_on(two):
    run, words, saved, _ = two
    assert f"step {saved} is saved" in words
    assert sorted(rows(run)) == list(range(1, saved + 2))
    # An evaluation that the signal cut short is made again.
    assert sorted(rows(run, "val_loss")) == list(range(1, saved + 2))


def test_two_processes_give_the_losses_of_one(two, one):
    for key in ("loss", "grad_norm", "val_loss"):
        expected, seen = rows(one, key), rows(two[0], key)
        expected = {step: row for step, row in expected.items() if step <= 6}
        assert expected and expected.keys() <= seen.keys()
        for step in expected:
            assert seen[step][key] == pytest.approx(expected[step][key], rel=1e-4)


@pytest.mark.parametrize(
    ("processes", "settings"), [("2", []), pytest.param("4", ["training.local_batch_size=1"], marks=pytest.mark.slow)]
)
def test_replicated_processes_give_the_gradients_of_one(workspace, one, processes, settings):
    settings = options("parallel.replicate=2", "training.steps=2", *settings)
    run = pretrain(workspace, f"replicated-{processes}", "--nproc", processes, *settings)
    assert len(rows(run)) == 2
    for step, row in rows(run).items():
        assert row["loss"] == pytest.approx(rows(one)[step]["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(rows(one)[step]["grad_norm"], rel=1e-4)


def test_recovery_goes_on_where_stage_1_ended(recovered):
    seen = rows(recovered)
    board = EventAccumulator(str(recovered / "tb"), size_guidance={"scalars": 0})
    board.Reload()
    # One curve through both stages, each step once, and where it becomes dense.
    assert [(one.step, one.value) for one in board.Scalars("loss")] == [
        (step, pytest.approx(row["loss"], rel=1e-6)) for step, row in sorted(seen.items())
    ]
    assert [(one.step, one.value) for one in board.Scalars("dense")] == [(step, step > 6) for step in sorted(seen)]
    assert not any("/" in tag for tag in board.Tags()["scalars"])
    assert [seen[step]["stage"] for step in sorted(seen)] == ["lighthouse"] * 6 + ["dense"] * 4
    ledger = json.loads((recovered / "ledger.json").read_text())
    assert [(s["stage"], s["start"], s["end"]) for s in ledger["stages"]] == [("lighthouse", 0, 6), ("dense", 6, 10)]
    assert [stage["steps"] for stage in ledger["stages"]] == [6, 4]
    assert ledger["stages"][0]["measured_dense"]["seconds"] > 0
    texts = [stage["data"] for stage in ledger["stages"]]
    assert texts[0] == texts[1] and len(texts[0]) == 16
    assert ledger["dense_step"]["how"] == "recovery"
    assert seen[7]["tokens"] == 7 * 4 * 512
    # Still warming up, and decaying from step 7 on: the schedule went on, with the recovery's own end.
    expected = [3e-3 * lr_factor(step, warmup=10, decay=Decay(6, 10)) for step in range(6, 10)]
    assert [seen[step]["lr"] for step in range(7, 11)] == pytest.approx(expected)
    assert expected[1] < 3e-3 * 8 / 10
    # A fresh optimizer or fresh weights would start near the first loss again.
    assert seen[10]["loss"] < seen[1]["loss"] - 0.5


@pytest.mark.slow
def test_a_dense_run_recovers_as_if_it_had_decayed_by_its_own_schedule(workspace):
    dense = ("lighthouse.enabled=false", "schedule.warmup_steps=2", "training.deterministic=true")
    decay = ("schedule.decay_steps=3", 'schedule.decay="1-sqrt"')
    whole = pretrain(workspace, "whole", "--nproc", "1", *options(*dense, *decay))
    first = pretrain(workspace, "parts", "--nproc", "1", *options(*dense, "training.steps=3"))
    succeed("recover", "parts", "--steps", "3", "--set", 'recover.decay="1-sqrt"', cwd=workspace)
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in rows(first).values()] == [row[key] for row in rows(whole).values()]
    ledger = json.loads((first / "ledger.json").read_text())
    assert [(stage["stage"], stage["steps"]) for stage in ledger["stages"]] == [("dense", 3), ("dense", 3)]
    succeed("strip", "runs/parts", "parts-hf", cwd=workspace)


def test_an_extended_recovery_takes_its_rate_from_the_new_end_and_is_saved_on_a_signal(workspace, recovered):
    extended = workspace / "runs/extended"
    shutil.copytree(recovered, extended)
    command = ["recover", "extended", "--extend", "500", *options("checkpoint.interval=500")]
    refused = lighthouse(*command, cwd=workspace)
    assert refused.returncode == 2 and "would rise to" in refused.stderr
    words = interrupt(*command, *options('recover.decay="linear"'), after="step 12/", cwd=workspace)
    saved, seen = checkpoint_steps(extended)[-1], rows(extended)
    assert f"step {saved} is saved" in words
    assert f"learning rate goes from {seen[10]['lr']:.3g} (step 10) to {seen[11]['lr']:.3g} (step 11)" in words
    assert max(seen) == saved < 500
    expected = [3e-3 * lr_factor(step, warmup=10, decay=Decay(6, 510)) for step in (10, 11)]
    assert [seen[step]["lr"] for step in (11, 12)] == pytest.approx(expected)


def test_a_resumed_run_repeats_an_uninterrupted_one(workspace, one):
    resumed = workspace / "runs/resumed"
    shutil.rmtree(resumed / "checkpoints/step-6")
    lines = (resumed / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 4]
    # Rows that a crash left behind after the checkpoint, one of them cut short.
    crash = '{"step": 5, "stage": "lighthouse", "loss": 99.0}\n{"step": 6, "st'
    (resumed / "metrics.jsonl").write_text("".join(kept) + crash)
    # And a checkpoint that has changed since.
    damaged = next((resumed / "checkpoints/step-4").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    refused = lighthouse("pretrain", "--resume", "resumed", "--strict", cwd=workspace)
    assert refused.returncode == 2 and f"{damaged.name} is damaged" in refused.stderr
    done = succeed("pretrain", "--resume", "resumed", cwd=workspace)
    assert f"{damaged.name} is damaged" in done.stderr and "going on from step 2" in done.stderr
    assert (resumed / "checkpoints/step-4.damaged").is_dir() and checkpoint_steps(resumed) == [2, 4, 6]
    expected = {step: row for step, row in rows(one).items() if step <= 6}  # it may have been recovered since
    seen = rows(resumed)
    assert seen.keys() == expected.keys()
    for step in expected:
        assert seen[step]["loss"] == expected[step]["loss"]
        assert seen[step]["grad_norm"] == expected[step]["grad_norm"]


def test_bad_numbers_end_a_run_before_they_are_saved(workspace):
    settings = options(*TINY, "optimizer.lr=1e30", "checkpoint.interval=1", "checkpoint.keep=0")
    command = ["pretrain", str(ROOT / "recipes/quickstart.toml"), "--name", "exploded", "--nproc", "2", *settings]
    done = lighthouse(*command, cwd=workspace)
    steps = checkpoint_steps(workspace / "runs/exploded")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert f"gradient of step {steps[-1] + 1} (sequences {4 * steps[-1]} to {4 * steps[-1] + 3} of" in error
    assert steps == list(range(1, steps[-1] + 1))


def test_strip_writes_an_ordinary_llama(workspace, recovered):
    transformers = pytest.importorskip("transformers")
    done = succeed("strip", "one", "out", cwd=workspace)
    assert "logits equal the trainer's" in done.stderr
    out = workspace / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    prompt = tokenizer("def ", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]


def test_eval_measures_both_stages_and_the_export(workspace, one, recovered):
    """The same text costs the exported model what it costs the run."""
    pytest.importorskip("transformers")
    if not (workspace / "out").exists():
        succeed("strip", "one", "out", cwd=workspace)
    cpu = torch.device("cpu")
    first, recipe = load_checkpoint(one / "checkpoints/step-6", attention="trained", device=cpu)
    switched, _ = load_checkpoint(one / "checkpoints/step-6", attention="dense", device=cpu)
    last, _ = load_checkpoint(recovered, attention="trained", device=cpu)
    exported = load_directory(workspace / "out", device=cpu)
    assert [("Lighthouse" in subject.name, subject.leaky) for subject in (first, switched, last)] == [
        (True, False),
        (False, False),
        (False, False),
    ]
    text = torch.randint(256, (2, 512), generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(first.losses(text), switched.losses(text), atol=1e-5)
    # Its weights are bfloat16.
    torch.testing.assert_close(exported.losses(text), last.losses(text), rtol=0.02, atol=0.02)
    report = evaluate(first, recipe.data, tokens=256, sequences=2, measures=("loss", "leak"))
    assert all(row["largest"] == 0 for row in report["leak"])
    assert report["loss"]["nats_per_token"]["mean"] < 7
    done = succeed("eval", "one", "--tokens", "256", "--sequences", "2", "--only", "loss", "--json", cwd=workspace)
    assert json.loads(done.stdout)["subject"] == "one step 10, dense attention"


PHASES = (
    "lighthouse.phases=[{scorer='random', window=32, rope_theta=300}, "
    "{method='chunked', window=64, window_end=256, dense_layers=[]}, {enabled=false}, "
    "{scorer='norm', rotate='after', window=16}]"
)


@pytest.mark.slow
def test_a_run_goes_on_in_every_phase(workspace):
    """As if it had been interrupted within each phase."""
    run = pretrain(
        workspace, "phases", *options(PHASES, "training.steps=8", "checkpoint.interval=1", "checkpoint.keep=0")
    )
    losses = {step: row["loss"] for step, row in rows(run).items()}
    logged = [(row["phase"], row.get("window"), row["leaky"]) for row in rows(run).values()]
    assert logged[:6] == [(1, 32, False)] * 2 + [(2, 64, False), (2, 256, False)] + [(3, None, False)] * 2
    assert logged[6:] == [(4, 16, True)] * 2
    for step in (7, 5, 3, 1):
        for later in range(step + 1, 9):
            shutil.rmtree(run / f"checkpoints/step-{later}")
        succeed("pretrain", "--resume", "phases", cwd=workspace)
        assert {step: row["loss"] for step, row in rows(run).items()} == losses
    # The first phase rotates as a model with its base, to the bit.
    other = pretrain(workspace, "other", *options(PHASES, "model.rope_theta=300", "training.steps=8"))
    turned = {step: row["loss"] for step, row in rows(other).items()}
    assert [turned[step] == losses[step] for step in (1, 2, 3)] == [True, True, False]
    words = {1: "window 32", 3: "chunked, window 64", 5: "dense attention", 8: "window 16"}
    for step, said in words.items():
        subject, _ = load_checkpoint(run, attention="trained", step=step)
        assert said in subject.name and subject.leaky == (step == 8)


def test_a_branch_in_other_phases_is_an_unbroken_run(workspace):
    """To the last bit: the checkpoint, the optimizer's state and the place in the data are the other run's."""
    more = options(
        "training.steps=6", 'lighthouse.method="chunked"', "checkpoint.keep=0", "training.deterministic=true"
    )
    common = "{window=32}, {window=64, window_end=96}"
    other = f"lighthouse.phases=[{common}, {{method='compressed', window=64, keep=4}}]"
    first = pretrain(workspace, "begun", *more, *options(f"lighthouse.phases=[{common}, {{window=128}}]"))
    unbroken = pretrain(workspace, "unbroken", *more, *options(other))
    branched = branch(Run(first), workspace / "runs/branched", 4, [other])
    succeed("pretrain", "--resume", "branched", cwd=workspace)
    losses, same, begun = (
        [(row["loss"], row["grad_norm"]) for row in rows(path).values()] for path in (branched.path, unbroken, first)
    )
    assert len(losses) == 6 and losses == same
    assert losses[:4] == begun[:4] and losses[5] != begun[5]


def test_strip_refuses_a_stage_1_checkpoint(workspace, one, recovered):
    done = lighthouse("strip", str(one / "checkpoints/step-6"), "early", cwd=workspace)
    assert done.returncode == 2
    assert "lighthouse recover" in done.stderr and "Traceback" not in done.stderr
    assert not (workspace / "early").exists()


def test_a_checkpoint_of_another_model_is_one_line(workspace, one):
    other = workspace / "runs/other"
    shutil.copytree(one, other)
    for recipe in other.glob("*.toml"):
        recipe.write_text(recipe.read_text().replace("ffn_dim = 96", "ffn_dim = 128"))
    ledger = json.loads((other / "ledger.json").read_text())
    ledger["stages"][-1]["end"] += 5
    (other / "ledger.json").write_text(json.dumps(ledger))
    command = ["recover"] if len(ledger["stages"]) > 1 else ["pretrain", "--resume"]
    done = lighthouse(*command, "other", cwd=workspace)
    assert done.returncode == 2
    assert "another model: layers.0.feed_forward.w1.weight" in done.stderr and "Traceback" not in done.stderr


def test_a_mistake_in_the_data_is_one_line(workspace):
    settings = options(*TINY, 'data.paths=["missing/"]')
    done = lighthouse("pretrain", str(ROOT / "recipes/quickstart.toml"), "--name", "bad", *settings, cwd=workspace)
    assert done.returncode == 2
    assert "missing" in done.stderr and "Traceback" not in done.stderr
