"""What `[model] from` says of a model: by a directory's config.json, or by the recipe of a run. No weight is read."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from lighthouse_core.config.rope import RopeScaling
from lighthouse_core.errors import RecipeError, UserError, refusal
from lighthouse_core.models import FAMILIES
from lighthouse_core.reading import RECIPE_BYTES, home_expanded, is_count, parse_json, parse_toml, read_regular
from lighthouse_core.text import decoded

# What belongs to the weights; a recipe may repeat it, but not change it.
FIXED = (
    *("family", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "vocab_size", "norm_eps"),
    "tied_embeddings",
)
# What a recipe may change: the model learns the rest of its length.
FREE = ("rope_theta", "rope_scaling")
# What every recipe has that a run keeps.
_KEPT = (*FIXED, "rope_theta", "embedding_std", "dense_layers")
# That weights are stored in.
DTYPES = ("bfloat16", "float16", "float32")
# The folder of a run with what describes the weights that it began with, and the names of such files.
ORIGIN = "origin"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "chat_template.jinja"),
    "chat_template.json",
)
DESCRIPTIONS = ("config.json", "generation_config.json", *TOKENIZER_FILES)
# The folder of a run with its tokenizer, where that is a model's.
TOKENIZER = "tokenizer"
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,15})")
_CONFIG_BYTES = 1 << 24
_SCALING: TypeAdapter[Any] = TypeAdapter(RopeScaling)
_HINT = "give a directory with a config.json and safetensors, a run, or a run's checkpoints/step-N"


class Origin(NamedTuple):
    """A model that exists.

    Attributes:
        path: the directory, or the run.
        step: of the run's checkpoint; None for its newest, and for a directory.
        run: whether it is a run.
        model: the keys FIXED and FREE of its [model] section.
        tokenizer: what [data] calls its tokenizer; None for a directory without one.
        tokens: the length that it was made for; None where it does not say.
        file: that says so.
    """

    path: Path
    step: int | None
    run: bool
    model: dict[str, Any]
    tokenizer: str | None
    tokens: int | None
    file: Path


class Unfit(RecipeError):
    """A key of a recipe that does not fit the weights that it begins with, or is missing for them.

    Args:
        path: of the key.
        message, hint: as of any error.
    """

    def __init__(self, path: tuple[str, str], message: str, hint: str):
        super().__init__(message, hint)
        self.path = path


def _contradiction(key: str, here: Any, origin: Origin) -> Unfit:
    return Unfit(
        ("model", key),
        f"model.{key} is {here!r}, and {origin.model.get(key)!r} in {origin.file}",
        f"leave model.{key} out: it is read from the weights' own description",
    )


def split_checkpoint(path: Path) -> tuple[Path, int | None]:
    """The run and N of a RUN/checkpoints/step-N; any other path itself, and None."""
    match = _STEP.fullmatch(path.name)
    return (path.parents[1], int(match[1])) if match and path.parent.name == "checkpoints" else (path, None)


def refuse_adapter(path: Path) -> None:
    """Raise UserError for a directory with an adapter."""
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} holds an adapter, which changes a model and is none by itself",
            hint="merge it into its model, as merge_and_unload of peft does, and save the whole",
        )


def read_origin(name: str) -> Origin:
    """What a recipe calls `from`.

    Raises:
        UserError: it is neither a directory with a model of a known family nor a run.
    """
    path = Path(os.path.abspath(home_expanded(name)))
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise RecipeError(f"model.from: the path {path} is not UTF-8, and a recipe is", hint="rename it") from None
    folder, step = split_checkpoint(path)
    try:
        if step is not None or (path / "recipe.toml").is_file():
            return _run(folder, step)
        refuse_adapter(path)
        if (path / "config.json").is_file():
            return _directory(path)
    except OSError as error:
        raise refusal(error, f"model.from: cannot read {path}", kind=RecipeError) from None
    what = "has neither a config.json nor a recipe.toml" if path.is_dir() else "is not there"
    raise RecipeError(f"model.from: {path} {what}", hint=_HINT)


def _run(path: Path, step: int | None) -> Origin:
    file = path / "recipe.toml"
    try:
        table = parse_toml(decoded(read_regular(file, RECIPE_BYTES)))
    except OSError as error:
        raise refusal(error, f"model.from: cannot read {file}", kind=RecipeError) from None
    except ValueError as error:
        raise RecipeError(f"model.from: {file} cannot be read: {error}", hint=_HINT) from None
    model, data = table.get("model"), table.get("data")
    if not isinstance(model, dict) or not isinstance(data, dict):
        raise RecipeError(f"model.from: {file} has no [model] and [data]", hint=_HINT)
    usual = {"family": "llama", "tied_embeddings": False}
    settings = usual | {key: model[key] for key in (*FIXED, *FREE) if key in model}
    tokenizer = data.get("tokenizer", "bytes")
    # The run's own copy.
    places = (path / TOKENIZER / "tokenizer.json", path / "tokenizer.json", path / "tokenizer.model")
    own = next((file for file in places if file.is_file()), None)
    training = table.get("training")
    tokens = training.get("seq_len") if isinstance(training, dict) else None
    tokenizer = str(own) if own and tokenizer != "bytes" else tokenizer
    return Origin(path, step, True, settings, tokenizer, tokens if is_count(tokens) else None, file)


def _directory(path: Path) -> Origin:
    file = path / "config.json"
    try:
        config = parse_json(read_regular(file, _CONFIG_BYTES))
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
        family = FAMILIES.get(str(config.get("model_type")))
        if family is None:
            known = ", ".join(FAMILIES)
            raise ValueError(f"model_type must be one of {known}, not {config.get('model_type')!r}")
        if config.get("quantization_config") is not None:
            raise ValueError("it has a quantization_config, and quantized weights cannot be trained")
        if config.get("auto_map"):
            raise ValueError("it has an auto_map, which names code to run, and none is run")
        settings = family.settings(config)
    except OSError as error:
        raise refusal(error, f"model.from: cannot read {file}", kind=RecipeError) from None
    except ValueError as error:
        raise RecipeError(f"model.from: {file}: {error}") from None
    has = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokens = config.get("max_position_embeddings")
    tokens = tokens if is_count(tokens) else None
    return Origin(path, None, False, settings, str(path) if has else None, tokens, file)


def generation_ends(folder: Path) -> list[int]:
    """The ids at which a model stops to generate: eos_token_id of generation_config.json, else of config.json.

    Raises:
        RecipeError: a file holds something else.
    """
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = parse_json(read_regular(file, _CONFIG_BYTES))
            if not isinstance(content, dict):
                raise ValueError("it holds no object")
            found = content.get("eos_token_id")
            ids = found if isinstance(found, list) else [] if found is None else [found]
            if not all(isinstance(one, int) for one in ids):
                raise ValueError(f"eos_token_id must be an id or a list of ids, not {found!r}")
        except OSError as error:
            raise refusal(error, f"model.from: cannot read {file}", kind=RecipeError) from None
        except ValueError as error:
            raise RecipeError(f"model.from: {file}: {error}") from None
        if ids:
            return ids
    return []


def other_end(folder: Path, eos_id: int) -> str | None:
    """What to say where documents of training end in a token at which the model of `folder` does not stop; else None.

    Raises:
        RecipeError: see `generation_ends`.
    """
    ends = generation_ends(folder)
    if eos_id in ends:
        return None
    stops = f"its generation stops at {', '.join(map(str, ends))}" if ends else "the model has no eos_token_id"
    return (
        f"training ends documents with token {eos_id}, the EOS of the model's tokenizer, but {stops}: compare "
        "eos_token in tokenizer_config.json with eos_token_id in generation_config.json and config.json"
    )


def filled(table: dict[str, Any]) -> tuple[dict[str, Any], Origin | None]:
    """A recipe's table with what `from` stands for in place of the keys that are not set; and what it stands for, where
    that was read.

    A recipe with all of them, as a run keeps it, does not look at `from` again.

    Raises:
        UserError: see `read_origin`.
        Unfit: a key that is set belongs to the weights, or there is no tokenizer.
    """
    model = table.get("model")
    name = model.get("from") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(name, str) or not name or "\0" in name:
        return table, None
    data = table.get("data", {})
    if isinstance(data, dict) and all(key in model for key in _KEPT) and "tokenizer" in data:
        return table, None
    origin = read_origin(name)
    for key in FIXED:
        if key in model and key in origin.model and not _same(model[key], origin.model[key]):
            raise _contradiction(key, model[key], origin)
    if isinstance(data, dict) and "tokenizer" not in data:
        if origin.tokenizer is None:
            raise Unfit(
                ("data", "tokenizer"),
                f"data.tokenizer is missing, and {origin.path} has no tokenizer.json",
                "put the model's tokenizer beside it, or set data.tokenizer",
            )
        data = {**data, "tokenizer": origin.tokenizer}
    path = origin.path if origin.step is None else origin.path / "checkpoints" / f"step-{origin.step}"
    scaling, there = model.get("rope_scaling"), origin.model.get("rope_scaling")
    if isinstance(scaling, dict) and "rope_type" not in scaling and isinstance(there, dict):
        # Some keys of the kind that it has.
        model = {**model, "rope_scaling": {**there, **scaling}}
    return {**table, "model": {**origin.model, **model, "from": str(path)}, "data": data}, origin


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a key are one, also where 1 stands for 1.0; a boolean is no number."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def changes(name: str, model: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys of [model] that differ from those of `from`, as (there, here); None for one that is not set.

    Args:
        name: what the recipe calls `from`.
        model: the resolved section, as a table.

    Raises:
        UserError: see `read_origin`.
        Unfit: one of them belongs to the weights.
    """
    origin = read_origin(name)
    there = dict(origin.model)
    if "rope_scaling" in there:
        # With what is left to its default, as the section has it.
        there["rope_scaling"] = _SCALING.validate_python(there["rope_scaling"]).model_dump()
    found = {
        key: (there.get(key), model.get(key)) for key in (*FIXED, *FREE) if not _same(there.get(key), model.get(key))
    }
    for key in FIXED:
        if key in found:
            raise _contradiction(key, found[key][1], origin)
    return found
