"""What pretrain and recover share: describing a recipe, and seeing a launch through to its end."""

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lighthouse_cli import _output, _watch
from lighthouse_cli._source import size_of_source

if TYPE_CHECKING:
    from collections.abc import Sequence

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
# Seconds that a dry run reads for, where documents must be read to know their lengths.
_LOOK = 3.0
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def describe(recipe: "Recipe", nproc: str, nnodes: int) -> None:
    """Print the resolved recipe, with what it costs in comments, so that the output is itself a recipe."""
    from lighthouse_core.config import dump_recipe
    from lighthouse_core.estimate import estimate

    cost = estimate(recipe)
    training, counts = recipe.training, cost.parameters
    processes = nnodes * (int(nproc) if nproc.isdigit() else 1)
    _output.data(dump_recipe(recipe))

    _line(
        "parameters",
        f"{_short(counts.total)} (embedding {_short(counts.embedding)}, body {_short(counts.body)}, "
        f"head {_short(counts.head)})",
    )
    if cost.lighthouse_flops is not None:
        if cost.gathered is not None:
            _line("S", f"{cost.gathered} of {training.seq_len} tokens")
        turns = recipe.lighthouse.turns(training.steps)
        if recipe.lighthouse.windows:
            _line("windows", ", ".join(f"{window} from step {begin}" for window, begin in turns.items()))
    if recipe.data.packing == "concat":
        _describe_attention(recipe, None)
    _line("tokens per step", f"{cost.tokens_per_step}")
    for stage, steps in (("training", training.steps), ("recovery", recipe.recover.steps)):
        if steps:
            _line(f"tokens, {stage}", f"{_short(steps * cost.tokens_per_step)} in {steps} steps")
    sharded = processes if recipe.parallel.shard == -1 else recipe.parallel.shard
    state = cost.state_bytes / sharded
    _line(
        "memory (estimate)",
        f"{_gib(state + cost.activation_bytes)} a process over {processes}: weights, gradients and optimizer "
        f"{_gib(state)}, activations about {_gib(cost.activation_bytes)} in the stage that takes more",
    )


def _describe_attention(recipe: "Recipe", lengths: "Sequence[int] | None") -> None:
    """Print what attention costs; `lengths` are those of `estimate.mean_keys`."""
    from lighthouse_core.estimate import DENSE, estimate, mean_keys

    cost, seen = estimate(recipe, lengths), mean_keys(recipe, lengths)
    flops, dense = f"{_short(cost.dense_flops)}", f"{seen.pop(DENSE):.0f}"
    if cost.lighthouse_flops is not None:
        _line("keys a query (mean)", f"{', then '.join(f'{keys:.0f}' for keys in seen.values())}; dense {dense}")
        flops = f"{_short(cost.lighthouse_flops)} in stage 1, {flops} dense"
    elif lengths:
        _line("keys a query (mean)", dense)
    _line("FLOPs per token", flops)


def _line(name: str, text: str) -> None:
    _output.data(f"# {name:<21} {text}")


def describe_data(recipe: "Recipe") -> None:
    """Print each source of a mixture, and how long documents are and what keeping them apart costs, in comments as
    `describe` does.

    Raises:
        DataError: the data is not there.
    """
    from lighthouse_core.data.survey import sizes

    for one in sizes(recipe) if recipe.data.sources else ():
        share, size, tokens, epochs = size_of_source(one.share, one.size, one.tokens, one.epochs)
        known = {"bytes": size, "tokens": tokens, "epochs in the run": epochs}
        facts = ", ".join(f"{value} {what}" for what, value in known.items() if value != "?")
        _line(f"source {one.source}", f"{share} of the sequences; {facts or 'its size is not known'}")
    if recipe.alignment is not None:
        _describe_documents(recipe)


def _describe_documents(recipe: "Recipe") -> None:
    """How long documents are, of each source; their padding and what attention costs, of all by their shares of the
    sequences."""
    from lighthouse_core.data.survey import mixed_ignored, mixed_padding, mixed_pieces, quantiles, survey

    found = survey(recipe, "train", seconds=_LOOK, samples=0)
    for one in found:
        of = f" of {one.source}" if recipe.data.sources else ""
        count = f"{len(one.lengths)}{'' if one.complete else f' in the first {_LOOK:g} seconds of reading'}"
        if len(one.lengths):
            tokens = quantiles(one.lengths)
            count += f"; tokens: median {tokens.median}, mean {one.lengths.mean():.0f}, 90% {tokens.p90}"
            count += f", longest {tokens.longest}"
            count += f"; {one.longer} longer than training.seq_len"
            if of:
                count += f"; padding {one.padding:.2%}"
        _line(f"documents{of}", count)
    if not all(len(one.lengths) for one in found):
        _line("attention", "lengths are not known: one document a sequence is counted")
        _describe_attention(recipe, None)
        return
    text = f"{mixed_padding(found):.2%} of the tokens, each document to a multiple of {recipe.alignment}"
    _line("padding", f"{text}; {mixed_ignored(found):.2%} of the labels are ignored")
    _describe_attention(recipe, mixed_pieces(found))


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
    drawn = run.ledger["stages"][-1].get("sources", {})
    total = sum(one["samples"] for one in drawn.values())
    if len(drawn) > 1 or any(one["epochs"] for one in drawn.values()):
        parts = (
            f"{name} {one['samples']:,} ({one['samples'] / max(total, 1):.1%}), in its epoch {one['epochs'] + 1}"
            for name, one in drawn.items()
        )
        _output.say(f"sequences by source: {'; '.join(parts)}")


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


def check_weights(recipe: "Recipe", *, dry_run: bool) -> "tuple[Recipe, dict[str, Any] | None]":
    """Meet what does not fit of the weights that a run begins with, if it begins with any.

    Returns:
        The recipe, which names one checkpoint of a run; and what the ledger keeps of the weights.

    Raises:
        UserError: there are no such weights, they cannot be used, or the recipe contradicts them.
    """
    if not recipe.model.origin:
        return recipe, None
    from lighthouse_core.config.origin import changes, read_origin
    from lighthouse_core.weights.origin import find_weights

    model = recipe.model
    changed = changes(model.origin, model.model_dump())
    if not dry_run:
        _output.say(f"reading every weight of {model.origin}")
    weights = find_weights(model, verify=not dry_run)
    if dry_run:
        _line("weights", f"{weights.path}: {weights.about}")
        if (tokens := read_origin(model.origin).tokens) != recipe.training.seq_len:
            _line("changed", f"length {tokens} -> {recipe.training.seq_len}")
        for key, (there, here) in changed.items():
            _line("changed", f"model.{key} {there or 'none'} -> {here or 'none'}")
    else:
        _output.say(f"beginning with {weights.path}: {weights.about}; step, optimizer and place in the data are new")
    update = {"model": model.model_copy(update={"origin": str(weights.path)})}
    return recipe.model_copy(update=update), weights.facts


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
