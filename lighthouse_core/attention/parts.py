"""Attention over a part of the keys, with its log-sum-exp: parts of one softmax, by stock kernels, add up exactly.

B batch, N tokens, H query heads, Hkv key/value heads, D head dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lighthouse_core.attention.context import Documents
from lighthouse_core.attention.dense import BACKENDS
from lighthouse_core.attention.dense.call import kernel_beyond, packed
from lighthouse_core.attention.dense.kernel import DenseKernel
from lighthouse_core.attention.dense.math import wide

_WITH_LSE = tuple(name for name, facts in BACKENDS.items() if facts.lse)
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


def near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
    documents: Documents | None = None,
) -> Part:
    """Every query over the `window` tokens that end with its own; over all before it for 0.

    Args:
        q: [B, N, H, D].
        k, v: [B, N, Hkv, D].
        window: tokens.
        scale: factor on the scores; 1/sqrt(D) by default.
        backend: `auto`, or a dense kernel that gives its log-sum-exp; see `parts_kernel`.
        documents: that the tokens are packed from, which then see no other one's.

    Raises:
        ValueError: for a backend that is not there.
    """
    kernel = parts_kernel(backend, q.device.type, q.dtype, q.shape[3])
    window = 0 if window >= q.shape[1] else window
    if documents is not None:
        return Part(*packed(kernel, q, k, v, scale, window, documents))
    assert kernel.part is not None
    return Part(*kernel.part(q, k, v, scale, window))


def near_entries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Part:
    """Every gathered row over those before it that are of its document.

    Args:
        q: [B, S, H, D].
        k, v: [B, S, Hkv, D].
        documents: of the rows; see `documents.of_entries`.
        scale, backend: see `near`.
    """
    batch, heads = q.shape[0], k.shape[2]
    # Where a document ends among the rows differs from KV head to KV head: each is a sequence of its own.
    q, k, v = (x.unflatten(2, (heads, -1)).movedim(2, 0).flatten(1, 2) for x in (q, k, v))
    found = near(q, k, v, 0, scale=scale, backend=backend, documents=documents)
    out, lse = (x.unflatten(1, (batch, -1)).movedim(0, 2).flatten(2, 3) for x in found)
    return Part(out, lse)


def windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
    documents: Documents | None = None,
) -> Tensor:
    """`near` without its log-sum-exp, [B, N, H, D], which more kernels can do."""
    kernel = windowed_kernel(backend, q.device.type, q.dtype, q.shape[3])
    window = 0 if window >= q.shape[1] else window
    if documents is not None:
        return packed(kernel, q, k, v, scale, window, documents)[0]
    assert kernel.windowed is not None
    return kernel.windowed(q, k, v, scale, window)


def parts_kernel(name: str, device_type: str, dtype: torch.dtype, dim: int) -> DenseKernel:
    """The kernel that makes the parts of a softmax; see `kernel_beyond`."""
    return kernel_beyond("parts of a softmax", _WITH_LSE, name, device_type, dtype, dim)


def windowed_kernel(name: str, device_type: str, dtype: torch.dtype, dim: int) -> DenseKernel:
    """The kernel of attention over the last tokens alone; see `kernel_beyond`."""
    return kernel_beyond("windows", _WITH_WINDOW, name, device_type, dtype, dim)


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
