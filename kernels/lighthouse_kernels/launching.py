"""What every kernel launch and every operation of torch needs."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lighthouse_kernels.geometry import Geometry

# The guard under which an operation's gradient formula calls the operation itself.
below_autograd = torch._C._AutoDispatchBelowAutograd


def target(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; make that the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def padded_dim(dim: int) -> int:
    """Columns of a tile: the next power of two."""
    return max(16, 1 << (dim - 1).bit_length())


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head, in elements."""
    assert x.stride(3) == 1 or x.shape[3] == 1
    return x.stride(0), x.stride(1), x.stride(2)


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is contiguous, as the kernels need it, else a copy."""
    return x if x.stride(3) == 1 else x.contiguous()


def operation(function: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register a function as `torch.ops.lighthouse.<its name>`, which a compiler leaves whole.

    Done in the plain way: `torch.library.custom_op` takes some tens of microseconds more a call.
    """
    name = f"lighthouse::{function.__name__}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, ("cpu", "cuda"), function)
    return getattr(torch.ops.lighthouse, function.__name__).default


class Layout:
    """The numbers of a pyramid that launches need, worked out once."""

    def __init__(self, g: Geometry):
        self.geometry = g
        self.tokens, self.levels, self.pooling = g.tokens, g.levels, g.pooling
        self.log_p = g.pooling.bit_length() - 1
        self.padded = g.padded
        # Of a whole sequence, which has no padding where it has shards.
        self.first, self.whole = g.first, g.whole or g.padded
        self.windows = [g.windows(level) for level in range(g.levels)]
        self.pyramid_length = g.pyramid_length
        self.entries = g.selected_length
        self.tiles = g.tiles
        self.stored_from = g.stored_from
        # Rows of all stored levels, in flat pyramid order.
        self.stored_rows = sum(self.windows[self.stored_from :])
        # Windows of the levels above 0, which have scores.
        self.scored = self.pyramid_length - self.padded


@functools.lru_cache(maxsize=256)
def _layout(shape: tuple[int, ...]) -> Layout:
    return Layout(Geometry.of(shape))


def layout(shape: list[int]) -> Layout:
    """The layout of `Geometry.shape`, worked out once for each."""
    return _layout(tuple(shape))


def symbolic_layout(shape: list[int]) -> Layout:
    """The same where a compiler may not know the length yet: such a shape cannot be looked up."""
    return Layout(Geometry.of(shape))
