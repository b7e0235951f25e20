"""What one operation hands to the next, the same for every backend."""

from typing import NamedTuple

import torch
from torch import Tensor

from lighthouse_kernels.geometry import Geometry


class Pyramid(NamedTuple):
    """Pooled rows and window scores of one call.

    Attributes:
        q: [B, R, H, D]; k, v: [B, R, Hkv, D]: the rows that the backend keeps, in flat pyramid order.
        scores: what the backend's `select` takes, or None where no scorer reads tokens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scores: tuple[Tensor, Tensor] | None


class Selection(NamedTuple):
    """The entries of one call.

    Attributes:
        indices: [B, Hkv, S] integers, flat pyramid indices in causal order. [B, Hkv, S + L - 1] where a shard's entries
            are followed by those of the shard before that serve its first positions; see `with_edge`.
        slots: [B, Hkv, M] int32, the place of each window among `indices`, -1 for those not kept; None where the
            backend needs none.
    """

    indices: Tensor
    slots: Tensor | None


def slots_of(indices: Tensor, windows: int) -> Tensor:
    """The slots of a selection, [B, Hkv, windows] int32: see `Selection`.

    Args:
        indices: [B, Hkv, S] integers, no window twice.
        windows: of the pyramid, M.
    """
    places = torch.arange(indices.shape[2], dtype=torch.int32, device=indices.device).expand(indices.shape)
    return places.new_full((*indices.shape[:2], windows), -1).scatter(2, indices.long(), places)


def last_kept(indices: Tensor, g: Geometry) -> Tensor:
    """Whether a shard keeps its last windows, which serve the first positions of the next one, too: int32
    [B, Hkv, L - 1], 1 or 0, of the levels 1 to L - 1. Those kept are its last entries, in this order.

    Args:
        indices: [B, Hkv, S] of the shard.
        g: its pyramid.
    """
    last = (indices[..., level - g.levels] == g.offset(level + 1) - 1 for level in range(1, g.levels))
    return torch.stack(tuple(last), 2).int()


def with_edge(selection: Selection, kept: Tensor) -> Selection:
    """A selection whose entries are followed by the last L - 1 of the shard before. The window of level l that ended
    just before the first token has the index -1 - l. An entry that is no such window has -1, and serves no position.

    Args:
        selection: of a shard.
        kept: `last_kept` of the shard before.
    """
    levels = torch.arange(1, kept.shape[2] + 1, device=kept.device)
    indices = torch.cat((selection.indices, (-1 - levels * kept).to(selection.indices.dtype)), 2)
    return selection._replace(indices=indices)
