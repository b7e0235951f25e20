"""Attention over a part of the keys, with its log-sum-exp: parts of one softmax, by stock kernels, add up exactly.

B batch, N tokens, H query heads, Hkv key/value heads, D head dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lighthouse_core.attention.backends import log_once
from lighthouse_core.attention.dense import BACKENDS
from lighthouse_core.attention.dense.call import KERNELS
from lighthouse_core.attention.dense.kernel import DenseKernel
from lighthouse_core.attention.dense.math import wide
from lighthouse_core.attention.settings import BackendError, SettingError, known

_WITH_LSE = tuple(name for name, facts in BACKENDS.items() if facts.lse)
# What `auto` takes, the first that can; matrix products on a CPU.
_PREFERRED = ("fa4", "varlen")
_WITH_WINDOW = tuple(name for name, facts in BACKENDS.items() if facts.window)


class Part(NamedTuple):
    """Attention of every query over some of the keys.

    Attributes:
        out: [B, N, H, D], a softmax over those keys alone.
        lse: [B, N, H] float32 (float64 for float64 inputs), log of the sum of their exponentials; -inf where there
            is no key.
    """

    out: Tensor
    lse: Tensor


def merge(parts: list[Part]) -> Tensor:
    """One softmax over the keys of all parts, [B, N, H, D]; every query has a key in the first part."""
    if len(parts) == 1:
        return parts[0].out
    weights = torch.softmax(torch.stack([part.lse for part in parts]), 0)[..., None]
    total = sum(weight * part.out for weight, part in zip(weights, parts, strict=True))
    return total.to(parts[0].out.dtype)


def near(q: Tensor, k: Tensor, v: Tensor, window: int, *, scale: float | None = None, backend: str = "auto") -> Part:
    """Every query over the `window` tokens that end with its own; over all before it for 0.

    Args:
        q: [B, N, H, D].
        k, v: [B, N, Hkv, D].
        window: tokens.
        scale: factor on the scores; 1/sqrt(D) by default.
        backend: `auto`, or a dense kernel that gives its log-sum-exp; see `parts_kernel`.

    Raises:
        ValueError: for a backend that is not there.
    """
    kernel = parts_kernel(backend, q.device.type, q.dtype, q.shape[3])
    assert kernel.part is not None
    return Part(*kernel.part(q, k, v, scale, 0 if window >= q.shape[1] else window))


def windowed(
    q: Tensor, k: Tensor, v: Tensor, window: int, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """`near` without its log-sum-exp, [B, N, H, D], which more kernels can do."""
    kernel = windowed_kernel(backend, q.device.type, q.dtype, q.shape[3])
    assert kernel.windowed is not None
    return kernel.windowed(q, k, v, scale, 0 if window >= q.shape[1] else window)


def parts_kernel(name: str, device_type: str, dtype: torch.dtype, dim: int) -> DenseKernel:
    """The kernel that makes the parts of a softmax: for `auto` the first fused one, and plain matrix products on a CPU.

    Args:
        name: of the backend.
        device_type, dtype, dim: of the inputs; dim is D.

    Raises:
        ValueError: an unknown backend, one that is not there, or one that gives no log-sum-exp.
    """
    return _kernel("parts of a softmax", _WITH_LSE, name, device_type, dtype, dim)


def windowed_kernel(name: str, device_type: str, dtype: torch.dtype, dim: int) -> DenseKernel:
    """The kernel of attention over the last tokens alone; see `parts_kernel`."""
    return _kernel("windows", _WITH_WINDOW, name, device_type, dtype, dim)


def _kernel(
    what: str, names: tuple[str, ...], name: str, device_type: str, dtype: torch.dtype, dim: int
) -> DenseKernel:
    if known("dense_backend", name, tuple(BACKENDS)) not in names:
        raise SettingError("dense_backend", f"must be one of {', '.join(names)} for {what}, not {name!r}")
    if name == "math":
        return KERNELS["math"]
    why: list[str] = []
    for kernel in (KERNELS[one] for one in (_PREFERRED if name == "auto" else (name,))):
        why_not = kernel.obstacle(device_type, dtype, dim)
        if why_not is None:
            log_once(f"{what} on {device_type}: {'; '.join([kernel.label, *why])}")
            return kernel
        why.append(f"{kernel.label} {why_not}")
    if name == "auto" and device_type != "cuda":
        return KERNELS["math"]
    hint = 'the dense_backend "math" runs everywhere, for short sequences'
    raise BackendError(f"{what} need a kernel for them: {'; '.join(why)}", hint)


def check_parts(name: str, device_type: str, dtype: torch.dtype | None, dim: int | None) -> None:
    """Raise ValueError unless a backend makes parts of a softmax of such tensors, where these are known."""
    if dtype is not None and dim is not None:
        parts_kernel(name, device_type, dtype, dim)


def check_window(name: str, device_type: str, dtype: torch.dtype | None, dim: int | None) -> None:
    """Raise ValueError unless a backend has windows for such tensors, where these are known."""
    if dtype is not None and dim is not None:
        windowed_kernel(name, device_type, dtype, dim)


def far(
    q: Tensor, k: Tensor, v: Tensor, ratio: int, behind: int, *, scale: float | None = None, backend: str = "auto"
) -> Part:
    """Every query over fewer keys than tokens, one for each `ratio` of them: that of position t over the keys 0 to
    t // ratio - behind.

    The queries of one remainder t % ratio make a sequence whose causal mask is just that, so the kernel is a stock one,
    to which they are further heads: a view of q, and of what it returns.

    Args:
        q: [B, N, H, D].
        k, v: [B, M, Hkv, D], M >= ceil(N / ratio) - behind.
        ratio: tokens a key.
        behind: keys that the newest visible one lies behind the query's own, at least 1.
        scale, backend: see `near`.
    """
    tokens, heads = q.shape[1:3]
    rows = -(-tokens // ratio)
    keys = rows - behind
    if keys < 1:
        return Part(torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=wide(q.dtype)))
    whole = pad(q, (0, 0, 0, 0, 0, rows * ratio - tokens)).unflatten(1, (rows, ratio))
    queries = whole[:, behind:].flatten(2, 3)
    k, v = (x[:, :keys].repeat(1, 1, ratio, 1) for x in (k, v))
    part = near(queries, k, v, 0, scale=scale, backend=backend)
    out, lse = (x.unflatten(2, (ratio, heads)).flatten(1, 2)[:, : tokens - behind * ratio] for x in part)
    return Part(pad(out, (0, 0, 0, 0, behind * ratio, 0)), pad(lse, (0, 0, behind * ratio, 0), value=-torch.inf))
