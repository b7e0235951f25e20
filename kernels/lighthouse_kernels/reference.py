"""Every operation in plain PyTorch, on any device: the readable truth.

A backend is a module with `pyramid`, `norm_scores`, `select`, `select_drawn`, `given`, `gather`, `scatter` and `merge`,
and with what activation checkpointing has to know: SELECTING, the operations that decide the selection, and GATHERING,
those whose results are better kept than made again.
"""

import torch
from torch import Tensor

from lighthouse_kernels.gather.reference import gather as gather_rows
from lighthouse_kernels.geometry import Geometry
from lighthouse_kernels.merge.reference import merge as merge_parts
from lighthouse_kernels.pyramid.reference import block_scores, pool, random_scores
from lighthouse_kernels.pyramid.reference_op import norm_scores
from lighthouse_kernels.scatter.reference import scatter as scatter_rows
from lighthouse_kernels.select.reference import select as select_windows
from lighthouse_kernels.types import Pyramid, Selection

SELECTING = (torch.ops.lighthouse.norm_scores.default,)
GATHERING = ()


def pyramid(q: Tensor, k: Tensor, v: Tensor, g: Geometry, *, scored: bool) -> Pyramid:
    """Rows of all levels, differentiable, and the norm scores if `scored`."""
    scores = norm_scores(q.detach(), k.detach(), g) if scored else None
    return Pyramid(pool(q, g), pool(k, g), pool(v, g), scores)


def select(scores: tuple[Tensor, Tensor], g: Geometry) -> Selection:
    """The selection from (s_Q, s_K), each [B, Hkv, M] float32."""
    return given(select_windows(*scores, g), g)


def select_drawn(key: Tensor, batch: int, kv_heads: int, score_block: int, g: Geometry) -> Selection:
    """The selection from scores drawn from `key`, one a window, or one a block of `score_block` tokens if not 0."""
    if score_block:
        drawn = block_scores(key, batch, kv_heads, score_block, g)
    else:
        drawn = random_scores(key, batch, kv_heads, g)
    return select((drawn, drawn), g)


def given(indices: Tensor, g: Geometry) -> Selection:
    """The selection that these indices make."""
    return Selection(indices, None)


def gather(
    q: Tensor, k: Tensor, v: Tensor, pyramid: Pyramid, selection: Selection, g: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, S, H, D], k and v [B, S, Hkv, D]: the kept rows in causal order."""
    q, k, v = (gather_rows(x, selection.indices) for x in pyramid[:3])
    return q, k, v


def scatter(rows: Tensor, selection: Selection, g: Geometry) -> Tensor:
    """[B, N, H, D] from the dense call's rows, [B, S, H, D]."""
    return scatter_rows(rows, selection.indices, g)


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
    [B, N, H] and [B, S, H] of both. `begins`, [B, N'/c_(L-1)] int32: for each window of the coarsest level the first
    token of its document; None where a sequence is one document."""
    return merge_parts(out, lse, rows, row_lse, selection.indices, g, begins)
