"""The gathered sequence in plain PyTorch."""

from torch import Tensor


def gather(pyramid: Tensor, indices: Tensor) -> Tensor:
    """Rows of the pyramid in causal order. Differentiable; the kept indices of a head are distinct, so the backward
    pass adds no two rows together and is deterministic.

    Args:
        pyramid: [B, M, H, D], from `pool`.
        indices: [B, Hkv, S] flat pyramid indices; query heads share those of their KV head.

    Returns:
        [B, S, H, D].
    """
    heads, dim = pyramid.shape[2:]
    per_head = indices.repeat_interleave(heads // indices.shape[1], dim=1)
    rows = per_head.transpose(1, 2)[..., None].expand(-1, -1, -1, dim).long()
    return pyramid.gather(1, rows)
