"""Write a checkpoint as a Hugging Face directory, verify it, then publish it under its name."""

import hashlib
import logging
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lighthouse_core import vml
from lighthouse_core.config.origin import FIXED, ORIGIN, other_end
from lighthouse_core.data.checks import checked_tokenizer
from lighthouse_core.errors import CheckpointError, ExportError, SystemFault, UserError, refusal
from lighthouse_core.export import verify
from lighthouse_core.export.tokenizer import (
    check_given,
    check_tokenizer,
    given_files,
    pad_token,
    write_json,
    write_tokenizer,
)
from lighthouse_core.files import check_output, remove_empty
from lighthouse_core.models.family import Entry, to_half_split
from lighthouse_core.reading import is_count, read_json
from lighthouse_core.seal import sync
from lighthouse_core.weights.checkpoint import Source, find_source, last_sources, load_mean

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_LENGTHS = (1, 17, 512)
_LONGEST = 4096


@dataclass(frozen=True)
class StripReport:
    """What was exported, and how far it was checked."""

    out: Path
    step: int
    dtype: str
    parameters: int
    recovered: bool
    max_logit_difference: float | None  # None when the logits were not compared
    verified: tuple[str, ...]
    skipped: tuple[str, ...]
    warnings: tuple[str, ...]


def strip(
    checkpoint: Path | str,
    out: Path | str,
    *,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    allow_unrecovered: bool = False,
    verify_length: int | None = None,
    average: int = 1,
    shard_bytes: int = 5 * 1000**3,
) -> StripReport:
    """Export a checkpoint as a directory that transformers loads as a model of its family.

    Nothing appears at `out` unless every check passes.

    Args:
        checkpoint: a run directory (its newest checkpoint) or one of its checkpoints/step-N.
        out: the directory to write; it must not exist or be empty.
        dtype: of the written weights; by default each tensor has that of the weights that training began with, or else
            float16 where it trained in float16, and bfloat16.
        allow_unrecovered: also export weights that were never trained with every layer dense.
        verify_length: one more sequence length, in tokens, at which logits are compared.
        average: export the mean of this checkpoint's weights and of those before it, so many in all. Those of stage 1
            are not mixed with those of dense training.
        shard_bytes: size above which the weights are split over several files.

    Raises:
        RunError: `checkpoint` is not in a run.
        CheckpointError: no such checkpoint, one of another model, one that was not recovered, or too few to average.
        UserError: `out` cannot be used, or an argument is out of range.
        ExportError: the written directory does not agree with the checkpoint.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f'unknown dtype "{dtype}"', hint=f"use one of {', '.join(_DTYPES)}")
    if verify_length is not None and verify_length < 1:
        raise UserError(f"verify length {verify_length} is not positive")
    if average < 1:
        raise UserError(f"a mean of {average} checkpoints is none")
    vml.settle()
    source, out = find_source(Path(checkpoint)), Path(os.path.realpath(out))
    recipe = source.run.recipe
    family = recipe.model.kind
    table = family.entries(recipe.model)
    # Of each tensor, by its name in the export.
    kinds = {entry.target: _DTYPES[dtype or source.others.get(entry.target, source.dtype)] for entry in table}
    if verify_length is not None and verify_length > (most := max(recipe.training.seq_len, _LONGEST)):
        raise UserError(f"verify length {verify_length} is above {most}", hint="the model knows no longer sequences")
    tokenizer = checked_tokenizer(recipe)
    ids: dict[str, Any] = {
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": pad_token(tokenizer, recipe.model.vocab_size).id,
    }
    origin = source.run.path / ORIGIN
    given = given_files(origin, tokenizer, recipe.data.tokenizer)
    problem = verify.transformers_problem()
    warnings = _check_recovered(source, allow_unrecovered)
    sources = last_sources(source, average)
    steps = [one.step for one in sources]
    whose = "the checkpoint's" if average == 1 else f"those of the mean of steps {_join(steps)}"
    if given and (note := other_end(origin, tokenizer.eos_id)):
        warnings.append(note)
    verified, skipped, worst = [], [], None
    with _published(out) as directory:
        config = family.config(recipe.model, seq_len=recipe.training.seq_len, dtype=dtype or source.dtype, **ids)
        named = {key.replace("_id", "_token_id"): value for key, value in ids.items()}
        if given and (described := _described(source, "config.json")):
            named = {key: described.get(key) for key in named}
        write_json(directory / "config.json", _as_it_came(source, config, keep_dtype=dtype is None) | named)
        for file in given:
            shutil.copyfile(file, directory / file.name)
        generation = _described(source, "generation_config.json")
        write_json(directory / "generation_config.json", generation if given and generation else generation | named)
        if not given:
            write_tokenizer(
                directory,
                tokenizer,
                max_length=recipe.training.seq_len,
                rows=recipe.model.vocab_size,
                transformers=not problem,
                family=family.name,
            )
        logger.info("reading %s", ", ".join(str(one.path) for one in sources))
        weights = load_mean(sources, table)
        files = _write_weights(directory, weights, table, kinds, shard_bytes)
        for path in files:  # safetensors makes them readable by their owner alone
            shutil.copymode(directory / "config.json", path)

        logger.info("verifying weights")
        verify.check_weights(files, weights, table, kinds)
        verified.append(f"weights equal {whose} bit for bit, and are exactly {family.architecture}'s")
        lengths = sorted({*_LENGTHS, min(recipe.training.seq_len, _LONGEST), verify_length or 1})
        if given:
            warnings += _short_limit(directory, recipe.training.seq_len)
            size, notes = check_given(directory, tokenizer, transformers=not problem)
            warnings += notes
            gives = f", and tokenizer.json gives the ids of training on {size / 1e6:.1f} MB of text" if size else ""
            verified.append(f"the files of the tokenizer are those that the weights came with{gives}")
        else:
            size = check_tokenizer(directory, tokenizer, transformers=not problem, rows=recipe.model.vocab_size)
            verified.append(f"the tokenizer gives the ids of training on {size / 1e6:.1f} MB of text")
        if problem:
            why = f"transformers cannot be used ({problem}); lighthouse-pretrain[hf] brings it"
            skipped.append(f"logits at lengths {_join(lengths)}: {why}")
        else:
            for entry in table:  # in place: a second copy of a large model is not affordable
                weights[entry.source].copy_(weights[entry.source].to(kinds[entry.target]))
            trainer = verify.trainer_model(recipe.model, max(lengths), weights)
            logger.info("comparing logits at lengths %s", lengths)
            worst = verify.compare_logits(directory, trainer, lengths, recipe.model)
            verified.append(f"logits equal the trainer's within {worst:.1e} at lengths {_join(lengths)}")
        provenance = _provenance(source, dtype or source.dtype) | {"averaged_steps": steps}
        write_json(directory / "lighthouse.json", provenance | {"verified": verified, "skipped": skipped})
    try:
        sync(out.parent)
    except OSError as error:
        # Some file systems cannot do that with a directory. What is there is whole.
        warnings.append(f"a crash of the machine may still lose the name {out}: {error.strerror}")
    return StripReport(
        out=out,
        step=source.step,
        dtype=dtype or source.dtype,
        parameters=sum(weight.numel() for weight in weights.values()),
        recovered=source.recovered,
        max_logit_difference=worst,
        verified=tuple(verified),
        skipped=tuple(skipped),
        warnings=tuple(warnings),
    )


def _described(source: Source, name: str) -> dict[str, Any]:
    """A file that describes the weights that training began with; empty where there is none."""
    path = source.run.path / ORIGIN / name
    if not os.path.lexists(path) and name not in source.run.ledger.get("weights", {}).get(ORIGIN, ()):
        return {}
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except OSError as error:
        raise refusal(error, f"cannot read {path}", kind=CheckpointError) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}", hint="put a sound copy of it back") from None
    return content


def _as_it_came(source: Source, config: dict[str, Any], *, keep_dtype: bool) -> dict[str, Any]:
    """config.json with everything else that the one had that training began with.

    It then differs in what training may have changed, which is the rotation and the length; in what an absent field
    stood for, which is written out; and it does not say which release made it.

    Args:
        source: the checkpoint.
        config: of the model as it is.
        keep_dtype: keep the dtype that the one had, which need not be that of the weights.
    """
    given = _described(source, "config.json")
    if not given:
        return config
    model, file = source.run.recipe.model, source.run.path / ORIGIN / "config.json"
    try:
        if given.get("model_type") != model.family:
            raise ValueError(f"model_type must be {model.family!r}, not {given.get('model_type')!r}")
        known = model.kind.settings(given)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}", hint="put a sound copy of it back") from None
    if other := next((key for key in FIXED if known[key] != getattr(model, key)), None):
        raise CheckpointError(
            f"{file} describes another model than the run has: model.{other}", hint="put a sound copy of it back"
        )
    # The rotation may have become another one; who made the file says nothing of this one.
    dropped = ("rope_scaling", "rope_parameters", "rope_theta", "transformers_version", "_name_or_path")
    kept = {key: value for key, value in given.items() if key not in dropped}
    tokens = given.get("max_position_embeddings")
    tokens = max(config["max_position_embeddings"], tokens if is_count(tokens) else 0)
    stored = given.get("dtype") or given.get("torch_dtype")
    kinds = {"dtype": stored, "torch_dtype": stored} if keep_dtype and stored in _DTYPES else {}
    return kept | config | kinds | {"max_position_embeddings": tokens}


def _short_limit(directory: Path, tokens: int) -> list[str]:
    """What to say where tokenizer_config.json has a smaller length than the model now has."""
    path = directory / "tokenizer_config.json"
    found = read_json(path) if path.is_file() else {}
    limit = found.get("model_max_length") if isinstance(found, dict) else None
    if not is_count(limit) or limit >= tokens:
        return []
    return [f"tokenizer_config.json, as it came, still has model_max_length {limit}; the model was trained at {tokens}"]


def _check_recovered(source: Source, allow_unrecovered: bool) -> list[str]:
    if not source.recovered:
        reason = f"step {source.step} of {source.run.name} was never trained with every layer dense"
        if not allow_unrecovered:
            raise CheckpointError(reason, hint=f"run `lighthouse recover {source.run.path}` first")
        recipe = source.run.recipe
        theta = recipe.other_rope_theta(source.step) if source.step else None
        if theta is None:
            return [reason]
        return [reason, f"it was trained with rope_theta {theta:g}, and the export has {recipe.model.rope_theta:g}"]
    start, end = source.run.start, source.run.end
    if source.run.recovering and start < source.step < end:
        return [f"the recovery is not finished: {source.step - start} of {end - start} steps"]
    return []


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its name when the block succeeds and is removed when it fails."""
    check_output(out)
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} already exists", hint="give a directory that does not exist or is empty")
    if os.path.ismount(out):
        # Nothing can take the name of one.
        raise UserError(f"{out} is the place of a mounted disk", hint=f"give a directory in it, as {out / 'model'}")
    directory = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    made = [path for path in out.parents if not path.exists()]
    try:
        directory.mkdir(parents=True)
        if out.exists():
            # Who may look into it is the user's choice.
            shutil.copymode(out, directory)
    except OSError as error:
        # It may have come as far as the folder itself, whose mode is not right.
        remove_empty([directory, *made])
        raise refusal(error, f"{out} cannot be written") from None
    try:
        yield directory
        for path in (*directory.iterdir(), directory):
            sync(path)
        directory.rename(out)
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        remove_empty(made)
        if isinstance(error, OSError):
            raise refusal(error, f"{out} cannot be written") from None
        if isinstance(error, SafetensorError):
            # Its writer has no error of the system's, only a sentence.
            raise SystemFault(f"{out} cannot be written: {error}") from None
        raise


def _write_weights(
    directory: Path, weights: dict[str, Tensor], table: list[Entry], kinds: dict[str, torch.dtype], shard_bytes: int
) -> list[Path]:
    """Write the tensors under their new names and in these types, one file's worth in memory at a time."""
    sizes = {entry.target: weights[entry.source].numel() * kinds[entry.target].itemsize for entry in table}
    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for entry in table:
        if shards[-1] and sizes[entry.target] > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= sizes[entry.target]

    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for entry in shard:
            weight = weights[entry.source].to(kinds[entry.target])
            if not weight.isfinite().all():
                raise ExportError(f"{entry.target} has numbers that float16 cannot hold", hint="strip --dtype bfloat16")
            tensors[entry.target] = to_half_split(weight, entry.rotary_heads) if entry.rotary_heads else weight
        save_file(tensors, directory / name, metadata={"format": "pt"})
        files.append(directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)
    return files


def _provenance(source: Source, dtype: str) -> dict[str, Any]:
    packages = ("lighthouse-pretrain", "torch", "torchtitan", "safetensors", "tokenizers", "transformers")
    return {
        "run": source.run.name,
        "step": source.step,
        "stages": source.run.ledger["stages"],
        "recovered": source.recovered,
        "recipe_sha256": hashlib.sha256(source.run.recipe_path.read_bytes()).hexdigest(),
        "dtype": dtype,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _join(lengths: list[int]) -> str:
    return ", ".join(map(str, lengths))
