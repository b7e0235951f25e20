"""Llama: how many weights it has, and the trainer's beside Hugging Face's LlamaForCausalLM: names, shapes, layouts,
config.json. Importing this module imports no torch.

D head dim. The two differ in names and in the rows of wq and wk: the trainer rotates the pairs (0,1), (2,3), ... of a
head, Hugging Face rotates (0,D/2), (1,D/2+1), ...
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from lighthouse_core.config.model import ModelSection


@dataclass(frozen=True)
class Parameters:
    """Weights by part; the embedding table is looked up, not multiplied, and so costs no FLOPs."""

    embedding: int
    body: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.body + self.head


def parameters(model: ModelSection) -> Parameters:
    """How many weights the model that [model] describes has."""
    sizes = {entry.source: prod(entry.shape) for entry in entries(model)}
    embedding, head = sizes.pop("tok_embeddings.weight"), sizes.pop("output.weight")
    return Parameters(embedding, sum(sizes.values()), head)


class Entry(NamedTuple):
    """One tensor under both names."""

    source: str  # key in the trainer's checkpoint
    target: str  # key in LlamaForCausalLM
    shape: tuple[int, ...]
    rotary_heads: int = 0  # heads whose rows RoPE rotates; 0 for a tensor that is copied as it is


def entries(model: ModelSection) -> list[Entry]:
    """Every tensor of the model that the recipe's [model] section describes."""
    dim, ffn_dim = model.dim, model.ffn_dim
    q_dim, kv_dim = model.heads * model.head_dim, model.kv_heads * model.head_dim
    table = [Entry("tok_embeddings.weight", "model.embed_tokens.weight", (model.vocab_size, dim))]
    for i in range(model.layers):
        source, target = f"layers.{i}", f"model.layers.{i}"
        attention, feed_forward = f"{source}.attention", f"{source}.feed_forward"
        table += [
            Entry(f"{source}.attention_norm.weight", f"{target}.input_layernorm.weight", (dim,)),
            Entry(f"{attention}.wq.weight", f"{target}.self_attn.q_proj.weight", (q_dim, dim), model.heads),
            Entry(f"{attention}.wk.weight", f"{target}.self_attn.k_proj.weight", (kv_dim, dim), model.kv_heads),
            Entry(f"{attention}.wv.weight", f"{target}.self_attn.v_proj.weight", (kv_dim, dim)),
            Entry(f"{attention}.wo.weight", f"{target}.self_attn.o_proj.weight", (dim, q_dim)),
            Entry(f"{source}.ffn_norm.weight", f"{target}.post_attention_layernorm.weight", (dim,)),
            Entry(f"{feed_forward}.w1.weight", f"{target}.mlp.gate_proj.weight", (ffn_dim, dim)),
            Entry(f"{feed_forward}.w3.weight", f"{target}.mlp.up_proj.weight", (ffn_dim, dim)),
            Entry(f"{feed_forward}.w2.weight", f"{target}.mlp.down_proj.weight", (dim, ffn_dim)),
        ]
    table += [
        Entry("norm.weight", "model.norm.weight", (dim,)),
        Entry("output.weight", "lm_head.weight", (model.vocab_size, dim)),
    ]
    return table


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection [heads * D, dim], from pairs (2i, 2i+1) to pairs (i, i + D/2) of each head."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of to_half_split, written on its own so that each checks the other."""
    import torch

    rows = weight.shape[0]
    order = torch.arange(rows).view(heads, 2, rows // heads // 2).mT.reshape(-1)
    return weight[order]


def hf_config(
    model: ModelSection, *, seq_len: int, bos_id: int | None, eos_id: int, pad_id: int, dtype: str
) -> dict[str, Any]:
    """config.json. RoPE and dtype appear twice, since transformers 4 and 5 read them under different names."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": False,
        "max_position_embeddings": seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "bos_token_id": bos_id,  # null, too, is written: without the key transformers takes 1
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


# What must be so in a config.json, since the model here has nothing else; absent stands for the first.
_FIXED = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
}


def model_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The [model] section that a config.json describes, the inverse of `hf_config`.

    Raises:
        ValueError: it describes another model; names the field.
    """
    for field, allowed in _FIXED.items():
        if config.get(field, allowed[0]) not in allowed:
            raise ValueError(f"{field} must be {allowed[0]!r}, not {config[field]!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type must be 'default', not {rope['rope_type']!r}")
    heads = config["num_attention_heads"]
    return {
        "dim": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", heads),
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "ffn_dim": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "norm_eps": config["rms_norm_eps"],
    }
