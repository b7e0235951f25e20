"""A window of tokens and kept entries as one softmax: each position reads its rows, and each row its positions."""

import triton
import triton.language as tl
from torch import Tensor

from lighthouse_kernels.indexing import begun, ended_before, ended_first, ended_last, program, served
from lighthouse_kernels.launching import Layout, padded_dim, row_strides, target

# Rows of a program, and its warps: positions, and entries in the backward pass.
BLOCK_TOKENS, TOKEN_WARPS = 16, 2
BLOCK_ENTRIES, ENTRY_WARPS = 4, 2


@triton.jit
def _merge_kernel(
    p_x, p_lse, p_rows, p_row_lse, p_indices, p_slots, p_begins, p_out, p_total, sxb, sxn, sxh, srb, srs, srh,
    tokens, padded, kept, entries, blocks, heads, windows,
    GROUP: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, LOG_P: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_block = program(heads, blocks)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < tokens
    o_d = tl.arange(0, D2)
    m_d = (o_d < D)[None, :]
    i_kv = i_b * (heads // GROUP) + i_h // GROUP
    p_slots += i_kv * windows
    p_indices += i_kv * entries
    p_begins += i_b * (padded >> (LOG_P * (LEVELS - 1)))
    begin = begun(p_begins, o_n, m_n, LOG_P, LEVELS, DOCUMENTS)
    p_rows += i_b * srb + i_h * srh
    p_row_lse += (i_b * heads + i_h) * entries
    o_sums = (i_b * heads + i_h) * tokens + o_n
    p_x += i_b * sxb + i_h * sxh
    acc = tl.load(p_x + o_n[:, None] * sxn + o_d[None, :], mask=m_n[:, None] & m_d, other=0.0).to(tl.float32)
    top = tl.load(p_lse + o_sums, mask=m_n, other=0.0)
    mass = tl.full([BLOCK], 1.0, tl.float32)
    o_level = tl.zeros([], tl.int64)
    for level in tl.static_range(LEVELS):
        m_level = m_n & (ended_first(o_n, LOG_P, level) >= begin)
        slot = ended_last(p_slots, o_level, o_n, m_level, LOG_P, level)
        if EDGE:
            slot = ended_before(slot, p_indices, o_n, m_level, kept, LOG_P, level)
        m = slot >= 0
        lse = tl.load(p_row_lse + slot, mask=m, other=float("-inf"))
        row = tl.load(p_rows + slot[:, None] * srs + o_d[None, :], mask=m[:, None] & m_d, other=0.0).to(tl.float32)
        higher = tl.maximum(top, lse)
        before, now = tl.exp(top - higher), tl.exp(lse - higher)
        acc = acc * before[:, None] + row * now[:, None]
        mass = mass * before + now
        top = higher
        o_level += padded >> (LOG_P * level)
    tl.store(p_total + o_sums, top + tl.log(mass), mask=m_n)
    acc = acc / mass[:, None]
    p_out += (i_b * tokens * heads + i_h) * D
    tl.store(p_out + o_n[:, None] * (heads * D) + o_d[None, :], acc.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_d)


@triton.jit
def _merge_backward_tokens_kernel(
    p_grad, p_total, p_x, p_lse, p_rows, p_row_lse, p_indices, p_slots, p_begins, p_dx, p_dlse, p_delta,
    sgb, sgn, sgh, sxb, sxn, sxh, srb, srs, srh,
    tokens, padded, kept, entries, blocks, heads, windows,
    GROUP: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, LOG_P: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_block = program(heads, blocks)
    o_n = i_block * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < tokens
    o_d = tl.arange(0, D2)[None, :]
    m_d = o_d < D
    m = m_n[:, None] & m_d
    i_kv = i_b * (heads // GROUP) + i_h // GROUP
    p_slots += i_kv * windows
    p_indices += i_kv * entries
    p_begins += i_b * (padded >> (LOG_P * (LEVELS - 1)))
    begin = begun(p_begins, o_n, m_n, LOG_P, LEVELS, DOCUMENTS)
    p_rows += i_b * srb + i_h * srh
    p_row_lse += (i_b * heads + i_h) * entries
    o_sums = (i_b * heads + i_h) * tokens + o_n
    grad = tl.load(p_grad + i_b * sgb + i_h * sgh + o_n[:, None] * sgn + o_d, mask=m, other=0.0).to(tl.float32)
    x = tl.load(p_x + i_b * sxb + i_h * sxh + o_n[:, None] * sxn + o_d, mask=m, other=0.0).to(tl.float32)
    total = tl.load(p_total + o_sums, mask=m_n, other=0.0)
    weight = tl.exp(tl.load(p_lse + o_sums, mask=m_n, other=0.0) - total)
    own = tl.sum(grad * x, axis=1)
    # From the parts: the output was rounded.
    delta = weight * own
    o_level = tl.zeros([], tl.int64)
    for level in tl.static_range(LEVELS):
        m_level = m_n & (ended_first(o_n, LOG_P, level) >= begin)
        slot = ended_last(p_slots, o_level, o_n, m_level, LOG_P, level)
        if EDGE:
            slot = ended_before(slot, p_indices, o_n, m_level, kept, LOG_P, level)
        m_slot = slot >= 0
        lse = tl.load(p_row_lse + slot, mask=m_slot, other=float("-inf"))
        row = tl.load(p_rows + slot[:, None] * srs + o_d, mask=m_slot[:, None] & m_d, other=0.0).to(tl.float32)
        delta += tl.exp(lse - total) * tl.sum(grad * row, axis=1)
        o_level += padded >> (LOG_P * level)
    tl.store(p_delta + o_sums, delta, mask=m_n)
    tl.store(p_dlse + o_sums, weight * (own - delta), mask=m_n)
    p_dx += (i_b * tokens * heads + i_h) * D
    tl.store(p_dx + o_n[:, None] * (heads * D) + o_d, (weight[:, None] * grad).to(p_dx.dtype.element_ty), mask=m)


@triton.jit
def _merge_backward_rows_kernel(
    p_grad, p_total, p_delta, p_rows, p_row_lse, p_indices, p_begins, p_drows, p_drow_lse,
    sgb, sgn, sgh, srb, srs, srh, tokens, padded, entries, blocks, heads,
    GROUP: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, LOG_P: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_block = program(heads, blocks)
    o_e = i_block * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < entries
    o_d = tl.arange(0, D2)[None, :]
    m_d = o_d < D
    o_indices = (i_b * (heads // GROUP) + i_h // GROUP) * entries
    index = tl.load(p_indices + o_indices + o_e, mask=m_e, other=0).to(tl.int64)
    first, width = served(index, m_e, padded, LOG_P, LEVELS)
    p_begins += i_b * (padded >> (LOG_P * (LEVELS - 1)))
    p_grad += i_b * sgb + i_h * sgh
    p_total += (i_b * heads + i_h) * tokens
    p_delta += (i_b * heads + i_h) * tokens
    o_sums = (i_b * heads + i_h) * entries + o_e
    lse = tl.load(p_row_lse + o_sums, mask=m_e, other=0.0)
    own = tl.load(p_rows + i_b * srb + i_h * srh + o_e[:, None] * srs + o_d, mask=m_e[:, None] & m_d, other=0.0)
    own = own.to(tl.float32)
    acc = tl.zeros([BLOCK, D2], tl.float32)
    d_lse = tl.zeros([BLOCK], tl.float32)
    for r in range(tl.max(width, axis=0)):
        m = (r < width) & (first + r < tokens)
        if EDGE:
            # The first position that such an entry serves is the last one of the shard before.
            m &= first + r >= 0
        m &= begun(p_begins, first + r, m, LOG_P, LEVELS, DOCUMENTS) <= first + 1 - width
        weight = tl.exp(lse - tl.load(p_total + first + r, mask=m, other=float("inf")))
        grad = tl.load(p_grad + (first + r)[:, None] * sgn + o_d, mask=m[:, None] & m_d, other=0.0).to(tl.float32)
        acc += weight[:, None] * grad
        # Differences, not two long sums that cancel each other.
        d_lse += weight * (tl.sum(grad * own, axis=1) - tl.load(p_delta + first + r, mask=m, other=0.0))
    tl.store(p_drow_lse + o_sums, d_lse, mask=m_e)
    p_drows += (i_b * entries * heads + i_h) * D
    tl.store(p_drows + o_e[:, None] * (heads * D) + o_d, acc.to(p_drows.dtype.element_ty), mask=m_e[:, None] & m_d)


def merge(
    x: Tensor, lse: Tensor, rows: Tensor, row_lse: Tensor, indices: Tensor, slots: Tensor, g: Layout,
    begins: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One softmax over every position's window and the windows of the pyramid that end at it or last before it.

    Args:
        x: [B, N, H, D], attention over the window; last dimension contiguous.
        lse: [B, H, N] float32, its log-sum-exp, contiguous and finite.
        rows: [B, S, H, D], those of the dense call; last dimension contiguous. [B, S + L - 1, H, D] with those of the
            shard before.
        row_lse: [B, H, S] or [B, H, S + L - 1] float32, contiguous.
        indices: int32, contiguous; [B, Hkv, S] or [B, Hkv, S + L - 1] of `types.with_edge`.
        slots: [B, Hkv, M] int32.
        begins: [B, N'/c_(L-1)] int32, contiguous: for each window of the coarsest level the first token of its
            document, whose rows serve no other one's positions; None where a sequence is one document. Of a shard, from
            its own first token, negative for a document that began before.

    Returns:
        [B, N, H, D], added in float32 and rounded once, and its log-sum-exp [B, H, N] float32.
    """
    batch, tokens, heads, dim = x.shape
    blocks = -(-tokens // BLOCK_TOKENS)
    out, total = x.new_empty(x.shape), lse.new_empty(lse.shape)
    with target(x):
        _merge_kernel[(batch * heads * blocks,)](
            x, lse, rows, row_lse, indices, slots, slots if begins is None else begins, out, total,
            *row_strides(x), *row_strides(rows),
            tokens, g.padded, g.entries, rows.shape[1], blocks, heads, slots.shape[2],
            GROUP=heads // slots.shape[1], D=dim, D2=padded_dim(dim), LOG_P=g.log_p, LEVELS=g.levels,
            BLOCK=BLOCK_TOKENS, DOCUMENTS=begins is not None, EDGE=rows.shape[1] > g.entries, num_warps=TOKEN_WARPS,
        )  # fmt: skip
    return out, total


def merge_backward(
    grad: Tensor, total: Tensor, x: Tensor, lse: Tensor, rows: Tensor, row_lse: Tensor, indices: Tensor, slots: Tensor,
    g: Layout, begins: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, lse, rows and row_lse, in their shapes.

    Args:
        grad: [B, N, H, D], last dimension contiguous.
        total: [B, H, N], the log-sum-exp that `merge` returned.
        x, lse, rows, row_lse, indices, slots, begins: what it took.
    """
    batch, tokens, heads, dim = x.shape
    entries = rows.shape[1]
    d_x, d_lse, delta = x.new_empty(x.shape), lse.new_empty(lse.shape), lse.new_empty(lse.shape)
    d_rows, d_row_lse = rows.new_empty(rows.shape), row_lse.new_empty(row_lse.shape)
    shape = {"GROUP": heads // slots.shape[1], "D": dim, "D2": padded_dim(dim), "LOG_P": g.log_p, "LEVELS": g.levels}
    shape |= {"DOCUMENTS": begins is not None, "EDGE": entries > g.entries}
    begins = slots if begins is None else begins
    with target(x):
        blocks = -(-tokens // BLOCK_TOKENS)
        _merge_backward_tokens_kernel[(batch * heads * blocks,)](
            grad, total, x, lse, rows, row_lse, indices, slots, begins, d_x, d_lse, delta,
            *row_strides(grad), *row_strides(x), *row_strides(rows),
            tokens, g.padded, g.entries, entries, blocks, heads, slots.shape[2],
            **shape, BLOCK=BLOCK_TOKENS, num_warps=TOKEN_WARPS,
        )  # fmt: skip
        blocks = -(-entries // BLOCK_ENTRIES)
        _merge_backward_rows_kernel[(batch * heads * blocks,)](
            grad, total, delta, rows, row_lse, indices, begins, d_rows, d_row_lse,
            *row_strides(grad), *row_strides(rows), tokens, g.padded, entries, blocks, heads,
            **shape, BLOCK=BLOCK_ENTRIES, num_warps=ENTRY_WARPS,
        )  # fmt: skip
    return d_x, d_lse, d_rows, d_row_lse
