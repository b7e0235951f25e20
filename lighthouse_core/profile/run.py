"""The kinds of `lighthouse profile`: each measures, draws into a folder, and says what came of it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lighthouse_core.attention import LighthouseConfig, check_backends
from lighthouse_core.config import Recipe
from lighthouse_core.errors import UserError
from lighthouse_core.profile import plots, selection_figure
from lighthouse_core.profile.advise import advise
from lighthouse_core.profile.machine import describe, roof
from lighthouse_core.profile.report import Report, attention_parts, selection_parts, step_parts, tune_parts
from lighthouse_core.profile.selection import selection_view
from lighthouse_core.profile.step import StepProfile, run_step
from lighthouse_core.profile.sweep import profile_lengths
from lighthouse_core.profile.work import Shape

Say = Callable[[str], None]


def device() -> torch.device:
    """Where everything is measured: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def attention(
    shapes: Sequence[tuple[Shape, LighthouseConfig]], folder: Path, say: Say, *, columns: int = 0, colour: bool = False
) -> tuple[Report, str | None]:
    """One attention call at each length beside dense attention, and the plot for a terminal so many columns wide."""
    where = device()
    try:
        for _, cfg in shapes:
            check_backends(cfg, where.type)
    except ValueError as error:
        raise UserError(str(error)) from None
    number = getattr(torch, shapes[0][0].dtype)
    found, limits = profile_lengths(shapes, lambda: roof(where, number), where, say)
    files = plots.draw(found, folder) if len(found.profiles) > 1 else []
    lengths = ", ".join(str(profile.tokens) for profile in found.profiles)
    report = Report(
        f"One attention call of {lengths} tokens",
        "attention",
        describe(where),
        attention_parts(found),
        found.as_json(),
        limits,
        files,
    )
    return report, plots.terminal(found, columns, colour=colour) if columns else None


def step(path: Path, recipe: Recipe, settings: list[str], folder: Path, nproc: int | None, say: Say) -> Report:
    """A training step of a recipe, and one with every layer dense beside it."""
    found = [run_step(path, settings, folder, nproc, say)]
    if recipe.lighthouse.enabled:
        found.append(run_step(path, settings, folder / "dense", nproc, say, stage="dense"))
    return Report(
        f"A training step of {path.stem}",
        "step",
        describe(device()),
        step_parts(found),
        {"steps": [profile.as_json() for profile in found]},
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

    def run(more: list[str]) -> StepProfile:
        batch = f"training.global_batch_size={training.local_batch_size * nproc}"
        return run_step(path, [*settings, *more, batch], folder, nproc, say)

    advice = advise(recipe, path.stem, floor, where, say, run)
    return Report(f"Settings for {path.stem}", "tune", describe(where), tune_parts(advice), advice.as_json())


def selection(path: Path, sequences: int, folder: Path, say: Say) -> Report:
    """What a checkpoint of stage 1 selects."""
    say(f"reading what {path} selects")
    view = selection_view(path, sequences=sequences)
    files = selection_figure.draw(view, folder / "selection") or []
    return Report(
        f"What {view.run} selects at step {view.step}",
        "selection",
        describe(device()),
        selection_parts(view),
        {"selection": view.as_json()},
        files=files,
    )
