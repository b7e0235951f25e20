"""The way back from the gathered sequence to the tokens in plain PyTorch."""

import torch
from torch import Tensor

from lighthouse_kernels.geometry import Geometry


def scatter(rows: Tensor, indices: Tensor, geometry: Geometry) -> Tensor:
    """Add every entry's output to the positions it stands for. Differentiable.

    Entry (l, i) adds to positions [i c_l + c_l - 1, i c_l + 2 c_l - 2]: the first position that has seen all of its
    window, and the c_l - 1 that follow. A position nobody writes to is 0.

    Args:
        rows: [B, S, H, D], the output of the dense call; [B, S + L - 1, H, D] with those of the shard before.
        indices: flat pyramid indices of the rows, [B, Hkv, S] or [B, Hkv, S + L - 1] of `types.with_edge`.
        geometry: the pyramid.

    Returns:
        [B, N, H, D] in the dtype of `rows`; 16-bit rows are added in float32.
    """
    batch, _, heads, dim = rows.shape
    entries = geometry.selected_length
    wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    per_head = indices.repeat_interleave(heads // indices.shape[1], dim=1).transpose(1, 2)
    where = per_head[:, :entries, :, None].expand(-1, -1, -1, dim).long()
    pyramid = wide.new_zeros(batch, geometry.pyramid_length, heads, dim).scatter(1, where, wide[:, :entries])

    out = pyramid[:, : geometry.tokens]
    for level in range(1, geometry.levels):
        window, start = geometry.window(level), geometry.offset(level)
        # Windows that begin writing at or after N contribute nothing.
        count = max(0, -(-(geometry.tokens - window + 1) // window))
        spread = pyramid[:, start : start + count].repeat_interleave(window, dim=1)
        before = wide.new_zeros(batch, 1, heads, dim)
        if rows.shape[1] > entries:
            edge = slice(entries + level - 1, entries + level)
            before = torch.where(per_head[:, edge, :, None] == -1 - level, wide[:, edge], 0.0)
        spread = torch.cat((before.expand(-1, window - 1, -1, -1), spread), 1)[:, : geometry.tokens]
        out = out + torch.nn.functional.pad(spread, (0, 0, 0, 0, 0, geometry.tokens - spread.shape[1]))
    return out.to(rows.dtype)
