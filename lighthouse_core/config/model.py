"""[model]: the shape of the Llama that is trained."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from lighthouse_core.config.section import Ints, PositiveFloat, Section, conflict

# Ids of a vocabulary.
MOST_IDS = 2**24
_Width = Annotated[int, Field(gt=0, le=2**22)]
_Heads = Annotated[int, Field(gt=0, le=2**16)]


def _count(value: Any) -> bool:
    return type(value) is int and 0 < value <= 2**22


class ModelSection(Section):
    """Widths are exact: nothing is rounded. `dense_layers` are indices from 0 of the layers without Lighthouse;
    `embedding_std` is the standard deviation of the initial embeddings, by default torchtitan's."""

    dim: _Width
    layers: Annotated[int, Field(gt=0, le=10_000)]
    heads: _Heads
    kv_heads: _Heads
    head_dim: _Heads
    ffn_dim: _Width
    vocab_size: Annotated[int, Field(gt=0, le=MOST_IDS)]
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
