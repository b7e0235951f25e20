"""What the packages FlashAttention-2 and -3 have in common: `flash_attn_func`, tokens first, and
`flash_attn_varlen_func`."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lighthouse_core.attention.context import Documents
from lighthouse_core.attention.dense.kernel import DenseKernel
from lighthouse_core.attention.documents import check_count

_NEEDS_GPU = "needs an NVIDIA GPU"


def from_package(name: str, label: str, module: str, installed: bool, majors: range, install: str) -> DenseKernel:
    """The kernel of a package.

    Args:
        name, label: of the kernel.
        module: that has both functions.
        installed: whether the package is.
        majors: compute capabilities that it has kernels for.
        install: how to get it.
    """
    calls, fault = _loaded(module) if installed else (None, f"is not installed ({install})")

    def absence(device_type: str) -> str | None:
        if device_type != "cuda":
            return _NEEDS_GPU
        return fault

    def obstacle(device_type: str, dtype: torch.dtype, dim: int) -> str | None:
        if why_not := absence(device_type):
            return why_not
        if _major() not in majors:
            return f"needs a GPU of compute capability {majors.start}.0 to {majors.stop - 1}.x"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"takes no {dtype}"
        return f"takes no head dimension of {dim}" if dim % 8 or dim > 256 else None

    def attend(number: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int, **more: Any) -> Tensor:
        assert calls is not None
        out = calls[number](
            q,
            k,
            v,
            **more,
            softmax_scale=scale,
            causal=True,
            window_size=(window - 1, 0) if window else (-1, -1),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        # Some releases return the log-sum-exp, too.
        return out[0] if isinstance(out, tuple) else out

    def windowed(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
        return attend(0, q, k, v, scale, window)

    def packed(
        q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int, documents: Documents
    ) -> tuple[Tensor, None]:
        check_count(name, documents)
        starts, longest = documents
        lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
        return attend(1, q, k, v, scale, window, **lengths), None

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return windowed(q, k, v, scale, 0)

    return DenseKernel(name, label, absence, obstacle, forward, windowed=windowed, packed=packed)


def _loaded(module: str) -> tuple[tuple[Callable[..., Any], ...] | None, str | None]:
    """`flash_attn_func` and `flash_attn_varlen_func` of a module, or why there are none: one built for another torch
    does not load.

    It is loaded before any call, for torch.compile follows no import.
    """
    try:
        found = importlib.import_module(module)
        return (found.flash_attn_func, found.flash_attn_varlen_func), None
    except (ImportError, AttributeError, OSError) as error:
        return None, f"does not load: {str(error).splitlines()[0]}"


@torch.compiler.assume_constant_result
def _major() -> int:
    return torch.cuda.get_device_capability()[0]
