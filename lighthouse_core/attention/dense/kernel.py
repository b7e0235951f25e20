"""What a dense kernel is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload

from lighthouse_core.attention.context import Documents


class Tiles(NamedTuple):
    """Which keys the queries of each tile see: the last ones before each query, and chosen blocks before these.

    N is a multiple of `tile` and of `block_size`, one of which divides the other; a document begins at a multiple of
    both.

    Attributes:
        chosen: int32 [B, Hkv, N / tile, n], the numbers of the blocks, ascending, each wholly before the window of the
            tile's first query and in its document. N / block_size stands for no block.
        starts: int32 [B, N / tile], the first token of the tile's document within the sequence; None for 0.
        window: tokens before each query, its own included.
        tile: queries of a tile.
        block_size: keys of a block.
    """

    chosen: Tensor
    starts: Tensor | None
    window: int
    tile: int
    block_size: int


@dataclass(frozen=True)
class DenseKernel:
    """A stock kernel of causal attention: q [B, N, H, D], k and v [B, N, Hkv, D] -> [B, N, H, D].

    Attributes:
        name: as recipes have it.
        label: for reports.
        absence: device type -> why it is not there for any tensor on such a device; None if it is. Touches no GPU.
        obstacle: device type, dtype, D -> why it cannot take such tensors; None if it can.
        forward: q, k, v, scale (None for 1/sqrt(D)) -> output; differentiable.
        part: q, k, v, scale, window (0 for all tokens) -> output and its log-sum-exp [B, N, H], float32 or wider, both
            differentiable; None for a kernel that has none.
        windowed: q, k, v, scale, window -> output; None for a kernel without windows.
        packed: q [T, H, D], k and v [T, Hkv, D] of packed documents, scale, window, documents -> output [T, H, D] and
            its log-sum-exp [T, H], None from a kernel without `part`; None for a kernel of equal lengths alone.
        packs: as `obstacle`, of documents; None if that is the same.
        blocked: q, k, v, scale, tiles -> output; None for a kernel without chosen blocks.
        blocks: as `obstacle`, of chosen blocks: device type, dtype, D, tile, block size. None for one that takes all.
        kept: operations of its forward pass, whose results selective checkpointing keeps.
    """

    name: str
    label: str
    absence: Callable[[str], str | None]
    obstacle: Callable[[str, torch.dtype, int], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
    part: Callable[[Tensor, Tensor, Tensor, float | None, int], tuple[Tensor, Tensor]] | None = None
    windowed: Callable[[Tensor, Tensor, Tensor, float | None, int], Tensor] | None = None
    packed: Callable[[Tensor, Tensor, Tensor, float | None, int, Documents], tuple[Tensor, Tensor | None]] | None = None
    packs: Callable[[str, torch.dtype, int], str | None] | None = None
    blocked: Callable[[Tensor, Tensor, Tensor, float | None, Tiles], Tensor] | None = None
    blocks: Callable[[str, torch.dtype, int, int, int], str | None] | None = None
    kept: tuple[OpOverload | HigherOrderOperator, ...] = ()
