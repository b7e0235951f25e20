"""FlashAttention-4 as a pair of operations of torch, so that compiled graphs hold it whole.

https://github.com/Dao-AILab/flash-attention, package flash-attn-4 (extra `flash`). Its own autograd function cannot be
used inside an operation of torch, and breaks a compiled graph outside of one.
"""

import functools
import importlib.metadata
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lighthouse_core.attention.context import Documents
from lighthouse_core.attention.dense import flex
from lighthouse_core.attention.dense.kernel import DenseKernel, Tiles

# Not by its module: FlashAttention-2 has one of that name, too, and importing it may fail.
INSTALLED = any(importlib.metadata.distributions(name="flash-attn-4"))
_NEEDS_GPU = "needs a Hopper or Blackwell GPU"
# Compute capabilities that it has kernels for: Hopper and Blackwell.
_MAJORS = (9, 10)


def absence(device_type: str) -> str | None:
    """Why FlashAttention-4 is not there for any tensor on such a device; None if it is. Touches no GPU."""
    if device_type != "cuda":
        return _NEEDS_GPU
    return None if INSTALLED else "is not installed (pip install 'lighthouse-pretrain[flash]')"


def obstacle(device_type: str, dtype: torch.dtype, dim: int) -> str | None:
    """Why FlashAttention-4 cannot take such tensors; None if it can."""
    if why_not := absence(device_type):
        return why_not
    if _major() not in _MAJORS:
        return _NEEDS_GPU
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes no {dtype}"
    if dim % 8 or dim > 128:
        return f"takes no head dimension of {dim}"
    return None


@torch.compiler.assume_constant_result
def _major() -> int:
    return torch.cuda.get_device_capability()[0]


@functools.cache
def _quieten() -> None:
    """It passes no auxiliary data, and its compiler says at each compilation that it does not know what that is."""
    warnings.filterwarnings("ignore", message=r"Argument aux_data \(position \d+\) cannot be converted")


@custom_op("lighthouse::flash4", mutates_args=())
def _flash4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    deterministic: bool,
    window: int = 0,
    starts: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor]:
    """Of [B, N, H, D] output and log-sum-exp [B, H, N]; of documents, [T, H, D], these and [H, T]."""
    from flash_attn.cute.interface import _flash_attn_fwd

    _quieten()
    how = _how(scale, window, starts, longest)
    out, lse, *_ = _flash_attn_fwd(q, k, v, return_lse=True, **how)
    return out, lse


def _how(scale: float, window: int, starts: Tensor | None, longest: int) -> dict[str, Any]:
    how: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    if window:
        how |= {"window_size_left": window - 1, "window_size_right": 0}
    if starts is not None:
        how |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return how


@_flash4.register_fake
def _(q, k, v, scale, deterministic, window=0, starts=None, longest=0):
    return torch.empty_like(q), q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32)


@custom_op("lighthouse::flash4_backward", mutates_args=())
def _flash4_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool,
    window: int = 0,
    starts: Tensor | None = None,
    longest: int = 0,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    how = _how(scale, window, starts, longest) | {"deterministic": deterministic}
    if grad_lse is not None:
        how["dlse"] = grad_lse.contiguous()
    return tuple(_flash_attn_bwd(q, k, v, out, grad.contiguous(), lse, **how)[:3])


@_flash4_backward.register_fake
def _(grad, q, k, v, out, lse, scale, deterministic, window=0, starts=None, longest=0, grad_lse=None):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx, inputs, output):
    q, k, v, scale, deterministic, window, starts, longest = inputs
    ctx.how, ctx.longest = (scale, deterministic, window), longest
    ctx.save_for_backward(q, k, v, *output, starts)
    ctx.set_materialize_grads(False)


def _grad(ctx, grad, grad_lse):
    # Read once: activation checkpointing makes them again for each time they are asked for.
    *saved, starts = ctx.saved_tensors
    grad = torch.zeros_like(saved[3]) if grad is None else grad
    grads = _flash4_backward(grad, *saved, *ctx.how, starts, ctx.longest, grad_lse)
    return *grads, None, None, None, None, None


_flash4.register_autograd(_grad, setup_context=_keep)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return _call(q, k, v, scale, 0)[0]


def _part(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> tuple[Tensor, Tensor]:
    out, lse = _call(q, k, v, scale, window)
    return out, lse.transpose(1, 2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    return _call(q, k, v, scale, window)[0]


def _packed(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int, documents: Documents
) -> tuple[Tensor, Tensor]:
    out, lse = _call(q, k, v, scale, window, *documents)
    return out, lse.T


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int,
    starts: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.contiguous() for x in (q, k, v))
    return _flash4(q, k, v, scale, torch.are_deterministic_algorithms_enabled(), window, starts, longest)


def _blocked(q: Tensor, k: Tensor, v: Tensor, scale: float | None, tiles: Tiles) -> Tensor:
    return flex.blocked(q, k, v, scale, tiles, "FLASH")


def _blocks(device_type: str, dtype: torch.dtype, dim: int, tile: int, size: int) -> str | None:
    if why_not := obstacle(device_type, dtype, dim):
        return why_not
    if torch.are_deterministic_algorithms_enabled():
        return "has no deterministic backward pass"
    # On Hopper a block is what the kernel takes at a time.
    return f"takes blocks of {flex.UNIT} keys, not {size}" if size != flex.UNIT else flex.odd_sizes(tile, size)


# Its backward pass is deterministic where torch is asked to be.
KERNEL = DenseKernel(
    "fa4",
    "FlashAttention-4",
    absence,
    obstacle,
    _forward,
    part=_part,
    windowed=_windowed,
    packed=_packed,
    blocked=_blocked,
    blocks=_blocks,
    kept=(torch.ops.lighthouse.flash4.default,),
)
