"""The dense kernels that are installed, each by its own name: what is timed is what the row says."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lighthouse_core.attention.dense.call import KERNELS, dense_attention
from lighthouse_core.profile.work import Shape

# Of the call that is compared with plain PyTorch.
TOKENS = 1024

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Kernel:
    """One dense kernel.

    Attributes:
        name: short; that of a `dense_backend` if it is one.
        label: which one that is.
        call: q [B, N, H, D], k and v [B, N, Hkv, D] -> [B, N, H, D], causal; differentiable.
        error: the largest relative error of its output and gradients at 1024 tokens.
    """

    name: str
    label: str
    call: Attention
    error: float

    @property
    def trains(self) -> bool:
        """Whether a recipe can name it."""
        return self.name in KERNELS


def _forced(name: str) -> Attention:
    return lambda q, k, v: dense_attention(q, k, v, backend=name)


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _candidates(device: torch.device, shape: Shape) -> Iterator[tuple[str, str, Attention | str]]:
    """Name, label, and the call of every kernel that this device may have, or why it has it not."""
    for name, kernel in KERNELS.items():
        # Which is what the others are compared with.
        if name == "math":
            continue
        why_not = kernel.obstacle(device.type, getattr(torch, shape.dtype), shape.head_dim)
        # A CPU is not told what needs a GPU.
        if why_not is None or device.type == "cuda":
            yield name, kernel.label, why_not or _forced(name)
    if device.type == "cuda":
        yield "efficient", "memory-efficient (torch)", _efficient


def dense_kernels(device: torch.device, shape: Shape) -> tuple[list[Kernel], dict[str, str]]:
    """The kernels that take such inputs, and why the others do not.

    Each is called on 1024 tokens, output and gradients compared with plain matrix products in float32. One whose error
    is more than `bound` cannot be used.

    Args:
        device: where.
        shape: gives heads, width and dtype.
    """
    there, absent = [], {}
    inputs = random_inputs(replace(shape, tokens=TOKENS), device)
    exact = with_gradients(_forced("math"), [x.float() for x in inputs])
    allowed = bound(with_gradients(_forced("math"), inputs), exact)
    for name, label, call in _candidates(device, shape):
        if isinstance(call, str):
            absent[name] = call
            continue
        try:
            found = with_gradients(call, inputs)
        # Whatever a kernel of somebody else's raises.
        except Exception as error:
            absent[name] = _first_line(error)
            continue
        lost = max(map(relative_error, found, exact))
        if lost <= allowed:
            there.append(Kernel(name, label, call, lost))
        else:
            absent[name] = f"differs from plain PyTorch by {lost:.1e}"
    return there, absent


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def bound(plain: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error that counts as rounding: 4 times what plain PyTorch loses in the same dtype. float32
    itself sums in another order."""
    return max(1e-5, 4 * max(map(relative_error, plain, exact)))


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.float() - exact).norm() / exact.norm()).item()


def random_inputs(shape: Shape, device: torch.device) -> list[Tensor]:
    """q [1, N, H, D], k and v [1, N, Hkv, D], and a gradient of the output, normally distributed."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(
            1, shape.tokens, h, shape.head_dim, device=device, dtype=getattr(torch, shape.dtype), generator=generator
        )
        for h in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    ]


def with_gradients(call: Attention, inputs: list[Tensor]) -> list[Tensor]:
    """Output, and gradients of q, k and v, from these three and the gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]
