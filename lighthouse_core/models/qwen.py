"""Qwen2, with biases, and Qwen3, with QK-norm; both without a sliding window."""

from typing import Any, ClassVar

from lighthouse_core.models.family import Family


class Qwen2(Family):
    """See the module."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    qkv_bias = True
    kv_heads = 32
    fixed: ClassVar = {"hidden_act": ("silu",), "use_sliding_window": (False,)}

    def minds(self, field: str, value: Any) -> bool:
        if field == "layer_types":
            return not isinstance(value, list) or value != ["full_attention"] * len(value)
        if field == "use_mrope":
            # Some say that the rotation is not one of images.
            return value is not False
        # Of the window that is not used.
        return field not in ("sliding_window", "max_window_layers")


class Qwen3(Qwen2):
    """See the module."""

    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    qkv_bias = False
    qk_norm = True
    fixed: ClassVar = {"hidden_act": ("silu",), "use_sliding_window": (False,), "attention_bias": (False,)}

    def usual_head_dim(self, width: int, heads: int, null: bool) -> int:
        return width // heads if null else 128
