"""The rows of the kept windows of q, k and v in one launch, and the transpose of gather and pooling together."""

import triton
import triton.language as tl
from torch import Tensor

from lighthouse_kernels.indexing import located, program
from lighthouse_kernels.launching import Layout, padded_dim, row_strides, target

# Rows of a program, and its warps, forward and backward.
BLOCK_ENTRIES, ENTRY_WARPS = 8, 4
BLOCK_TOKENS, TOKEN_WARPS = 16, 4


@triton.jit
def _row(
    p_x,
    p_stored,
    stride_n,
    stride_stored,
    o_token,
    o_stored,
    window,
    is_stored,
    m_entry,
    tokens,
    D: tl.constexpr,
    D2: tl.constexpr,
    FLY: tl.constexpr,
):
    """Pooled rows of a block of entries, float32: stored ones read, the others averaged from their tokens."""
    o_d = tl.arange(0, D2)
    m_d = (o_d < D)[None, :]
    m_stored = m_entry & is_stored
    total = tl.load(
        p_stored + o_stored[:, None] * stride_stored + o_d[None, :], mask=m_stored[:, None] & m_d, other=0.0
    ).to(tl.float32)  # fmt: skip
    for r in tl.static_range(FLY):
        m = m_entry & (is_stored == 0) & (r < window) & (o_token + r < tokens)
        row = tl.load(p_x + (o_token + r)[:, None] * stride_n + o_d[None, :], mask=m[:, None] & m_d, other=0.0)
        total += row.to(tl.float32)
    return total * tl.where(is_stored, 1.0, 1.0 / window.to(tl.float32))[:, None]


@triton.jit
def _gather_kernel(
    p_q, p_k, p_v, p_sq, p_sk, p_sv, p_indices, p_oq, p_ok, p_ov,
    sqb, sqn, sqh, skb, skn, skh, svb, svn, svh,
    tokens, padded, entries, blocks, kv_heads, stored_length,
    GROUP: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, LOG_P: tl.constexpr, LEVELS: tl.constexpr,
    STORED: tl.constexpr, FLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_block = program(kv_heads, blocks)
    o_e = i_block * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < entries
    index = tl.load(p_indices + (i_b * kv_heads + i_h) * entries + o_e, mask=m_e, other=0).to(tl.int64)

    log_window, o_window = located(index, padded, LOG_P, LEVELS)
    o_first_stored = tl.zeros([], tl.int64)
    for level in tl.static_range(STORED):
        o_first_stored += padded >> (LOG_P * level)
    window = tl.full([BLOCK], 1, tl.int64) << log_window
    is_stored = log_window >= LOG_P * STORED
    o_token = o_window << log_window
    o_stored = index - o_first_stored

    o_d = tl.arange(0, D2)
    m = m_e[:, None] & (o_d < D)[None, :]
    stride_kv = kv_heads * D
    stride_q = stride_kv * GROUP
    o_out = o_e[:, None] * stride_kv + o_d[None, :] + i_b * entries * stride_kv + i_h * D
    o_s = i_b * stored_length * stride_kv + i_h * D
    row = _row(
        p_k + i_b * skb + i_h * skh, p_sk + o_s, skn, stride_kv, o_token, o_stored, window, is_stored, m_e, tokens,
        D, D2, FLY,
    )  # fmt: skip
    tl.store(p_ok + o_out, row.to(p_ok.dtype.element_ty), mask=m)
    row = _row(
        p_v + i_b * svb + i_h * svh, p_sv + o_s, svn, stride_kv, o_token, o_stored, window, is_stored, m_e, tokens,
        D, D2, FLY,
    )  # fmt: skip
    tl.store(p_ov + o_out, row.to(p_ov.dtype.element_ty), mask=m)
    for g in tl.static_range(GROUP):
        i_hq = i_h * GROUP + g
        row = _row(
            p_q + i_b * sqb + i_hq * sqh, p_sq + i_b * stored_length * stride_q + i_hq * D, sqn, stride_q, o_token,
            o_stored, window, is_stored, m_e, tokens, D, D2, FLY,
        )  # fmt: skip
        o_out = o_e[:, None] * stride_q + o_d[None, :] + i_b * entries * stride_q + i_hq * D
        tl.store(p_oq + o_out, row.to(p_oq.dtype.element_ty), mask=m)


@triton.jit
def _spread(
    p_grad,
    p_out,
    stride,
    o_n,
    m_n,
    p_slots,
    padded,
    D: tl.constexpr,
    D2: tl.constexpr,
    LOG_P: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of a block of tokens: that of every kept window they are in, over the window's tokens."""
    o_d = tl.arange(0, D2)
    m_d = (o_d < D)[None, :]
    total = tl.zeros([BLOCK, D2], tl.float32)
    o_level = tl.zeros([], tl.int64)
    for level in tl.static_range(LEVELS):
        slot = tl.load(p_slots + o_level + (o_n >> (LOG_P * level)), mask=m_n, other=-1).to(tl.int64)
        row = tl.load(p_grad + slot[:, None] * stride + o_d[None, :], mask=(slot >= 0)[:, None] & m_d, other=0.0)
        total += row.to(tl.float32) * (1.0 / (1 << (LOG_P * level)))
        o_level += padded >> (LOG_P * level)
    tl.store(p_out + o_n[:, None] * stride + o_d[None, :], total.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_d)


@triton.jit
def _gather_backward_kernel(
    p_gq, p_gk, p_gv, p_slots, p_oq, p_ok, p_ov,
    tokens, padded, entries, blocks, kv_heads, windows,
    GROUP: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, LOG_P: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_block = program(kv_heads, blocks)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < tokens
    p_slots += (i_b * kv_heads + i_h) * windows
    stride_kv = kv_heads * D
    stride_q = stride_kv * GROUP
    o_in = i_b * entries * stride_kv + i_h * D
    o_out = i_b * tokens * stride_kv + i_h * D
    _spread(p_gk + o_in, p_ok + o_out, stride_kv, o_n, m_n, p_slots, padded, D, D2, LOG_P, LEVELS, BLOCK)
    _spread(p_gv + o_in, p_ov + o_out, stride_kv, o_n, m_n, p_slots, padded, D, D2, LOG_P, LEVELS, BLOCK)
    for g in tl.static_range(GROUP):
        o_h = (i_h * GROUP + g) * D
        _spread(
            p_gq + i_b * entries * stride_q + o_h, p_oq + i_b * tokens * stride_q + o_h, stride_q, o_n, m_n, p_slots,
            padded, D, D2, LOG_P, LEVELS, BLOCK,
        )  # fmt: skip


def gather(
    q: Tensor, k: Tensor, v: Tensor, stored: tuple[Tensor, Tensor, Tensor], indices: Tensor, g: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept rows in causal order.

    Args:
        q: [B, N, H, D]; k, v: [B, N, Hkv, D], last dimension contiguous.
        stored: pooled rows [B, R, H or Hkv, D] from `pyramid`.
        indices: [B, Hkv, S] int32, contiguous.

    Returns:
        q [B, S, H, D], k and v [B, S, Hkv, D].
    """
    batch, tokens, heads, dim = q.shape
    kv_heads, entries = k.shape[2], indices.shape[2]
    blocks = -(-entries // BLOCK_ENTRIES)
    first = g.stored_from
    out_q, out_k, out_v = (x.new_empty(batch, entries, x.shape[2], dim) for x in (q, k, v))
    with target(q):
        _gather_kernel[(batch * kv_heads * blocks,)](
            q, k, v, *stored, indices, out_q, out_k, out_v, *row_strides(q), *row_strides(k), *row_strides(v),
            tokens, g.padded, entries, blocks, kv_heads, g.stored_rows,
            GROUP=heads // kv_heads, D=dim, D2=padded_dim(dim), LOG_P=g.log_p, LEVELS=g.levels,
            STORED=first, FLY=g.pooling ** (first - 1), BLOCK=BLOCK_ENTRIES, num_warps=ENTRY_WARPS,
        )  # fmt: skip
    return out_q, out_k, out_v


def gather_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, slots: Tensor, g: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the tokens from those of the gathered rows; each token reads at most L rows.

    Args:
        grad_q: [B, S, H, D]; grad_k, grad_v: [B, S, Hkv, D], contiguous.
        slots: [B, Hkv, M] int32.

    Returns:
        [B, N, H, D], [B, N, Hkv, D], [B, N, Hkv, D].
    """
    batch, entries, heads, dim = grad_q.shape
    kv_heads = grad_k.shape[2]
    blocks = -(-g.tokens // BLOCK_TOKENS)
    out_q, out_k, out_v = (x.new_empty(batch, g.tokens, x.shape[2], dim) for x in (grad_q, grad_k, grad_v))
    with target(grad_q):
        _gather_backward_kernel[(batch * kv_heads * blocks,)](
            grad_q, grad_k, grad_v, slots, out_q, out_k, out_v,
            g.tokens, g.padded, entries, blocks, kv_heads, slots.shape[2],
            GROUP=heads // kv_heads, D=dim, D2=padded_dim(dim), LOG_P=g.log_p, LEVELS=g.levels,
            BLOCK=BLOCK_TOKENS, num_warps=TOKEN_WARPS,
        )  # fmt: skip
    return out_q, out_k, out_v
