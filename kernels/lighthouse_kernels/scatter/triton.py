"""Scatter as a gather at the output, and its transpose as a sum over the positions an entry wrote to."""

import triton
import triton.language as tl
from torch import Tensor

from lighthouse_kernels.indexing import ended_before, ended_last, program, served
from lighthouse_kernels.launching import Layout, padded_dim, row_strides, target

# Rows of a program, and its warps, forward and backward.
BLOCK_TOKENS, TOKEN_WARPS = 16, 2
BLOCK_ENTRIES, ENTRY_WARPS = 4, 2


@triton.jit
def _scatter_kernel(
    p_rows, p_slots, p_indices, p_out, stride_b, stride_s, stride_h,
    tokens, padded, entries, blocks, heads, windows,
    GROUP: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, LOG_P: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_block = program(heads, blocks)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < tokens
    o_d = tl.arange(0, D2)
    m_d = (o_d < D)[None, :]
    i_kv = i_b * (heads // GROUP) + i_h // GROUP
    p_slots += i_kv * windows
    p_indices += i_kv * (entries + LEVELS - 1)
    p_rows += i_b * stride_b + i_h * stride_h
    total = tl.zeros([BLOCK, D2], tl.float32)
    o_level = tl.zeros([], tl.int64)
    for level in tl.static_range(LEVELS):
        slot = ended_last(p_slots, o_level, o_n, m_n, LOG_P, level)
        if EDGE:
            slot = ended_before(slot, p_indices, o_n, m_n, entries, LOG_P, level)
        row = tl.load(p_rows + slot[:, None] * stride_s + o_d[None, :], mask=(slot >= 0)[:, None] & m_d, other=0.0)
        total += row.to(tl.float32)
        o_level += padded >> (LOG_P * level)
    p_out += (i_b * tokens * heads + i_h) * D
    tl.store(
        p_out + o_n[:, None] * (heads * D) + o_d[None, :], total.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_d
    )


@triton.jit
def _scatter_backward_kernel(
    p_grad, p_indices, p_out, stride_b, stride_n, stride_h,
    tokens, padded, entries, blocks, heads,
    GROUP: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, LOG_P: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_block = program(heads, blocks)
    o_e = i_block * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < entries
    o_d = tl.arange(0, D2)
    m_d = (o_d < D)[None, :]
    o_indices = (i_b * (heads // GROUP) + i_h // GROUP) * entries
    index = tl.load(p_indices + o_indices + o_e, mask=m_e, other=0).to(tl.int64)
    first, width = served(index, m_e, padded, LOG_P, LEVELS)
    p_grad += i_b * stride_b + i_h * stride_h
    total = tl.zeros([BLOCK, D2], tl.float32)
    for r in range(tl.max(width, axis=0)):
        m = (r < width) & (first + r < tokens)
        if EDGE:
            # The first position that such an entry serves is the last one of the shard before.
            m &= first + r >= 0
        row = tl.load(p_grad + (first + r)[:, None] * stride_n + o_d[None, :], mask=m[:, None] & m_d, other=0.0)
        total += row.to(tl.float32)
    p_out += (i_b * entries * heads + i_h) * D
    tl.store(
        p_out + o_e[:, None] * (heads * D) + o_d[None, :], total.to(p_out.dtype.element_ty), mask=m_e[:, None] & m_d
    )


def scatter(rows: Tensor, indices: Tensor, slots: Tensor, g: Layout) -> Tensor:
    """Sum, for every position, the rows of the windows that end at it or last before it.

    Args:
        rows: [B, S, H, D], last dimension contiguous; [B, S + L - 1, H, D] with those of the shard before.
        indices: int32, contiguous; [B, Hkv, S] or [B, Hkv, S + L - 1] of `types.with_edge`.
        slots: [B, Hkv, M] int32.

    Returns:
        [B, N, H, D]; added in float32 and rounded once.
    """
    batch, _, heads, dim = rows.shape
    blocks = -(-g.tokens // BLOCK_TOKENS)
    out = rows.new_empty(batch, g.tokens, heads, dim)
    with target(rows):
        _scatter_kernel[(batch * heads * blocks,)](
            rows, slots, indices, out, *row_strides(rows),
            g.tokens, g.padded, g.entries, blocks, heads, slots.shape[2],
            GROUP=heads // slots.shape[1], D=dim, D2=padded_dim(dim), LOG_P=g.log_p,
            LEVELS=g.levels, BLOCK=BLOCK_TOKENS, EDGE=indices.shape[2] > g.entries, num_warps=TOKEN_WARPS,
        )  # fmt: skip
    return out


def scatter_backward(grad: Tensor, indices: Tensor, g: Layout) -> Tensor:
    """The gradient of the rows: the sum of the positions each wrote to.

    Args:
        grad: [B, N, H, D], last dimension contiguous.
        indices: [B, Hkv, S] or [B, Hkv, S + L - 1] int32, contiguous.

    Returns:
        [B, S, H, D] or [B, S + L - 1, H, D].
    """
    batch, _, heads, dim = grad.shape
    entries = indices.shape[2]
    blocks = -(-entries // BLOCK_ENTRIES)
    out = grad.new_empty(batch, entries, heads, dim)
    with target(grad):
        _scatter_backward_kernel[(batch * heads * blocks,)](
            grad, indices, out, *row_strides(grad),
            g.tokens, g.padded, entries, blocks, heads,
            GROUP=heads // indices.shape[1], D=dim, D2=padded_dim(dim), LOG_P=g.log_p,
            LEVELS=g.levels, BLOCK=BLOCK_ENTRIES, EDGE=entries > g.entries, num_warps=ENTRY_WARPS,
        )  # fmt: skip
    return out
