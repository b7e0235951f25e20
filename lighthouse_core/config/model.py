"""[model]: the shape of the Llama that is trained."""

from typing import Any

from pydantic import model_validator

from lighthouse_core.config.section import Ints, Positive, PositiveFloat, Section, conflict


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


class ModelSection(Section):
    """Widths are exact: nothing is rounded. `dense_layers` are indices from 0 of the layers without Lighthouse;
    `embedding_std` is the standard deviation of the initial embeddings, by default torchtitan's."""

    dim: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    ffn_dim: Positive
    vocab_size: Positive
    rope_theta: PositiveFloat = 10000.0
    norm_eps: PositiveFloat = 1e-5
    embedding_std: PositiveFloat = 1.0
    dense_layers: Ints = ()

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, data: Any) -> Any:
        """kv_heads defaults to heads, head_dim to dim / heads."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        dim, heads = data.get("dim"), data.get("heads")
        if _count(heads):
            data.setdefault("kv_heads", heads)
        if _count(dim) and _count(heads):
            if dim % heads:
                # head_dim is free of dim / heads, but transformers loads no Llama without this.
                raise conflict("dim", f"model.dim {dim} is not a multiple of model.heads {heads}")
            data.setdefault("head_dim", dim // heads)
        return data

    @model_validator(mode="after")
    def _check(self) -> "ModelSection":
        if self.heads % self.kv_heads:
            raise conflict(
                "kv_heads", f"model.heads ({self.heads}) must be a multiple of model.kv_heads ({self.kv_heads})"
            )
        if self.head_dim % 2:
            raise conflict("head_dim", f"model.head_dim must be even (rotary embedding), not {self.head_dim}")
        for layer in self.dense_layers:
            if not 0 <= layer < self.layers:
                raise conflict(
                    "dense_layers", f"model.dense_layers: layer {layer} is outside 0..{self.layers - 1} (model.layers)"
                )
            if self.dense_layers.count(layer) > 1:
                raise conflict("dense_layers", f"model.dense_layers lists layer {layer} more than once")
        return self
