"""Cross-entropy of a linear projection, without its logits: 98304 tokens of a 128256-row vocabulary are 47 GiB.

Shapes: T tokens, D width of the model, V vocabulary rows, C tokens of a chunk.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lighthouse_core.models.labels import IGNORED

# Without compilation log-probabilities are float32 tensors, of so many tokens at a time.
_ROWS = 128
# The same of the gradient's scaling.
_SCALED_ROWS = 8192
# The gradients of float16 logits are probabilities, of which many would be 0 or lose digits. They are kept times so
# much: down to 2e-10, and what the hidden states get of them fits for weights up to 128.
_ENLARGED = 2**8


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = 1024, compiled: bool = False
) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(hidden @ weight.T), in nats.

    The same as torch's linear and cross_entropy, a chunk of tokens at a time: of the logits, C x V exist at once. The
    gradients are made in the forward pass, from the same logits; that of the weight is summed in float32.

    Args:
        hidden: [T, D] floating point. Under autocast it and the weight are cast as torch.nn.functional.linear does.
        weight: [V, D], of the dtype of `hidden`.
        labels: [T] int64; tokens with `IGNORED` count nothing.
        chunk: C.
        compiled: have torch.compile fuse what follows the logits.

    Returns:
        A float32 scalar (float64 for float64). Differentiable once.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (x.to(torch.get_autocast_dtype(device)) for x in (hidden, weight))
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, compiled, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, compiled, differentiated):
        precise = torch.promote_types(hidden.dtype, torch.float32)
        ctx.factor = factor = _ENLARGED if hidden.dtype == torch.float16 else 1
        loss = torch.zeros((), dtype=precise, device=hidden.device)
        if differentiated:
            hidden_grad = torch.empty_like(hidden)
            weight_grad = torch.zeros_like(weight, dtype=precise)
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.T
            # The last rows are of another shape, not worth compiling for.
            finish = _compiled() if compiled and len(logits) == chunk else _finish_by_parts
            loss += finish(logits, labels[rows], factor)
            if differentiated:
                torch.mm(logits, weight, out=hidden_grad[rows])
                _add_product(weight_grad, logits.T, hidden[rows])
            # Before the next ones are made.
            del logits
        if differentiated:
            ctx.save_for_backward(hidden_grad, weight_grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unscaled, weight_grad = ctx.saved_tensors
        grad = grad / ctx.factor
        hidden_grad = torch.empty_like(unscaled)
        # Not in their own type: one over the number of tokens would be rounded to it.
        for rows, out in zip(unscaled.split(_SCALED_ROWS), hidden_grad.split(_SCALED_ROWS), strict=True):
            torch.mul(rows.to(grad), grad, out=out)
        scaled = torch.empty_like(weight_grad, dtype=unscaled.dtype)
        return hidden_grad, torch.mul(weight_grad, grad, out=scaled), None, None, None, None


def _finish(logits: Tensor, labels: Tensor, factor: int) -> Tensor:
    """The sum of the cross-entropies [] of logits [C, V], which their own gradient times `factor` overwrites."""
    counted = (labels != IGNORED)[:, None]
    label = labels[:, None].where(counted, 0)
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    loss = -log_p.gather(-1, label).where(counted, 0).sum()
    gradient = log_p.exp_()
    gradient -= (torch.arange(logits.shape[1], device=logits.device) == label).to(gradient)
    gradient.masked_fill_(~counted, 0)
    if factor != 1:
        gradient *= factor
    logits.copy_(gradient)
    return loss


def _finish_by_parts(logits: Tensor, labels: Tensor, factor: int) -> Tensor:
    parts = zip(logits.split(_ROWS), labels.split(_ROWS), strict=True)
    return torch.stack([_finish(*part, factor) for part in parts]).sum()


@functools.cache
def _compiled() -> Any:
    return torch.compile(_finish, dynamic=False)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, of float32 (float64 for float64)."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total), b.to(total))
