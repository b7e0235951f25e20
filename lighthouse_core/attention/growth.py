"""How a window grows from a phase's first step to its last: SkyLadder's idea (arXiv 2503.15450). Imports no torch."""

import math
from typing import Literal

Growth = Literal["linear", "geometric"]

# Dense kernels work on tiles of so many tokens: other windows would leave a part of a tile.
_TILE = 128


def grown(first: int, last: int, growth: Growth, done: int, steps: int) -> int:
    """The window in tokens, `done` of `steps` steps after the phase's first one; `last` from there on.

    Between the first and the last step it is rounded down to a multiple of 128 tokens, the tile of the dense kernels;
    where the first window is shorter, of the largest power of two up to that window.
    """
    if done >= steps:
        return last
    if growth == "linear":
        return _rounded(first + (last - first) * done // steps, first, last)
    # A hair more: what is a whole number of tokens may come out a rounding error below.
    return _rounded(int(first * (last / first) ** (done / steps) * (1 + 1e-9)), first, last)


def mean_window(first: int, last: int, growth: Growth) -> int:
    """The mean in tokens over the steps of a phase of many steps, rounded as above.

    Where a step's time is linear in its window, as with chunks, a step with this window takes the phase's mean time.
    """
    if growth == "linear" or first == last:
        return _rounded((first + last) // 2, first, last)
    return _rounded(int((last - first) / math.log(last / first)), first, last)


def _rounded(window: int, first: int, last: int) -> int:
    unit = min(_TILE, 1 << (first.bit_length() - 1))
    return min(last, max(first, window // unit * unit))
