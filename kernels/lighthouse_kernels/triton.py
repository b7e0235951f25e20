"""Every operation as Triton kernels: what `reference.py` does, in the fewest passes over memory, without atomics."""

import torch
from torch import Tensor

from lighthouse_kernels.gather import op as gather_op
from lighthouse_kernels.geometry import Geometry
from lighthouse_kernels.merge import op as merge_op
from lighthouse_kernels.pyramid import op as pyramid_op
from lighthouse_kernels.scatter import op as scatter_op
from lighthouse_kernels.select import op as select_op
from lighthouse_kernels.types import Pyramid, Selection, slots_of

SELECTING = (select_op.select, select_op.select_drawn)
GATHERING = (gather_op.gather,)


def pyramid(q: Tensor, k: Tensor, v: Tensor, g: Geometry, *, scored: bool) -> Pyramid:
    """Rows of the wider windows, without a gradient (`gather` has it), and the norm scores if `scored`."""
    q, k, v, by_query, by_key = pyramid_op.pyramid(q.detach(), k.detach(), v.detach(), g.shape, True, scored)
    return Pyramid(q, k, v, (by_query, by_key) if scored else None)


def norm_scores(q: Tensor, k: Tensor, g: Geometry) -> tuple[Tensor, Tensor]:
    """(s_Q [B, H, M - N'] of every query head, s_K [B, Hkv, M - N']) of the levels above 0, float32."""
    q, k = q.detach(), k.detach()
    *_, by_query, by_key = pyramid_op.pyramid(q, k, k, g.shape, False, True)
    return by_query, by_key


def select(scores: tuple[Tensor, Tensor], g: Geometry) -> Selection:
    """The selection from (s_Q, s_K), [B, Hkv, M] float32 or of the levels above 0 alone."""
    above = g.pyramid_length - g.padded
    return Selection(*select_op.select(*(x[..., -above:] for x in scores), g.shape))


def select_drawn(key: Tensor, batch: int, kv_heads: int, score_block: int, g: Geometry) -> Selection:
    """The selection from scores drawn from `key`, one a window, or one a block of `score_block` tokens if not 0."""
    return Selection(*select_op.select_drawn(_whole(key), batch, kv_heads, score_block, g.shape))


def _whole(key: Tensor) -> Tensor:
    return key if key.numel() == 5 else torch.cat((key, key.new_zeros(5 - key.numel())))


def given(indices: Tensor, g: Geometry) -> Selection:
    """The selection that these indices make."""
    return Selection(indices.int().contiguous(), slots_of(indices, g.pyramid_length))


def gather(
    q: Tensor, k: Tensor, v: Tensor, pyramid: Pyramid, selection: Selection, g: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S, H, D], k and v [B, S, Hkv, D]: the kept rows in causal order. Differentiable in q, k and v."""
    return gather_op.gather(q, k, v, *pyramid[:3], *selection, g.shape)


def scatter(rows: Tensor, selection: Selection, g: Geometry) -> Tensor:
    """[B, N, H, D] from the dense call's rows, [B, S, H, D]. Differentiable."""
    return scatter_op.scatter(rows, *selection, g.shape)


def merge(
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    row_lse: Tensor,
    selection: Selection,
    g: Geometry,
    begins: Tensor | None = None,
) -> Tensor:
    """[B, N, H, D] from a window's attention [B, N, H, D] and the dense call's rows [B, S, H, D], with the log-sum-exps
    [B, N, H] and [B, S, H] of both. Differentiable in these four. `begins`, [B, N'/c_(L-1)] int32: for each window of
    the coarsest level the first token of its document; None where a sequence is one document."""
    sums = lse.transpose(1, 2), row_lse.transpose(1, 2)
    return merge_op.merge(out, sums[0], rows, sums[1], *selection, begins, g.shape)[0]
