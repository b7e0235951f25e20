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
def ended_first(o_n, LOG_P: tl.constexpr, level: tl.constexpr):
    """The first token of that window; negative where there is none."""
    return (((o_n + 1) >> (LOG_P * level)) - 1) << (LOG_P * level)


@triton.jit
def begun(p_begins, o_n, m_n, LOG_P: tl.constexpr, LEVELS: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The first token of the document at each position, of which the windows of the coarsest level know it; 0 where a
    sequence is one document."""
    begin = tl.zeros_like(o_n)
    if DOCUMENTS:
        begin = tl.load(p_begins + (o_n >> (LOG_P * (LEVELS - 1))), mask=m_n, other=0).to(o_n.dtype)
    return begin


@triton.jit
def located(index, padded, LOG_P: tl.constexpr, LEVELS: tl.constexpr):
    """The logarithm of the width of the windows of flat pyramid indices, and their places within their levels."""
    log_window = tl.zeros_like(index)
    o_window = index
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
