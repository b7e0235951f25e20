"""What one operation hands to the next, the same for every backend."""

from typing import NamedTuple

import torch
from torch import Tensor


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
        indices: [B, Hkv, S] integers, flat pyramid indices in causal order.
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
