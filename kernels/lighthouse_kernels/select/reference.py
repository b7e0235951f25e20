"""The descent that chooses windows, and their causal order, in plain PyTorch."""

import torch
from torch import Tensor

from lighthouse_kernels.geometry import Geometry


def _largest(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest entries of the last dimension; equal scores go to the lower position."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


@torch.no_grad()
def select(by_query: Tensor, by_key: Tensor, geometry: Geometry) -> Tensor:
    """Choose the windows that take part in one call.

    Each tile of the coarsest level descends on its own. At every level above 0 its m parents are the m/2 candidates
    with the largest query score, then the m/2 of the remaining with the largest key score; the children of the
    parents are the candidates one level below. All candidates are kept.

    Args:
        by_query: s_Q, [B, Hkv, M] float32, finite.
        by_key: s_K, [B, Hkv, M] float32, finite.
        geometry: the pyramid; not `dense`.

    Returns:
        [B, Hkv, S] int32 flat pyramid indices in causal order: under a plain causal mask no entry sees a token later
        than the first position it writes to.
    """
    batch, heads, _ = by_query.shape
    tiles, half = geometry.tiles, geometry.tile_parents // 2
    device = by_query.device
    flat, order = [], []

    candidates = torch.arange(geometry.windows(geometry.levels - 1), device=device)
    candidates = candidates.view(1, 1, tiles, -1).expand(batch, heads, -1, -1)
    for level in range(geometry.levels - 1, -1, -1):
        window = geometry.window(level)
        start = geometry.offset(level)
        # Causal order in integers: a position counts 2**(L-1), which leaves room for the parents of all levels just
        # before the position where their window ends.
        key = candidates * window << (geometry.levels - 1)
        flat.append((start + candidates).flatten(2))
        if level == 0:
            order.append(key.flatten(2))
            break
        index = (start + candidates).flatten(2)
        q_scores = by_query.gather(-1, index).view_as(candidates)
        k_scores = by_key.gather(-1, index).view_as(candidates)
        if geometry.cover_prefix:
            q_scores = q_scores.masked_fill(candidates == 0, torch.inf)
        by_q = _largest(q_scores, half)
        by_k = _largest(k_scores.scatter(-1, by_q, -torch.inf), half)
        parents = torch.cat((by_q, by_k), dim=-1)
        is_parent = torch.zeros_like(candidates, dtype=torch.bool).scatter(-1, parents, True)
        end = ((candidates + 1) * window << (geometry.levels - 1)) - (1 << (geometry.levels - 1 - level))
        order.append(torch.where(is_parent, end, key).flatten(2))
        chosen = candidates.gather(-1, parents.sort(dim=-1).values)
        children = chosen[..., None] * geometry.pooling + torch.arange(geometry.pooling, device=device)
        candidates = children.flatten(-2)

    position = torch.cat(order, dim=-1).argsort(dim=-1)
    return torch.cat(flat, dim=-1).gather(-1, position).int()
