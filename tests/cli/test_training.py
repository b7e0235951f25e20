"""pretrain and recover around a training that is replaced: runs, ledgers, messages, exit codes."""

import fcntl
import json
import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from lighthouse_core import titan
from lighthouse_core.config import load_recipe, loads_recipe
from lighthouse_core.data.build import build_source
from lighthouse_core.errors import LighthouseError
from lighthouse_core.estimate import exchanged_bytes
from lighthouse_core.job import launch, plan
from lighthouse_core.job.plan import Plan
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.run import Run


def ledger(name: str) -> list[tuple[str, int, int]]:
    return [(stage["stage"], stage["start"], stage["end"]) for stage in Run(f"runs/{name}").ledger["stages"]]


def test_pretrain_makes_a_run_and_prints_its_directory(lighthouse, trainer):
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a", "--set", "training.steps=30", "--nproc", "2")
    assert (answer.code, answer.out) == (0, "runs/a\n")
    assert "lighthouse recover runs/a" in answer.err
    assert trainer.launches == [("runs/a", Plan(2))]
    assert ledger("a") == [("lighthouse", 0, 30)]
    assert Run("runs/a").recipe == load_recipe("tiny.toml", ["training.steps=30"])


def test_a_run_without_a_name_gets_the_recipes_and_the_time(lighthouse, trainer):
    assert lighthouse("pretrain", "tiny.toml").out.startswith("runs/tiny-2")


def test_an_existing_name_is_an_error_and_touches_nothing(lighthouse, trainer):
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    before = (os.stat("runs/a").st_mtime_ns, os.listdir("runs/a"))
    assert "run runs/a exists" in lighthouse("pretrain", "tiny.toml", "--name", "a").error
    assert (os.stat("runs/a").st_mtime_ns, os.listdir("runs/a")) == before


def test_dry_run_prints_a_recipe_and_starts_nothing(lighthouse, trainer, here):
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", "--set", "training.seed=7")
    assert answer.code == 0 and not trainer.launches and not (here / "runs").exists()
    assert loads_recipe(answer.out) == load_recipe("tiny.toml", ["training.seed=7"])
    assert "# S                     192 of 1024 tokens\n" in answer.out
    for name in ("parameters", "FLOPs per token", "tokens per step", "memory (estimate)"):
        assert f"\n# {name}" in answer.out
    windows = (
        "lighthouse.phases=[{window=64}, {window=128}, {window=256}]",
        "training.steps=50",
        'lighthouse.method="chunked"',
    )
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", *(x for setting in windows for x in ("--set", setting)))
    for words in ("1               steps 1-17: chunked, window 64", "3               steps 35-50: chunked, window 256"):
        assert f"\n# phase {words}\n" in answer.out
    assert "\n# keys a query (mean)   32, then 64, then 128; dense 512\n" in answer.out


def estimated(answer):
    """GiB of each stage."""
    [line] = [line for line in answer.out.splitlines() if line.startswith("# memory (estimate)")]
    return {name: float(size) for name, size in re.findall(r"(stage 1|recovery) ([\d.]+) GiB", line)}


def test_dry_run_says_what_fits_a_gpu(lighthouse, trainer):
    larger = ["model.layers=24", "training.seq_len=131072", "lighthouse.topk=512", "training.compile=true"]
    larger.append('training.activation_checkpointing="selective"')
    settings = [x for setting in larger for x in ("--set", setting)]
    # What fits this machine, which has no GPU, is not asked.
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", *settings)
    assert answer.code == 0 and "GPU of" not in answer.out and not answer.err
    needed = estimated(answer)
    assert 1 < needed["stage 1"] < 0.75 * needed["recovery"]
    for gpu, words, warnings in (
        (1.3 * needed["recovery"], "stage 1 fits; recovery fits\n", []),
        (
            1.05 * needed["recovery"],
            "stage 1 fits; recovery is close: the est",
            ["the recovery that follows may not fit"],
        ),
        (0.85 * needed["recovery"], "stage 1 fits; recovery does not fit", ["the recovery that follows does not fit"]),
        (0.8 * needed["stage 1"], "stage 1 does not fit; ", ["stage 1 does not fit", "the recovery that follows"]),
    ):
        # Besides, what is no tensor.
        gpu += 1
        answer = lighthouse("pretrain", "tiny.toml", "--dry-run", "--gpu-memory", f"{gpu:.4f}", *settings)
        assert answer.code == 0 and f"# GPU of {gpu:.1f} GiB" in answer.out and words in answer.out
        assert len(answer.err.splitlines()) == len(warnings)
        for line, warning in zip(answer.err.splitlines(), warnings, strict=True):
            assert line.startswith(f"warning: {warning}")
            assert 'training.activation_checkpointing = "' in line and "parallel.context" in line
    # Less is kept, and less is needed: what the warning names is what the estimate is with it.
    mode, less = re.search(r'activation_checkpointing = "(\w+)" \(([\d.]+) GiB\)', answer.err.splitlines()[1]).groups()
    changed = ["--set", f'training.activation_checkpointing="{mode}"']
    assert estimated(lighthouse("pretrain", "tiny.toml", "--dry-run", *settings, *changed))["recovery"] == float(less)
    # An estimate that no measurement covers warns of nothing; one that leaves something out does.
    eager = ["--set", "training.compile=false"]
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", "--gpu-memory", "80", *settings, *eager)
    why = "fits by size: no run with training.compile = false was measured"
    assert f" stage 1 {why}; recovery {why}\n" in answer.out and not answer.err
    plain = ["--set", 'lighthouse.backend="reference"']
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", "--gpu-memory", "80", *settings, *plain)
    assert 'stage 1 is not estimated: lighthouse.backend = "reference"' in answer.out
    assert answer.err.startswith("warning: stage 1 may not fit, for its memory is not estimated: lighthouse.backend")
    # What holds the scores of all pairs is named.
    plain = ["--set", 'lighthouse.dense_backend="math"']
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", "--gpu-memory", "80", *settings, *plain)
    assert 'with lighthouse.dense_backend = "auto", for plain matrix products hold' in answer.err
    error = lighthouse("pretrain", "tiny.toml", "--gpu-memory", "80").error
    assert error == "error: --gpu-memory is for --dry-run" and not trainer.launches
    assert lighthouse("recover", "--gpu-memory", "80").error == error


def test_a_start_and_a_dry_run_warn_of_whole_sequences(lighthouse, trainer):
    """Two tiles are no four shards."""
    sizes = ["model.heads=4", "model.head_dim=16", "training.seq_len=65536", "lighthouse.topk=1024"]
    sizes += ["parallel.context=4", "lighthouse.tile_parents=512"]
    shared = ["--nproc", "4", *(x for setting in sizes for x in ("--set", setting))]

    def mib(*more):
        sent = exchanged_bytes(load_recipe("tiny.toml", [*sizes, *more]), dense=False)
        return f"({sent / 2**20:.1f} MiB"

    for more in (["--dry-run"], ["--name", "a"]):
        answer = lighthouse("pretrain", "tiny.toml", *more, *shared)
        [line] = [line for line in answer.err.splitlines() if "whole sequences" in line]
        assert line.startswith(
            f"warning: a Lighthouse layer sends whole sequences, as a dense one does {mib()} a pass)"
        )
        assert ": 4 processes cannot share out 2 tiles (topk / tile_parents); with lighthouse.topk = 2048 (" in line
        fewer = mib("lighthouse.tile_parents=256")
        assert f" or lighthouse.tile_parents = 256 {fewer}) it sends what is gathered" in line and fewer != mib()
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", *shared, "--set", "lighthouse.tile_parents=256")
    assert answer.code == 0 and "whole sequences" not in answer.err


def test_a_dry_run_says_what_processes_send_in_each_phase(lighthouse, trainer):
    sizes = ["model.heads=4", "model.head_dim=16", "parallel.context=2", "training.seq_len=65536"]
    sizes.append('lighthouse.method="sliding"')
    phases = "{window=1024}, {method='chunked', window=1536}, {window=1024, window_end=4096}, {enabled=false}"

    def dry_run(*settings):
        answer = lighthouse(
            "pretrain", "tiny.toml", "--dry-run", "--nproc", "2", *(x for s in settings for x in ("--set", s))
        )
        assert answer.code == 0
        return {line[2:23].strip(): line[24:] for line in answer.out.splitlines() if line.startswith("# ")}

    def mib(dense=False, window=1024):
        made = load_recipe("tiny.toml", [*sizes, f"lighthouse.window={window}"])
        return f"{exchanged_bytes(made, dense=dense) / 2**20:.1f} MiB"

    # What a phase sends is what a recipe of that phase alone sends.
    alone = [mib(), mib(dense=True), mib(window=4096)]
    assert len(set(alone)) == 3
    lines = dry_run(*sizes, f"lighthouse.phases=[{phases}]")
    said = "in a pass, a process sends"
    for number, most in ((1, ""), (2, ""), (3, "up to ")):
        assert lines[f"phase {number}"].endswith(f"; {said} {most}{alone[number - 1]} for a Lighthouse layer")
    assert lines["phase 4"].endswith(": dense")
    assert lines["shared sequences"] == f"2 processes share each sequence; {said} {alone[1]} for a dense layer"
    lines = dry_run(*sizes, "lighthouse.window=1024")
    assert lines["shared sequences"].endswith(f" {alone[1]} for a dense layer and {alone[0]} for a Lighthouse layer")
    # Of chunks that grow some do not fill the shares.
    growing = "lighthouse.phases=[{method='chunked', window=1024, window_end=16384}]"
    assert f" {said} up to {alone[1]} for a" in dry_run(*sizes, growing)["phase 1"]


def test_a_key_that_a_phase_does_not_read_is_warned_of(lighthouse, trainer):
    phases = "lighthouse.phases=[{topk=32, window=64}, {method='chunked', window=64, topk=16}, {enabled=false}]"
    for more in (["--dry-run"], ["--name", "a"]):
        answer = lighthouse("pretrain", "tiny.toml", *more, "--set", phases)
        assert answer.code == 0 and [line for line in answer.err.splitlines() if line.startswith("warning")] == [
            "warning: lighthouse.phases[2].topk has no effect: the method chunked does not read it"
        ]
    # A dense baseline reads none of them.
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", "--set", phases, "--set", "lighthouse.enabled=false")
    assert answer.code == 0 and "warning" not in answer.err


def test_a_start_warns_of_what_may_not_fit_its_gpu(lighthouse, trainer, monkeypatch):
    monkeypatch.setattr(plan, "gpu_memory", lambda: 2**20)
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a")
    assert answer.code == 0 and len(trainer.launches) == 1
    warnings = [line for line in answer.err.splitlines() if line.startswith("warning: ")]
    assert ["stage 1 does not fit" in warnings[0], "recovery that follows does not fit" in warnings[1]] == [True, True]
    assert "the GPU has 0.00 GiB" in warnings[0] and len(warnings) == 2
    answer = lighthouse("recover", "a")
    warnings = [line for line in answer.err.splitlines() if line.startswith("warning: ")]
    assert answer.code == 0 and ["every layer dense does not fit" in line for line in warnings] == [True]
    monkeypatch.setattr(plan, "gpu_memory", lambda: 2**40)
    assert "warning" not in lighthouse("pretrain", "tiny.toml", "--name", "b").err


def test_dry_run_shows_a_mixture(lighthouse, trainer, here):
    for folder in ("a", "b"):
        (here / folder).mkdir()
        for i in range(30):
            (here / folder / str(i)).mkdir()
            (here / folder / f"{i}/a.py").write_text("x" * 998)
    sources = 'data.sources=[{paths=["a"], weight=3}, {paths=["b"], weight=1, name="rest"}]'
    settings = [sources, "data.validation=0.2"]
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", "--set", sources, "--set", settings[1])
    assert answer.code == 0 and loads_recipe(answer.out) == load_recipe("tiny.toml", settings)
    [a, rest] = [line for line in answer.out.splitlines() if line.startswith("# source ")]
    tokens = int(re.search(r"([\d,]+) tokens", a)[1].replace(",", ""))
    # 120 steps of 4 sequences of 1024 tokens.
    assert a.startswith("# source a              75.00% of the sequences; ") and 10_000 < tokens < 30_000
    assert f" {0.75 * 120 * 4096 / tokens:.2f} epochs in the run" in a
    assert rest.startswith("# source rest           25.00% of the sequences; ")
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", "--set", sources.replace('"b"', '"a"'))
    assert answer.code == 2 and "the sources a and rest both read" in answer.err


def test_the_dry_run_of_a_recovery_counts_what_documents_attend_to(lighthouse, trainer):
    packed = ("--set", 'data.packing="documents"', "--set", "lighthouse.window=64")
    lighthouse("pretrain", "tiny.toml", "--name", "a", *packed)
    answer = lighthouse("recover", "a", "--dry-run")
    assert answer.code == 0 and "\n# documents " in answer.out
    (line,) = (line for line in answer.out.splitlines() if line.startswith("# keys a query"))
    assert 1 < float(line.rpartition("dense ")[2]) < 512


@pytest.mark.parametrize("method", ["pyramid", "sliding", "chunked"])
def test_a_stage_1_that_saves_nothing_is_warned_of(lighthouse, trainer, here, method):
    def settings(name, **more):
        given = {"data.source": "files", "data.paths": [f"{name}.jsonl"], "data.packing": "documents",
                 "lighthouse.method": method, "lighthouse.window": 64} | more  # fmt: skip
        return [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]

    for name, size in (("short", 30), ("long", 900)):
        (here / f"{name}.jsonl").write_text("".join(json.dumps({"text": "x" * size}) + "\n" for _ in range(200)))
    for begin in (("--dry-run",), ("--name", "a")):
        answer = lighthouse("pretrain", "tiny.toml", *begin, *settings("short"))
        (line,) = (line for line in answer.err.splitlines() if line.startswith("warning: stage 1 saves nothing"))
        assert answer.code == 0 and "32 tokens on average" in line and "16 with dense attention" in line
        assert "lighthouse.enabled = false" in line
    for begin in (("--dry-run",), ("--name", "b")):
        answer = lighthouse("pretrain", "tiny.toml", *begin, *settings("long"))
        assert answer.code == 0 and "warning" not in answer.err
    # Nor of a run without a stage 1.
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", *settings("short", **{"lighthouse.enabled": False}))
    assert answer.code == 0 and "warning" not in answer.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--nproc", "3"),
        ("--nproc", "none"),
        ("--nnodes", "0"),
        ("--name", "a"),
        ("--name", "a/b"),
        ("--set", 'data.paths=["nowhere"]'),
        ("--set", 'data.source="tokens"', "--set", 'data.paths=["nowhere"]'),
        ("--set", 'lighthouse.backend="triton"'),
        ("--set", "parallel.shard=2"),
    ],
)
def test_a_dry_run_refuses_what_a_start_refuses(lighthouse, trainer, here, arguments):
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    error = lighthouse("pretrain", "tiny.toml", *arguments).error
    answer = lighthouse("pretrain", "tiny.toml", *arguments, "--dry-run")
    # A refusal is all that there is on the screen.
    assert answer.error == error
    assert len(trainer.launches) == 1 and os.listdir("runs") == ["a"]


def test_a_dry_run_reads_no_checksums(lighthouse, here):
    (here / "a.txt").write_text("some words")
    files = ("--set", "data.validation=0.0", "--set", 'data.source="files"', "--set", 'data.paths=["a.txt"]')
    assert lighthouse("data", "prepare", "tiny.toml", "out", "--workers", "1", *files).code == 0
    with (here / "out/train-00000.tokens").open("r+b") as file:
        # The last letter, before EOS of two bytes and the place of the document of eight.
        file.seek(-12, os.SEEK_END)
        file.write(b"\x7f")
    tokens = ("--set", "data.validation=0.0", "--set", 'data.source="tokens"', "--set", 'data.paths=["out"]')
    assert "checksum" in lighthouse("pretrain", "tiny.toml", *tokens).error
    assert lighthouse("pretrain", "tiny.toml", *tokens, "--dry-run").code == 0
    (here / "out/train-00000.tokens").unlink()
    assert lighthouse("pretrain", "tiny.toml", *tokens, "--dry-run").code == 2


def test_dry_runs_of_what_was_begun(lighthouse, trainer):
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    for arguments in (("pretrain", "--resume", "a"), ("recover", "a", "--nproc", "3")):
        error = lighthouse(*arguments).error
        answer = lighthouse(*arguments, "--dry-run")
        assert answer.error == error
    # A command line that is wrong whatever the run is refused before the run is read.
    answer = lighthouse("recover", "a", "--nproc", "x", "--dry-run")
    assert "--nproc must be" in answer.error
    several = ("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "host:29500")
    assert lighthouse("recover", "a", "--dry-run", *several).code == 0
    trainer.stop, trainer.code = 40, 130
    lighthouse("pretrain", "tiny.toml", "--name", "b")
    assert lighthouse("pretrain", "--resume", "b", "--dry-run").code == 0
    assert len(trainer.launches) == 2


def test_an_interruption_says_how_to_go_on_and_resume_does(lighthouse, trainer):
    trainer.stop, trainer.code = 40, 130
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a")
    assert (answer.code, answer.out) == (130, "")
    assert "step 40 is saved. Continue with: lighthouse pretrain --resume runs/a" in answer.err

    trainer.stop, trainer.code = None, 0
    assert lighthouse("pretrain", "--resume", "latest").code == 0
    assert [name for name, _ in trainer.launches] == ["runs/a", "runs/a"]
    error = lighthouse("pretrain", "--resume", "a")
    assert "complete at step 100" in error.error and "lighthouse recover runs/a" in error.err


def test_resuming_takes_settings_that_still_have_an_effect(lighthouse, trainer):
    trainer.stop, trainer.code = 40, 130
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    refused = lighthouse("pretrain", "--resume", "a", "--set", "optimizer.lr=1.0")
    assert "the checkpoint decides optimizer.lr" in refused.error
    skip = ("--set", 'training.nonfinite="skip"')
    assert lighthouse("pretrain", "--resume", "a", *skip, "--dry-run").code == 0
    assert Run("runs/a").recipe.training.nonfinite == "halt"
    trainer.code = 1
    answer = lighthouse("pretrain", "--resume", "a", *skip, "--measure-dense")
    assert answer.err.startswith("resuming runs/a: steps 41 to 100\n")
    assert answer.err.endswith("step 40 is saved. Continue with: lighthouse pretrain --resume runs/a\n")
    recipe = Run("runs/a").recipe
    assert recipe.training.nonfinite == "skip" and recipe.metrics.measure_dense
    assert Path("runs/a/recipe.toml").read_text().startswith("# Every setting of run a, from tiny.toml.\n")


def test_a_fault_says_how_to_go_on(lighthouse, trainer):
    trainer.stop, trainer.code = 40, 130
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    trainer.fault = LighthouseError("a training process was killed", hint="memory?")
    answer = lighthouse("pretrain", "--resume", "a")
    assert answer.code == 1
    assert "hint: memory?; step 40 is saved; continue with: lighthouse pretrain --resume runs/a" in answer.err


def test_what_a_run_has_cost_is_said_and_kept(lighthouse, trainer):
    row = {"step": 100, "stage": "lighthouse", "leaky": True, "loss": 1.0, "grad_norm": 1.0, "lr": 1.0}
    trainer.rows = [row | {"tokens_per_second": 1.0, "steps": 100, "seconds": 3.0}]
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a")
    assert "100 steps in 5:00, " in answer.err and "(estimated from FLOPs; --measure-dense measures it)" in answer.err
    assert Run("runs/a").ledger["stages"][0]["seconds"] == 300.0
    assert "steps in" not in lighthouse("pretrain", "tiny.toml", "--name", "b", "--quiet").err


def test_costs_that_cannot_be_kept_hide_nothing(lighthouse, trainer, monkeypatch):
    def full(run):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "settle", full)
    trainer.fault = LighthouseError("a training process was killed")
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a")
    assert answer.code == 1 and "warning: the costs in runs/a/ledger.json are not up to date" in answer.err
    assert answer.err.endswith("error: a training process was killed\n")


@pytest.mark.parametrize("command", [("recover", "a"), ("pretrain", "tiny.toml", "--set", "lighthouse.enabled=false")])
def test_dense_training_needs_no_kernels_of_lighthouse(lighthouse, trainer, command):
    triton = ("--set", 'lighthouse.backend="triton"')
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    assert "triton" in lighthouse("pretrain", "tiny.toml", *triton).error
    assert "cudnn" in lighthouse(*command, "--set", 'lighthouse.dense_backend="cudnn"').error
    assert lighthouse(*command, *triton).code == 0


def test_resuming_needs_a_checkpoint(lighthouse, trainer, here):
    trainer.code, trainer.rows = 1, [{"step": 1, "stage": "lighthouse", "leaky": True, "loss": 1.0}]
    assert lighthouse("pretrain", "tiny.toml", "--name", "a").code == 1
    answer = lighthouse("recover", "a")
    assert "no complete checkpoint" in answer.error and "pretrain --resume runs/a begins it at step 0" in answer.err
    # A run that had checkpoints, which are lost, does not begin again by itself.
    (here / "runs/a/metrics.jsonl").write_text(json.dumps(trainer.rows[0] | {"step": 40}) + "\n")
    answer = lighthouse("pretrain", "--resume", "a", "--set", "checkpoint.interval=20")
    assert "no complete checkpoint" in answer.error and "its checkpoints are lost" in answer.err
    (here / "runs/a/checkpoints/step-5").mkdir(parents=True)
    assert "every checkpoint of runs/a is damaged" in lighthouse("pretrain", "--resume", "a").error


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(lighthouse, trainer, here):
    trainer.code, trainer.rows = 1, [{"step": 1, "stage": "lighthouse", "leaky": True, "loss": 1.0}]
    assert lighthouse("pretrain", "tiny.toml", "--name", "a").code == 1
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a")
    assert answer.code == 2 and "it has no checkpoint: --resume a begins it at step 0" in answer.err
    # Processes that have outlived their launcher may be about to save.
    (here / "runs/a/checkpoints").mkdir()
    folder = os.open(here / "runs/a/checkpoints", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    answer = lighthouse("pretrain", "--resume", "a")
    assert "no complete checkpoint" in answer.error and "another process trains it" in answer.err
    os.close(folder)
    trainer.code = 0
    answer = lighthouse("pretrain", "--resume", "a")
    assert answer.code == 0 and "runs/a has no checkpoint yet: it begins at step 0\n" in answer.err
    assert "resuming runs/a: steps 1 to 100\n" in answer.err and len(trainer.launches) == 2


def test_a_command_that_begins_a_run_or_goes_on_with_it(lighthouse, trainer, here):
    command = ("pretrain", "tiny.toml", "--name", "a", "--or-resume", "--set", "optimizer.lr=1e-4")
    trainer.code, trainer.rows = 1, [{"step": 1, "stage": "lighthouse", "leaky": True, "loss": 1.0}]
    assert lighthouse(*command).code == 1 and Run("runs/a").recipe.optimizer.lr == 1e-4
    trainer.code, trainer.stop = 143, 40
    answer = lighthouse(*command)
    assert answer.code == 143 and "run runs/a exists and goes on by its own recipe\n" in answer.err
    assert "runs/a has no checkpoint yet" in answer.err
    trainer.code, trainer.stop = 0, None
    assert "resuming runs/a: steps 41 to 100\n" in lighthouse(*command).err
    launches = len(trainer.launches)
    answer = lighthouse(*command)
    assert answer.code == 0 and "is complete at step 100: nothing is left for pretrain to do\n" in answer.err
    assert "complete at step 100" in lighthouse("pretrain", "--resume", "a").error and len(trainer.launches) == launches
    assert "--or-resume is for a RECIPE" in lighthouse("pretrain", "--resume", "a", "--or-resume").error
    assert "needs the --name" in lighthouse("pretrain", "tiny.toml", "--or-resume").error


def test_machines_compare_the_same_whether_the_run_is_there(lighthouse, trainer, here):
    several = ("--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:29500", "--node-rank")
    command = ("pretrain", "tiny.toml", "--name", "a", "--or-resume", *several)
    trainer.code, asked = 1, []
    for rank in ("1", "0", "0", "1"):
        # Machine 1 makes no run.
        trainer.rows = [] if rank == "1" else [{"step": 1, "stage": "lighthouse", "leaky": True, "loss": 1.0}]
        assert lighthouse(*command, rank).code == 1
        asked.append(trainer.asked.facts)
    assert asked == [asked[0]] * 4 and asked[0]["optimizer.lr"] == 1e-3
    lighthouse(*command, "1", "--set", "optimizer.lr=1e-4")
    assert trainer.asked.facts != asked[0]


def test_what_machine_1_cannot_take_is_refused_before_it_waits(lighthouse, trainer, here):
    several = ("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "host:29500")
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    for command in (("pretrain", "--resume", "a"), ("recover", "a")):
        answer = lighthouse(*command, *several, "--set", "optimizer.lr=1")
        assert "the checkpoint decides optimizer.lr" in answer.error
        assert "titan" in lighthouse(*command, *several, "--set", "titan.comm.nonsense=1").error
        assert "metrics.evry" in lighthouse(*command, *several, "--set", "metrics.evry=1").error
    assert "--steps" in lighthouse("recover", "a", *several, "--steps", "0").error
    assert len(trainer.launches) == 1
    # How long machines wait for each other is of the launch.
    trainer.code = 1
    for command in (("pretrain", "--resume", "a"), ("recover", "a")):
        lighthouse(*command, *several, "--set", "titan.comm.init_timeout_seconds=900")
        assert trainer.asked.seconds == 900
    assert len(trainer.launches) == 3


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_dry_run_of_several_machines_meets_nobody(lighthouse, trainer, here, monkeypatch, rank):
    def look_up(*given, **named):
        raise AssertionError("an address was looked up")

    lighthouse("pretrain", "tiny.toml", "--name", "a")
    trainer.stop, trainer.code = 40, 143
    lighthouse("pretrain", "tiny.toml", "--name", "b")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for command in (("pretrain", "tiny.toml"), ("pretrain", "--resume", "b"), ("recover",), ("recover", "a")):
        for place in ((), ("--rdzv-endpoint", "node-a:29500")):
            answer = lighthouse(*command, "--dry-run", "--nnodes", "2", "--node-rank", rank, *place)
            assert answer.code == 0 and " a process over 2" in answer.out, answer
    assert (
        "--rdzv-endpoint HOST:PORT" in lighthouse(*command, "--dry-run", "--nnodes", "2", "--rdzv-endpoint", "x").error
    )


def test_what_ends_before_the_first_step_frees_the_name(lighthouse, trainer, here):
    for code in (1, 2):
        trainer.code = code
        assert lighthouse("pretrain", "tiny.toml", "--name", "a").code == code
        assert not (here / "runs/a").exists()
    trainer.fault = LighthouseError("a training process was killed")
    assert lighthouse("pretrain", "tiny.toml", "--name", "a").code == 1
    trainer.fault = OSError(28, "No space left on device")
    assert lighthouse("pretrain", "tiny.toml", "--name", "a").code == 1
    assert not (here / "runs/a").exists()
    trainer.code, trainer.fault = 0, None
    assert lighthouse("pretrain", "tiny.toml", "--name", "a").code == 0
    trainer.code = 2
    assert lighthouse("recover", "a").code == 2
    assert (here / "runs/a").exists()


def leave(folder, *names):
    """Make links out of a run's folder, as Weights & Biases makes some within its own."""
    outside = folder.parent.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "kept.txt").touch()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(outside, target_is_directory=True)


@pytest.mark.parametrize(("names", "kept"), [(["wandb/latest-run", "wandb/debug.log"], None), (["logs"], "logs")])
def test_links_of_a_start_that_failed(lighthouse, trainer, here, monkeypatch, names, kept):
    def fail(run_dir, plan, watcher):
        leave(Path(run_dir), *names)
        raise LighthouseError("a training process was killed")

    monkeypatch.setattr(launch, "launch", fail)
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a")
    assert answer.code == 1 and (here / "runs/a").exists() == bool(kept)
    assert (f"runs/a is kept: it holds {kept}\n" if kept else "runs/a held no step and is removed\n") in answer.err
    assert (here / "outside/kept.txt").exists()


def test_recover_takes_the_newest_run_and_says_which(lighthouse, trainer):
    for name in ("old", "new"):
        lighthouse("pretrain", "tiny.toml", "--name", name)
    os.utime("runs/old", (1000, 1000))
    answer = lighthouse("recover", "--set", "training.compile=true")
    assert (answer.code, answer.out) == (0, "runs/new\n")
    assert "newest run: runs/new" in answer.err and "steps 101 to 120" in answer.err
    assert ledger("new") == [("lighthouse", 0, 100), ("dense", 100, 120)]
    assert Run("runs/new").recipe.training.compile
    assert ledger("old") == [("lighthouse", 0, 100)]


def test_recover_is_finished_repeated_extended(lighthouse, trainer):
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    trainer.stop, trainer.code = 105, 143
    answer = lighthouse("recover", "a", "--steps", "10")
    assert answer.code == 143 and "Continue with: lighthouse recover runs/a" in answer.err

    trainer.stop, trainer.code = None, 0
    assert "was begun with 10 steps, not 12" in lighthouse("recover", "a", "--steps", "12").error
    assert "steps 106 to 110" in lighthouse("recover", "a").err
    assert "complete at step 110" in lighthouse("recover", "a").error
    launches = len(trainer.launches)
    for length in ((), ("--steps", "10")):
        answer = lighthouse("recover", "a", "--or-done", *length)
        assert answer.code == 0 and "is complete at step 110: nothing is left to do\n" in answer.err
    assert "with 10 steps, not 12" in lighthouse("recover", "a", "--or-done", "--steps", "12").error
    assert "exclude each other" in lighthouse("recover", "a", "--or-done", "--extend", "3").error
    assert len(trainer.launches) == launches
    assert "steps 111 to 113" in lighthouse("recover", "a", "--extend", "3").err
    assert ledger("a") == [("lighthouse", 0, 100), ("dense", 100, 113)]

    error = lighthouse("pretrain", "--resume", "a")
    assert "in its recovery" in error.error and "lighthouse recover runs/a" in error.err


def test_recover_warns_when_stage_1_stopped_early(lighthouse, trainer):
    trainer.stop, trainer.code = 40, 143
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    phases = "lighthouse.phases=[{window=64, rope_theta=100}, {window=128}]"
    lighthouse("pretrain", "tiny.toml", "--name", "turned", "--set", phases)
    trainer.stop, trainer.code = None, 0
    answer = lighthouse("recover", "a")
    assert answer.code == 0 and "warning: runs/a stopped at step 40 of 100" in answer.err
    assert ledger("a")[-1] == ("dense", 40, 60) and "rope_theta" not in answer.err
    assert "warning: rope_theta goes from 100 to 10000" in lighthouse("recover", "turned").err


def test_recover_dry_run_writes_nothing(lighthouse, trainer, here):
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    before = {path: path.stat().st_mtime_ns for path in (here / "runs").rglob("*")}
    answer = lighthouse("recover", "a", "--steps", "7", "--dry-run")
    assert loads_recipe(answer.out).recover.steps == 7
    assert {path: path.stat().st_mtime_ns for path in (here / "runs").rglob("*")} == before
    assert len(trainer.launches) == 1


@pytest.mark.parametrize("override", ["optimizer.lr=1.0", "training.seq_len=2048", "lighthouse.enabled=false"])
def test_recover_refuses_what_the_checkpoint_decides(lighthouse, trainer, override):
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    answer = lighthouse("recover", "a", "--set", override)
    key = override.split("=")[0]
    assert f"the checkpoint decides {key}" in answer.error and "recover.*" in answer.err
    assert ledger("a") == [("lighthouse", 0, 100)]


def test_a_dense_run_goes_on(lighthouse, trainer):
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a", "--set", "lighthouse.enabled=false")
    assert "lighthouse strip runs/a OUT" in answer.err
    # Not by mistake.
    answer = lighthouse("recover", "--steps", "5")
    assert "runs/a, was dense from the start" in answer.error and "lighthouse recover runs/a" in answer.err
    assert lighthouse("recover", "a", "--steps", "5", "--set", 'recover.decay="linear"').code == 0
    assert ledger("a") == [("dense", 0, 100), ("dense", 100, 105)]


def test_a_dense_run_that_decays_by_itself_has_no_recovery(lighthouse, trainer):
    dense = ("--set", "lighthouse.enabled=false", "--set", "schedule.decay_steps=50")
    lighthouse("pretrain", "tiny.toml", "--name", "a", *dense)
    assert "goes to zero by its own schedule" in lighthouse("recover", "a", "--steps", "5").error


def test_a_run_in_training_is_not_recovered(lighthouse, trainer):
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    with Run("runs/a").lock():
        assert "another process" in lighthouse("recover", "a").error
        assert lighthouse("recover", "a", "--dry-run").code == 0


def test_another_machine_launches_without_writing(lighthouse, trainer, here):
    trainer.code = 1  # it would look for the run that machine 0 makes
    several = ("--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "host:29500")
    assert lighthouse("pretrain", "tiny.toml", "--name", "a", *several).code == 1
    assert trainer.launches == [("runs/a", Plan(1, 2, 1, "host:29500"))]
    assert not (here / "runs").exists()


def test_titan_tables_are_checked_before_a_run_is_made(lighthouse, trainer, here):
    assert "titan" in lighthouse("pretrain", "tiny.toml", "--set", "titan.comm.nonsense=1").error
    assert not (here / "runs").exists()


def test_titan_tables_are_checked_once_in_a_command(lighthouse, trainer, here, monkeypatch):
    checked = []
    monkeypatch.setattr(titan, "check_overrides", lambda recipe: checked.append(dict(recipe.titan)))
    table = {"comm": {"init_timeout_seconds": 600}}
    trainer.stop, trainer.code = 40, 130
    set_titan = ("--set", "titan.comm.init_timeout_seconds=600")
    assert lighthouse("pretrain", "tiny.toml", "--name", "a", *set_titan).code == 130
    assert checked == [table]
    trainer.stop, trainer.code = None, 0
    assert lighthouse("pretrain", "--resume", "a").code == 0 and checked == [table] * 2
    assert lighthouse("recover", "a").code == 0 and checked == [table] * 3


def test_environment_is_recorded(lighthouse, trainer, here):
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    assert json.loads((here / "runs/a/environment.json").read_text())["argv"][:2] == ["lighthouse", "pretrain"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [('lighthouse.backend="triton"', "'triton'"), ('lighthouse.dense_backend="fa4"', "'fa4'")],
)
def test_a_backend_that_is_not_there_is_met_before_the_launch(lighthouse, trainer, here, setting, words):
    answer = lighthouse("pretrain", "tiny.toml", "--set", setting)
    # As every other refusal begins, and what to do.
    assert words in answer.error and answer.error.startswith(f"error: {'dense ' * ('fa4' in words)}backend '")
    assert '"auto" takes' in answer.err.splitlines()[-1]
    assert not trainer.launches and not (here / "runs").exists()


def test_the_length_of_a_recovery_can_be_corrected_before_its_first_checkpoint(lighthouse, trainer):
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    trainer.code = 1
    assert lighthouse("recover", "a", "--steps", "5000").code == 1
    trainer.code = 0
    assert lighthouse("recover", "a", "--steps", "4").code == 0
    assert ledger("a") == [("lighthouse", 0, 100), ("dense", 100, 104)]


def test_a_run_keeps_the_commit_of_its_data_set(lighthouse, trainer, here, monkeypatch):
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    (here / "there").mkdir()
    (here / "there/a.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(50)))
    commits, build = iter(("1" * 40, "2" * 40)), datasets.load_dataset_builder

    class Api:
        def dataset_info(self, path, revision=None):
            return SimpleNamespace(sha=next(commits))

    def load(path, config=None, revision=None):
        builder = build(str(here / "there"))
        builder.hash = revision
        return builder

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    trainer.stop, trainer.code = 40, 130
    data = ("--set", 'data.source="hf"', "--set", 'data.paths=["someone/some-data"]')
    assert lighthouse("pretrain", "tiny.toml", "--name", "a", *data).code == 130
    assert Run("runs/a").recipe.data.hf_revision == "1" * 40
    assert f'hf_revision = "{"1" * 40}"' in (here / "runs/a/recipe.toml").read_text()

    trainer.stop, trainer.code = None, 0
    assert lighthouse("pretrain", "--resume", "a").code == 0
    assert lighthouse("recover", "a").code == 0
    assert build_source(Run("runs/a").recipe.data).revision == "1" * 40
    assert next(commits) == "2" * 40  # asked once, when the run was made


def test_damaged_shards_are_met_by_resume_and_recover_before_anything_is_written(lighthouse, trainer, here):
    (here / "src").mkdir()
    (here / "src/a.txt").write_text("some words\n" * 100)
    files = ["--set", 'data.paths=["src/*"]', "--set", "data.validation=0", "--set"]
    assert lighthouse("data", "prepare", "tiny.toml", "out", *files, 'data.source="files"').code == 0
    tokens = [*files[2:], 'data.source="tokens"', "--set", 'data.paths=["out"]']
    trainer.stop, trainer.code = 40, 130
    assert lighthouse("pretrain", "tiny.toml", "--name", "a", *tokens).code == 130
    shard = here / "out/train-00000.tokens"
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    before = {path: path.stat().st_mtime_ns for path in (here / "runs").rglob("*")}
    for command in (["pretrain", "--resume", "a"], ["recover", "a"]):
        assert "train-00000.tokens is damaged" in lighthouse(*command).error
    assert {path: path.stat().st_mtime_ns for path in (here / "runs").rglob("*")} == before
    assert len(trainer.launches) == 1


def test_a_run_that_is_being_trained_is_not_to_be_deleted(lighthouse, trainer, here):
    run = create_run(load_recipe("tiny.toml"), "tiny", "a")
    with run.lock():
        for command in (["pretrain", "--resume", "a"], ["recover", "a"]):
            assert "being trained by another process" in lighthouse(*command).error
    refused = lighthouse("recover", "a")
    assert refused.code == 2 and "hint: lighthouse pretrain --resume runs/a begins it at step 0" in refused.err
