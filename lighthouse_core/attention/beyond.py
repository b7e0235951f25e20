"""How much of each KV head's attention lies beyond its window, by exact rows of the softmax.

N tokens, H query heads, Hkv key/value heads, G query heads of a KV head, D head dimension.
"""

import math

import torch
from torch import Tensor

from lighthouse_core.attention.dense.math import wide

# Query rows of a KV head whose scores exist at once.
_ROWS = 32


def measured_rows(tokens: int, queries: int) -> list[int]:
    """The positions that are measured: `queries` evenly spaced ones of the second half of a sequence, all of them where
    it has fewer. In the first half a query has few tokens beyond its window, or none, whatever its head looks for.

    Args:
        tokens: N.
        queries: at least 1.
    """
    begin = tokens // 2
    count = min(queries, tokens - begin)
    return [begin + (number + 1) * (tokens - begin) // count - 1 for number in range(count)]


@torch.no_grad()
def shares_beyond(q: Tensor, k: Tensor, rows: Tensor, window: int, starts: Tensor | None = None) -> Tensor:
    """The share of dense causal attention that falls on tokens before the window: means over the rows and over the
    query heads of each KV head. It makes the scores of a few rows at a time.

    Args:
        q: [rows, H, D], the queries of these rows.
        k: [N, Hkv, D].
        rows: int64 [rows], the positions of the queries.
        window: tokens before each query, its own included, that do not count.
        starts: integers [rows], the first token of each query's document; None for 0.

    Returns:
        [Hkv], float32 at least, each from 0 to 1.
    """
    dtype, position = wide(q.dtype), torch.arange(len(k), device=k.device)
    found = []
    # Under autocast the products would be made in 16 bits.
    with torch.autocast(q.device.type, enabled=False):
        for queries, keys in zip(q.chunk(k.shape[1], 1), k.unbind(1), strict=True):
            total, keys = torch.zeros((), dtype=dtype, device=q.device), keys.to(dtype).T
            for begin in range(0, len(rows), _ROWS):
                part = slice(begin, begin + _ROWS)
                age = (rows[part, None] - position)[:, None]
                hidden = age < 0
                if starts is not None:
                    hidden |= (position < starts[part, None])[:, None]
                scores = queries[part].to(dtype) @ keys / math.sqrt(q.shape[2])
                shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
                total += shares.masked_fill(age < window, 0).sum()
            found.append(total / (len(rows) * queries.shape[1]))
    # Not above 1 by rounding.
    return torch.stack(found).clamp(max=1)
