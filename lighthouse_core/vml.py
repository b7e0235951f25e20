"""The first call of each elementwise function on a CPU, made by one thread.

torch has MKL compute sines, exponentials and the like. MKL looks for the right kernel when a function is first called.
Where several threads make that first call at once, one of them may run a kernel of low precision over its whole share,
without a word (pytorch issue 188792; seen here in one of a thousand processes, with errors of 1.5e-4 in a cosine).
"""

import functools

import torch

# Those of MKL's that torch is linked with.
_FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp"),
    *("log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc"),
)


@functools.cache
def settle() -> None:
    """Call each function on one number. To be called once by a process, before it computes on the CPU."""
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in _FUNCTIONS:
            getattr(torch, name)(one)
