"""Scattering as an operation of torch, and its gradient."""

from torch import Tensor
from torch.library import custom_op

from lighthouse_kernels.geometry import Geometry
from lighthouse_kernels.launching import rows_contiguous
from lighthouse_kernels.scatter import triton as kernel


@custom_op("lighthouse::scatter", mutates_args=())
def scatter(rows: Tensor, indices: Tensor, slots: Tensor, shape: list[int]) -> Tensor:
    """See `triton.scatter`. Differentiable in the rows."""
    return kernel.scatter(rows_contiguous(rows), slots, Geometry.of(shape))


@scatter.register_fake
def _(rows, indices, slots, shape):
    return rows.new_empty(rows.shape[0], shape[0], rows.shape[2], rows.shape[3])


@custom_op("lighthouse::scatter_backward", mutates_args=())
def scatter_backward(grad: Tensor, indices: Tensor, shape: list[int]) -> Tensor:
    """See `triton.scatter_backward`."""
    return kernel.scatter_backward(rows_contiguous(grad), indices, Geometry.of(shape))


@scatter_backward.register_fake
def _(grad, indices, shape):
    return grad.new_empty(grad.shape[0], indices.shape[2], grad.shape[2], grad.shape[3])


def _keep_for_scatter(ctx, inputs, output):
    _, indices, _, ctx.shape = inputs
    ctx.save_for_backward(indices)


def _scatter_grad(ctx, grad):
    (indices,) = ctx.saved_tensors
    return scatter_backward(grad, indices, ctx.shape), None, None, None


scatter.register_autograd(_scatter_grad, setup_context=_keep_for_scatter)
