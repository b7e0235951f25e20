"""Llama 2 and 3.x."""

from typing import ClassVar

from lighthouse_core.models.family import Family


class Llama(Family):
    """See the module."""

    name = "llama"
    architecture = "LlamaForCausalLM"
    even_heads = True
    fixed: ClassVar = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
