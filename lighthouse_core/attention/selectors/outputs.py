"""Scores that are norms of what an attention gives."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def twice(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(s_Q, s_K): L2 norms, float32, of what attention gives for (Q, K, V) and for (K, Q, V).

    Args:
        attend: q, k, v, each [B, N, H, D] -> [B, N, H, D].
        q: [B, N, H, D].
        k, v: [B, N, Hkv, D]; of a group of heads, the key's score is the largest.

    Returns:
        [B, N, H] and [B, N, Hkv].
    """
    kv_heads = k.shape[2]
    k, v = (x.detach().repeat_interleave(q.shape[2] // kv_heads, 2) for x in (k, v))
    q = q.detach()
    by_query, by_key = (attend(*qkv).float().norm(dim=-1) for qkv in ((q, k, v), (k, q, v)))
    return by_query, by_key.unflatten(2, (kv_heads, -1)).amax(-1)
