"""cuDNN's kernel, by torch."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from lighthouse_core.attention.dense.kernel import DenseKernel
from lighthouse_core.attention.dense.sdpa import attend


def _absence(device_type: str) -> str | None:
    return None if device_type == "cuda" else f"needs a CUDA device, not {device_type}"


def _obstacle(device_type: str, dtype: torch.dtype, dim: int) -> str | None:
    return _absence(device_type)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return attend(q, k, v, scale, [SDPBackend.CUDNN_ATTENTION])


KERNEL = DenseKernel(
    "cudnn",
    "cuDNN (torch)",
    _absence,
    _obstacle,
    _forward,
    kept=(torch.ops.aten._scaled_dot_product_cudnn_attention.default,),
)
