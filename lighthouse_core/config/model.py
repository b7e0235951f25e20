"""[model]: the model that is trained, and the weights that it begins with."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from lighthouse_core.config.rope import RopeScaling
from lighthouse_core.config.section import Ints, PathOrNothing, PositiveFloat, Section, conflict
from lighthouse_core.models import FAMILIES
from lighthouse_core.models.family import Family

# Ids of a vocabulary.
MOST_IDS = 2**24
_Width = Annotated[int, Field(gt=0, le=2**22)]
_Heads = Annotated[int, Field(gt=0, le=2**16)]


def _count(value: Any) -> bool:
    return type(value) is int and 0 < value <= 2**22


class ModelSection(Section):
    """Widths are exact: nothing is rounded.

    Attributes:
        origin: `from` in a recipe: a directory of Hugging Face's format or a run of ours, whose weights are the initial
            ones; "" draws them. Keys that are not set are then read from it.
        family: "llama", "mistral", "qwen2" (biases) or "qwen3" (QK-norm).
        tied_embeddings: whether the head is the embedding table.
        rope_scaling: of the rotation's frequencies; none by default.
        embedding_std: standard deviation of the initial embeddings, by default torchtitan's.
        dense_layers: indices from 0 of the layers without Lighthouse.
    """

    origin: PathOrNothing = Field(default="", alias="from")
    family: Literal[*FAMILIES] = "llama"  # type: ignore[valid-type]
    dim: _Width
    layers: Annotated[int, Field(gt=0, le=10_000)]
    heads: _Heads
    kv_heads: _Heads
    head_dim: _Heads
    ffn_dim: _Width
    vocab_size: Annotated[int, Field(gt=0, le=MOST_IDS)]
    tied_embeddings: bool = False
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
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
        if data.get("rope_scaling") == {"rope_type": "default"}:
            # As a config.json says that there is none.
            del data["rope_scaling"]
        dim, heads = data.get("dim"), data.get("heads")
        if _count(heads):
            data.setdefault("kv_heads", heads)
        if _count(dim) and _count(heads):
            family = FAMILIES.get(str(data.get("family", "llama")))
            if dim % heads and ("head_dim" not in data or (family is not None and family.even_heads)):
                # head_dim is free of dim / heads, but transformers loads no Llama without this.
                raise conflict("dim", f"model.dim {dim} is not a multiple of model.heads {heads}")
            data.setdefault("head_dim", dim // heads)
        return data

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """TOML has no null, and weights that are drawn have no origin."""
        return {key: value for key, value in handler(self).items() if value not in (None, "")}

    @property
    def kind(self) -> Family:
        """What is known of the family."""
        return FAMILIES[self.family]

    @model_validator(mode="after")
    def _check(self) -> "ModelSection":
        if self.heads % self.kv_heads:
            raise conflict(
                "kv_heads", f"model.heads ({self.heads}) must be a multiple of model.kv_heads ({self.kv_heads})"
            )
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "yarn" and self.rope_theta <= 1:
            raise conflict("rope_theta", f"model.rope_theta must be above 1 for YaRN, not {self.rope_theta}")
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
