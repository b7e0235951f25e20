"""Selection as an operation of torch, from scores or from a key. Carries no gradient."""

import torch
from torch import Tensor
from torch.library import register_fake

from lighthouse_kernels.launching import Layout, layout, operation, symbolic_layout
from lighthouse_kernels.select import triton as kernel


def _selection(like: Tensor, batch: int, kv_heads: int, g: Layout) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty(batch, kv_heads, g.entries, dtype=torch.int32),
        like.new_empty(batch, kv_heads, g.pyramid_length, dtype=torch.int32),
    )


@operation
def select(by_query: Tensor, by_key: Tensor, shape: list[int]) -> tuple[Tensor, Tensor]:
    """See `triton.select`; the scores are those of the levels above 0."""
    scores = by_query.contiguous(), by_key.contiguous()
    return kernel.select(layout(shape), *by_key.shape[:2], scores=scores)


@register_fake("lighthouse::select")
def _(by_query, by_key, shape):
    return _selection(by_query, by_key.shape[0], by_key.shape[1], symbolic_layout(shape))


@operation
def select_drawn(key: Tensor, batch: int, kv_heads: int, score_block: int, shape: list[int]) -> tuple[Tensor, Tensor]:
    """See `triton.select`; scores are drawn from `key`, int64 [5]."""
    return kernel.select(layout(shape), batch, kv_heads, key=key.contiguous(), score_block=score_block)


@register_fake("lighthouse::select_drawn")
def _(key, batch, kv_heads, score_block, shape):
    return _selection(key, batch, kv_heads, symbolic_layout(shape))
