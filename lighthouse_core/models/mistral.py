"""Mistral without a sliding window."""

from typing import ClassVar

from lighthouse_core.models.family import Family


class Mistral(Family):
    """See the module."""

    name = "mistral"
    architecture = "MistralForCausalLM"
    kv_heads = 8
    fixed: ClassVar = {"hidden_act": ("silu",), "sliding_window": (None,)}
    absent: ClassVar = {"sliding_window": 4096}
