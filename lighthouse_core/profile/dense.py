"""The dense kernels that are installed, each by its own name: what is timed is what the row says."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lighthouse_core.attention.config import DENSE_BACKENDS
from lighthouse_core.attention.dense import dense_attention
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
        return self.name in DENSE_BACKENDS


def _forced(name: str) -> Attention:
    return lambda q, k, v: dense_attention(q, k, v, backend=name)


def _efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def _package(module: str) -> Attention:
    """`flash_attn_func` of a package of FlashAttention.

    Raises:
        ImportError: it is not there, or does not load.
    """
    try:
        function = importlib.import_module(module).flash_attn_func
    except AttributeError:
        # FlashAttention-4 leaves a folder of the name of FlashAttention-2.
        raise ModuleNotFoundError(module) from None

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return call


# Name, label, and what makes the call.
_KNOWN: dict[str, list[tuple[str, str, Callable[[], Attention]]]] = {
    "cuda": [
        ("fa4", "FlashAttention-4", lambda: _forced("fa4")),
        ("fa3", "FlashAttention-3", lambda: _package("flash_attn_interface")),
        ("fa2", "FlashAttention-2", lambda: _package("flash_attn")),
        ("cudnn", "cuDNN (torch)", lambda: _forced("cudnn")),
        ("flash", "FlashAttention-2 (torch)", lambda: _forced("flash")),
        ("efficient", "memory-efficient (torch)", lambda: _efficient),
    ],
    "cpu": [("flash", "flash attention (torch)", lambda: _forced("flash"))],
}


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
    for name, label, make in _KNOWN[device.type]:
        try:
            call = make()
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError)
            absent[name] = "is not installed" if missing else f"does not load: {_first_line(error)}"
            continue
        try:
            found = with_gradients(call, inputs)
        # Whatever a kernel of somebody else's raises.
        except Exception as error:
            absent[name] = _first_line(error)
            continue
        error = max(map(relative_error, found, exact))
        if error <= allowed:
            there.append(Kernel(name, label, call, error))
        else:
            absent[name] = f"differs from plain PyTorch by {error:.1e}"
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
