"""Attention of a sequence that several processes share. Each has some of the tokens, and attends for some of the heads.

One all-to-all turns "my tokens, all heads" into "all tokens, my heads". The attention call then sees whole sequences,
as on one device, and its output goes back the same way (DeepSpeed-Ulysses, arXiv 2309.14509).

B batch, N tokens, R processes, n = N / R tokens of one of them, H query heads, Hkv key/value heads, D head dimension. A
process attends for h = H / R query heads and c = max(Hkv, R) / R key/value heads.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

from lighthouse_core.attention.context import AttentionContext, Heads
from lighthouse_core.attention.heads import shares_heads

Scores = tuple[Tensor, Tensor]


def by_heads(
    call: Callable[[Tensor, Tensor, Tensor, AttentionContext, Scores | None], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: AttentionContext,
    scores: Scores | None = None,
) -> Tensor:
    """What `call` makes of the whole sequences, of which this process has some tokens.

    Args:
        call: attention, (q, k, v, context, scores) -> [B, N, h, D]; is given [B, N, h, D], twice [B, N, c, D], and
            scores [B, N, h] and [B, N, c].
        q: [B, n, H, D].
        k, v: [B, n, Hkv, D].
        context: of the batch. Without a group `call` is given all arguments as they are.
        scores: of the tokens, [B, n, H] and [B, n, Hkv], without a gradient.

    Returns:
        [B, n, H, D].

    Raises:
        ValueError: the processes of the group cannot share out the heads.
    """
    if context.group is None:
        return call(q, k, v, context, scores)
    group, heads, kv_heads = context.group, q.shape[2], k.shape[2]
    count, rank = group.size(), group.rank()
    if not shares_heads(heads, kv_heads, count):
        raise ValueError(f"{count} processes cannot share out {heads} query heads and {kv_heads} key/value heads")
    # A KV head goes to every process that has query heads of it; the gradients of its copies add up.
    copies = max(1, count // kv_heads)
    sent = [q, *(x if copies == 1 else x.repeat_interleave(copies, 2) for x in (k, v))]
    widths = [x.shape[2] // count for x in sent]
    received = _exchange(torch.cat([_by_owner(x, count) for x in sent], 3), group).split(widths, 3)
    q, k, v = (x.movedim(0, 1).flatten(1, 2).contiguous() for x in received)
    if scores is not None:
        scores = _whole_scores(scores, kv_heads, copies, widths[0] // widths[1], group)
    first = rank * widths[0]
    key = context.key
    if key is not None:
        first_kv = key.new_full((1,), first // (heads // kv_heads))
        key = torch.cat((key, key.new_zeros(4 - key.numel()), first_kv))
    own = Heads(first, copies, group if copies > 1 else None)
    out = call(q, k, v, replace(context, key=key, group=None, first_position=0, heads=own), scores)
    back = _exchange(out.unflatten(1, (count, -1)).movedim(1, 0), group)
    return back.movedim(0, 2).flatten(2, 3)


def of_all_query_heads(scores: Tensor, dim: int, heads: Heads | None) -> Tensor:
    """Scores whose maximum over the heads of a KV head is that over all of its query heads, also where processes share
    these. No gradient.

    Args:
        scores: of this process, the heads along `dim`.
        dim: not 0.
        heads: of the context.

    Returns:
        The same scores; where processes share a KV head, their maximum for each head.
    """
    if heads is None or heads.group is None:
        return scores
    own = scores.amax(dim, keepdim=True)
    count, rank = heads.group.size(), heads.group.rank()
    all_of_them = _exchange(own.expand(count, *own.shape), heads.group)
    first = rank // heads.copies * heads.copies
    return all_of_them[first : first + heads.copies].amax(0).expand_as(scores)


def _whole_scores(scores: Scores, kv_heads: int, copies: int, group_size: int, group: ProcessGroup) -> Scores:
    """Scores of all tokens for the heads of this process, [B, N, h] and [B, N, c]."""
    by_query, by_key = (x.detach() for x in scores)
    # What a selection takes of a group of query heads is their maximum.
    both = torch.stack((by_query.unflatten(2, (kv_heads, -1)).amax(-1), by_key), -1)
    whole = _exchange(_by_owner(both.repeat_interleave(copies, 2), group.size()), group).movedim(0, 1).flatten(1, 2)
    by_query, by_key = whole.unbind(-1)
    return by_query.repeat_interleave(group_size, 2), by_key.contiguous()


def _by_owner(x: Tensor, count: int) -> Tensor:
    """[B, n, heads, D] as [R, B, n, heads / R, D]: along the first dimension the process that attends for them."""
    return x.unflatten(2, (count, -1)).movedim(2, 0)


def _exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """Send `x[r]` to process r; of what comes back, `[r]` is from process r. Differentiable."""
    return _Exchange.apply(x, group)


class _Exchange(torch.autograd.Function):
    """All-to-all. torch's differentiable one does not wait for the end where only views follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    return wait_tensor(all_to_all_single(x.contiguous(), None, None, group))
