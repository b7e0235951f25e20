"""Where things are, for kernels that go over tokens or over entries; Triton puts these functions in place."""

import triton
import triton.language as tl


@triton.jit
def program(heads, blocks):
    """Batch, head and block of this program, int64: heads turn fastest, as they are neighbours in memory."""
    pid = tl.program_id(0).to(tl.int64)
    return pid // (heads * blocks), pid % heads, (pid // heads) % blocks


@triton.jit
def ended_last(p_slots, o_level, o_n, m_n, LOG_P: tl.constexpr, level: tl.constexpr):
    """The slot of the window of a level that ended last at each position, -1 where there is none or it is not kept."""
    window = ((o_n + 1) >> (LOG_P * level)) - 1
    return tl.load(p_slots + o_level + window, mask=m_n & (window >= 0), other=-1).to(tl.int64)


@triton.jit
def ended_before(slot, p_indices, o_n, m_n, entries, LOG_P: tl.constexpr, level: tl.constexpr):
    """The slots of `ended_last`, with that of the shard before where its last window of the level ended last. What it
    keeps of these follows the entries of the shard."""
    if level > 0:
        kept = tl.load(p_indices + entries + level - 1) == -1 - level
        slot = tl.where(m_n & kept & (((o_n + 1) >> (LOG_P * level)) == 0), entries + level - 1, slot)
    return slot


@triton.jit
def ended_first(o_n, LOG_P: tl.constexpr, level: tl.constexpr):
    """The first token of that window; negative where there is none."""
    return (((o_n + 1) >> (LOG_P * level)) - 1) << (LOG_P * level)


@triton.jit
def begun(p_begins, o_n, m_n, LOG_P: tl.constexpr, LEVELS: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The first token of the document at each position, of which the windows of the coarsest level know it; before all
    windows where a sequence is one document."""
    begin = tl.zeros_like(o_n) - (1 << 40)
    if DOCUMENTS:
        begin = tl.load(p_begins + (o_n >> (LOG_P * (LEVELS - 1))), mask=m_n, other=0).to(o_n.dtype)
    return begin


@triton.jit
def located(index, padded, LOG_P: tl.constexpr, LEVELS: tl.constexpr):
    """The logarithm of the width of the windows of flat pyramid indices, and their places within their levels. Those of
    the shard before have negative indices, see `types.with_edge`."""
    log_window = tl.where(index < 0, LOG_P * (-1 - index), 0)
    o_window = tl.maximum(index, -1)
    o_level = tl.zeros([], tl.int64)
    for level in tl.static_range(1, LEVELS):
        o_level += padded >> (LOG_P * (level - 1))
        log_window = tl.where(index >= o_level, LOG_P * level, log_window)
        o_window = tl.where(index >= o_level, index - o_level, o_window)
    return log_window, o_window


@triton.jit
def served(index, m_e, padded, LOG_P: tl.constexpr, LEVELS: tl.constexpr):
    """The first position that each entry serves, that of the last token of its window, and how many it serves."""
    log_window, o_window = located(index, padded, LOG_P, LEVELS)
    return ((o_window + 1) << log_window) - 1, m_e.to(tl.int64) << log_window
