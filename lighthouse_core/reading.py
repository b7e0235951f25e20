"""Reading files that somebody else may have written. Standard library only.

Whatever such a file holds, reading it ends, and ends in an OSError or a ValueError: a pipe is not waited for, a device
is not read until memory is full, and a document nested a million times deep is refused.
"""

import errno
import json
import os
import stat
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

# Of a file that a person or this program writes for one run; rows and weights are read elsewhere.
_DOCUMENT_BYTES = 1 << 30
RECIPE_BYTES = 1 << 20
# Deeper than any document of ours; Python's own functions fail from about a thousand on.
_DEEPEST = 64


def open_regular(path: Path | str, buffering: int = -1) -> BinaryIO:
    """A regular file, open for reading.

    Args:
        path: of the file.
        buffering: as of `open`.

    Raises:
        OSError: there is none, it cannot be read, or it is a directory, a pipe or a device.
    """
    path = os.fspath(path)
    if "\0" in path:
        raise OSError(errno.EINVAL, "the path holds a NUL character", path)
    # Opening a pipe for reading would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return open(descriptor, "rb", buffering=buffering)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path | str, most: int | None = None) -> bytes:
    """The bytes of a regular file.

    Args:
        path: of the file.
        most: bytes that it may have.

    Raises:
        OSError: as open_regular, or it has more bytes.
    """
    with open_regular(path) as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"larger than {most >> 20} MiB", os.fspath(path))
        return file.read()


def read_json(path: Path | str) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: as read_regular.
        ValueError: it is no JSON, or nested too deeply.
    """
    return parse_json(read_regular(path, _DOCUMENT_BYTES))


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    return _parse(json.loads, text)


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML text holds.

    Raises:
        ValueError: it is no TOML, or nested too deeply.
    """
    return _parse(tomllib.loads, text)


def _parse(parser: Callable[[Any], Any], text: str | bytes) -> Any:
    try:
        value = parser(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        # Python's own words are about a setting of the interpreter.
        if "integer string conversion" in str(error):
            raise ValueError("an integer has too many digits") from None
        raise
    level, depth = [value], 0
    while level := [part for whole in level for part in _parts(whole)]:
        if (depth := depth + 1) > _DEEPEST:
            raise ValueError("nested too deeply")
    return value


def _parts(value: Any) -> Iterable[Any]:
    """The tables and lists in a table or a list."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in inner if isinstance(part, dict | list)]


def home_expanded(path: Path | str) -> Path:
    """A path with `~` and `~user` resolved, as far as such a user is known; else as it is.

    pathlib's own raises a RuntimeError for an unknown user, and where nobody has a home directory.
    """
    return Path(os.path.expanduser(path))


def plain_name(name: Any) -> bool:
    """Whether a name from an index or a manifest is one of a file in the same folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a JSON file is a number that arithmetic can be done with; a NaN is one, a boolean is none."""
    return (type(value) is int and abs(value) < 1 << 63) or type(value) is float


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value of a JSON file is a step or another number of things."""
    return type(value) is int and 0 <= value < 1 << 53
