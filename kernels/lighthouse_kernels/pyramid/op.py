"""Pooling and scoring as one operation of torch. Carries no gradient: `gather` has that of both."""

import torch
from torch import Tensor
from torch.library import register_fake

from lighthouse_kernels.launching import layout, operation, rows_contiguous, symbolic_layout
from lighthouse_kernels.pyramid import triton as kernel


@operation
def pyramid(
    q: Tensor, k: Tensor, v: Tensor, shape: list[int], pooled: bool, scored: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `triton.pyramid`."""
    q, k, v = map(rows_contiguous, (q, k, v))
    return kernel.pyramid(q, k, v, layout(shape), pooled=pooled, scored=scored)


@register_fake("lighthouse::pyramid")
def _(q, k, v, shape, pooled, scored):
    g = symbolic_layout(shape)
    rows = g.stored_rows if pooled else 0
    above = g.scored if scored else 0
    stored = (x.new_empty(x.shape[0], rows, x.shape[2], x.shape[3]) for x in (q, k, v))
    scores = (x.new_empty(x.shape[0], x.shape[2], above, dtype=torch.float32) for x in (q, k))
    return (*stored, *scores)
