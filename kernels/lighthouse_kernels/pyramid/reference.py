"""Mean-pooled levels and window scores in plain PyTorch."""

import torch
from torch import Tensor

from lighthouse_kernels.geometry import Geometry
from lighthouse_kernels.pyramid.random import uniform

PADDING_SCORE = -1.0


def pool(x: Tensor, geometry: Geometry) -> Tensor:
    """Mean of every window of every level, in flat pyramid order.

    Args:
        x: [B, N, H, D], any floating dtype.
        geometry: the pyramid of N tokens.

    Returns:
        [B, M, H, D] in the dtype of `x`; 16-bit inputs are averaged in float32. Padding tokens count as zeros.
    """
    batch, tokens, heads, dim = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, geometry.padded - tokens))
    wide = padded if x.dtype in (torch.float32, torch.float64) else padded.float()
    levels = [padded]
    for level in range(1, geometry.levels):
        windows = wide.view(batch, geometry.windows(level), geometry.window(level), heads, dim)
        levels.append(windows.mean(dim=2).to(x.dtype))
    return torch.cat(levels, dim=1)


def window_scores(token_scores: Tensor, geometry: Geometry) -> Tensor:
    """Scores of all windows from scores of the tokens: the maximum over each window's tokens.

    Args:
        token_scores: [B, Hkv, N], float32.

    Returns:
        [B, Hkv, M] float32; a window that holds only padding scores -1.
    """
    padding = geometry.padded - geometry.tokens
    level = torch.nn.functional.pad(token_scores, (0, padding), value=PADDING_SCORE)
    levels = [level]
    for _ in range(1, geometry.levels):
        level = level.unflatten(-1, (-1, geometry.pooling)).amax(dim=-1)
        levels.append(level)
    return torch.cat(levels, dim=-1)


def mask_padding(scores: Tensor, geometry: Geometry) -> Tensor:
    """Window scores, [B, Hkv, M] float32, with -1 for the windows that hold padding alone, so that they come last."""
    starts = torch.cat(
        [
            torch.arange(0, geometry.padded, geometry.window(level), device=scores.device)
            for level in range(geometry.levels)
        ]
    )
    return scores.masked_fill(starts >= geometry.tokens, PADDING_SCORE)


def group_max(token_scores: Tensor, kv_heads: int) -> Tensor:
    """Scores of the query heads, [B, N, H], reduced to their KV heads: the maximum of each group, [B, Hkv, N]."""
    return token_scores.unflatten(2, (kv_heads, -1)).amax(dim=-1).transpose(1, 2)


@torch.no_grad()
def norm_scores(q: Tensor, k: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Scores of the paper: the L2 norm of each token's query and key, in float32.

    Args:
        q: [B, N, H, D].
        k: [B, N, Hkv, D].

    Returns:
        (s_Q, s_K), each [B, Hkv, M] float32. s_Q is the maximum over the query heads of a KV head.
    """
    by_query = torch.linalg.vector_norm(q.float(), dim=-1)
    by_key = torch.linalg.vector_norm(k.float(), dim=-1)
    return (
        window_scores(group_max(by_query, k.shape[2]), geometry),
        window_scores(by_key.transpose(1, 2), geometry),
    )


@torch.no_grad()
def random_scores(key: Tensor, batch: int, kv_heads: int, geometry: Geometry) -> Tensor:
    """One independent uniform per window of every level above 0; no token of the sequence is read.

    Args:
        key: see `uniform`.

    Returns:
        [B, Hkv, M] float32; level 0 (never compared) and windows of padding alone score -1. A window of a shard scores
        what it does in the whole sequence.
    """
    places = []
    for level in range(geometry.levels):
        # Of the whole sequence, the windows of finer levels and those of this one that come before.
        before = sum((geometry.whole or geometry.padded) // geometry.window(finer) for finer in range(level))
        before += geometry.first // geometry.window(level)
        places.append(torch.arange(before, before + geometry.windows(level), device=key.device))
    index = torch.cat(places)
    scores = uniform(key, batch, kv_heads, index)
    scores[..., : geometry.windows(0)] = PADDING_SCORE
    return mask_padding(scores, geometry)


@torch.no_grad()
def block_scores(key: Tensor, batch: int, kv_heads: int, block: int, geometry: Geometry) -> Tensor:
    """One uniform per block of `block` tokens, shared by the windows inside it; a wider window takes the maximum.

    Args:
        key: see `uniform`.
        block: tokens per block, a power of two.

    Returns:
        [B, Hkv, M] float32.
    """
    first, begin = geometry.first // block, geometry.first % block
    blocks = -(-(begin + geometry.tokens) // block)
    scores = uniform(key, batch, kv_heads, first + torch.arange(blocks, device=key.device))
    return window_scores(scores.repeat_interleave(block, dim=-1)[..., begin : begin + geometry.tokens], geometry)
