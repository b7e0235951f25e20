"""Plain matrix products, in float32 at least: the readable truth of every kernel, and what a CPU has for windows.

B batch, N tokens, H query heads, Hkv key/value heads, G query heads of a KV head, D head dimension.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lighthouse_core.attention.context import Documents
from lighthouse_core.attention.dense.kernel import DenseKernel, Tiles
from lighthouse_core.attention.dense.sdpa import attend, no_obstacle, nowhere_absent

# Query rows whose scores are made at once.
_ROWS = 512


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return attend(q, k, v, scale, [SDPBackend.MATH])


def _part(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where it is not compiled, autograd keeps all scores for the backward pass."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # A compiled graph would hold the blocks of rows of one length alone.
    products = _compiled if torch.compiler.is_compiling() else _products
    return products(q, k, v, window, scale, starts)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int, documents: Documents
) -> tuple[Tensor, Tensor]:
    out, lse = _part(q[None], k[None], v[None], scale, window, documents.starts)
    return out[0], lse[0]


def _windowed(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    return _part(q, k, v, scale, window)[0]


def _blocked(q: Tensor, k: Tensor, v: Tensor, scale: float | None, tiles: Tiles) -> Tensor:
    """The scores of all pairs, of which those that are not seen do not count."""
    mask = seen(tiles, q.shape[1]).repeat_interleave(q.shape[2] // k.shape[2], 1)
    dtype = q.dtype
    q, k, v = (x.transpose(1, 2).to(wide(dtype)) for x in (q, k, v))
    with sdpa_kernel([SDPBackend.MATH]):
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).to(dtype)


def seen(tiles: Tiles, tokens: int) -> Tensor:
    """Which keys each query sees, bool [B, Hkv, N, N]."""
    at = torch.arange(tokens, device=tiles.chosen.device)
    age = at[:, None] - at
    near = (age >= 0) & (age < tiles.window)
    if tiles.starts is not None:
        near = (near & (at >= tiles.starts.repeat_interleave(tiles.tile, 1)[..., None]))[:, None]
    far = members(tiles.chosen, tokens // tiles.block_size)
    return near | far.repeat_interleave(tiles.tile, 2).repeat_interleave(tiles.block_size, 3)


def members(chosen: Tensor, count: int) -> Tensor:
    """Which of so many blocks each tile has chosen, bool [B, Hkv, tiles, count]; `chosen` has their numbers."""
    # One more, for those that stand for no block.
    found = chosen.new_zeros((*chosen.shape[:3], count + 1), dtype=torch.bool)
    return found.scatter(3, chosen.long(), True)[..., :count]


def _blocks(
    q: Tensor, k: Tensor, window: int, scale: float, starts: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of every block of query rows the rows, the keys that some of them see, and the scores [B, rows, Hkv, G, keys].

    q is [B, N, Hkv, G, D], k [B, N, Hkv, D]. With `starts`, those of documents, a block is of one document.
    """
    bounds = [0, q.shape[1]] if starts is None else starts.tolist()
    for begin, stop in pairwise(bounds):
        for start in range(begin, stop, _ROWS):
            end = min(start + _ROWS, stop)
            first = max(begin, start - window + 1) if window else begin
            age = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
            hidden = (age < 0) | (age >= window) if window else age < 0
            scores = scale * torch.einsum("bnhgd,bmhd->bnhgm", q[:, start:end], k[:, first:end])
            yield slice(start, end), slice(first, end), scores.masked_fill(hidden[:, None, None], -torch.inf)


def _widened(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide(q.dtype)
    return q.to(dtype).unflatten(2, (k.shape[2], -1)), k.to(dtype), v.to(dtype)


def _products(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    grouped, k, v = _widened(q, k, v)
    outs, sums = [], []
    for _, keys, scores in _blocks(grouped, k, window, scale, starts):
        lse = scores.logsumexp(-1)
        outs.append(torch.einsum("bnhgm,bmhd->bnhgd", (scores - lse[..., None]).exp(), v[:, keys]))
        sums.append(lse)
    out, lse = (torch.cat(parts, 1).flatten(2, 3) for parts in (outs, sums))
    return out.to(q.dtype), lse


@custom_op("lighthouse::plain_part", mutates_args=())
def _compiled(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same as an operation, which keeps none of the scores: its gradient makes them again."""
    out, lse = _products(q, k, v, window, scale, starts)
    return out.contiguous(), lse.contiguous()


@_compiled.register_fake
def _(q, k, v, window, scale, starts=None):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@custom_op("lighthouse::plain_part_backward", mutates_args=())
def _compiled_backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    scale: float,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grouped, wide_k, wide_v = _widened(q, k, v)
    grad, out = (x.to(wide_k.dtype).unflatten(2, (k.shape[2], -1)) for x in (grad, out))
    lse, grad_lse = (x.unflatten(2, (k.shape[2], -1))[..., None] for x in (lse, grad_lse))
    # Of a score, what its weight gets but for the value that it weighs.
    common = grad_lse - (grad * out).sum(-1, keepdim=True)
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (grouped, wide_k, wide_v))
    for rows, keys, scores in _blocks(grouped, wide_k, window, scale, starts):
        weights = (scores - lse[:, rows]).exp()
        grad_v[:, keys] += torch.einsum("bnhgm,bnhgd->bmhd", weights, grad[:, rows])
        of_scores = torch.einsum("bnhgd,bmhd->bnhgm", grad[:, rows], wide_v[:, keys]) + common[:, rows]
        of_scores *= scale * weights
        grad_q[:, rows] = torch.einsum("bnhgm,bmhd->bnhgd", of_scores, wide_k[:, keys])
        grad_k[:, keys] += torch.einsum("bnhgm,bnhgd->bmhd", of_scores, grouped[:, rows])
    return grad_q.flatten(2, 3).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


@_compiled_backward.register_fake
def _(grad, grad_lse, q, k, v, out, lse, window, scale, starts=None):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    *tensors, ctx.window, ctx.scale, starts = inputs
    ctx.save_for_backward(*tensors, *output, starts)


def _grad(ctx, grad, grad_lse):
    *saved, starts = ctx.saved_tensors
    with torch.autocast(grad.device.type, enabled=False):
        return *_compiled_backward(grad, grad_lse, *saved, ctx.window, ctx.scale, starts), None, None, None


_compiled.register_autograd(_grad, setup_context=_keep)


KERNEL = DenseKernel(
    "math",
    "plain matrix products",
    nowhere_absent,
    no_obstacle,
    _forward,
    part=_part,
    windowed=_windowed,
    packed=_packed,
    blocked=_blocked,
    kept=(torch.ops.aten._scaled_dot_product_attention_math.default,),
)
