"""torch's variable-length attention: torch's copy of FlashAttention-2, with windows and with log-sum-exps.

torch.nn.attention.varlen, its public function, has no windows before torch 2.13 and no gradient of the log-sum-exp. So
this calls the operations below it.

B batch, N tokens of a sequence, T of all of them, H query heads, Hkv key/value heads, D head dimension.
"""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad

from lighthouse_core.attention.context import Documents
from lighthouse_core.attention.dense.kernel import DenseKernel
from lighthouse_core.attention.documents import check_count

_NEEDS_GPU = "needs an NVIDIA GPU of compute capability 8.0 or more"
# Columns that carry the gradient of the log-sum-exp into the backward pass; head dimensions are multiples of 8.
_COLUMNS = 8
_MOST_DIM = 256 - _COLUMNS


def absence(device_type: str) -> str | None:
    """Why it is not there for any tensor on such a device; None if it is. Touches no GPU."""
    return None if device_type == "cuda" else _NEEDS_GPU


def obstacle(device_type: str, dtype: torch.dtype, dim: int) -> str | None:
    """Why it cannot take such tensors; None if it can."""
    if why_not := absence(device_type):
        return why_not
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes no {dtype}"
    if dim % 8 or dim > _MOST_DIM:
        return f"takes no head dimension of {dim}"
    return _NEEDS_GPU if _major() < 8 or torch.version.hip else None


@torch.compiler.assume_constant_result
def _major() -> int:
    return torch.cuda.get_device_capability()[0]


# Apart, so that a test can put others in place.
_kernel_forward = torch.ops.aten._flash_attention_forward
_kernel_backward = torch.ops.aten._flash_attention_backward


@custom_op("lighthouse::varlen", mutates_args=())
def _varlen(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and log-sum-exp [H, T] float32."""
    lengths = starts, starts, longest, longest
    out, lse, *_ = _kernel_forward(q, k, v, *lengths, 0.0, True, False, scale=scale, **_sides(window))
    return out, lse


def _sides(window: int) -> dict[str, int]:
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


@_varlen.register_fake
def _(q, k, v, starts, longest, scale, window):
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@custom_op("lighthouse::varlen_backward", mutates_args=())
def _varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    out: Tensor,
    lse: Tensor,
    longest: int,
    scale: float,
    window: int,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dim = q.shape[2]
    if grad_lse is not None:
        q, k, v, out, grad = carry(q, k, v, out, grad, grad_lse)
    lengths = starts, starts, longest, longest
    # Of a generator that nothing draws from.
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    grads = _kernel_backward(
        grad.contiguous(), q, k, v, out, lse, *lengths, 0.0, True, state, unused, scale=scale, **_sides(window)
    )
    return tuple(x[..., :dim].contiguous() for x in grads[:3])


@_varlen_backward.register_fake
def _(grad, q, k, v, starts, out, lse, longest, scale, window, grad_lse=None):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def carry(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a backward pass with more columns, which bring in the gradient of the log-sum-exp.

    The gradient of a score is P (dP - delta + dlse), where the kernel works out delta as the row sum of dO O. With
    columns of ones in O, of zeros in Q, K and V, and in dO of numbers that add up to -dlse, that sum is delta - dlse,
    and nothing else changes. Three numbers of the dtype hold what one of float32 does.

    Args:
        q, out, grad: [T, H, D].
        k, v: [T, Hkv, D].
        grad_lse: [H, T] float32.
    """
    q, k, v = (pad(x, (0, _COLUMNS)) for x in (q, k, v))
    rest, parts = -grad_lse.T.float(), []
    for _ in range(3):
        parts.append(rest.to(grad.dtype))
        rest = rest - parts[-1].float()
    more = torch.stack(parts, -1)
    grad = torch.cat((grad, pad(more, (0, _COLUMNS - 3))), -1)
    return q, k, v, pad(out, (0, _COLUMNS), value=1.0), grad


def _keep(ctx, inputs, output):
    q, k, v, starts, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, starts, *output)
    ctx.set_materialize_grads(False)


def _grad(ctx, grad, grad_lse):
    # Read once: activation checkpointing makes them again for each time they are asked for.
    saved = ctx.saved_tensors
    out = saved[4]
    grad = torch.zeros_like(out) if grad is None else grad
    return *_varlen_backward(grad, *saved, *ctx.how, grad_lse), None, None, None, None


_varlen.register_autograd(_grad, setup_context=_keep)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int, documents: Documents
) -> tuple[Tensor, Tensor]:
    check_count("varlen", documents)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out, lse = _varlen(*(x.contiguous() for x in (q, k, v)), *documents, scale, window)
    return out, lse.T


def _call(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> tuple[Tensor, Tensor]:
    batch, tokens = q.shape[:2]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * tokens
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, lse = (x.unflatten(0, (batch, tokens)) for x in _packed(q, k, v, scale, window, Documents(starts, tokens)))
    return out, lse


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return _call(q, k, v, scale, 0)[0]


def _windowed(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    return _call(q, k, v, scale, window)[0]


# torch chooses a deterministic backward pass where it is asked to.
KERNEL = DenseKernel(
    "varlen",
    "variable-length attention (torch)",
    absence,
    obstacle,
    _forward,
    part=_call,
    windowed=_windowed,
    packed=_packed,
    kept=(torch.ops.lighthouse.varlen.default,),
)
