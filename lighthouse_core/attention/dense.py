"""Dense causal attention by a stock kernel."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lighthouse_core.attention import flash
from lighthouse_core.attention.config import DENSE_BACKENDS, LighthouseConfig, known
from lighthouse_core.attention.parts import fused
from lighthouse_core.backends import kernels, log_once

_SDPA = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "math": [SDPBackend.MATH],
}
# torch tries these in order and takes the first that supports the inputs.
_AUTO = {
    "cuda": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "cpu": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
}


def _choose(name: str, device_type: str, dtype: torch.dtype, dim: int) -> list[SDPBackend] | None:
    """SDPA backends in order of preference, or None for FlashAttention-4.

    Raises:
        ValueError: for a backend that is not there.
    """
    if name in ("auto", "fa4"):
        why_not = flash.obstacle(device_type, dtype, dim)
        if why_not is None:
            log_once(f"dense attention on {device_type}: FlashAttention-4")
            return None
        if name == "fa4":
            raise ValueError(f"dense backend 'fa4' {why_not}")
        order = _AUTO.get(device_type, [SDPBackend.MATH])
        names = ", ".join(b.name.removesuffix("_ATTENTION").lower() for b in order)
        faster = f"; FlashAttention-4 {why_not}" if device_type == "cuda" else ""
        log_once(f"dense attention on {device_type}: the first of torch's {names} that supports the inputs{faster}")
        return order
    return _sdpa(name, device_type)


def _sdpa(name: str, device_type: str) -> list[SDPBackend]:
    known("dense_backend", name, DENSE_BACKENDS)
    if name == "cudnn" and device_type != "cuda":
        raise ValueError(f"dense backend 'cudnn' needs a CUDA device, not {device_type}")
    return _SDPA[name]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """Causal softmax attention.

    It computes in the dtype of the inputs, also within torch.autocast. Under torch.compile batch, tokens and heads may
    be dynamic.

    Args:
        q: [B, N, H, D].
        k, v: [B, N, Hkv, D]; H is a multiple of Hkv.
        scale: factor on the scores; 1/sqrt(D) by default.
        backend: `auto`, `fa4`, `cudnn`, `flash` or `math`. `auto` is FlashAttention-4 where it is installed and takes
            the inputs, else the first of torch's that does.

    Returns:
        [B, N, H, D] in the dtype of `q`.

    Raises:
        ValueError: for shapes that do not fit together, or a backend that is not there.
    """
    check_inputs(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        return _dense(q, k, v, scale, backend)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str) -> Tensor:
    backends = _choose(backend, q.device.type, q.dtype, q.shape[3])
    if backends is None:
        return flash.flash4(q, k, v, scale)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    # Of sizes that a compiler leaves open a comparison is no bool, which is what torch wants.
    grouped = True if q.shape[2] != k.shape[2] else False  # noqa: SIM210
    with sdpa_kernel(backends, set_priority=True):
        out = scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def check_backends(cfg: LighthouseConfig, device_type: str, *, pooled: bool = True) -> None:
    """Raise ValueError unless the backends that `cfg` names are there on a device of this type, `pooled` for its
    Lighthouse calls, too. Touches no GPU."""
    if pooled and cfg.method == "pyramid":
        kernels(cfg.backend, device_type)
    if cfg.dense_backend == "fa4" and (why_not := flash.absence(device_type)):
        raise ValueError(f"dense backend 'fa4' {why_not}")
    if cfg.dense_backend not in ("auto", "fa4"):
        _sdpa(cfg.dense_backend, device_type)


def log_choices(cfg: LighthouseConfig, device_type: str, dtype: torch.dtype, dim: int, *, pooled: bool) -> None:
    """Say in the log which backends such calls take, and why: a compiled call cannot.

    Args:
        cfg: settings of the calls.
        device_type, dtype, dim: of their inputs; dim is D.
        pooled: whether any of them is a Lighthouse call.

    Raises:
        ValueError: for a backend that is not there.
    """
    if pooled and cfg.method == "pyramid":
        kernels(cfg.backend, device_type, dtype)
    if pooled and cfg.adds_parts:
        fused(cfg.dense_backend, device_type, dtype, dim)
    _choose(cfg.dense_backend, device_type, dtype, dim)


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
