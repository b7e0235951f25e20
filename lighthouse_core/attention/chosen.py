"""Which blocks of keys each tile of queries attends to, beside its window. No gradient goes through the choice.

B batch, N tokens, H query heads, Hkv key/value heads, G query heads of a KV head, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad

from lighthouse_core.attention.backends import uniform
from lighthouse_core.attention.budgets import WIDEST
from lighthouse_core.attention.context import AttentionContext, checked_key
from lighthouse_core.attention.dense.math import wide
from lighthouse_core.attention.settings import Settings
from lighthouse_core.attention.sharing import all_query_heads


def choose_blocks(
    q: Tensor, k: Tensor, settings: Settings, context: AttentionContext, starts: Tensor | None = None
) -> Tensor:
    """The blocks that each tile chooses, `dense.kernel.Tiles.chosen`: the best ones of those that lie wholly before the
    window of the tile's first query, in its document. Of equal scores the earlier block is the better one.

    Args:
        q: [B, N, H, D]; N is a multiple of the tile and of the block.
        k: [B, N, Hkv, D].
        settings: of the call.
        context: of the batch.
        starts: `Tiles.starts`.

    Returns:
        int32 [B, Hkv, N / tile, `settings.blocks`]; where the context has budgets, `WIDEST` times as many, of which
        each KV head uses its own number.
    """
    s, kv_heads = settings, k.shape[2]
    rows, count = q.shape[1] // s.tile, k.shape[1] // s.block_size
    if s.block_score == "random":
        key = checked_key(context.key, s.block_score).to(q.device)
        tile, block = (torch.arange(number, device=q.device) for number in (rows, count))
        # A number of 32 bits that does not depend on N.
        index = (tile[:, None] * 65536 + block).flatten()
        scores = uniform(key, q.shape[0], kv_heads, index).unflatten(2, (rows, count))
    else:
        mean = all_query_heads(_mean_queries(q.detach(), s.tile), 2, context.heads)
        mean = mean.unflatten(2, (kv_heads, -1)).mean(3)
        # Of the tile before. The first one has none, and no block to choose.
        scores = _scores(pad(mean[:, :-1], (0, 0, 0, 0, 1, 0)), k.detach(), s.block_size, s.block_score == "bound")
    width = s.blocks * (1 if context.budgets is None else WIDEST)
    return _best(scores, starts, width, s.window, s.tile, s.block_size, context.budgets)


@custom_op("lighthouse::mean_queries", mutates_args=())
def _mean_queries(q: Tensor, tile: int) -> Tensor:
    """[B, N / tile, H, D], float32 at least.

    An operation of its own, as the two below: fused by a compiler, sums would round differently than elsewhere.
    """
    return q.unflatten(1, (-1, tile)).mean(2, dtype=wide(q.dtype))


@_mean_queries.register_fake
def _(q, tile):
    return q.new_empty(q.shape[0], q.shape[1] // tile, *q.shape[2:], dtype=wide(q.dtype))


@custom_op("lighthouse::block_scores", mutates_args=())
def _scores(q: Tensor, k: Tensor, size: int, bound: bool) -> Tensor:
    """Scores of all blocks, [B, Hkv, tiles, blocks]: the product with the mean key, or the largest one that a key
    within the bounds of the block could have.

    Args:
        q: [B, tiles, Hkv, D].
        k: [B, N, Hkv, D].
        size: keys of a block.
        bound: whether by the bounds.
    """
    blocks = k.unflatten(1, (-1, size))
    if not bound:
        return torch.einsum("bthd,bnhd->bhtn", q, blocks.mean(2, dtype=q.dtype))
    most, least = blocks.amax(2).to(q.dtype), blocks.amin(2).to(q.dtype)
    # Of a positive number the largest product is that with the largest key, of a negative one that with the smallest.
    return torch.einsum("bthd,bnhd->bhtn", q.clamp(min=0), most) + torch.einsum(
        "bthd,bnhd->bhtn", q.clamp(max=0), least
    )


@_scores.register_fake
def _(q, k, size, bound):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], k.shape[1] // size)


@custom_op("lighthouse::best_blocks", mutates_args=())
def _best(
    scores: Tensor,
    starts: Tensor | None,
    blocks: int,
    window: int,
    tile: int,
    size: int,
    budgets: Tensor | None = None,
) -> Tensor:
    """`choose_blocks`, from scores [B, Hkv, tiles, blocks]; `budgets` are of the KV heads, int32 [Hkv]."""
    rows, count = scores.shape[2:]
    number = torch.arange(count, device=scores.device)
    first = torch.arange(rows, device=scores.device) * tile
    there = number < ((first - window + 1).clamp(min=0) // size)[:, None]
    if starts is not None:
        there = (there & (number >= (starts // size)[..., None]))[:, None]
    scores, wanted = scores.masked_fill(~there, -torch.inf), min(blocks, count)
    room: Any = wanted
    largest = scores.topk(wanted).values
    least = largest[..., -1:]
    if budgets is not None:
        room = budgets.clamp(max=wanted).long()[:, None, None]
        # Of a head without blocks the largest score: nothing is better, and there is no room for an equal one.
        least = largest.gather(-1, (room - 1).clamp(min=0).expand(*scores.shape[:3], 1))
    better, equal = scores > least, (scores == least) & there
    taken = better | (equal & (equal.cumsum(-1) <= room - better.sum(-1, keepdim=True)))
    found = torch.where(taken, number, count).topk(wanted, largest=False).values
    return pad(found, (0, blocks - wanted), value=count).int()


@_best.register_fake
def _(scores, starts, blocks, window, tile, size, budgets=None):
    return scores.new_empty(*scores.shape[:3], blocks, dtype=torch.int32)


# What decides which keys there are: activation checkpointing must not decide it again.
SELECTING = (torch.ops.lighthouse.best_blocks.default,)
