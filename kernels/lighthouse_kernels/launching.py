"""What every kernel launch needs."""

import contextlib

import torch
from torch import Tensor


def target(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; make that the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def padded_dim(dim: int) -> int:
    """Columns of a tile: the next power of two."""
    return max(16, 1 << (dim - 1).bit_length())


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head, in elements."""
    assert x.stride(3) == 1 or x.shape[3] == 1
    return x.stride(0), x.stride(1), x.stride(2)


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is contiguous, as the kernels need it, else a copy."""
    return x if x.stride(3) == 1 else x.contiguous()
