"""What the families of models share: a transformer of Llama's form, beside transformers' class of it. Imports no torch.

D head dim. The trainer and Hugging Face differ in names and in the order of a head's rows: the trainer's RoPE turns the
pairs (0, 1), (2, 3), ... of a head, Hugging Face's (0, D/2), (1, D/2 + 1), ...
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lighthouse_core.config.model import ModelSection


@dataclass(frozen=True)
class Parameters:
    """Weights by part. The embedding table is looked up, not multiplied, and costs no FLOPs; a tied one is counted as
    the head alone."""

    embedding: int
    body: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.body + self.head


class Entry(NamedTuple):
    """One tensor under both names."""

    source: str  # key in the trainer's checkpoint
    target: str  # key in transformers' class
    shape: tuple[int, ...]
    rotary_heads: int = 0  # heads whose rows RoPE turns; 0 for a tensor that is copied as it is


EMBEDDING = Entry("tok_embeddings.weight", "model.embed_tokens.weight", ())
HEAD = Entry("output.weight", "lm_head.weight", ())

# Fields of a config.json that say nothing of how logits are computed.
_SILENT = frozenset(
    (
        *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache"),
        *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"),
        # Of a projection that older releases of transformers computed in parts.
        "pretraining_tp",
        *("id2label", "label2id", "output_attentions", "output_hidden_states", "return_dict", "problem_type"),
        *("chunk_size_feed_forward", "is_encoder_decoder"),
        # Notes of those who publish models.
        *("is_llama_config", "unsloth_fixed", "unsloth_version", "max_sequence_length"),
        # Nothing is dropped here, in training neither.
        "attention_dropout",
    )
)
# Fields that become the [model] section.
_READ = frozenset(
    (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "vocab_size", "rms_norm_eps", "tie_word_embeddings"),
        *("rope_theta", "rope_parameters", "rope_scaling"),
    )
)
_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    ),
}


class Family:
    """One family; its file has the rest.

    Attributes:
        name: in a recipe, and model_type in config.json.
        architecture: transformers' class.
        qkv_bias: whether the projections of queries, keys and values add a bias.
        qk_norm: whether queries and keys pass an RMSNorm of each head before RoPE.
        even_heads: whether the width must be a multiple of the number of heads.
        kv_heads: that a config.json without num_key_value_heads stands for; None for as many as query heads.
        fixed: fields of config.json with the values that the model here can have; an absent field stands for `absent`,
            or else for the first of them.
        absent: what an absent field stands for where that is none of the fixed values.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    even_heads: ClassVar[bool] = False
    kv_heads: ClassVar[int | None] = None
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    absent: ClassVar[Mapping[str, Any]] = {}

    def entries(self, model: ModelSection) -> list[Entry]:
        """Every tensor of the model that the recipe's [model] section describes."""
        dim, ffn_dim, table = model.dim, model.ffn_dim, (model.vocab_size, model.dim)
        q_dim, kv_dim = model.heads * model.head_dim, model.kv_heads * model.head_dim
        found = [EMBEDDING._replace(shape=table)]
        for i in range(model.layers):
            source, target = f"layers.{i}", f"model.layers.{i}"
            attention, feed_forward = f"{source}.attention", f"{source}.feed_forward"
            found.append(Entry(f"{source}.attention_norm.weight", f"{target}.input_layernorm.weight", (dim,)))
            for ours, theirs, rows, heads in (
                ("wq", "q_proj", q_dim, model.heads),
                ("wk", "k_proj", kv_dim, model.kv_heads),
                ("wv", "v_proj", kv_dim, 0),
            ):
                found.append(
                    Entry(f"{attention}.{ours}.weight", f"{target}.self_attn.{theirs}.weight", (rows, dim), heads)
                )
                if self.qkv_bias:
                    found.append(Entry(f"{attention}.{ours}.bias", f"{target}.self_attn.{theirs}.bias", (rows,), heads))
            if self.qk_norm:
                found += [
                    Entry(f"{attention}.{name}.weight", f"{target}.self_attn.{name}.weight", (model.head_dim,), 1)
                    for name in ("q_norm", "k_norm")
                ]
            found += [
                Entry(f"{attention}.wo.weight", f"{target}.self_attn.o_proj.weight", (dim, q_dim)),
                Entry(f"{source}.ffn_norm.weight", f"{target}.post_attention_layernorm.weight", (dim,)),
                Entry(f"{feed_forward}.w1.weight", f"{target}.mlp.gate_proj.weight", (ffn_dim, dim)),
                Entry(f"{feed_forward}.w3.weight", f"{target}.mlp.up_proj.weight", (ffn_dim, dim)),
                Entry(f"{feed_forward}.w2.weight", f"{target}.mlp.down_proj.weight", (dim, ffn_dim)),
            ]
        found.append(Entry("norm.weight", "model.norm.weight", (dim,)))
        return found if model.tied_embeddings else [*found, HEAD._replace(shape=table)]

    def parameters(self, model: ModelSection) -> Parameters:
        """How many weights the model that [model] describes has."""
        # All layers are alike, and there may be thousands.
        one = self.entries(model.model_copy(update={"layers": 1}))
        sizes = {entry.source: prod(entry.shape) for entry in one}
        embedding = sizes.pop(EMBEDDING.source)
        head = sizes.pop(HEAD.source, None)
        body = sum(size * (model.layers if name.startswith("layers.") else 1) for name, size in sizes.items())
        return Parameters(0, body, embedding) if head is None else Parameters(embedding, body, head)

    def config(
        self, model: ModelSection, *, seq_len: int, bos_id: int | None, eos_id: int, pad_id: int, dtype: str
    ) -> dict[str, Any]:
        """config.json. RoPE and dtype appear twice, since transformers 4 and 5 read them under different names."""
        scaling = {"rope_type": "default"} if model.rope_scaling is None else model.rope_scaling.model_dump()
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "hidden_size": model.dim,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "intermediate_size": model.ffn_dim,
            **{field: values[0] for field, values in self.fixed.items()},
            "vocab_size": model.vocab_size,
            "tie_word_embeddings": model.tied_embeddings,
            "max_position_embeddings": seq_len,
            "rms_norm_eps": model.norm_eps,
            "rope_theta": model.rope_theta,
            **({} if model.rope_scaling is None else {"rope_scaling": scaling}),
            "rope_parameters": {**scaling, "rope_theta": model.rope_theta},
            "bos_token_id": bos_id,  # null, too, is written: without the key transformers takes 1
            "eos_token_id": eos_id,
            "pad_token_id": pad_id,
            "torch_dtype": dtype,
            "dtype": dtype,
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The [model] section that a config.json describes, the inverse of `config`; its values are not checked.

        Raises:
            ValueError: it describes another model, or has a field that is not known; names the field.
        """
        for field, values in self.fixed.items():
            given = config.get(field, self.absent.get(field, values[0]))
            if given not in values and (given is not None or None in values):
                absent = "" if field in config else ", which its absence stands for"
                wanted, found = json.dumps(values[0]), json.dumps(given)
                raise ValueError(f"{field} must be {wanted} for the family {self.name}, not {found}{absent}")
        for field, value in config.items():
            # A null says nothing.
            if field not in _READ | _SILENT | self.fixed.keys() and value is not None and self.minds(field, value):
                raise ValueError(f"the field {field} is not known of the family {self.name}")
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
            if config.get(field) is None:
                raise ValueError(f"{field} is missing")
        heads, width = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim")
        if head_dim is None:
            if not (_count(heads) and _count(width)):
                raise ValueError(f"num_attention_heads {heads!r} and hidden_size {width!r} must be integers above 0")
            head_dim = self.usual_head_dim(width, heads, "head_dim" in config)
        kv_heads = config.get("num_key_value_heads", self.kv_heads)
        return {
            "family": self.name,
            "dim": width,
            "layers": config["num_hidden_layers"],
            "heads": heads,
            "kv_heads": heads if kv_heads is None else kv_heads,
            "head_dim": head_dim,
            "ffn_dim": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
            # A null stands for the default.
            "norm_eps": 1e-6 if config.get("rms_norm_eps") is None else config["rms_norm_eps"],
            "tied_embeddings": False if config.get("tie_word_embeddings") is None else config["tie_word_embeddings"],
        } | _rope_settings(config)

    def minds(self, field: str, value: Any) -> bool:
        """Whether a field of config.json that this module does not read may change the logits."""
        return True

    def usual_head_dim(self, width: int, heads: int, null: bool) -> int:
        """D of a config.json without head_dim, or where it is null."""
        return width // heads


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling of a [model] section."""
    rope: dict[str, Any] = {}
    for field in ("rope_scaling", "rope_parameters"):
        given = config.get(field)
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"{field} must be a table, not {json.dumps(given)}")
        rope |= given or {}
    # The older name.
    older = rope.pop("type", None)
    kind = rope.pop("rope_type", None) or older or "default"
    if not isinstance(kind, str) or kind not in _ROPE:
        raise ValueError(f"rope_type must be one of {', '.join(_ROPE)}, not {json.dumps(kind)}")
    thetas = rope.pop("rope_theta", None), config.get("rope_theta"), 10000.0
    theta = next(one for one in thetas if one is not None)
    scaling = {name: value for name, value in rope.items() if value is not None}
    if kind == "yarn" and (tokens := config.get("max_position_embeddings")) is not None:
        # Transformers fills this in, too.
        scaling.setdefault("original_max_position_embeddings", tokens)
    for name in scaling:
        if name not in _ROPE[kind]:
            raise ValueError(f"the field {name} is not known of a rope_type {kind!r}")
    return {"rope_theta": theta} | ({} if kind == "default" else {"rope_scaling": {"rope_type": kind, **scaling}})


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, [heads * D, dim] or [heads * D], from pairs (2i, 2i + 1) to pairs
    (i, i + D/2) of each head."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of to_half_split, written on its own so that each checks the other."""
    import torch

    rows = weight.shape[0]
    order = torch.arange(rows).view(heads, 2, rows // heads // 2).mT.reshape(-1)
    return weight[order]


# Buffers of early releases of transformers, which the weights' files of Llama 2 hold: worked out anew.
WORKED_OUT = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
