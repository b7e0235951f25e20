"""Pooling and scoring as one operation of torch. Carries no gradient: `gather` has that of both."""

import torch
from torch import Tensor
from torch.library import custom_op

from lighthouse_kernels.geometry import Geometry
from lighthouse_kernels.launching import rows_contiguous
from lighthouse_kernels.pyramid import triton as kernel


@custom_op("lighthouse::pyramid", mutates_args=())
def pyramid(
    q: Tensor, k: Tensor, v: Tensor, shape: list[int], pooled: bool, scored: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `triton.pyramid`."""
    q, k, v = map(rows_contiguous, (q, k, v))
    return kernel.pyramid(q, k, v, Geometry.of(shape), pooled=pooled, scored=scored)


@pyramid.register_fake
def _(q, k, v, shape, pooled, scored):
    g = Geometry.of(shape)
    rows = kernel.stored_rows(g) if pooled else 0
    above = g.pyramid_length - g.padded if scored else 0
    stored = (x.new_empty(x.shape[0], rows, x.shape[2], x.shape[3]) for x in (q, k, v))
    scores = (x.new_empty(x.shape[0], x.shape[2], above, dtype=torch.float32) for x in (q, k))
    return (*stored, *scores)
