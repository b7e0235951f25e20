"""The norm scores as one operation that a compiler leaves whole.

A selection follows from the exact bits of the scores. Compiled together with what surrounds them, the norms would round
otherwise than in eager mode, so that recomputation and eager runs would select other windows; torch 2.11's inductor
even gets the maximum over grouped heads wrong on CUDA.
"""

import torch
from torch import Tensor

from lighthouse_kernels.geometry import Geometry
from lighthouse_kernels.pyramid import reference


def norm_scores(q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """See `reference.norm_scores`; the same bits in eager mode and under torch.compile."""
    g = geometry
    return _norm_scores(q, k, [g.pooling, g.levels, g.topk, g.tile_parents])


@torch.library.custom_op("lighthouse::norm_scores", mutates_args=())
def _norm_scores(q: Tensor, k: Tensor, shape: list[int]) -> tuple[Tensor, Tensor]:
    return reference.norm_scores(q, k, _geometry(q, shape))


@_norm_scores.register_fake
def _(q: Tensor, k: Tensor, shape: list[int]) -> tuple[Tensor, Tensor]:
    windows = _geometry(q, shape).pyramid_length
    scores = q.new_empty(q.shape[0], k.shape[2], windows, dtype=torch.float32)
    return scores, torch.empty_like(scores)


def _geometry(q: Tensor, shape: list[int]) -> Geometry:
    pooling, levels, topk, tile_parents = shape
    return Geometry(q.shape[1], pooling, levels, topk, tile_parents)
