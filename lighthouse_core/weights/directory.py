"""A directory of Hugging Face's format from anywhere: what it must be before anything is made of it.

Nothing in such a directory is run: no code of its own, no pickled weights, no kernels that it names. Importing this
module imports no torch.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lighthouse_core.config.origin import refuse_adapter
from lighthouse_core.errors import UserError, refusal
from lighthouse_core.reading import parse_json, read_regular
from lighthouse_core.text import BOM, UTF8_HINT

# Of a directory that is damaged.
COPY_ANEW = "copy the directory anew from where it was made"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
_CONFIG_BYTES = 1 << 30


class Stored(NamedTuple):
    """A tensor in a file of safetensors.

    Attributes:
        file: that holds it.
        shape: of it.
        dtype: as the format names it: "F32", "F16", "BF16", ...
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory that can be measured.

    Raises:
        UserError: it cannot be read, or the directory needs what is not run here.
    """
    refuse_adapter(path)
    config = _object(path / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{path / 'config.json'} has no model_type", hint=COPY_ANEW)
    if config.get("quantization_config") is not None:
        raise UserError(f"{path} holds quantized weights", hint="measure the model that was quantized")
    if config.get("transformers_weights") is not None:
        raise UserError(
            f"{path / 'config.json'} names weights in another file: transformers_weights",
            hint="only model.safetensors and its index are read",
        )
    for key, value in items(config):
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise UserError(f"{path / 'config.json'} names kernels to fetch and run: {key}", hint=f"remove {key}")
    if config.get("auto_map"):
        known = False
        with contextlib.suppress(ImportError, RuntimeError):
            from transformers.models.auto.configuration_auto import CONFIG_MAPPING

            known = kind in CONFIG_MAPPING
        if not known:
            raise UserError(
                f"{path} needs code of its own (auto_map in config.json), which is not run",
                hint="a model that transformers itself knows needs none",
            )
    return config


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: there is none.
    """
    try:
        content = read_regular(path, _CONFIG_BYTES)
        if content.startswith(BOM):
            raise UserError(f"{path} begins with a byte-order mark, which transformers does not read", hint=UTF8_HINT)
        content = parse_json(content)
    except OSError as error:
        raise refusal(error, f"cannot read {path}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {words(error)}", hint=COPY_ANEW) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object", hint=COPY_ANEW)
    return content


def items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key in nested objects, with its value. None is deeper than `parse_json` reads."""
    if isinstance(value, dict):
        yield from value.items()
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from items(part)


def read_headers(path: Path) -> dict[str, Stored]:
    """Every tensor in a directory's safetensors, by name, from their headers alone.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    from safetensors import safe_open

    single, places = path / "model.safetensors", {}
    if not single.is_file():
        places = _indexed(path)
    found: dict[str, Stored] = {}
    for file in sorted(set(places.values())) or [single]:
        if not file.is_file():
            # A pipe would be waited for.
            raise UserError(f"{file} is not there, or no ordinary file", hint=COPY_ANEW)
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = opened.get_slice(name)
                    stored = Stored(file, tuple(part.get_shape()), part.get_dtype())
                    if (other := found.setdefault(name, stored)) is not stored:
                        raise UserError(f"{words(name)} is in {other.file} and in {file.name}", hint=COPY_ANEW)
        except UserError:
            raise
        except Exception as error:  # the library's own, of several kinds
            raise UserError(f"{file} cannot be read: {words(error)}", hint=COPY_ANEW) from None
    if not found:
        raise UserError(f"{path} holds no weights", hint=COPY_ANEW)
    for name, file in places.items():
        if name not in found or found[name].file != file:
            raise UserError(
                f"{path / _INDEX} says that {words(name)} is in {file.name}, which is not so", hint=COPY_ANEW
            )
    return found


def _indexed(path: Path) -> dict[str, Path]:
    """The files that an index names, by the tensors that they are said to hold."""
    index = path / _INDEX
    if not index.is_file():
        pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
        if pickled:
            raise UserError(
                f"the weights in {path} are pickled ({words(pickled[0])}) and could run code, and are not read",
                hint="only safetensors are read; save_pretrained of transformers writes them",
            )
        raise UserError(
            f"{path} has neither a model.safetensors nor a {_INDEX}", hint="save_pretrained of transformers writes one"
        )
    names = _object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map", hint=COPY_ANEW)
    for name in names.values():
        # A link to elsewhere is fine: the cache of Hugging Face is made of them.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(
                f"{index} names {words(str(name))!r}, which is no file of safetensors beside it",
                hint=COPY_ANEW,
            )
    return {name: path / file for name, file in names.items()}


def words(error: BaseException | str) -> str:
    """The first line of an error, fit for a terminal; the second, too, where the first announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    if lines[0].endswith(":") and len(lines) > 1:
        lines[0] += f" {lines[1]}"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in lines[0])[:300]
