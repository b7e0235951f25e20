"""Pooled rows and window scores in one pass over q, k and v.

Windows of fewer than `STORED_TOKENS` tokens are not stored: the gather averages them from the tokens, which costs less
than writing all of them to read the few that are kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lighthouse_kernels.geometry import Geometry
from lighthouse_kernels.launching import padded_dim, row_strides, target

# A window this wide is pooled once, for all; see kernels/README.md.
STORED_TOKENS = 16
# Rows that one program reduces.
BLOCK_ROWS = 64
WARPS = 4


def stored_from(g: Geometry) -> int:
    """The first level whose pooled rows are stored; `levels` where none is."""
    return next((level for level in range(1, g.levels) if g.window(level) >= STORED_TOKENS), g.levels)


def stored_rows(g: Geometry) -> int:
    """Rows of all stored levels, in flat pyramid order."""
    return g.pyramid_length - g.offset(stored_from(g))


@triton.jit
def _means(x, p_out, stride_row, i_block, padded, BASE, COUNT, STORED, LOG_P, BLOCK, D, D2):
    """Store the means of levels BASE + 1 .. BASE + COUNT from a block of rows of level BASE."""
    o_d = tl.arange(0, D2)
    o_level = tl.zeros([], tl.int64)
    for i in tl.static_range(COUNT):
        level = BASE + 1 + i
        x = tl.sum(tl.reshape(x, [BLOCK >> (LOG_P * (i + 1)), 1 << LOG_P, D2]), axis=1)
        if level >= STORED:
            # Levels between STORED and this one come before it.
            o_level = tl.zeros([], tl.int64)
            for j in tl.static_range(level - STORED):
                o_level += padded >> (LOG_P * (STORED + j))
            windows = padded >> (LOG_P * level)
            o_w = i_block * (BLOCK >> (LOG_P * (i + 1))) + tl.arange(0, BLOCK >> (LOG_P * (i + 1)))
            p_w = p_out + (o_level + o_w)[:, None] * stride_row + o_d[None, :]
            mean = x * (1.0 / (1 << (LOG_P * (i + 1))))
            tl.store(p_w, mean.to(p_out.dtype.element_ty), mask=(o_w < windows)[:, None] & (o_d < D)[None, :])


@triton.jit
def _maxima(s, p_score, i_block, padded, BASE, COUNT, LOG_P, BLOCK):
    """Store the scores of levels BASE + 1 .. BASE + COUNT from those of a block of rows of level BASE."""
    for i in tl.static_range(COUNT):
        level = BASE + 1 + i
        s = tl.max(tl.reshape(s, [BLOCK >> (LOG_P * (i + 1)), 1 << LOG_P]), axis=1)
        o_level = tl.zeros([], tl.int64)
        for j in tl.static_range(level - 1):
            o_level += padded >> (LOG_P * (1 + j))
        windows = padded >> (LOG_P * level)
        o_w = i_block * (BLOCK >> (LOG_P * (i + 1))) + tl.arange(0, BLOCK >> (LOG_P * (i + 1)))
        tl.store(p_score + o_level + o_w, s, mask=o_w < windows)


@triton.jit
def _reduce_kernel(
    p_q, p_k, p_v, p_oq, p_ok, p_ov, p_sq, p_sk,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    rows, padded, blocks, kv_heads, score_length, stored_length,
    GROUP: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, LOG_P: tl.constexpr, BASE: tl.constexpr,
    COUNT: tl.constexpr, STORED: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
    POOL: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    """Reduce a block of rows of level BASE, of one KV head, to the COUNT levels above it."""
    pid = tl.program_id(0).to(tl.int64)
    i_h = pid % kv_heads
    i_block = (pid // kv_heads) % blocks
    i_b = pid // (kv_heads * blocks)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, D2)
    m_n = o_n < rows
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    stride_kv = kv_heads * D
    stride_q = stride_kv * GROUP
    o_score = (i_b * kv_heads + i_h) * score_length

    # Above level 0 the scores are those already there, so that a level is read back from where it was written.
    o_base = tl.zeros([], tl.int64)
    for j in tl.static_range(BASE - 1):
        o_base += padded >> (LOG_P * (1 + j))

    by_query = tl.full([BLOCK], -1.0, tl.float32)
    for g in tl.static_range(GROUP):
        i_hq = i_h * GROUP + g
        if POOL or (SCORE and BASE == 0):
            x = tl.load(
                p_q + i_b * sqb + i_hq * sqh + o_n[:, None] * sqn + o_d[None, :], mask=m_nd, other=0.0
            ).to(tl.float32)  # fmt: skip
            if SCORE and BASE == 0:
                by_query = tl.maximum(by_query, tl.where(m_n, tl.sqrt(tl.sum(x * x, axis=1)), -1.0))
            if POOL:
                p_out = p_oq + i_b * stored_length * stride_q + i_hq * D
                _means(x, p_out, stride_q, i_block, padded, BASE, COUNT, STORED, LOG_P, BLOCK, D, D2)
    if SCORE:
        if BASE > 0:
            by_query = tl.load(p_sq + o_score + o_base + o_n, mask=m_n, other=-1.0)
        _maxima(by_query, p_sq + o_score, i_block, padded, BASE, COUNT, LOG_P, BLOCK)

    if POOL or (SCORE and BASE == 0):
        x = tl.load(p_k + i_b * skb + i_h * skh + o_n[:, None] * skn + o_d[None, :], mask=m_nd, other=0.0)
        x = x.to(tl.float32)
    if SCORE:
        if BASE > 0:
            by_key = tl.load(p_sk + o_score + o_base + o_n, mask=m_n, other=-1.0)
        else:
            by_key = tl.where(m_n, tl.sqrt(tl.sum(x * x, axis=1)), -1.0)
        _maxima(by_key, p_sk + o_score, i_block, padded, BASE, COUNT, LOG_P, BLOCK)
    if POOL:
        o_out = i_b * stored_length * stride_kv + i_h * D
        _means(x, p_ok + o_out, stride_kv, i_block, padded, BASE, COUNT, STORED, LOG_P, BLOCK, D, D2)
        x = tl.load(p_v + i_b * svb + i_h * svh + o_n[:, None] * svn + o_d[None, :], mask=m_nd, other=0.0)
        x = x.to(tl.float32)
        _means(x, p_ov + o_out, stride_kv, i_block, padded, BASE, COUNT, STORED, LOG_P, BLOCK, D, D2)


def pyramid(
    q: Tensor, k: Tensor, v: Tensor, g: Geometry, *, pooled: bool, scored: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pool and score.

    Args:
        q: [B, N, H, D]; k, v: [B, N, Hkv, D], 16-bit or float32, last dimension contiguous.
        g: the pyramid.
        pooled: whether to store rows.
        scored: whether to store scores.

    Returns:
        pooled q [B, R, H, D], k and v [B, R, Hkv, D] with R = `stored_rows(g)`; s_Q, s_K [B, Hkv, M - N'] float32, of
        the levels above 0. What was not asked for is empty.
    """
    batch, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    log_p = g.pooling.bit_length() - 1
    first = stored_from(g)
    length = stored_rows(g) if pooled else 0
    outs = [x.new_empty(batch, length, x.shape[2], dim) for x in (q, k, v)]
    above = g.pyramid_length - g.padded if scored else 0
    scores = [q.new_empty(batch, kv_heads, above, dtype=torch.float32) for _ in range(2)]
    block = max(BLOCK_ROWS, g.pooling)
    base, inputs, rows = 0, [q, k, v], tokens
    highest = g.levels - 1 if scored or length else 0
    while base < highest:
        # All levels whose windows fit in a block of rows; the next launch goes on from the last of them.
        count = min(highest - base, (block.bit_length() - 1) // log_p)
        blocks = -(-g.windows(base) // block)
        with target(q):
            _reduce_kernel[(batch * kv_heads * blocks,)](
                *inputs, *outs, *scores, *(s for x in inputs for s in row_strides(x)),
                rows, g.padded, blocks, kv_heads, above, length,
                GROUP=heads // kv_heads, D=dim, D2=padded_dim(dim), LOG_P=log_p, BASE=base, COUNT=count, STORED=first,
                LEVELS=g.levels, BLOCK=block, POOL=length > 0, SCORE=scored, num_warps=WARPS,
            )  # fmt: skip
        base += count
        if base < highest:
            rows = g.windows(base)
            if length:
                start = g.offset(base) - g.offset(first)
                inputs = [x[:, start : start + rows] for x in outs]
    return (*outs, *scores)
