"""Every operation in plain PyTorch, on any device: the readable truth."""

from lighthouse_kernels.gather.reference import gather
from lighthouse_kernels.pyramid.op import norm_scores
from lighthouse_kernels.pyramid.reference import (
    block_scores,
    group_max,
    mask_padding,
    pool,
    random_scores,
    window_scores,
)
from lighthouse_kernels.scatter.reference import scatter
from lighthouse_kernels.select.reference import select

__all__ = [
    "block_scores",
    "gather",
    "group_max",
    "mask_padding",
    "norm_scores",
    "pool",
    "random_scores",
    "scatter",
    "select",
    "window_scores",
]
