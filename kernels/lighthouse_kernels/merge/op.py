"""Merging as an operation of torch, and its gradient."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import register_fake

from lighthouse_kernels.launching import below_autograd, layout, operation, rows_contiguous
from lighthouse_kernels.merge import triton as kernel


@operation
def merge(
    x: Tensor, lse: Tensor, rows: Tensor, row_lse: Tensor, indices: Tensor, slots: Tensor, begins: Tensor | None,
    shape: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `triton.merge`. Differentiable in the first four, but for the log-sum-exp that it returns."""
    x, rows = map(rows_contiguous, (x, rows))
    return kernel.merge(x, lse.contiguous(), rows, row_lse.contiguous(), indices, slots, layout(shape), begins)


@register_fake("lighthouse::merge")
def _(x, lse, rows, row_lse, indices, slots, begins, shape):
    return x.new_empty(x.shape), lse.new_empty(lse.shape)


@operation
def merge_backward(
    grad: Tensor, total: Tensor, x: Tensor, lse: Tensor, rows: Tensor, row_lse: Tensor, indices: Tensor, slots: Tensor,
    begins: Tensor | None, shape: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `triton.merge_backward`."""
    grad, x, rows = map(rows_contiguous, (grad, x, rows))
    sums = lse.contiguous(), row_lse.contiguous()
    return kernel.merge_backward(grad, total, x, sums[0], rows, sums[1], indices, slots, layout(shape), begins)


@register_fake("lighthouse::merge_backward")
def _(grad, total, x, lse, rows, row_lse, indices, slots, begins, shape):
    return tuple(y.new_empty(y.shape) for y in (x, lse, rows, row_lse))


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lse, rows, row_lse, indices, slots, begins, shape):
        with below_autograd():
            out, total = merge(x, lse, rows, row_lse, indices, slots, begins, shape)
        ctx.save_for_backward(total, x, lse, rows, row_lse, indices, slots, begins)
        ctx.mark_non_differentiable(total)
        ctx.shape = shape
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        return *merge_backward(grad, *ctx.saved_tensors, ctx.shape), None, None, None, None


torch.library.impl("lighthouse::merge", "Autograd", _Merge.apply)
