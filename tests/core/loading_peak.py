"""The most memory that reading every weight of a directory takes, for test_estimate.py."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lighthouse_core.config.model import ModelSection
from lighthouse_core.weights.origin import find_weights


def peak() -> int:
    """Largest resident size of this process since it was reset (proc(5))."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def loading_peak(rank: int, folder: Path, dtype: str, model: ModelSection) -> int:
    """Bytes, of weights of this type that it writes into the folder. In a process of its own."""
    config = model.kind.config(model, seq_len=256, dtype=dtype, bos_id=0, eos_id=1, pad_id=2)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    entries = model.kind.entries(model)
    tensors = {entry.target: torch.zeros(entry.shape, dtype=getattr(torch, dtype)) for entry in entries}
    save_file(tensors, folder / "model.safetensors")
    del tensors
    weights = find_weights(model.model_copy(update={"origin": str(folder)}))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = peak()
    for entry in entries:
        weights.read(entry.source)
    return peak() - before
