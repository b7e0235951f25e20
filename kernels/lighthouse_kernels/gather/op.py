"""Gathering as an operation of torch. Its gradient is that of gathering and pooling together, so that pooled rows need
none, and nothing of full length is kept for it."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import register_fake

from lighthouse_kernels.gather import triton as kernel
from lighthouse_kernels.launching import below_autograd, layout, operation, rows_contiguous


@operation
def gather(
    q: Tensor, k: Tensor, v: Tensor, stored_q: Tensor, stored_k: Tensor, stored_v: Tensor,
    indices: Tensor, slots: Tensor, shape: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `triton.gather`. Differentiable in q, k and v, which are not kept for it."""
    q, k, v = map(rows_contiguous, (q, k, v))
    return kernel.gather(q, k, v, (stored_q, stored_k, stored_v), indices, layout(shape))


@register_fake("lighthouse::gather")
def _(q, k, v, stored_q, stored_k, stored_v, indices, slots, shape):
    return tuple(x.new_empty(x.shape[0], indices.shape[2], x.shape[2], x.shape[3]) for x in (q, k, v))


@operation
def gather_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, slots: Tensor, shape: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `triton.gather_backward`."""
    grad_q, grad_k, grad_v = (x.contiguous() for x in (grad_q, grad_k, grad_v))
    return kernel.gather_backward(grad_q, grad_k, grad_v, slots, layout(shape))


@register_fake("lighthouse::gather_backward")
def _(grad_q, grad_k, grad_v, slots, shape):
    return tuple(x.new_empty(x.shape[0], shape[0], x.shape[2], x.shape[3]) for x in (grad_q, grad_k, grad_v))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, stored_q, stored_k, stored_v, indices, slots, shape):
        ctx.save_for_backward(slots)
        ctx.shape = shape
        with below_autograd():
            return gather(q, k, v, stored_q, stored_k, stored_v, indices, slots, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k, grad_v):
        (slots,) = ctx.saved_tensors
        return *gather_backward(grad_q, grad_k, grad_v, slots, ctx.shape), None, None, None, None, None, None


torch.library.impl("lighthouse::gather", "Autograd", _Gather.apply)
