"""The dense kernels that are installed, each by its own name: what is timed is what the row says."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lighthouse_core.attention.dense import dense_attention

# Of the call that is compared with plain PyTorch.
_TOKENS = 1024


@dataclass(frozen=True)
class Kernel:
    """One dense kernel.

    Attributes:
        name: short.
        label: which one that is.
        call: q [B, N, H, D], k and v [B, N, Hkv, D] -> [B, N, H, D], causal; differentiable.
    """

    name: str
    label: str
    call: Callable[[Tensor, Tensor, Tensor], Tensor]


def _forced(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: dense_attention(q, k, v, backend=name)


def _package(module: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`flash_attn_func` of a package of FlashAttention.

    Raises:
        ImportError: it is not there.
    """
    function = importlib.import_module(module).flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return call


# Name, label, and what makes the call. Those with a name that is a dense_backend run in training, too.
_KNOWN: dict[str, list[tuple[str, str, Callable[[str], Callable[[Tensor, Tensor, Tensor], Tensor]]]]] = {
    "cuda": [
        ("fa4", "FlashAttention-4", _forced),
        ("fa3", "FlashAttention-3", lambda name: _package("flash_attn_interface")),
        ("fa2", "FlashAttention-2", lambda name: _package("flash_attn")),
        ("cudnn", "cuDNN in torch's SDPA", _forced),
        ("flash", "FlashAttention-2 in torch's SDPA", _forced),
    ],
    "cpu": [("flash", "flash attention in torch's SDPA", _forced)],
}


def dense_kernels(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> tuple[list[Kernel], dict[str, str], dict[str, float]]:
    """The kernels that take such inputs, why the others do not, and the largest relative error of each that does.

    Each is called on 1024 tokens, output and gradients compared with plain matrix products in float32. One whose error
    is not of the size of the dtype's roundings counts as one that cannot be used.
    """
    there, absent, errors = [], {}, {}
    inputs = _draw(device, heads, kv_heads, dim, dtype)
    exact = _with_gradients(_forced("math"), [x.float() for x in inputs])
    for name, label, make in _KNOWN[device.type]:
        try:
            call = make(name)
            found = _with_gradients(call, inputs)
        except ImportError:
            absent[name] = "is not installed"
            continue
        except (ValueError, RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
            absent[name] = (str(error) or type(error).__name__).splitlines()[0]
            continue
        errors[name] = max(relative_error(a, b) for a, b in zip(found, exact, strict=True))
        if not errors[name] <= tolerance(dtype):
            absent[name] = f"differs from plain PyTorch by {errors[name]:.1e}"
            continue
        there.append(Kernel(name, label, call))
    return there, absent, errors


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that a few roundings to a dtype explain; float32 itself sums in another order."""
    return max(4 * torch.finfo(dtype).eps, 1e-5)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.float() - exact).norm() / exact.norm()).item()


def _draw(device: torch.device, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(1, _TOKENS, h, dim, device=device, generator=generator).to(dtype)
        for h in (heads, kv_heads, kv_heads, heads)
    ]


def _with_gradients(call: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]
