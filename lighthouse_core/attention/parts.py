"""Attention over a part of the keys, with its log-sum-exp: parts of one softmax, by stock kernels, add up exactly.

B batch, N tokens, H query heads, Hkv key/value heads, D head dimension.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad

from lighthouse_core.attention import flash
from lighthouse_core.attention.config import known

# Query rows whose scores are made at once without a fused kernel.
_ROWS = 512
_BACKENDS = ("auto", "fa4", "math")


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
    """Whether FlashAttention-4 makes the parts. On a CPU, and for `math`, plain matrix products do. Where they are not
    compiled, these keep all their scores for the backward pass.

    Args:
        backend: `auto`, `fa4` or `math`.
        device_type, dtype, dim: of the inputs; dim is D.

    Raises:
        ValueError: an unknown backend; `auto` finds no fused kernel on a GPU, or `fa4` is not there.
    """
    known("backend of parts of a softmax", backend, _BACKENDS)
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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # A compiled graph would hold the blocks of rows of one length alone.
    products = _compiled if torch.compiler.is_compiling() else _products
    return Part(*products(q, k, v, window, scale))


def _blocks(q: Tensor, k: Tensor, window: int, scale: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of every block of query rows the rows, the keys that some of them see, and the scores [B, rows, Hkv, G, keys].

    q is [B, N, Hkv, G, D], k [B, N, Hkv, D].
    """
    for start in range(0, q.shape[1], _ROWS):
        end = min(start + _ROWS, q.shape[1])
        first = max(0, start - window + 1) if window else 0
        age = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
        hidden = (age < 0) | (age >= window) if window else age < 0
        scores = scale * torch.einsum("bnhgd,bmhd->bnhgm", q[:, start:end], k[:, first:end])
        yield slice(start, end), slice(first, end), scores.masked_fill(hidden[:, None, None], -torch.inf)


def _widened(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(q.dtype)
    return q.to(wide).unflatten(2, (k.shape[2], -1)), k.to(wide), v.to(wide)


def _products(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    grouped, k, v = _widened(q, k, v)
    outs, sums = [], []
    for _, keys, scores in _blocks(grouped, k, window, scale):
        lse = scores.logsumexp(-1)
        outs.append(torch.einsum("bnhgm,bmhd->bnhgd", (scores - lse[..., None]).exp(), v[:, keys]))
        sums.append(lse)
    out, lse = (torch.cat(parts, 1).flatten(2, 3) for parts in (outs, sums))
    return out.to(q.dtype), lse


@custom_op("lighthouse::plain_part", mutates_args=())
def _compiled(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """The same as an operation, which keeps none of the scores: its gradient makes them again."""
    out, lse = _products(q, k, v, window, scale)
    return out.contiguous(), lse.contiguous()


@_compiled.register_fake
def _(q, k, v, window, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_wide(q.dtype))


@custom_op("lighthouse::plain_part_backward", mutates_args=())
def _compiled_backward(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grouped, wide_k, wide_v = _widened(q, k, v)
    grad, out = (x.to(wide_k.dtype).unflatten(2, (k.shape[2], -1)) for x in (grad, out))
    lse, grad_lse = (x.unflatten(2, (k.shape[2], -1))[..., None] for x in (lse, grad_lse))
    # Of a score, what its weight gets but for the value that it weighs.
    common = grad_lse - (grad * out).sum(-1, keepdim=True)
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (grouped, wide_k, wide_v))
    for rows, keys, scores in _blocks(grouped, wide_k, window, scale):
        weights = (scores - lse[:, rows]).exp()
        grad_v[:, keys] += torch.einsum("bnhgm,bnhgd->bmhd", weights, grad[:, rows])
        of_scores = torch.einsum("bnhgd,bmhd->bnhgm", grad[:, rows], wide_v[:, keys]) + common[:, rows]
        of_scores *= scale * weights
        grad_q[:, rows] = torch.einsum("bnhgm,bmhd->bnhgd", of_scores, wide_k[:, keys])
        grad_k[:, keys] += torch.einsum("bnhgm,bnhgd->bmhd", of_scores, grouped[:, rows])
    return grad_q.flatten(2, 3).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


@_compiled_backward.register_fake
def _(grad, grad_lse, q, k, v, out, lse, window, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    *tensors, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _grad(ctx, grad, grad_lse):
    with torch.autocast(grad.device.type, enabled=False):
        return *_compiled_backward(grad, grad_lse, *ctx.saved_tensors, ctx.window, ctx.scale), None, None


_compiled.register_autograd(_grad, setup_context=_keep)
