"""FlashAttention-2 (https://github.com/Dao-AILab/flash-attention), package flash-attn."""

import importlib.metadata

from lighthouse_core.attention.dense.packages import from_package

KERNEL = from_package(
    "fa2",
    "FlashAttention-2",
    "flash_attn",
    # Not by its module: FlashAttention-4 leaves a folder of that name.
    any(importlib.metadata.distributions(name="flash-attn")),
    range(8, 13),
    "pip install flash-attn",
)
