"""Dense causal attention by a stock kernel, and which one."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from lighthouse_core.attention.backends import log_once
from lighthouse_core.attention.dense import BACKENDS
from lighthouse_core.attention.dense.kernel import DenseKernel
from lighthouse_core.attention.dense.sdpa import attend
from lighthouse_core.attention.settings import BackendError, known

KERNELS: dict[str, DenseKernel] = {
    name: import_module(f"lighthouse_core.attention.dense.{name}").KERNEL for name in BACKENDS if name != "auto"
}
# What `auto` takes where it can, before those of torch.
_PREFERRED = ("fa4",)
# torch tries these in order and takes the first that supports the inputs.
_TORCH = {
    "cuda": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cpu": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
}
_OTHER = 'the dense_backend "auto" takes a kernel that runs here'


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """Causal softmax attention.

    It computes in the dtype of the inputs, also within torch.autocast. Under torch.compile batch, tokens and heads may
    be dynamic.

    Args:
        q: [B, N, H, D].
        k, v: [B, N, Hkv, D]; H is a multiple of Hkv.
        scale: factor on the scores; 1/sqrt(D) by default.
        backend: a name of lighthouse_core.attention.dense. `auto` is FlashAttention-4 where it is installed and takes
            the inputs, else the first of torch's that does.

    Returns:
        [B, N, H, D] in the dtype of `q`.

    Raises:
        ValueError: for shapes that do not fit together, or a backend that is not there.
    """
    check_inputs(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        return choose(backend, q.device.type, q.dtype, q.shape[3])(q, k, v, scale)


def choose(
    name: str, device_type: str, dtype: torch.dtype, dim: int
) -> Callable[[Tensor, Tensor, Tensor, float | None], Tensor]:
    """The function of a dense backend; what `auto` stands for is logged.

    Args:
        name: of the backend.
        device_type, dtype, dim: of the inputs; dim is D.

    Raises:
        ValueError: for a backend that is not there.
    """
    if known("dense_backend", name, tuple(BACKENDS)) != "auto":
        kernel = KERNELS[name]
        if why_not := kernel.obstacle(device_type, dtype, dim):
            raise BackendError(f"dense backend {name!r} {why_not}", _OTHER)
        return kernel.forward
    why = []
    for preferred in _PREFERRED:
        kernel = KERNELS[preferred]
        why_not = kernel.obstacle(device_type, dtype, dim)
        if why_not is None:
            log_once(f"dense attention on {device_type}: {kernel.label}")
            return kernel.forward
        why.append(f"; {kernel.label} {why_not}")
    order = _TORCH.get(device_type, [SDPBackend.MATH])
    names = ", ".join(b.name.removesuffix("_ATTENTION").lower() for b in order)
    faster = "".join(why) if device_type == "cuda" else ""
    log_once(f"dense attention on {device_type}: the first of torch's {names} that supports the inputs{faster}")
    return partial(attend, order=order)


def check_backend(name: str, device_type: str) -> None:
    """Raise ValueError unless a dense backend is there on a device of this type. Touches no GPU."""
    if known("dense_backend", name, tuple(BACKENDS)) != "auto" and (why_not := KERNELS[name].absence(device_type)):
        raise BackendError(f"dense backend {name!r} {why_not}", _OTHER)


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q is [B, N, H, D] and k, v are [B, N, Hkv, D] of the same dtype and device."""
    if q.dim() != 4 or k.dim() != 4 or v.shape != k.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q must be [B, N, H, D] and k, v [B, N, Hkv, D]; got {shapes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch, tokens or head dimension")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if 0 in q.shape:
        raise ValueError(f"q {tuple(q.shape)} is empty")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k and v must share a floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")
