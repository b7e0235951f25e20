"""Small models that transformers makes, as the directories that training begins from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# A recipe for any of them: it has no [model] of its own.
RECIPE = """\
[lighthouse]
pooling = 2
levels = 2
topk = 2
tile_parents = 2

[data]
source = "files"
paths = ["corpus/*.txt"]
tokenizer = "bytes"
validation = 0.25
packing = "concat"

[training]
seq_len = 64
global_batch_size = 2
steps = 2
dtype = "float32"

[optimizer]
lr = 1e-3

[recover]
steps = 1

[checkpoint]
also = [0]
keep = 0
"""


def made(path, family, dtype="float32", *, shards="5GB", rope=None, **changes):
    """A small model of transformers' own class with no weight left at its initial value, saved at `path`."""
    transformers = pytest.importorskip("transformers")
    settings = {
        "vocab_size": 300,
        "hidden_size": 60,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5} | (rope or {}),
    }
    if family == "mistral":
        settings["sliding_window"] = None
    if family == "qwen3":
        settings["head_dim"] = 14
    config = transformers.AutoConfig.for_model(family, **settings | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
            else:
                parameter.mul_(3)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shards)
    return model.float()


def plain(section, path: Path) -> None:
    """A directory with the model of a [model] section, made without transformers."""
    path.mkdir()
    config = section.kind.config(section, seq_len=64, bos_id=None, eos_id=1, pad_id=2, dtype="float32")
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text('{"eos_token_id": 1}')
    weights = {entry.target: torch.ones(entry.shape) for entry in section.kind.entries(section)}
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Everything in a directory's safetensors, by name."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Also of the sign of a zero."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.view({2: torch.int16, 4: torch.int32}[weight.element_size()])


def edit(path: Path, name: str = "config.json", **changes) -> None:
    """Change keys of a JSON file of a directory; those that are to be ... go."""
    content = json.loads((path / name).read_text()) | changes
    (path / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def rewrite(path: Path, change) -> None:
    """Write model.safetensors anew with what `change` does to its tensors, in place."""
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def corpus(folder: Path) -> None:
    (folder / "corpus").mkdir()
    for i in range(8):
        (folder / f"corpus/{i}.txt").write_text("some words of a text, and others " * 40 + "abcdefgh"[:i])
