"""Pooled rows and window scores in one pass over q, k and v.

Windows of fewer than `geometry.STORED_TOKENS` tokens are not stored: the gather averages them from the tokens, which
costs less than writing all of them to read the few that are kept.

The two finest levels are reduced row by row in registers; only the coarser ones exchange data between threads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lighthouse_kernels.launching import Layout, padded_dim, row_strides, target

# Rows that one program reduces, and its warps.
BLOCK_ROWS, WARPS = 64, 2


@triton.jit
def _offset(padded, LOG_P: tl.constexpr, FROM: tl.constexpr, LEVEL: tl.constexpr):
    """Windows of the levels FROM .. LEVEL - 1."""
    total = tl.zeros([], tl.int64)
    for level in tl.static_range(FROM, LEVEL):
        total += padded >> (LOG_P * level)
    return total


@triton.jit
def _store_mean(
    total, p_out, stride, o_w, padded, ROWS: tl.constexpr, LEVEL: tl.constexpr, STORED: tl.constexpr,
    LOG_P: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Store the means of windows of LEVEL from sums over ROWS rows each."""
    o_d = tl.arange(0, D2)
    p_w = p_out + (_offset(padded, LOG_P, STORED, LEVEL) + o_w)[:, None] * stride + o_d[None, :]
    m = (o_w < (padded >> (LOG_P * LEVEL)))[:, None] & (o_d < D)[None, :]
    tl.store(p_w, (total * (1.0 / ROWS)).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _store_score(best, p_score, o_w, padded, LEVEL: tl.constexpr, LOG_P: tl.constexpr):
    m = o_w < (padded >> (LOG_P * LEVEL))
    tl.store(p_score + _offset(padded, LOG_P, 1, LEVEL) + o_w, best, mask=m)


@triton.jit
def _reduce(
    p_x, p_out, p_score, stride_b, stride_n, stride_h, i_b, i_block, i_h,
    rows, padded, heads, score_length, stored_length,
    D: tl.constexpr, D2: tl.constexpr, LOG_P: tl.constexpr, BASE: tl.constexpr, COUNT: tl.constexpr,
    STORED: tl.constexpr, OUTER: tl.constexpr, WINDOWS: tl.constexpr, POOL: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """Reduce a block of rows of level BASE, of one head of one tensor, to the COUNT levels above it.

    The block is WINDOWS windows of OUTER * p rows; OUTER is p where two levels are reduced in registers, else 1.
    """
    P: tl.constexpr = 1 << LOG_P
    # Levels reduced in registers.
    INNER: tl.constexpr = 1 if OUTER == 1 else 2
    o_w = i_block * WINDOWS + tl.arange(0, WINDOWS)
    o_d = tl.arange(0, D2)
    p_x += i_b * stride_b + i_h * stride_h
    p_out += (i_b * stored_length * heads + i_h) * D
    p_score += (i_b * heads + i_h) * score_length
    stride = heads * D

    total = tl.zeros([WINDOWS, D2], tl.float32)
    best = tl.full([WINDOWS], -1.0, tl.float32)
    for y in tl.static_range(OUTER):
        part = tl.zeros([WINDOWS, D2], tl.float32)
        best_part = tl.full([WINDOWS], -1.0, tl.float32)
        for x in tl.static_range(P):
            o_n = o_w * (OUTER * P) + y * P + x
            m_n = o_n < rows
            if POOL or BASE == 0:
                m = m_n[:, None] & (o_d < D)[None, :]
                row = tl.load(p_x + o_n[:, None] * stride_n + o_d[None, :], mask=m, other=0.0).to(tl.float32)
                part += row
            if SCORE:
                if BASE == 0:
                    score = tl.where(m_n, tl.sqrt(tl.sum(row * row, axis=1)), -1.0)
                else:
                    # Above level 0 the scores are those already there.
                    score = tl.load(p_score + _offset(padded, LOG_P, 1, BASE) + o_n, mask=m_n, other=-1.0)
                best_part = tl.maximum(best_part, score)
        if OUTER > 1:
            if SCORE:
                _store_score(best_part, p_score, o_w * OUTER + y, padded, BASE + 1, LOG_P)
            if POOL and BASE + 1 >= STORED:
                _store_mean(part, p_out, stride, o_w * OUTER + y, padded, P, BASE + 1, STORED, LOG_P, D, D2)
        total += part
        best = tl.maximum(best, best_part)

    for i in tl.static_range(INNER, COUNT + 1):
        if i > INNER:
            total = tl.sum(tl.reshape(total, [WINDOWS >> (LOG_P * (i - INNER)), P, D2]), axis=1)
            best = tl.max(tl.reshape(best, [WINDOWS >> (LOG_P * (i - INNER)), P]), axis=1)
        o_i = i_block * (WINDOWS >> (LOG_P * (i - INNER))) + tl.arange(0, WINDOWS >> (LOG_P * (i - INNER)))
        if SCORE:
            _store_score(best, p_score, o_i, padded, BASE + i, LOG_P)
        if POOL and BASE + i >= STORED:
            _store_mean(total, p_out, stride, o_i, padded, 1 << (LOG_P * i), BASE + i, STORED, LOG_P, D, D2)


@triton.jit
def _reduce_kernel(
    p_q, p_k, p_v, p_pooled_q, p_pooled_k, p_pooled_v, p_by_query, p_by_key,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    rows, padded, blocks, heads, kv_heads, score_length, stored_length,
    D: tl.constexpr, D2: tl.constexpr, LOG_P: tl.constexpr, BASE: tl.constexpr, COUNT: tl.constexpr,
    STORED: tl.constexpr, OUTER: tl.constexpr, WINDOWS: tl.constexpr, POOL: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """A block of one head of q, k or v; v only where rows are stored, for it has no scores."""
    pid = tl.program_id(0).to(tl.int64)
    all_heads = heads + kv_heads * 2 if POOL else heads + kv_heads
    i_h = pid % all_heads
    i_block = (pid // all_heads) % blocks
    i_b = pid // (all_heads * blocks)
    if i_h < heads:
        _reduce(
            p_q, p_pooled_q, p_by_query, sqb, sqn, sqh, i_b, i_block, i_h,
            rows, padded, heads, score_length, stored_length,
            D, D2, LOG_P, BASE, COUNT, STORED, OUTER, WINDOWS, POOL, SCORE,
        )  # fmt: skip
    elif i_h < heads + kv_heads:
        _reduce(
            p_k, p_pooled_k, p_by_key, skb, skn, skh, i_b, i_block, i_h - heads,
            rows, padded, kv_heads, score_length, stored_length,
            D, D2, LOG_P, BASE, COUNT, STORED, OUTER, WINDOWS, POOL, SCORE,
        )  # fmt: skip
    elif POOL:
        _reduce(
            p_v, p_pooled_v, p_by_key, svb, svn, svh, i_b, i_block, i_h - heads - kv_heads,
            rows, padded, kv_heads, score_length, stored_length,
            D, D2, LOG_P, BASE, COUNT, STORED, OUTER, WINDOWS, True, False,
        )  # fmt: skip


def pyramid(
    q: Tensor, k: Tensor, v: Tensor, g: Layout, *, pooled: bool, scored: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pool and score.

    Args:
        q: [B, N, H, D]; k, v: [B, N, Hkv, D], 16-bit or float32, last dimension contiguous.
        g: the pyramid.
        pooled: whether to store rows.
        scored: whether to store scores.

    Returns:
        pooled q [B, R, H, D], k and v [B, R, Hkv, D] with R = `g.stored_rows`; s_Q [B, H, M - N'] of every query head
        and s_K [B, Hkv, M - N'], float32, of the levels above 0. What was not asked for is empty.
    """
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    p, log_p, first = g.pooling, g.log_p, g.stored_from
    length = g.stored_rows if pooled else 0
    above = g.scored if scored else 0
    outs = [x.new_empty(batch, length, x.shape[2], dim) for x in (q, k, v)]
    scores = [x.new_empty(batch, x.shape[2], above, dtype=torch.float32) for x in (q, k)]
    block = max(BLOCK_ROWS, p)
    sources = [q, k, v]
    base, rows, highest = 0, tokens, g.levels - 1 if length or scored else 0
    while base < highest:
        # All levels whose windows fit in a block of rows; the next launch goes on from the last of them.
        count = min(highest - base, (block.bit_length() - 1) // log_p)
        outer = p if count > 1 and p <= 4 else 1
        blocks = -(-g.windows[base] // block)
        programs = batch * blocks * (heads + kv_heads * (2 if length else 1))
        with target(q):
            _reduce_kernel[(programs,)](
                *sources, *outs, *scores, *(stride for x in sources for stride in row_strides(x)),
                rows, g.padded, blocks, heads, kv_heads, above, length,
                D=dim, D2=padded_dim(dim), LOG_P=log_p, BASE=base, COUNT=count, STORED=first, OUTER=outer,
                WINDOWS=block // (outer * p), POOL=length > 0, SCORE=scored, num_warps=WARPS,
            )  # fmt: skip
        base += count
        rows = g.windows[base]
        if length and base < highest:
            start = sum(g.windows[first:base])
            sources = [x[:, start : start + rows] for x in outs]
    pooled_q, pooled_k, pooled_v = outs
    by_query, by_key = scores
    return pooled_q, pooled_k, pooled_v, by_query, by_key
