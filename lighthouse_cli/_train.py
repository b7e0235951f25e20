"""What pretrain and recover share: describing a recipe, and seeing a launch through to its end."""

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lighthouse_cli import _output, _watch

if TYPE_CHECKING:
    from lighthouse_core.config import Recipe
    from lighthouse_core.job.plan import Plan
    from lighthouse_core.runs.run import Run
    from lighthouse_core.seal import Verification

# How a dense step's time is known.
_HOW = {
    "recovery": "by the recovery's own steps",
    "measured": "measured at the start",
    "estimated": "estimated from FLOPs; --measure-dense measures it",
}
# Times the memory that a step is tried with: its estimate is rough.
_MARGIN = 1.5
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def describe(recipe: "Recipe", nproc: str, nnodes: int) -> None:
    """Print the resolved recipe, with what it costs in comments, so that the output is itself a recipe."""
    from lighthouse_core.config import dump_recipe
    from lighthouse_core.estimate import estimate

    cost = estimate(recipe)
    training, counts = recipe.training, cost.parameters
    processes = nnodes * (int(nproc) if nproc.isdigit() else 1)
    _output.data(dump_recipe(recipe))

    def line(name: str, text: str) -> None:
        _output.data(f"# {name:<21} {text}")

    line(
        "parameters",
        f"{_short(counts.total)} (embedding {_short(counts.embedding)}, body {_short(counts.body)}, "
        f"head {_short(counts.head)})",
    )
    if cost.lighthouse_flops is not None:
        if cost.gathered is not None:
            line("S", f"{cost.gathered} of {training.seq_len} tokens")
        turns = recipe.lighthouse.turns(training.steps)
        if recipe.lighthouse.windows:
            line("windows", ", ".join(f"{window} from step {begin}" for window, begin in turns.items()))
        seen = (f"{recipe.lighthouse.attention(window).keys(training.seq_len):.0f}" for window in turns)
        line("keys a query (mean)", f"{', then '.join(seen)}; dense {training.seq_len / 2:.0f}")
        line("FLOPs per token", f"{_short(cost.lighthouse_flops)} in stage 1, {_short(cost.dense_flops)} dense")
    else:
        line("FLOPs per token", f"{_short(cost.dense_flops)}")
    line("tokens per step", f"{cost.tokens_per_step}")
    for stage, steps in (("training", training.steps), ("recovery", recipe.recover.steps)):
        if steps:
            line(f"tokens, {stage}", f"{_short(steps * cost.tokens_per_step)} in {steps} steps")
    sharded = processes if recipe.parallel.shard == -1 else recipe.parallel.shard
    state = cost.state_bytes / sharded
    line(
        "memory (estimate)",
        f"{_gib(state + cost.activation_bytes)} a process over {processes}: weights, gradients and optimizer "
        f"{_gib(state)}, activations about {_gib(cost.activation_bytes)} in the stage that takes more",
    )


def train(
    run_dir: Path, run: "Run | None", plan: "Plan", resume: str, *, quiet: bool = False, as_json: bool = False
) -> None:
    """Launch the run's last stage. The caller holds the run's lock.

    Args:
        run_dir: of the run.
        run: None on a machine other than the first: that one keeps the run.
        plan: the processes.
        resume: the command that goes on after an interruption.
        quiet: show errors only.
        as_json: print every logged row on stdout.

    Raises:
        typer.Exit: with the job's exit code, unless it is 0.
    """
    from lighthouse_core.errors import LighthouseError
    from lighthouse_core.job.launch import launch

    if run is not None:
        # The run that was trained last is the newest, whenever it was made.
        with contextlib.suppress(OSError):
            os.utime(run_dir)
    watcher = _watch.watcher(run, plan, quiet=quiet, as_json=as_json) if run is not None else _watch.Silence(quiet)
    outcome = "failed"
    try:
        code = launch(run_dir, plan, watcher)
        outcome = "done" if code == 0 else "stopped" if code in _INTERRUPTED else outcome
    except LighthouseError as error:
        if run is not None and (steps := run.checkpoint_steps()):
            error.hint = f"{error.hint}; " if error.hint else ""
            error.hint += f"step {steps[-1]} is saved; continue with: {resume}"
        raise
    finally:
        watcher.end(outcome)
        if run is not None:
            _settle(run)
    if run is not None and code in _INTERRUPTED:
        steps = run.checkpoint_steps()
        if steps and steps[-1] >= run.end:
            _output.final(f"interrupted after the last step, {steps[-1]}, which is saved")
        elif steps:
            _output.final(f"interrupted; step {steps[-1]} is saved. Continue with: {resume}")
        else:
            _output.final("interrupted before the first checkpoint")
    elif run is not None and code == LighthouseError.exit_code and (steps := run.checkpoint_steps()):
        _output.final(f"step {steps[-1]} is saved. Continue with: {resume}")
    if code:
        raise typer.Exit(code)


def _settle(run: "Run") -> None:
    """Bring the ledger up to date, and say what the run has cost."""
    from lighthouse_core.errors import LighthouseError
    from lighthouse_core.runs.rows import clock

    try:
        run.settle()
    except (OSError, LighthouseError) as error:
        _output.warn(f"the costs in {run.path / 'ledger.json'} are not up to date: {error}")
    spent = [stage for stage in run.ledger["stages"] if "steps" in stage]
    if not spent:
        return
    steps, seconds, flops = (sum(stage[key] for stage in spent) for key in ("steps", "seconds", "flops"))
    line = f"{steps} steps in {clock(seconds)}, {_short(flops)} FLOPs"
    if "dense" in run.ledger:
        dense, how = run.ledger["dense"], _HOW[run.ledger["dense_step"]["how"]]
        line += f"; as many dense ones {clock(dense['seconds'])} ({how}), {_short(dense['flops'])} FLOPs: "
        line += f"{dense['seconds'] / seconds:.2f}x"
    _output.say(line)


def verify_ahead(run: "Run") -> "Verification | None":
    """Have the run's newest checkpoint read while this process imports torch, which it needs for its GPUs."""
    from lighthouse_core.job.plan import local_gpus

    ahead = run.verify_ahead()
    local_gpus()
    return ahead


def warn_of_damage(damaged: dict[int, str], step: int) -> None:
    """Say which checkpoints were passed over for the one of `step`."""
    for text in damaged.values():
        _output.warn(text)
    if damaged:
        _output.warn(f"going on from step {step}; --strict refuses to")


def check_data(recipe: "Recipe", *, checksums: bool = True) -> None:
    """Meet what is wrong with the data here, rather than after the processes have started.

    Args:
        recipe: the recipe.
        checksums: whether prepared tokens are read and compared with theirs.

    Raises:
        DataError: what is wrong.
    """
    from lighthouse_core.data import check

    for note in check(recipe, _output.say, checksums=checksums):
        _output.warn(note)


def check_titan(recipe: "Recipe") -> None:
    """Meet what is wrong with a [titan] table before anything is made of its recipe.

    Raises:
        RecipeError: torchtitan has no such setting, or it cannot be set, or not to this value.
    """
    if recipe.titan:
        from lighthouse_core.titan import check_overrides

        check_overrides(recipe)


def check(recipe: "Recipe", plan: "Plan", *, dense: bool = False) -> None:
    """Meet what does not fit this machine here, rather than after the processes have started.

    Args:
        recipe: the recipe.
        plan: the processes.
        dense: whether every layer is.

    Raises:
        UserError: the batch does not divide among the processes, a package is missing, or a
            backend is not there.
    """
    from lighthouse_core.attention import check_backends
    from lighthouse_core.errors import UserError
    from lighthouse_core.job.plan import check_loggers, check_world, local_gpus

    check_world(recipe, plan.world_size)
    check_loggers(recipe)
    try:
        pooled = recipe.lighthouse.enabled and not dense
        check_backends(recipe.lighthouse.attention(), "cuda" if local_gpus() else "cpu", pooled=pooled)
    except ValueError as error:
        raise UserError(str(error), hint=getattr(error, "hint", None)) from None


def check_memory(recipe: "Recipe", plan: "Plan", *, dry_run: bool) -> None:
    """Refuse a step that is far too large for a machine without GPUs, before it fills the memory. A dry run only says
    so: it may be about another machine.

    Raises:
        UserError: by the estimate of `--dry-run`.
    """
    from lighthouse_core.errors import UserError
    from lighthouse_core.estimate import estimate
    from lighthouse_core.job.plan import local_gpus

    if local_gpus():
        # An accelerator says itself what does not fit.
        return
    cost = estimate(recipe)
    needed = cost.state_bytes / plan.nnodes + cost.activation_bytes * plan.nproc
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > _MARGIN * there:
        text = f"a step takes about {_gib(needed)}, and this machine has no GPU and {_gib(there)}"
        if not dry_run:
            raise UserError(text, hint="use a smaller model, shorter sequences or a smaller training.local_batch_size")
        _output.warn(text)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _short(number: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
