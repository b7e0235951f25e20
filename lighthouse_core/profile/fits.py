"""Straight lines through measurements on logarithmic scales. Nothing here imports torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PowerLaw:
    """ms = scale * tokens ** slope."""

    slope: float
    scale: float

    def at(self, tokens: float) -> float:
        """Milliseconds."""
        return self.scale * tokens**self.slope


def fit(tokens: Sequence[float], ms: Sequence[float]) -> PowerLaw | None:
    """Least squares through the logarithms; None for fewer than two lengths."""
    if len(set(tokens)) < 2:
        return None
    x, y = [math.log(n) for n in tokens], [math.log(t) for t in ms]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return PowerLaw(slope, math.exp(mean_y - slope * mean_x))


@dataclass(frozen=True)
class Crossover:
    """Where one curve falls below another.

    Attributes:
        tokens: the length, interpolated on logarithmic scales; None where the curves do not cross.
        note: in words.
    """

    tokens: float | None
    note: str


def crossover(tokens: Sequence[int], ours: Sequence[float], theirs: Sequence[float]) -> Crossover:
    """The length from which on `ours` is below `theirs`, both in milliseconds at the same lengths, which grow."""
    gaps = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    if gaps[-1] >= 0:
        return Crossover(None, f"dense attention is as fast or faster at {tokens[-1]} tokens")
    above = [number for number, gap in enumerate(gaps) if gap >= 0]
    if not above:
        return Crossover(None, f"Lighthouse is faster from {tokens[0]} tokens on, the shortest measured")
    last = above[-1]
    share = gaps[last] / (gaps[last] - gaps[last + 1])
    low, high = math.log(tokens[last]), math.log(tokens[last + 1])
    where = math.exp(low + share * (high - low))
    return Crossover(where, f"Lighthouse is faster from about {where:,.0f} tokens on")
