"""torch's own flash attention: FlashAttention-2 on a GPU, a kernel of its own on a CPU."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from lighthouse_core.attention.context import Documents
from lighthouse_core.attention.dense import math, varlen
from lighthouse_core.attention.dense.kernel import DenseKernel
from lighthouse_core.attention.dense.sdpa import attend, no_obstacle, nowhere_absent


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return attend(q, k, v, scale, [SDPBackend.FLASH_ATTENTION])


def _packs(device_type: str, dtype: torch.dtype, dim: int) -> str | None:
    return None if device_type == "cpu" else varlen.obstacle(device_type, dtype, dim)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int, documents: Documents
) -> tuple[Tensor, Tensor | None]:
    """On a GPU the variable-length form of the same kernel. On a CPU one document after another; a compiler cannot
    follow that, and gets plain matrix products."""
    assert not window, "it has no windows"
    if q.device.type != "cpu":
        assert varlen.KERNEL.packed is not None
        return varlen.KERNEL.packed(q, k, v, scale, window, documents)
    if torch.compiler.is_compiling():
        assert math.KERNEL.packed is not None
        return math.KERNEL.packed(q, k, v, scale, window, documents)
    parts = [
        _forward(q[None, start:end], k[None, start:end], v[None, start:end], scale)[0]
        for start, end in pairwise(documents.starts.tolist())
        if end > start
    ]
    return torch.cat(parts), None


KERNEL = DenseKernel(
    "flash",
    "flash attention (torch)",
    nowhere_absent,
    no_obstacle,
    _forward,
    packed=_packed,
    packs=_packs,
    kept=(
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    ),
)
