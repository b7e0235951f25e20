"""FlashAttention-3 (https://github.com/Dao-AILab/flash-attention, folder hopper), module flash_attn_interface."""

import importlib.util

from lighthouse_core.attention.dense.packages import from_package

KERNEL = from_package(
    "fa3",
    "FlashAttention-3",
    "flash_attn_interface",
    importlib.util.find_spec("flash_attn_interface") is not None,
    range(9, 10),
    "build it from the folder hopper of its repository",
)
