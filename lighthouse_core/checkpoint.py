"""What a checkpoint holds, read from its metadata as data and checked before anything else is read.

A seal tells damage from soundness, but not who made a checkpoint: whoever changes one can seal it again. So nothing
here trusts what `.metadata` says. Nothing here imports torch.
"""

import itertools
import math
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighthouse_core.errors import CheckpointError
from lighthouse_core.unpickle import Made, Refused, load_plain, loads, named

METADATA = ".metadata"
# Of whatever cannot be read of a checkpoint.
DAMAGED_HINT = "take another checkpoint of the run, or copy this one anew"
# Bytes of an element. What a run saves is float32 and int64; the others are those of torch's own checkpoints.
DTYPES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_MODEL_KEY = re.compile(r"(tok_embeddings|layers|norm|output)\.")
_USUAL = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,255}")
_TORCH = "torch.distributed.checkpoint.metadata"
_METADATA = _TORCH, "Metadata"
_BYTES = _TORCH, "BytesStorageMetadata"
_TENSOR = _TORCH, "TensorStorageMetadata"
_PROPERTIES = _TORCH, "TensorProperties"
_CHUNK = _TORCH, "ChunkStorageMetadata"
_INDEX = _TORCH, "MetadataIndex"
_STORAGE_META = _TORCH, "StorageMeta"
_MEMORY_FORMAT = _TORCH, "_MEM_FORMAT_ENCODING"
_PLACE = "torch.distributed.checkpoint.filesystem", "_StorageInfo"
_SIZE = "torch", "Size"
_LAYOUT = "torch.serialization", "_get_layout"
# Early releases of Python 3.11 write a member of an enumeration as the attribute of its class.
_GETATTR = "builtins", "getattr"
_PATHS = {(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")}
_NAMES = (
    {_METADATA, _BYTES, _TENSOR, _PROPERTIES, _CHUNK, _INDEX, _STORAGE_META, _MEMORY_FORMAT, _PLACE, _SIZE, _LAYOUT}
    | {_GETATTR}
    | _PATHS
    | {("torch", dtype) for dtype in DTYPES}
)
# Of a tensor. A number beyond it is no size of a file, either.
_LARGEST = 1 << 62
_DIMENSIONS = 16
# Of a tensor that is cut along several dimensions.
_MOST_PARTS = 512


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        dtype: a key of DTYPES.
        size: of the whole tensor.
        chunks: (offsets, sizes) of the parts that it is stored in, which together are the whole of it.
    """

    dtype: str
    size: tuple[int, ...]
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Place:
    """Where something is stored: bytes of a file in the checkpoint's own folder."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        tensors: by name.
        values: names of what is no tensor.
        places: by name, and the offsets of a chunk; None for the offsets of what is no tensor.
        paths: keys of the nested state that each name stands for; empty where the checkpoint does not say.
    """

    tensors: dict[str, StoredTensor]
    values: list[str]
    places: dict[tuple[str, tuple[int, ...] | None], Place]
    paths: dict[str, tuple[str | int, ...]]


def read_contents(folder: Path) -> Contents:
    """What the checkpoint in a folder holds.

    Raises:
        CheckpointError: its metadata is missing, holds anything but a description of a checkpoint, or describes what
            does not lie in the folder's own files.
    """
    path = folder / METADATA
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(
                f"{folder} cannot be read: {METADATA} is no file",
                hint=DAMAGED_HINT,
            )
        contents = _contents(loads(path.read_bytes(), _NAMES))
        _check_places(folder, contents)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be read: {Path(error.filename).name}: {error.strerror}",
            hint=DAMAGED_HINT,
        ) from None
    except Refused as refused:
        raise refused_checkpoint(folder, METADATA, refused) from None
    return contents


def check_contents(folder: Path) -> Contents:
    """What the checkpoint in a folder holds, and that all of it that is no tensor is plain.

    Raises:
        CheckpointError: as `read_contents` does, or a value is more than numbers, text, lists and dictionaries.
    """
    contents = read_contents(folder)
    by_file = sorted((contents.places[name, None].file, name) for name in contents.values)
    for file_name, group in itertools.groupby(by_file, key=lambda pair: pair[0]):
        try:
            with (folder / file_name).open("rb") as file:
                for _, name in group:
                    place = contents.places[name, None]
                    file.seek(place.offset)
                    load_plain(file.read(place.length))
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot be read: {file_name}: {error.strerror}",
                hint=DAMAGED_HINT,
            ) from None
        except Refused as refused:
            raise refused_checkpoint(folder, f"{quoted(name)} in {file_name}", refused) from None
    return contents


def refused_checkpoint(folder: Path, where: str, refused: Refused) -> CheckpointError:
    """The error for a checkpoint that holds what it should not."""
    return CheckpointError(
        f"{folder} is no checkpoint of Lighthouse: {where}: {refused}",
        hint="nothing of it was run; if the checkpoint came from elsewhere, do not use it",
    )


def check_model(path: Path, shapes: Mapping[str, tuple[int, ...]], recipe_path: Path) -> Contents:
    """What a checkpoint holds, which is exactly these model tensors and what else training needs.

    Args:
        path: the checkpoint's directory.
        shapes: of every tensor of the model, by its name in the checkpoint.
        recipe_path: the recipe that the shapes come from, for the hint.

    Raises:
        CheckpointError: as `read_contents` does, or a tensor is missing, left over or of another shape.
    """
    contents = read_contents(path)

    def fail(reason: str) -> None:
        raise CheckpointError(
            f"{path} is a checkpoint of another model: {reason}", hint=f"compare [model] in {recipe_path}"
        )

    for name, shape in shapes.items():
        tensor = contents.tensors.get(name)
        if tensor is None:
            fail(f"{name} is missing")
        elif tensor.size != shape:
            fail(f"{name} has shape {list(tensor.size)}, the recipe says {list(shape)}")
    extra = {key for key in (*contents.tensors, *contents.values) if _MODEL_KEY.match(key)} - shapes.keys()
    if extra:
        fail(f"{quoted(min(extra))} is not in the recipe's model")
    return contents


def quoted(name: str) -> str:
    """A name from a checkpoint for a message: in quotes, with control characters spelt, where it is no usual one."""
    return name if _USUAL.fullmatch(name) else repr(name if len(name) <= 80 else name[:77] + "...")


def _need(true: bool, what: str) -> None:
    if not true:
        raise Refused(what)


def _contents(value: Any) -> Contents:
    metadata = _fields(value, _METADATA, {"state_dict_metadata", "planner_data", "storage_data"})
    stored, places = metadata["state_dict_metadata"], metadata["storage_data"]
    _need(type(stored) is dict and type(places) is dict, "it lists no tensors")
    tensors, values = {}, []
    for name, entry in stored.items():
        _need(type(name) is str, "a name of it is no text")
        if _made(entry, _BYTES):
            _need(not entry.args and not entry.state, f"{quoted(name)} is described twice")
            values.append(name)
        else:
            tensors[name] = _tensor(entry, name)
    found = {}
    for index, place in places.items():
        key = _index(index)
        _need(key not in found, f"{quoted(key[0])} is in two places")
        found[key] = _place(place, key[0])
    contents = Contents(tensors, values, found, _paths(metadata["planner_data"]))
    wanted: set[tuple[str, tuple[int, ...] | None]]
    wanted = {(name, offsets) for name, tensor in tensors.items() for offsets, _ in tensor.chunks}
    wanted.update((name, None) for name in values)
    for name, _ in wanted ^ found.keys():
        raise Refused(f"{quoted(name)} is described and not stored, or stored and not described")
    return contents


def _made(value: Any, name: tuple[str, str]) -> bool:
    """Whether a value is what a call of this name would make."""
    return isinstance(value, Made) and value.called == name


def _fields(value: Any, name: tuple[str, str], wanted: set[str]) -> dict[str, Any]:
    """The attributes of an object of torch's metadata."""
    right = _made(value, name) and not value.args and type(value.state) is dict
    _need(right and wanted <= value.state.keys(), f"it has no {name[1]} where one belongs")
    return value.state


def _size(value: Any) -> tuple[int, ...]:
    right = _made(value, _SIZE) and value.state is None and len(value.args) == 1
    size: Any = value.args[0] if right else None
    _need(type(size) is tuple and len(size) <= _DIMENSIONS, "it has no Size where one belongs")
    _need(all(type(n) is int and n >= 0 for n in size), "a size of it is no number of elements")
    # Where there are none, the other dimensions could be anything.
    _need(math.prod(n or 1 for n in size) < _LARGEST, "a size of it is too large")
    return size


def _tensor(value: Any, name: str) -> StoredTensor:
    state = _fields(value, _TENSOR, {"properties", "size", "chunks"})
    size, parts = _size(state["size"]), state["chunks"]
    _need(type(parts) is list and bool(parts), f"{quoted(name)} has no chunks")
    chunks = []
    for part in parts:
        chunk = _fields(part, _CHUNK, {"offsets", "sizes"})
        chunks.append((_size(chunk["offsets"]), _size(chunk["sizes"])))
    _need(_whole(size, chunks), f"the chunks of {quoted(name)} are not the whole of it")
    return StoredTensor(_dtype(state["properties"], name), size, chunks)


def _dtype(value: Any, name: str) -> str:
    """Of a tensor's properties; the others must be those of an ordinary tensor."""
    right = _made(value, _PROPERTIES) and not value.args
    state: Any = value.state if right else None
    _need(type(state) is tuple and len(state) == 5, f"{quoted(name)} has no dtype")
    dtype, layout, grad, memory_format, pinned = state
    module, kind = named(dtype) or ("", "")
    known = module == "torch" and kind in DTYPES
    _need(known and type(grad) is bool and type(pinned) is bool, f"{quoted(name)} has no dtype")
    strided = _made(layout, _LAYOUT) and layout.args == ("torch.strided",)
    _need(strided and layout.state is None, f"{quoted(name)} is no dense tensor")
    _need(_is_memory_format(memory_format), f"{quoted(name)} has no memory format")
    return kind


def _is_memory_format(value: Any) -> bool:
    if not isinstance(value, Made) or value.state is not None:
        return False
    if value.called == _MEMORY_FORMAT:
        return value.args in ((0,), (1,), (2,))
    if value.called != _GETATTR or len(value.args) != 2:
        return False
    owner, member = value.args
    return named(owner) == _MEMORY_FORMAT and member in (
        "TORCH_CONTIGUOUS_FORMAT",
        "TORCH_CHANNELS_LAST",
        "TORCH_PRESERVE_FORMAT",
    )


def _whole(size: tuple[int, ...], chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether the chunks are the whole tensor, none of it twice. What no chunk has would keep what was in memory."""
    for offsets, sizes in chunks:
        if not len(offsets) == len(sizes) == len(size):
            return False
        if any(first + count > whole for first, count, whole in zip(offsets, sizes, size, strict=True)):
            return False
    if sum(math.prod(sizes) for _, sizes in chunks) != math.prod(size):
        return False
    full = [chunk for chunk in chunks if math.prod(chunk[1])]
    for dimension in range(len(size)):
        # Most tensors are cut along one dimension.
        spans = sorted((offsets[dimension], sizes[dimension]) for offsets, sizes in full)
        if all(first + count <= other for (first, count), (other, _) in itertools.pairwise(spans)):
            return True
    return len(full) <= _MOST_PARTS and not any(_overlap(a, b) for a, b in itertools.combinations(full, 2))


def _overlap(a: tuple[tuple[int, ...], tuple[int, ...]], b: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    spans: Iterable[tuple[int, int, int, int]] = zip(*a, *b, strict=True)
    return all(first < other + theirs and other < first + ours for first, ours, other, theirs in spans)


def _index(value: Any) -> tuple[str, tuple[int, ...] | None]:
    state = _fields(value, _INDEX, {"fqn"})
    name, offsets, number = state["fqn"], state.get("offset"), state.get("index")
    _need(type(name) is str and state.keys() <= {"fqn", "offset", "index"}, "a name of it is no text")
    _need(number is None or type(number) is int, f"{quoted(name)} has no number")
    return name, None if offsets is None else _size(offsets)


def _place(value: Any, name: str) -> Place:
    state = _fields(value, _PLACE, {"relative_path", "offset", "length"})
    file, offset, length = state["relative_path"], state["offset"], state["length"]
    _need(type(file) is str, f"{quoted(name)} is in no file")
    inside = _FILE_NAME.fullmatch(file) and file not in (".", "..")
    _need(bool(inside), f"{quoted(name)} is in {quoted(file)}, which is no file of its folder")
    numbers = all(type(n) is int and 0 <= n < _LARGEST for n in (offset, length))
    _need(numbers, f"{quoted(name)} is at no place of a file")
    _need(not state.get("transform_descriptors"), f"{quoted(name)} is transformed")
    return Place(file, offset, length)


def _paths(value: Any) -> dict[str, tuple[str | int, ...]]:
    _need(value is None or type(value) is dict, "it has no paths where they belong")
    paths = value or {}
    for name, path in paths.items():
        right = type(name) is str and type(path) is tuple and all(type(part) in (str, int) for part in path)
        _need(right, "a path of it is none")
    return paths


def _check_places(folder: Path, contents: Contents) -> None:
    """Raise Refused for what does not lie within an ordinary file of the folder."""
    sizes: dict[str, int] = {}
    for (name, _), place in contents.places.items():
        if place.file not in sizes:
            found = (folder / place.file).lstat()
            _need(stat.S_ISREG(found.st_mode), f"{place.file} is no file of its own")
            sizes[place.file] = found.st_size
        inside = place.offset + place.length <= sizes[place.file]
        _need(inside, f"{quoted(name)} lies beyond the end of {place.file}")
