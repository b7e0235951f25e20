"""Rotary position embedding of neighbouring pairs, in float32 and in real numbers: torch.compile fuses no others.

B batch, N tokens, H heads, D head dimension, S entries of a pyramid.
"""

import torch
from torch import Tensor

from lighthouse_kernels.geometry import Geometry


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Every token at its own place.

    Args:
        x: [B, N, H, D].
        rotary: float32, the cosine and sine of the angles of each position, [at least N, D/2, 2], or of each token,
            [B, N, D/2, 2].

    Returns:
        [B, N, H, D] in the dtype of `x`.
    """
    return _turned(x, rotary[: x.shape[1], None] if rotary.dim() == 3 else rotary[:, :, None])


def rotate_entries(x: Tensor, indices: Tensor, rotary: Tensor, g: Geometry) -> Tensor:
    """Every gathered row at the last token that its window covers, ((i + 1) c_l - 1).

    Args:
        x: [B, S, H, D].
        indices: [B, Hkv, S] integers, flat pyramid indices; a group of H / Hkv heads shares its KV head's.
        rotary: see `rotate`.
        g: the pyramid.

    Returns:
        [B, S, H, D] in the dtype of `x`.
    """
    # A window that ends in padding serves no position.
    last = last_tokens(indices, g).clamp(max=g.tokens - 1)
    if rotary.dim() == 3:
        turns = rotary[last].transpose(1, 2)
    else:
        turns = rotary[torch.arange(len(last), device=last.device)[:, None, None], last].transpose(1, 2)
    return _turned(x, turns.repeat_interleave(x.shape[2] // indices.shape[1], 2))


def last_tokens(indices: Tensor, g: Geometry) -> Tensor:
    """The last token of each window, int64, by its flat pyramid index."""
    last = indices.long()
    for level in range(1, g.levels):
        start, width = g.offset(level), g.window(level)
        inside = indices >= start
        last = torch.where(inside, (indices.long() - start + 1) * width - 1, last)
    return last


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    cos, sin = turns.unbind(-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
