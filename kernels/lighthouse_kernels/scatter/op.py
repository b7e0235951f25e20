"""Scattering as an operation of torch, and its gradient."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import register_fake

from lighthouse_kernels.launching import below_autograd, layout, operation, rows_contiguous
from lighthouse_kernels.scatter import triton as kernel


@operation
def scatter(rows: Tensor, indices: Tensor, slots: Tensor, shape: list[int]) -> Tensor:
    """See `triton.scatter`. Differentiable in the rows."""
    return kernel.scatter(rows_contiguous(rows), indices, slots, layout(shape))


@register_fake("lighthouse::scatter")
def _(rows, indices, slots, shape):
    return rows.new_empty(rows.shape[0], shape[0], rows.shape[2], rows.shape[3])


@operation
def scatter_backward(grad: Tensor, indices: Tensor, shape: list[int]) -> Tensor:
    """See `triton.scatter_backward`."""
    return kernel.scatter_backward(rows_contiguous(grad), indices, layout(shape))


@register_fake("lighthouse::scatter_backward")
def _(grad, indices, shape):
    return grad.new_empty(grad.shape[0], indices.shape[2], grad.shape[2], grad.shape[3])


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, indices, slots, shape):
        ctx.save_for_backward(indices)
        ctx.shape = shape
        with below_autograd():
            return scatter(rows, indices, slots, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        return scatter_backward(grad, indices, ctx.shape), None, None, None


torch.library.impl("lighthouse::scatter", "Autograd", _Scatter.apply)
