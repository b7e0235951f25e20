"""Kept entries and a window of tokens as parts of one softmax, in plain PyTorch."""

import torch
from torch import Tensor

from lighthouse_kernels.geometry import Geometry
from lighthouse_kernels.types import slots_of


def merge(
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    row_lse: Tensor,
    indices: Tensor,
    geometry: Geometry,
    begins: Tensor | None = None,
) -> Tensor:
    """Average every position's window and the rows that serve it, by the exponentials of their log-sum-exps.

    Args:
        out: [B, N, H, D], attention over a window that ends with the position.
        lse: [B, N, H], its log-sum-exp, finite; float32, or float64.
        rows: [B, S, H, D], the output of the dense call; [B, S + L - 1, H, D] with those of the shard before.
        row_lse: [B, S, H], its log-sum-exp; [B, S + L - 1, H] likewise.
        indices: flat pyramid indices of the rows, [B, Hkv, S] or [B, Hkv, S + L - 1] of `types.with_edge`.
        geometry: the pyramid.
        begins: [B, N'/c_(L-1)] integers: for each window of the coarsest level the first token of its document, whose
            rows serve no other one's positions; None where a sequence is one document. Of a shard, from its own first
            token, negative for a document that began before.

    Returns:
        [B, N, H, D] in the dtype of `out`; added in that of `lse`. Differentiable in the first four.
    """
    tokens, heads, dim = out.shape[1:]
    entries = geometry.selected_length
    edge = indices[..., entries:].repeat_interleave(heads // indices.shape[1], 1).transpose(1, 2)
    slots = slots_of(indices[..., :entries], geometry.pyramid_length)
    slots = slots.repeat_interleave(heads // indices.shape[1], 1).transpose(1, 2)
    ends = torch.arange(1, tokens + 1, device=out.device)
    parts, sums = [out], [lse]
    # Without documents every window serves, also those of the shard before.
    begin = torch.full((1, tokens), -geometry.first, device=out.device)
    if begins is not None:
        begin = begins[:, (ends - 1) // geometry.window(geometry.levels - 1)]
    for level in range(geometry.levels):
        width = geometry.window(level)
        window = ends // width - 1
        serves = window * width >= begin
        slot = torch.where(
            (serves & (window >= 0))[..., None], slots[:, geometry.offset(level) + window.clamp(min=0)], -1
        )
        if level > 0 and edge.shape[1]:
            kept = edge[:, None, level - 1] == -1 - level
            slot = torch.where((serves & (window < 0))[..., None] & kept, entries + level - 1, slot)
        here = slot.clamp(min=0).long()
        parts.append(rows.gather(1, here[..., None].expand(-1, -1, -1, dim)))
        sums.append(torch.where(slot >= 0, row_lse.gather(1, here), -torch.inf))
    weights = torch.softmax(torch.stack(sums), 0)[..., None]
    return sum(weight * part for weight, part in zip(weights, parts, strict=True)).to(out.dtype)
