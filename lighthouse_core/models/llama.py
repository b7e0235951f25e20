"""Llama 2 and 3.x."""

from typing import Any, ClassVar

from lighthouse_core.models.family import Family


class Llama(Family):
    """See the module."""

    name = "llama"
    architecture = "LlamaForCausalLM"
    even_heads = True
    fixed: ClassVar = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}

    def minds(self, field: str, value: Any) -> bool:
        # SmolLM2 says what is so in any case.
        return field != "rope_interleaved" or value is not False
