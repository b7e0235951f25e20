"""The learning rate as a function of the step."""

from collections.abc import Callable
from functools import partial
from math import cos, pi, sqrt
from typing import NamedTuple

from lighthouse_core.config import Recipe
from lighthouse_core.config.schedule import DecayShape

# The factor on the rate; `left` is the part of the decay that is to come. "1-sqrt": Hägele et al., arXiv 2405.18392.
_SHAPES: dict[DecayShape, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cosine": lambda left: (1 + cos(pi * (1 - left))) / 2,
    "1-sqrt": lambda left: 1 - sqrt(1 - left),
}


class Decay(NamedTuple):
    """A decay of the rate. The update after its first step has the full rate, one after its last would have `least`.

    Attributes:
        start, end: finished steps at which it begins and ends.
        shape: of the rate between them.
        least: factor on the rate at the end.
    """

    start: int
    end: int
    shape: DecayShape = "linear"
    least: float = 0.0

    def factor(self, step: int) -> float:
        """Factor on the rate of the update that follows `step` finished steps, from `least` to 1."""
        if step <= self.start:
            return 1.0
        left = max(0.0, (self.end - step) / (self.end - self.start))
        return self.least + (1 - self.least) * _SHAPES[self.shape](left)


def lr_factor(step: int, *, warmup: int, decay: Decay | None = None, base: float = 1.0) -> float:
    """Factor on the base learning rate for the update that follows `step` finished steps.

    Linear warm-up, then constant, then the `decay`.

    Args:
        step: finished steps.
        warmup: steps of warm-up; the first update uses 1/warmup.
        decay: of the rate.
        base: factor on all of it.

    Returns:
        A factor in [0, 1].
    """
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return factor * base * (decay.factor(step) if decay else 1.0)


def stage_1_factor(recipe: Recipe) -> Callable[[int], float]:
    """`lr_factor` of stage 1, or of a run that is dense from the start, as a function of the finished steps."""
    return partial(lr_factor, warmup=recipe.schedule.warmup_steps, decay=_of_stage_1(recipe))


def recovery_factor(recipe: Recipe, start: int, end: int) -> Callable[[int], float]:
    """`lr_factor` of a recovery between two steps of its run. It begins with the rate that stage 1 has come to."""
    before, shape = _of_stage_1(recipe), recipe.recover.decay
    return partial(
        lr_factor,
        warmup=recipe.schedule.warmup_steps,
        decay=None if shape == "none" else Decay(start, end, shape),
        base=before.factor(start) if before else 1.0,
    )


def _of_stage_1(recipe: Recipe) -> Decay | None:
    schedule, end = recipe.schedule, recipe.training.steps
    if not schedule.decay_steps:
        return None
    return Decay(end - schedule.decay_steps, end, schedule.decay, schedule.min_lr_factor)
