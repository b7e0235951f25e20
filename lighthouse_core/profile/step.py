"""A training step of a recipe taken apart: a short run of it whose last step is traced. Nothing here imports torch."""

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lighthouse_core.annotations import OPTIMIZER
from lighthouse_core.config import Recipe, load_recipe
from lighthouse_core.config.dump import toml_value
from lighthouse_core.config.phases import Phase
from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.estimate import exchanged_bytes
from lighthouse_core.files import open_to_append, refuse_links, write_atomically
from lighthouse_core.job.environment import TRACE_FOLDER
from lighthouse_core.job.exits import follow_parent
from lighthouse_core.profile.trace import Breakdown, StepShapes, breakdown, folded, read_trace
from lighthouse_core.python import run_module
from lighthouse_core.runs.rows import read_rows
from lighthouse_core.runs.run import Run

# Steps of the run: these, then those that are timed (so many, unless more are asked for), one in which the profiler
# starts up, and the traced one.
_WARM, _TIMED = 2, 5
_LAST_LINES = 5


@dataclass(frozen=True)
class StepProfile:
    """What `run_step` found.

    Attributes:
        recipe: name of its file.
        settings: what was asked for beside the recipe.
        stage: "lighthouse", or "dense" for every layer dense.
        phase: number of the recipe's phase that the step is of, from 1; 0 for a dense step.
        steps: of that phase in a run of the recipe; 0 for a dense step.
        window: of the traced step's Lighthouse layers; 0 for none.
        packing: the recipe's `data.packing`.
        notes: what of the recipe the step leaves out.
        machine: versions and devices, as the run recorded them.
        processes: that trained.
        tokens: of a step, over all processes.
        timed: seconds of steps that no profiler slowed down.
        seconds: their median.
        tokens_per_second: over all processes.
        memory_gib: peak of one process.
        mfu: model FLOPs as a fraction of the accelerator's peak; None where there is none.
        breakdown: of the traced step, on the first process.
        trace: for Perfetto or chrome://tracing.
        stacks: folded ones, for speedscope or flamegraph.pl.
        run: the run's directory.
        exchanged: where processes share sequences, bytes that one sends in a pass of a layer of each kind.
    """

    recipe: str
    settings: list[str]
    stage: str
    phase: int
    steps: int
    window: int
    packing: str
    notes: list[str]
    machine: dict[str, Any]
    processes: int
    tokens: int
    timed: list[float]
    seconds: float
    tokens_per_second: float
    memory_gib: float
    mfu: float | None
    breakdown: Breakdown
    trace: Path
    stacks: Path
    run: Path
    exchanged: dict[str, int] = field(default_factory=dict)

    @property
    def update_ms(self) -> float:
        """What the step takes once, however many micro-batches it has."""
        return self.breakdown.ms(OPTIMIZER)

    def within(self, folder: Path) -> "StepProfile":
        """The same with its files as they are named from that folder, which holds them."""
        names = {key: getattr(self, key).resolve().relative_to(folder.resolve()) for key in ("trace", "stacks", "run")}
        return replace(self, **names)

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and strings."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def run_step(
    recipe_path: Path,
    settings: Sequence[str],
    folder: Path,
    nproc: int | None,
    say: Callable[[str], None],
    *,
    stage: str = "lighthouse",
    phase: int = 0,
    timed: int = _TIMED,
) -> StepProfile:
    """Train a few steps of a recipe by `lighthouse pretrain` and trace the last one.

    Leaves trace.json.gz, stacks.folded, pretrain.log and runs/ in `folder`, and of several processes traces/. The run
    saves no checkpoint and validates nothing.

    Args:
        recipe_path: the recipe.
        settings: `a.b=value`, as `--set` takes them.
        folder: made if it is not there.
        nproc: processes; None for one a GPU.
        say: told what goes on.
        stage: "dense" has every layer dense, as in the recovery.
        phase: number of the phase of stage 1, from 1; 0 for the last one that is not dense. A window that grows has
            its mean over the phase.
        timed: steps of which the median is taken; the run has four more.

    Raises:
        UserError: the recipe cannot be trained here.
        LighthouseError: the run failed, or its trace holds no step.
    """
    asked = load_recipe(recipe_path, settings)
    profiled = _phase(asked, phase)
    notes = _notes(profiled, stage)
    for note in notes:
        say(note)
    chosen = [*settings, *_settings(asked, profiled, stage, folder, timed)]
    recipe = load_recipe(recipe_path, chosen)
    stage = "lighthouse" if recipe.lighthouse.enabled else "dense"
    name = f"{stage}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    say(f"{recipe.training.steps} steps of {recipe_path}, {stage}; the last one is traced")
    traces = folder.resolve() / "traces"
    _pretrain(recipe_path, chosen, name, nproc, folder / "pretrain.log", traces)

    trace, stacks = folder / "trace.json.gz", folder / "stacks.folded"
    (traces / "rank0.json.gz").replace(trace)
    if not any(traces.iterdir()):
        traces.rmdir()
    events, shapes = read_trace(trace), shapes_of(recipe)
    costs = breakdown(events, shapes)
    write_atomically(stacks, "".join(f"{line}\n" for line in folded(events, shapes)))

    run = Run(folder / "runs" / name)
    # Rows of what the budgets measured have no seconds.
    logged = read_rows(run.path / "metrics.jsonl", ["seconds"])
    rows = [row for row in logged if _WARM < row["step"] <= _WARM + timed]
    machine = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    del machine["argv"]
    machine |= run.ledger["stages"][-1]["conditions"]
    tokens = recipe.training.global_batch_size * recipe.training.seq_len
    times = [row["seconds"] for row in rows]
    seconds = statistics.median(times)
    return StepProfile(
        recipe=recipe_path.stem,
        settings=[*settings],
        stage=stage,
        phase=profiled.number if recipe.lighthouse.enabled else 0,
        steps=profiled.end - profiled.begin + 1 if recipe.lighthouse.enabled else 0,
        window=recipe.lighthouse.window if recipe.lighthouse.enabled else 0,
        packing=recipe.data.packing,
        notes=notes,
        machine=machine,
        processes=machine["devices"],
        tokens=tokens,
        timed=times,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        memory_gib=max(row["memory_gib"] for row in rows),
        mfu=statistics.median(row["mfu"] for row in rows) if "mfu" in rows[0] else None,
        breakdown=costs,
        trace=trace,
        stacks=stacks,
        run=run.path,
        exchanged=exchanged(recipe),
    )


def shapes_of(recipe: Recipe) -> StepShapes:
    """The sizes by which a step of the recipe is read."""
    model, training = recipe.model, recipe.training
    return StepShapes(
        dim=model.dim,
        q_width=model.heads * model.head_dim,
        kv_width=model.kv_heads * model.head_dim,
        ffn_dim=model.ffn_dim,
        vocab_size=model.vocab_size,
        tokens=training.seq_len,
        batch=training.local_batch_size,
    )


def _phase(recipe: Recipe, number: int) -> Phase:
    if number:
        return recipe.phases[number - 1]
    return (recipe.sparse_phases or recipe.phases)[-1]


def exchanged(recipe: Recipe) -> dict[str, int]:
    """Of a step of the recipe: bytes that `StepProfile.exchanged` has."""
    kinds = {"Lighthouse": False} if recipe.lighthouse.enabled else {}
    kinds["dense"] = True
    return {kind: exchanged_bytes(recipe, dense=dense) for kind, dense in kinds.items() if recipe.parallel.context > 1}


def _notes(phase: Phase, stage: str) -> list[str]:
    if stage == "dense" or not phase.growth:
        return []
    grows = f"the window of phase {phase.number} grows from {phase.first_window} to {phase.attention.window}"
    return [f"{grows}; this step has the mean, {phase.mean_window}"]


def _settings(recipe: Recipe, phase: Phase, stage: str, folder: Path, timed: int) -> list[str]:
    chosen: dict[str, Any] = {
        "training.steps": _WARM + timed + 2,
        "schedule.decay_steps": 0,
        "schedule.decay": "linear",
        "schedule.min_lr_factor": 0.0,
        "checkpoint.also": [],
        "metrics.every": 1,
        "metrics.validation_every": 0,
        "metrics.measure_dense": False,
        "metrics.tensorboard": False,
        "metrics.wandb": False,
        "lighthouse.phases": [],
        **{f"lighthouse.{name}": value for name, value in vars(phase.attention).items()},
        "lighthouse.window": phase.mean_window,
        "model.dense_layers": phase.dense_layers,
        "output.dir": str(folder.resolve() / "runs"),
    }
    if stage == "dense":
        chosen["lighthouse.enabled"] = False
    return [f"{key}={toml_value(value)}" for key, value in chosen.items()]


def _pretrain(
    recipe_path: Path, settings: Sequence[str], name: str, nproc: int | None, log_path: Path, traces: Path
) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    command = [*run_module("lighthouse_cli"), "pretrain", str(recipe_path), "--name", name]
    log_path.parent.mkdir(parents=True, exist_ok=True)
    refuse_links(log_path.parent, "runs", "traces")
    # That of an earlier report, or a link that somebody put there.
    log_path.unlink(missing_ok=True)
    with open_to_append(log_path) as log:
        code = subprocess.run(
            [*command, "--nproc", str(nproc or "auto"), *options],
            env={**os.environ, TRACE_FOLDER: str(traces)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=follow_parent,
        ).returncode
    if code:
        lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.startswith("error: ")][-1:] or lines[-_LAST_LINES:]
        words = "\n".join(said).removeprefix("error: ")
        kind = UserError if code == UserError.exit_code else LighthouseError
        raise kind(f"the run ended with exit code {code}: {words}", hint=f"{log_path} has all that it said")
