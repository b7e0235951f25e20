"""Attention of a sequence that several processes share. Each has some of the tokens, and attends for some of the heads.

One all-to-all turns "my tokens, all heads" into "all tokens, my heads". The attention call then sees whole sequences,
as on one device, and its output goes back the same way (DeepSpeed-Ulysses, arXiv 2309.14509). A pyramid whose shards
are whole tiles does this to its gathered rows alone (`rows_by_heads`). Its other stages need a few rows of the shard
before, and a window needs the last tokens before the shard (`with_last_tokens`).

All processes run the same graph, also the first and the last one: a compiler must not leave out on one of them what the
others wait for. So shards form a ring, and what the first one gets of the last one takes no part in its attention.

B batch, N tokens, R processes, n = N / R tokens of one of them, H query heads, Hkv key/value heads, D head dimension, S
entries, L levels. A process attends for h = H / R query heads and c = max(Hkv, R) / R key/value heads.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

from lighthouse_core.attention.context import AttentionContext, Documents, Heads
from lighthouse_core.attention.documents import of_shard
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
        ValueError: the processes of the group cannot share out the heads, or the context has budgets of the KV heads.
    """
    if context.group is None:
        return call(q, k, v, context, scores)
    if context.budgets is not None:
        raise ValueError("budgets of the KV heads are not for sequences that processes share")
    group, heads, kv_heads = context.group, q.shape[2], k.shape[2]
    count, rank = group.size(), group.rank()
    q, k, v = _all_tokens(q, k, v, group)
    copies, own_heads = max(1, count // kv_heads), q.shape[2]
    if scores is not None:
        scores = _whole_scores(scores, kv_heads, copies, own_heads // k.shape[2], group)
    first = rank * own_heads
    key = context.key
    if key is not None:
        first_kv = key.new_full((1,), first // (heads // kv_heads))
        key = torch.cat((key, key.new_zeros(4 - key.numel()), first_kv))
    own = Heads(first, copies, group if copies > 1 else None)
    out = call(q, k, v, replace(context, key=key, group=None, first_position=0, heads=own), scores)
    return _all_heads(out, group)


def rows_by_heads(
    call: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: ProcessGroup,
    edge: int,
    last: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What `call` makes of all gathered rows, of which this process has those of its shard.

    Args:
        call: (q, k, v, last) -> tensors [B, S, h, ...]; is given [B, S, h, D], twice [B, S, c, D], and [c, B, S].
        q: [B, S / R, H, D].
        k, v: [B, S / R, Hkv, D].
        group: processes that share the sequences.
        edge: rows of the shard before that each process gets, too.
        last: integers of the entries, [B, Hkv, S / R]; None for none.

    Returns:
        [B, S / R + edge, H, ...]: the rows of the shard, then the last ones of the shard before. The first shard gets
        those of the last one.
    """
    count, copies = group.size(), max(1, group.size() // k.shape[2])
    q, k, v = _all_tokens(q, k, v, group)
    if last is not None:
        last = _by_owner(last.transpose(1, 2).repeat_interleave(copies, 2), count)
        last = _exchange(last, group).movedim(0, 1).flatten(1, 2).movedim(2, 0)
    return tuple(_all_heads(x, group, edge) for x in call(q, k, v, last))


def from_previous(x: Tensor, group: ProcessGroup) -> Tensor:
    """Send `x` to the next process; what comes back is the previous one's, zeros for the first. No gradient."""
    # Zeroed where it is sent: the first process reads what it got as all others do.
    return _shifted(x * (group.rank() < group.size() - 1), group, 1)


def with_last_tokens(
    call: Callable[[Tensor, Tensor, Tensor, Documents | None], tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: int,
    context: AttentionContext,
) -> tuple[Tensor, ...]:
    """What `call` makes of a shard that has the keys and values of the last `rows` tokens before it, too.

    Args:
        call: (q, k, v, documents) -> tensors [B, n + rows, H, ...]; is given [B, n + rows, H, D], and twice
            [B, n + rows, Hkv, D].
        q: [B, n, H, D].
        k, v: [B, n, Hkv, D].
        rows: at most n.
        context: of the batch, with a group.

    Returns:
        [B, n, H, ...].
    """
    group = context.group
    assert group is not None
    batch, whole = len(q), context.tokens(q)
    q, (k, v) = with_padding(q, rows, group), with_previous(k, v, rows, group)
    documents = context.documents
    if documents is not None:
        documents = of_shard(documents, batch, max(0, context.first_position - rows), q.shape[1], whole)
    return tuple(own_tokens(x, rows, group) for x in call(q, k, v, documents))


def with_previous(k: Tensor, v: Tensor, rows: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """k and v, both [B, n, Hkv, D], after the last `rows` tokens of the shard before, [B, n + rows, Hkv, D].
    Differentiable. In the first shard its own tokens come first, where causal attention sees nothing of the others; see
    `own_tokens`."""
    return _WithPrevious.apply(k, v, rows, group)


def with_padding(x: Tensor, rows: int, group: ProcessGroup) -> Tensor:
    """`with_previous` of zeros, which takes no communication; for queries, whose results are left out."""
    before, after = (rows, 0) if group.rank() else (0, rows)
    return torch.nn.functional.pad(x, (0, 0, 0, 0, before, after))


def own_tokens(x: Tensor, rows: int, group: ProcessGroup) -> Tensor:
    """The tokens of the shard among those of `with_previous`."""
    return x[:, rows:] if group.rank() else x[:, : x.shape[1] - rows]


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
    largest = all_query_heads(scores.amax(dim, keepdim=True), dim, heads)
    return largest.amax(dim, keepdim=True).expand_as(scores)


def all_query_heads(x: Tensor, dim: int, heads: Heads | None) -> Tensor:
    """All query heads of a KV head, in their order, also where processes share these. No gradient.

    Args:
        x: of the query heads of this process, which are along `dim`.
        dim: counted from the front.
        heads: of the context.
    """
    if heads is None or heads.group is None:
        return x
    count, rank = heads.group.size(), heads.group.rank()
    all_of_them = _exchange(x.expand(count, *x.shape), heads.group)
    first = rank // heads.copies * heads.copies
    return torch.cat(all_of_them[first : first + heads.copies].unbind(0), dim)


def _all_tokens(q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, n, H, D], k and v [B, n, Hkv, D] as [B, N, h, D] and [B, N, c, D]."""
    count, heads, kv_heads = group.size(), q.shape[2], k.shape[2]
    if not shares_heads(heads, kv_heads, count):
        raise ValueError(f"{count} processes cannot share out {heads} query heads and {kv_heads} key/value heads")
    # A KV head goes to every process that has query heads of it; the gradients of its copies add up.
    copies = max(1, count // kv_heads)
    sent = [q, *(x if copies == 1 else x.repeat_interleave(copies, 2) for x in (k, v))]
    widths = [x.shape[2] // count for x in sent]
    received = _exchange(torch.cat([_by_owner(x, count) for x in sent], 3), group).split(widths, 3)
    q, k, v = (x.movedim(0, 1).flatten(1, 2).contiguous() for x in received)
    return q, k, v


def _all_heads(x: Tensor, group: ProcessGroup, edge: int = 0) -> Tensor:
    """[B, N, h, ...] as [B, n, H, ...], or [B, n + edge, H, ...] with the last rows of the shard before."""
    parts = x.unflatten(1, (group.size(), -1))
    if edge:
        parts = torch.cat((parts, parts[:, :, -edge:].roll(1, 1)), 2)
    return _exchange(parts.movedim(1, 0), group).movedim(0, 2).flatten(2, 3)


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


class _WithPrevious(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, rows: int, group: ProcessGroup) -> tuple[Tensor, ...]:
        ctx.rows, ctx.group = rows, group
        last = torch.cat([x[:, x.shape[1] - rows :] for x in (k, v)], 3)
        parts = zip((k, v), _shifted(last, group, 1).chunk(2, 3), strict=True)
        return tuple(torch.cat((before, x) if group.rank() else (x, before), 1) for x, before in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, group = ctx.rows, ctx.group
        sent = [x[:, :rows] if group.rank() else x[:, x.shape[1] - rows :] for x in grads]
        back = _shifted(torch.cat(sent, 3), group, -1).chunk(2, 3)
        own = (own_tokens(x, rows, group).split((x.shape[1] - 2 * rows, rows), 1) for x in grads)
        added = (torch.cat((x, last + more), 1) for (x, last), more in zip(own, back, strict=True))
        return *added, None, None


def _shifted(x: Tensor, group: ProcessGroup, by: int) -> Tensor:
    """Send `x` to the process `by` places on; what comes back is from the one as many places before."""
    count, rank = group.size(), group.rank()
    to, source = ([int(place == (rank + step) % count) for place in range(count)] for step in (by, -by))
    return wait_tensor(all_to_all_single(x.contiguous()[None], source, to, group))[0]


def _all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    return wait_tensor(all_to_all_single(x.contiguous(), None, None, group))
