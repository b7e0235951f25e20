"""Blocks of tokens that stay at full resolution: which one of every group of `keep` blocks, and its rows."""

import torch
from torch import Tensor
from torch.library import custom_op

from lighthouse_core.attention.backends import uniform


def take_blocks(k: Tensor, v: Tensor, chosen: Tensor, keep: int, size: int) -> tuple[Tensor, ...]:
    """Keys and values of the chosen blocks, [B, groups * size, Hkv, D].

    Args:
        k, v: [B, N, Hkv, D].
        chosen: [B, groups, Hkv] int64, the number of a block within each whole group.
        keep: blocks in a group.
        size: tokens in a block.
    """
    index = chosen[:, :, None, None, :, None].expand(-1, -1, 1, size, -1, k.shape[3])
    return tuple(_groups(x, keep, size).gather(2, index).flatten(1, 3) for x in (k, v))


def largest_blocks(k: Tensor, keep: int, size: int) -> Tensor:
    """Of every whole group the block with the key of largest L2 norm, [B, groups, Hkv] int64."""
    return _largest(_groups(k.detach(), keep, size))


def drawn_blocks(key: Tensor, k: Tensor, keep: int, size: int) -> Tensor:
    """Of every whole group one block at random, [B, groups, Hkv] int64, from `key`; see `uniform`."""
    groups = k.shape[1] // (keep * size)
    drawn = uniform(key.to(k.device), k.shape[0], k.shape[2], torch.arange(groups, device=k.device))
    return (drawn * keep).long().transpose(1, 2)


def _groups(x: Tensor, keep: int, size: int) -> Tensor:
    """[B, N, Hkv, D] in whole groups of blocks, [B, groups, keep, size, Hkv, D]."""
    groups = x.shape[1] // (keep * size)
    return x[:, : groups * keep * size].unflatten(1, (groups, keep, size))


@custom_op("lighthouse::largest_block", mutates_args=())
def _largest(k: Tensor) -> Tensor:
    """Of every group in [B, groups, keep, size, Hkv, D] the block with the largest key, [B, groups, Hkv] int64.

    An operation of its own: fused by a compiler, norms would round differently than they do elsewhere.
    """
    return k.float().square().sum(-1).amax(3).argmax(2)


@_largest.register_fake
def _(k):
    return k.new_empty(k.shape[0], k.shape[1], k.shape[4], dtype=torch.int64)


# What decides which keys there are: activation checkpointing must not decide it again.
SELECTING = (torch.ops.lighthouse.largest_block.default,)
