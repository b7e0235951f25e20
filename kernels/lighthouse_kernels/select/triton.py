"""The descent and the causal order, one program for each tile of each head; no sort of the whole.

Order: kept windows form a forest, in which a parent's children are the next finer windows. Causal order is the
post-order of that forest: children before their parent, siblings by position. An entry's slot is therefore the number
of entries that end before it, which follows level by level from counts of parents:

    candidate j of level l: x_l = j + 1, x_(i-1) = p * (parents among the first x_i candidates of level i)
    slot = (candidates of coarser levels before its ancestors) + x_l + ... + x_0 - 1
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lighthouse_kernels.launching import Layout, target

# Candidates a program looks at together.
BLOCK, WARPS = 512, 4
_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)


@triton.jit
def _ordered(score):
    """int32 in the order of the float32 scores; both zeros are equal."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _drawn(p_key, i_b, i_h, index):
    """The 24 random bits of `pyramid/random.py` as int32."""
    seed, step, layer, sample = tl.load(p_key), tl.load(p_key + 1), tl.load(p_key + 2), tl.load(p_key + 3)
    row = (sample + i_b) * 65536 + tl.load(p_key + 4) + i_h
    zeros = index * 0
    bits, _, _, _ = tl.philox(
        seed.to(tl.uint64), index.to(tl.uint32), (zeros + row).to(tl.uint32), (zeros + layer).to(tl.uint32),
        (zeros + step).to(tl.uint32),
    )  # fmt: skip
    return (bits.to(tl.uint32, bitcast=True) >> 8).to(tl.int32)


@triton.jit
def _threshold(p_order, count, wanted, BLOCK: tl.constexpr):
    """The `wanted`-th largest of the keys + 2**31, and how many keys equal to it are among the `wanted` largest.

    A radix search from the top, 8 bits a pass.
    """
    wanted = tl.full([], 0, tl.int32) + wanted
    found = tl.zeros([], tl.int64)
    o_digit = tl.arange(0, 256)
    # A rolled loop: this code runs a few times only, so that fetching it would take longer than running it.
    for i in range(4):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, count, BLOCK):
            o = start + tl.arange(0, BLOCK)
            m = o < count
            key = tl.load(p_order + o, mask=m, other=_LOWEST).to(tl.int64) + 2147483648
            m = m & ((key >> (32 - 8 * i)) == (found >> (32 - 8 * i)))
            counts += tl.histogram(((key >> (24 - 8 * i)) & 255).to(tl.int32), 256, mask=m)
        larger = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
        digit = tl.sum((larger >= wanted).to(tl.int32), axis=0)
        wanted -= tl.sum(tl.where(o_digit == digit, larger, 0), axis=0)
        found += digit.to(tl.int64) << (24 - 8 * i)
    return found, wanted


@triton.jit
def _select_kernel(
    p_sq, p_sk, p_key, p_indices, p_slots, p_scratch,
    tokens, padded, first_token, whole, kv_heads, tiles, coarse, tile_entries, windows, entries, scratch_length,
    GROUP: tl.constexpr, HALF: tl.constexpr, LOG_P: tl.constexpr, LEVELS: tl.constexpr, COVER: tl.constexpr,
    DRAWN: tl.constexpr, LOG_BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    i_tile = pid % tiles
    i_bh = pid // tiles
    i_h = i_bh % kv_heads
    i_b = i_bh // kv_heads
    # Of every candidate, level after level: its window, the entries of coarser levels before it, its key, and the
    # parents up to and with it.
    p_window = p_scratch + pid * tile_entries
    p_before = p_window + scratch_length
    p_order = p_before + scratch_length
    p_parents = p_order + scratch_length
    o_scores = i_bh * (windows - padded) - padded
    fine: tl.constexpr = (2 * HALF) << LOG_P

    o_segment = tl.zeros([], tl.int32)
    for level in tl.static_range(LEVELS - 1, 0, -1):
        count = coarse if level == LEVELS - 1 else fine
        o_level = tl.zeros([], tl.int64)
        for j in tl.static_range(level):
            o_level += padded >> (LOG_P * j)
        o_next = o_segment + count

        for start in range(0, count, BLOCK):
            o = start + tl.arange(0, BLOCK)
            m = o < count
            if level == LEVELS - 1:
                window = i_tile.to(tl.int32) * coarse + o
                tl.store(p_window + o, window, mask=m)
                tl.store(p_before + o, o * 0, mask=m)
            else:
                window = tl.load(p_window + o_segment + o, mask=m, other=0)
            if DRAWN == "norm":
                score = tl.full([BLOCK], -1.0, tl.float32)
                for x in tl.static_range(GROUP):
                    o_query = (i_bh * GROUP + x) * (windows - padded) - padded
                    score = tl.maximum(score, tl.load(p_sq + o_query + o_level + window, mask=m, other=-1.0))
                key = _ordered(score)
            else:
                # Its place in the whole sequence.
                place = window.to(tl.int64) + (first_token >> (LOG_P * level))
                if DRAWN == "random":
                    o_whole = tl.zeros([], tl.int64)
                    for j in tl.static_range(level):
                        o_whole += whole >> (LOG_P * j)
                    key = _drawn(p_key, i_b, i_h, o_whole + place)
                else:
                    if LOG_P * level <= LOG_BLOCK_TOKENS:
                        key = _drawn(p_key, i_b, i_h, place >> (LOG_BLOCK_TOKENS - LOG_P * level))
                    else:
                        key = tl.full([BLOCK], -1, tl.int32)
                        for x in range(1 << (LOG_P * level - LOG_BLOCK_TOKENS)):
                            block = (place << (LOG_P * level - LOG_BLOCK_TOKENS)) + x
                            inside = (block << LOG_BLOCK_TOKENS) < first_token + tokens
                            key = tl.maximum(key, tl.where(inside, _drawn(p_key, i_b, i_h, block), -1))
                key = tl.where((window.to(tl.int64) << (LOG_P * level)) < tokens, key, -1)
            if COVER:
                key = tl.where(window == 0, _HIGHEST, key)
            tl.store(p_order + o_segment + o, key, mask=m)
        tl.debug_barrier()

        if DRAWN == "norm":
            # By query: the chosen leave, the others go on by key.
            found, equal = _threshold(p_order + o_segment, count, HALF, BLOCK)
            tl.debug_barrier()
            for start in range(0, count, BLOCK):
                o = start + tl.arange(0, BLOCK)
                m = o < count
                window = tl.load(p_window + o_segment + o, mask=m, other=0)
                key = tl.load(p_order + o_segment + o, mask=m, other=_LOWEST).to(tl.int64) + 2147483648
                ties = (key == found).to(tl.int32)
                chosen = (key > found) | ((ties > 0) & (tl.cumsum(ties, axis=0) <= equal))
                equal -= tl.sum(ties, axis=0)
                by_key = _ordered(tl.load(p_sk + o_scores + o_level + window, mask=m, other=-1.0))
                tl.store(p_order + o_segment + o, tl.where(chosen, _LOWEST, by_key), mask=m)
                tl.store(p_parents + o_segment + o, chosen.to(tl.int32), mask=m)
            tl.debug_barrier()
            found, equal = _threshold(p_order + o_segment, count, HALF, BLOCK)
        else:
            # Both scores are one, so the largest by query and then by key are the largest.
            found, equal = _threshold(p_order + o_segment, count, 2 * HALF, BLOCK)

        parents = tl.zeros([], tl.int32)
        for start in range(0, count, BLOCK):
            o = start + tl.arange(0, BLOCK)
            m = o < count
            key = tl.load(p_order + o_segment + o, mask=m, other=_LOWEST).to(tl.int64) + 2147483648
            ties = ((key == found) & m).to(tl.int32)
            chosen = ((key > found) | ((ties > 0) & (tl.cumsum(ties, axis=0) <= equal))).to(tl.int32)
            equal -= tl.sum(ties, axis=0)
            if DRAWN == "norm":
                chosen += tl.load(p_parents + o_segment + o, mask=m, other=0)
            upto = parents + tl.cumsum(chosen, axis=0)
            parents += tl.sum(chosen, axis=0)
            tl.store(p_parents + o_segment + o, upto, mask=m)
            window = tl.load(p_window + o_segment + o, mask=m, other=0)
            before = tl.load(p_before + o_segment + o, mask=m, other=0) + o
            for x in tl.static_range(1 << LOG_P):
                o_child = o_next + ((upto - 1) << LOG_P) + x
                tl.store(p_window + o_child, (window << LOG_P) + x, mask=m & (chosen > 0))
                tl.store(p_before + o_child, before, mask=m & (chosen > 0))
        tl.debug_barrier()
        o_segment = o_next

    p_indices += i_bh * entries + i_tile * tile_entries
    p_slots += i_bh * windows
    o_segment = tl.zeros([], tl.int32)
    for level in tl.static_range(LEVELS - 1, -1, -1):
        count = coarse if level == LEVELS - 1 else fine
        o_level = tl.zeros([], tl.int64)
        for j in tl.static_range(level):
            o_level += padded >> (LOG_P * j)
        for start in range(0, count, BLOCK):
            o = start + tl.arange(0, BLOCK)
            m = o < count
            window = tl.load(p_window + o_segment + o, mask=m, other=0)
            first = o + 1
            slot = tl.load(p_before + o_segment + o, mask=m, other=0) + o
            o_finer = o_segment
            for above in tl.static_range(level, 0, -1):
                first = tl.load(p_parents + o_finer + first - 1, mask=m & (first > 0), other=0) << LOG_P
                slot += first
                o_finer += coarse if above == LEVELS - 1 else fine
            tl.store(p_indices + slot, (o_level + window).to(tl.int32), mask=m)
            tl.store(p_slots + o_level + window, (i_tile * tile_entries + slot).to(tl.int32), mask=m)
        o_segment += count


def select(
    g: Layout,
    batch: int,
    kv_heads: int,
    *,
    scores: tuple[Tensor, Tensor] | None = None,
    key: Tensor | None = None,
    score_block: int = 0,
) -> tuple[Tensor, Tensor]:
    """Choose the windows of one call, from scores or from a key.

    Args:
        g: the pyramid; not `dense`.
        scores: (s_Q, s_K), [B, Hkv, M - N'] float32 contiguous: the levels above 0. s_Q may be [B, H, M - N'], of
            which each KV head takes the maximum of its query heads.
        key: int64 [5], see `random.uniform`; in place of scores.
        score_block: tokens that share one draw; 0 for a draw a window.

    Returns:
        indices [B, Hkv, S] int32 in causal order, and slots [B, Hkv, M] int32: the place of each window among them, -1
        for windows that are not kept.
    """
    entries = g.entries
    windows = g.pyramid_length
    coarse = g.windows[-1] // g.tiles
    by = key if scores is None else scores[0]
    assert by is not None
    indices = by.new_empty(batch, kv_heads, entries, dtype=torch.int32)
    slots = by.new_full((batch, kv_heads, windows), -1, dtype=torch.int32)
    scratch = by.new_empty(4, batch * kv_heads * entries, dtype=torch.int32)
    by_query, by_key = scores if scores is not None else (slots, slots)
    with target(by):
        _select_kernel[(batch * kv_heads * g.tiles,)](
            by_query, by_key, by, indices, slots, scratch,
            g.tokens, g.padded, g.first, g.whole, kv_heads, g.tiles, coarse, entries // g.tiles, windows, entries,
            scratch.shape[1],
            GROUP=by_query.shape[1] // kv_heads, HALF=g.geometry.tile_parents // 2, LOG_P=g.log_p,
            LEVELS=g.levels, COVER=g.geometry.cover_prefix,
            DRAWN="norm" if scores is not None else "block" if score_block else "random",
            LOG_BLOCK_TOKENS=max(score_block, 1).bit_length() - 1, BLOCK=BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    return indices, slots
