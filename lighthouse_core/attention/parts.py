"""Attention over a part of the keys, with its log-sum-exp: parts of one softmax, by stock kernels, add up exactly.

B batch, N tokens, H query heads, Hkv key/value heads, D head dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lighthouse_core.attention import flash

# Query rows whose scores are made at once without a fused kernel.
_ROWS = 512


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
        backend: `auto`, `fa4` or `math`; see `fused`.

    Raises:
        ValueError: for a backend that is not there.
    """
    window = 0 if window >= q.shape[1] else window
    if fused(backend, q.device.type, q.dtype, q.shape[3]):
        return Part(*flash.flash4_part(q, k, v, scale, window))
    return _plain(q, k, v, window, scale)


def fused(backend: str, device_type: str, dtype: torch.dtype, dim: int) -> bool:
    """Whether FlashAttention-4 makes the parts. On a CPU, and for `math`, plain matrix products do, which keep all
    their scores for the backward pass.

    Args:
        backend: `auto`, `fa4` or `math`.
        device_type, dtype, dim: of the inputs; dim is D.

    Raises:
        ValueError: `auto` finds no fused kernel on a GPU, or `fa4` is not there.
    """
    why_not = flash.obstacle(device_type, dtype, dim)
    if why_not and (backend == "fa4" or (backend == "auto" and device_type == "cuda")):
        raise ValueError(f"parts of a softmax need FlashAttention-4, which {why_not}; 'math' is for short sequences")
    return backend != "math" and why_not is None


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
        return Part(torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=_wide(q.dtype)))
    whole = pad(q, (0, 0, 0, 0, 0, rows * ratio - tokens)).unflatten(1, (rows, ratio))
    queries = whole[:, behind:].flatten(2, 3)
    part = near(queries, *(x[:, :keys].repeat(1, 1, ratio, 1) for x in (k, v)), 0, scale=scale, backend=backend)
    out, lse = (x.unflatten(2, (ratio, heads)).flatten(1, 2)[:, : tokens - behind * ratio] for x in part)
    return Part(pad(out, (0, 0, 0, 0, behind * ratio, 0)), pad(lse, (0, 0, behind * ratio, 0), value=-torch.inf))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _plain(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Part:
    """`near` by matrix products, in float32 at least."""
    with torch.autocast(q.device.type, enabled=False):
        return _products(q, k, v, window, scale)


def _products(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Part:
    tokens, kv_heads = q.shape[1], k.shape[2]
    wide = _wide(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped, k, v = q.to(wide).unflatten(2, (kv_heads, -1)), k.to(wide), v.to(wide)
    outs, sums = [], []
    for start in range(0, tokens, _ROWS):
        end = min(start + _ROWS, tokens)
        first = max(0, start - window + 1) if window else 0
        age = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
        hidden = (age < 0) | (age >= window) if window else age < 0
        scores = scale * torch.einsum("bnhgd,bmhd->bnhgm", grouped[:, start:end], k[:, first:end])
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        lse = scores.logsumexp(-1)
        outs.append(torch.einsum("bnhgm,bmhd->bnhgd", (scores - lse[..., None]).exp(), v[:, first:end]))
        sums.append(lse)
    out, lse = (torch.cat(parts, 1).flatten(2, 3) for parts in (outs, sums))
    return Part(out.to(q.dtype), lse)
