"""Selection as an operation of torch, from scores or from a key. Carries no gradient."""

import torch
from torch import Tensor
from torch.library import custom_op

from lighthouse_kernels.geometry import Geometry
from lighthouse_kernels.select import triton as kernel


def _selection(like: Tensor, batch: int, kv_heads: int, g: Geometry) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty(batch, kv_heads, g.selected_length, dtype=torch.int32),
        like.new_empty(batch, kv_heads, g.pyramid_length, dtype=torch.int32),
    )


@custom_op("lighthouse::select", mutates_args=())
def select(by_query: Tensor, by_key: Tensor, shape: list[int]) -> tuple[Tensor, Tensor]:
    """See `triton.select`; the scores are those of the levels above 0."""
    scores = by_query.contiguous(), by_key.contiguous()
    return kernel.select(Geometry.of(shape), *by_key.shape[:2], scores=scores)


@select.register_fake
def _(by_query, by_key, shape):
    return _selection(by_query, *by_key.shape[:2], Geometry.of(shape))


@custom_op("lighthouse::select_drawn", mutates_args=())
def select_drawn(key: Tensor, batch: int, kv_heads: int, score_block: int, shape: list[int]) -> tuple[Tensor, Tensor]:
    """See `triton.select`; scores are drawn from `key`, int64 [4]."""
    return kernel.select(Geometry.of(shape), batch, kv_heads, key=key.contiguous(), score_block=score_block)


@select_drawn.register_fake
def _(key, batch, kv_heads, score_block, shape):
    return _selection(key, batch, kv_heads, Geometry.of(shape))
