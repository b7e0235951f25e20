"""What the kernels of torch's scaled_dot_product_attention have in common."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, order: list[SDPBackend]) -> Tensor:
    """Causal attention by the first of torch's kernels, in this order, that supports the inputs.

    Args:
        q: [B, N, H, D].
        k, v: [B, N, Hkv, D].
        scale: factor on the scores; 1/sqrt(D) for None.
        order: torch's names of its kernels.
    """
    # Of sizes that a compiler leaves open a comparison is no bool, which is what torch wants.
    grouped = True if q.shape[2] != k.shape[2] else False  # noqa: SIM210
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(order, set_priority=True):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def nowhere_absent(device_type: str) -> str | None:
    """Of a kernel that every device has."""
    return None


def no_obstacle(device_type: str, dtype: torch.dtype, dim: int) -> str | None:
    """Of a kernel that torch itself refuses tensors for, by name."""
    return None
