"""The model of a directory of Hugging Face's format, as transformers loads it. What it describes is compared with what
its weights are before memory is taken for it."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lighthouse_core.errors import UserError
from lighthouse_core.reading import read_json
from lighthouse_core.weights.directory import items, read_headers, words

# Of a directory whose files do not belong together.
_COMPARE = "compare config.json with the weights"
# Bytes of what a model keeps beside its weights, such as masks, that need no comparison.
_BUFFERS = 1 << 30
_COUNTS = re.compile(r"(^|_)(layers?|experts?|blocks?|depth)$|_layers?_|_experts?_")
# Names of classes that transformers makes up by the number of them.
_LABELS = 10_000


def load_model(path: Path, config: dict[str, Any]) -> nn.Module:
    """The causal language model of a directory, from its safetensors, on the CPU.

    Args:
        path: of the directory.
        config: its config.json, by `read_config`.

    Raises:
        UserError: transformers is missing or cannot load it, it holds no such model or only a part of one, it asks for
            code to be run, or its weights are pickled.
    """
    shapes = {name: stored.shape for name, stored in read_headers(path).items()}
    _check_counts(path, config, len(shapes))
    try:
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM
    except (ImportError, RuntimeError) as error:  # transformers 4 wraps a failed import of its own in RuntimeError
        raise UserError(
            f"transformers cannot be used: {words(error)}", hint="pip install 'lighthouse-pretrain[hf]'"
        ) from None
    if "rope_parameters" in config and "rope_theta" not in config and _release(transformers) < (5,):
        # An older release would take the usual base of the rotation without a word.
        raise UserError(
            f"{path} needs transformers 5 or later: its config.json has rope_parameters",
            hint="pip install -U transformers",
        )
    activation = config.get("hidden_act")
    with explained(path), _quiet(transformers):
        if isinstance(activation, str) and activation not in transformers.activations.ACT2FN:
            raise UserError(f"{path / 'config.json'} has an unknown hidden_act, {words(activation)!r}")
        parsed = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            # Every weight's shape, and no memory.
            planned = _of_kernels(
                lambda kernels: AutoModelForCausalLM.from_config(parsed, trust_remote_code=False, **kernels)
            )
        _check_size(path, planned, shapes)
        model, loading = _of_kernels(
            lambda kernels: AutoModelForCausalLM.from_pretrained(
                path,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **_dtype(transformers),
                **kernels,
            )
        )
    _check_loaded(path, config, model, loading)
    return model


def _of_kernels(load: Callable[[dict[str, str]], Any]) -> Any:
    """What `load` makes with torch's attention, or with plain attention where the model has no other. Which it is must
    not be up to config.json, which may name kernels to fetch."""
    try:
        return load({"attn_implementation": "sdpa"})
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return load({"attn_implementation": "eager"})


def _release(transformers: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])


def _dtype(transformers: Any) -> dict[str, str]:
    return {"dtype" if _release(transformers) >= (4, 56) else "torch_dtype": "auto"}


def training_data(path: Path) -> tuple[str, str] | None:
    """The name of the run that `lighthouse strip` made a directory of, and the fingerprint of the data that the run was
    trained on, as its ledger has it; None where no lighthouse.json says both."""
    try:
        found = read_json(path / "lighthouse.json")
        name, trained = found["run"], found["stages"][0]["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return (name, trained) if isinstance(name, str) and isinstance(trained, str) else None


def _check_counts(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse more layers than there are tensors: each is an object, whether there are weights for it or not."""
    for key, value in items(config):
        limit = _LABELS if key == "num_labels" else max(tensors, 512) if _COUNTS.search(key) else None
        if limit is not None and isinstance(value, int | float) and not -1 <= value <= limit:
            raise UserError(
                f"{path / 'config.json'} has {key} = {words(str(value))[:40]}, and there are {tensors} tensors",
                hint=_COMPARE,
            )


def _check_size(path: Path, planned: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a description of more weights than there are, before memory is taken for them."""
    stored = sum(_numel(shape) for shape in shapes.values())
    described = sum(parameter.numel() for parameter in planned.parameters())
    if described > stored:
        raise UserError(
            f"{path / 'config.json'} describes a model of {described} weights, and its safetensors hold {stored}",
            hint=_COMPARE,
        )
    beside = sum(buffer.numel() * buffer.element_size() for buffer in planned.buffers())
    if beside > max(_BUFFERS, stored):
        raise UserError(
            f"{path / 'config.json'} describes a model with {beside / 2**30:.0f} GiB beside its weights",
            hint=_COMPARE,
        )


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _check_loaded(path: Path, config: dict[str, Any], model: nn.Module, loading: dict[str, Any]) -> None:
    """Refuse a model of which a part was drawn at random, or that is another one than the directory says."""
    kind, named = type(model).__name__, config.get("architectures")
    named = named if isinstance(named, list) else [named] if named else []
    if named and kind.lower() not in [str(name).lower() for name in named]:
        raise UserError(
            f"{path} holds {words(str(named[0]))}, which is no causal language model: transformers would make "
            f"{kind} of it",
            hint="measure a causal language model",
        )
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs", "conversion_errors"):
        if found := loading.get(problem):
            first = sorted(found, key=str)[0]
            raise UserError(
                f"the weights in {path} are not those of {kind}: {problem.replace('_', ' ')}, "
                f"{words(str(first))!r} and {len(found) - 1} more",
                hint=_COMPARE,
            )


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Whatever transformers makes of a bad directory, as one error."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        known = isinstance(error, OSError | ValueError) and str(error)
        reason = words(error) if known else f"{type(error).__name__}: {words(error)}"
        hint = f"compare {path / 'config.json'} with one that transformers wrote"
        raise UserError(f"transformers cannot load {path}: {reason}", hint=hint) from None


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without what transformers prints: the one line of an error says it."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
