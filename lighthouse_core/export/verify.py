"""Checks on a written directory before it is published.

B batch (1), N tokens, V vocabulary.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from lighthouse_core.errors import ExportError
from lighthouse_core.models.family import Entry, to_interleaved

if TYPE_CHECKING:
    from lighthouse_core.config.model import ModelSection
    from lighthouse_core.models.decoder import Decoder

LOGIT_TOLERANCE = 1e-4
# 128 positions of a 128256-row vocabulary are 66 MB of float32 logits.
_HEAD_POSITIONS = 128


def check_weights(
    files: list[Path], weights: dict[str, Tensor], table: list[Entry], kinds: dict[str, torch.dtype]
) -> None:
    """Compare the written tensors, back in the trainer's layout, with `weights` cast to `kinds`, which has the dtype of
    each by its written name: equal bit for bit.

    Raises:
        ExportError: a tensor differs, is missing, or is one too many.
    """
    by_target = {entry.target: entry for entry in table}
    seen: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                entry = by_target.get(name)
                if entry is None or name in seen:
                    raise ExportError(f"{path.name} holds {name}, which the model has no place for")
                seen.add(name)
                written = file.get_tensor(name)
                if entry.rotary_heads:
                    written = to_interleaved(written, entry.rotary_heads)
                dtype = kinds[name]
                if written.dtype != dtype or not _same_bits(written, weights[entry.source].to(dtype)):
                    raise ExportError(f"{name} does not equal {entry.source} of the checkpoint")
    if missing := by_target.keys() - seen:
        raise ExportError(f"{min(missing)} was not written")


@torch.inference_mode()
def compare_logits(directory: Path, trainer: "Decoder", lengths: list[int], model: "ModelSection") -> float:
    """Largest difference of any logit between transformers' model read from `directory` and the trainer's model.

    Both run in float32 on the CPU, on the same random tokens [1, N] for each N of `lengths`, at every position.

    Args:
        trainer: the trainer's dense model with the exported weights.
        model: the recipe's [model] section.

    Raises:
        ExportError: transformers finds other tensors than it expects, or a logit differs by more than LOGIT_TOLERANCE.
    """
    exported = _load_exported(directory, model.kind.architecture).eval()
    trainer.eval()
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for length in lengths:
        tokens = torch.randint(model.vocab_size, (1, length), generator=generator)
        ours = trainer.hidden(tokens)
        theirs = exported.model(input_ids=tokens, use_cache=False).last_hidden_state
        # The head apart, chunk by chunk: logits [1, N, V] of a long sequence do not fit in memory.
        for start in range(0, length, _HEAD_POSITIONS):
            chunk = slice(start, start + _HEAD_POSITIONS)
            difference = (trainer.head(ours[:, chunk]) - exported.lm_head(theirs[:, chunk])).abs().max().item()
            if not difference <= LOGIT_TOLERANCE:  # so that NaN fails
                last = min(start + _HEAD_POSITIONS, length) - 1
                raise ExportError(
                    f"transformers' logits differ from the trainer's by {difference:.2e} at length {length}, "
                    f"positions {start} to {last}; the limit is {LOGIT_TOLERANCE:.0e}"
                )
            worst = max(worst, difference)
    return worst


def transformers_problem() -> str | None:
    """Why transformers cannot load a Llama here; None when it can."""
    try:
        from transformers import LlamaForCausalLM  # noqa: F401
    except (ImportError, RuntimeError) as error:  # transformers 4 wraps a failed import of its own in RuntimeError
        return str(error).splitlines()[0]
    return None


def trainer_model(model: "ModelSection", max_length: int, weights: dict[str, Tensor]) -> "Decoder":
    """The trainer's dense model over `weights`, which it shares rather than copies."""
    from lighthouse_core.models.decoder import build_dense_model

    module = build_dense_model(model, max_length)
    module.load_state_dict(weights, assign=True)
    return module


def _load_exported(directory: Path, architecture: str) -> Any:
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # Release 4 does so by itself, and has another name for it.
    how = {} if transformers.__version__.startswith("4.") else {"dtype": torch.float32}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, local_files_only=True, **how
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    if type(model).__name__ != architecture:
        raise ExportError(f"transformers reads the directory as {type(model).__name__}")
    for problem, names in loading.items():
        if names:
            raise ExportError(f"transformers reports {problem.replace('_', ' ')}: {names}")
    return model


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # torch.equal takes -0.0 for 0.0.
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.view(bits), b.view(bits))
