"""torch's own flash attention: FlashAttention-2 on a GPU, a kernel of its own on a CPU."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from lighthouse_core.attention.dense.kernel import DenseKernel
from lighthouse_core.attention.dense.sdpa import attend, no_obstacle, nowhere_absent


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return attend(q, k, v, scale, [SDPBackend.FLASH_ATTENTION])


KERNEL = DenseKernel(
    "flash",
    "flash attention (torch)",
    nowhere_absent,
    no_obstacle,
    _forward,
    kept=(
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    ),
)
