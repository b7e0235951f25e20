"""The kinds of `lighthouse profile`: each measures, draws into a folder, and says what came of it."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lighthouse_core.attention import LighthouseConfig, check_backends
from lighthouse_core.attention.call import log_choices
from lighthouse_core.config import Recipe
from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.estimate import process_bytes
from lighthouse_core.profile import plots, selection_figure
from lighthouse_core.profile.advise import advise
from lighthouse_core.profile.heads import HeadsView
from lighthouse_core.profile.machine import Roof, busy, describe, free_memory, memory, roof
from lighthouse_core.profile.report import Report, attention_parts, heads_parts, selection_parts, step_parts, tune_parts
from lighthouse_core.profile.selection import selection_view
from lighthouse_core.profile.step import StepProfile, run_step
from lighthouse_core.profile.sweep import Sweep, profile_lengths
from lighthouse_core.profile.work import Shape

Say = Callable[[str], None]
# Of a profiled step: its trace grows with them, and they are all alike.
_MICRO_BATCHES = 2


# Tokens from which on a CPU takes minutes.
_LONG = 32768
# Share of the processors that others may use while a CPU is timed.
_BUSY = 0.1
# Times the memory that a step is tried with: its estimate is rough.
_MARGIN = 1.5


def _warn(where: torch.device, tokens: int, say: Say) -> None:
    """Say what a user should know before times are taken on a CPU."""
    if where.type == "cpu" and tokens > _LONG:
        say(f"{tokens} tokens take minutes on a CPU: shorter sequences show what there is")
    if others := _others(where):
        say(others)


def _others(where: torch.device) -> str:
    """What others do on a CPU that is to be timed now; "" for little or nothing."""
    if where.type != "cpu" or (share := busy()) <= _BUSY:
        return ""
    return f"others keep {share:.0%} of the processors busy: times beside other work are not to be used"


def _check_step(recipe: Recipe, nproc: int) -> None:
    """Raise for a step that is far too large, before it fills the memory; one a little too large may end by itself.

    Raises:
        UserError: by the estimate of `pretrain --dry-run`.
    """
    where = device()
    needed = max(process_bytes(recipe, nproc, gpu=where.type == "cuda").values())
    there, place = memory(where), "each GPU"
    if where.type != "cuda":
        needed, there, place = needed * nproc, free_memory(where), "this machine"
    if needed > _MARGIN * there:
        raise UserError(
            f"a step of {recipe.training.seq_len} tokens takes about {needed / 2**30:.0f} GiB on {place}, which has "
            f"{there / 2**30:.0f} for it",
            hint="use shorter sequences, or a smaller training.local_batch_size",
        )


def device() -> torch.device:
    """Where everything is measured: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Errors of torch that a user can do something about, and none of its warnings that mean nothing here."""
    try:
        with warnings.catch_warnings():
            # The backward pass multiplies on a thread of its own.
            warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA context")
            yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(f"the GPU's memory is full: {reason}", hint="use a smaller --seq, or fewer --heads") from None
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise UserError("no dense kernel of that name takes such inputs", hint="--dense-backend auto does") from None


def _drawn(files: list[Path] | None, say: Say) -> list[Path]:
    if not files:
        say("figures need matplotlib: pip install -e '.[plot]'")
    return files or []


def attention(
    shapes: Sequence[tuple[Shape, LighthouseConfig]], folder: Path, say: Say, *, columns: int = 0, colour: bool = False
) -> tuple[Report, str | None]:
    """One attention call at each length beside dense attention, and the plot for a terminal so many columns wide."""
    where = device()
    number = getattr(torch, shapes[0][0].dtype)
    try:
        for shape, cfg in shapes:
            check_backends(cfg, where.type)
            log_choices(cfg, where.type, number, shape.head_dim, pooled=True)
    except ValueError as error:
        raise UserError(str(error), hint=getattr(error, "hint", None)) from None

    machine = describe(where)

    def limits_here() -> Roof:
        _warn(where, max(shape.tokens for shape, _ in shapes), say)
        return roof(where, number)

    def report(found: Sweep, limits: Roof) -> Report:
        lengths = ", ".join(str(profile.tokens) for profile in found.profiles)
        title = f"One attention call of {lengths} tokens"
        return Report(title, "attention", machine, attention_parts(found), found.as_json(), limits)

    with _explained():
        found, limits = profile_lengths(
            shapes,
            limits_here,
            where,
            say,
            done=lambda found, limits: report(found, limits).write(folder),
        )
    whole = report(found, limits)
    if len(found.profiles) > 1:
        whole = replace(whole, draw=lambda place: _drawn(plots.draw(found, place), say))
    return whole, plots.terminal(found, columns, colour=colour) if columns else None


def step(path: Path, recipe: Recipe, settings: list[str], folder: Path, nproc: int, say: Say) -> Report:
    """A training step of each phase of a recipe beside a dense one; each of a few micro-batches."""
    training = recipe.training
    _check_step(recipe, nproc)
    _warn(device(), training.seq_len, say)
    micro_batch = training.local_batch_size * nproc // recipe.parallel.context
    notes, batch = [], min(training.global_batch_size, _MICRO_BATCHES * micro_batch)
    if batch < training.global_batch_size:
        notes.append(
            f"The steps have {_MICRO_BATCHES} of their {training.global_batch_size // micro_batch} micro-batches, so "
            "that the optimizer weighs more than in training."
        )
    settings = [*settings, f"training.global_batch_size={batch}"]
    found: list[StepProfile] = []

    def timed(place: Path, **which: Any) -> None:
        # Before the first step `_warn` has looked; the others begin minutes later.
        if found and (others := _others(device())):
            say(others)
            notes.append(f"After {len(found)} of these steps: {others}.")
        found.append(run_step(path, settings, place, nproc, say, **which))

    # What a dense phase takes, the dense step tells.
    for phase in recipe.sparse_phases if recipe.lighthouse.phases else ():
        timed(folder / f"phase-{phase.number}", phase=phase.number)
    if not found:
        timed(folder)
    if recipe.lighthouse.enabled:
        try:
            timed(folder / "dense", stage="dense")
        except LighthouseError as error:
            notes.append(f"No dense step: {error}")
            say(notes[-1])
    found = [profile.within(folder) for profile in found]
    return Report(
        f"A training step of {path.stem}",
        "step",
        describe(device()),
        [*step_parts(found), *notes],
        {"steps": [profile.as_json() for profile in found], "notes": notes},
    )


def tune(
    path: Path,
    recipe: Recipe,
    settings: list[str],
    floor: float,
    folder: Path,
    nproc: int,
    say: Say,
) -> Report:
    """Settings of stage 1 for a recipe's model, by time under a floor."""
    where, training = device(), recipe.training
    _check_step(recipe, nproc)
    _warn(where, training.seq_len, say)

    def run(more: list[str]) -> StepProfile:
        batch = f"training.global_batch_size={training.local_batch_size * nproc // recipe.parallel.context}"
        return run_step(path, [*settings, *more, batch], folder, nproc, say)

    with _explained():
        advice = advise(recipe, path.stem, floor, where, say, run)
    return Report(f"Settings for {path.stem}", "tune", describe(where), tune_parts(advice), advice.as_json())


def selection(path: Path, sequences: int, say: Say) -> Report:
    """What a checkpoint of stage 1 selects."""
    say(f"reading what {path} selects")
    view = selection_view(path, sequences=sequences)
    return Report(
        f"What {view.run} selects at step {view.step}",
        "selection",
        describe(device()),
        heads_parts(view) if isinstance(view, HeadsView) else selection_parts(view),
        {"selection": view.as_json()},
        draw=lambda place: _drawn(selection_figure.draw(view, place / "selection"), say),
    )
