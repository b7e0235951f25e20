"""Counter-based uniforms: Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").

A number depends on its coordinates alone, so it can be drawn again in any order, on any device, by any kernel.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for 32-bit values held in int64."""
    low_part = (a & 0xFFFF) * b
    high_part = (a >> 16) * b + (low_part >> 16)
    return (high_part >> 16) & _MASK, ((high_part << 16) | (low_part & 0xFFFF)) & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """First output word of Philox4x32-10. All tensors are int64 holding 32-bit values and broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0


def uniform(key: Tensor, batch: int, heads: int, index: Tensor) -> Tensor:
    """Uniforms in [0, 1) with 24 random bits, one for each (batch row, head, index).

    Args:
        key: int64 (seed, step, layer[, sample[, head]]), by default 0. `sample` is the number of the first row within
            the global batch, and `head` that of the first head within the layer: a row and a head draw the same numbers
            however batch and heads are split.
        batch: rows B.
        heads: key/value heads; at most 65536.
        index: int64 [M], the windows or blocks, below 2**32.

    Returns:
        [B, heads, M] float32.

    Counter words: index; sample * 65536 + head; layer; step, each modulo 2**32. Key words: the halves of the seed.
    """
    seed, step, layer = key[0], key[1], key[2]
    sample, first = (key[n] if key.numel() > n else torch.zeros_like(seed) for n in (3, 4))
    row = (sample + torch.arange(batch, device=key.device))[:, None, None]
    head = (first + torch.arange(heads, device=key.device))[None, :, None]
    counter = (index[None, None, :] & _MASK, (row * 65536 + head) & _MASK, layer & _MASK, step & _MASK)
    bits = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return (bits >> 8).float() * 2.0**-24
