"""What a file of the source "files" is, by its name and by what it begins with, and its text as a stream."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, NamedTuple, cast

from lighthouse_core.data.compressed import Compression, Decompressed, compression_of, from_byte, to_byte
from lighthouse_core.data.documents import CHANGED_HINT
from lighthouse_core.errors import DataError
from lighthouse_core.text import BOM

Kind = Literal["text", "lines", "array", "csv", "parquet"]

WHOLE = (".txt", ".md")
_TABLES: dict[str, Kind] = {".jsonl": "lines", ".json": "lines", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".zst")
SUFFIXES = (*WHOLE, *_TABLES, *(name + end for name in (".jsonl", ".json", ".csv") for end in _COMPRESSED))
BUFFER = 1 << 20
# Of the beginning that tells what a file is.
_HEAD = 4096
# Of what is told by name as something that cannot be read: its first bytes, and how it is decompressed.
_OTHERS = {
    b"PK\x03\x04": ("a zip archive", "unzip"),
    b"BZh": ("bzip2 data", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz data", "unxz"),
    b"ARROW1": ("an Arrow file", None),
    b"Obj\x01": ("an Avro file", None),
}


@dataclass(frozen=True)
class TextFile:
    """A file.

    Attributes:
        identity: see `list_files`.
        size: in bytes, the byte-order mark counted.
        path: where it is on this machine; no part of what it is.
        skip: bytes of the mark where the whole file is one document; a line file has its mark removed on the way.
    """

    identity: str
    size: int
    path: str = field(compare=False)
    skip: int = 0

    @property
    def fingerprint(self) -> tuple[object, ...]:
        return (self.identity, self.size, self.skip) if self.skip else (self.identity, self.size)

    @property
    def is_compressed(self) -> bool:
        """Whether its name says that its bytes are not those of its text."""
        return self.path.endswith((*_COMPRESSED, ".parquet"))

    @property
    def is_document(self) -> bool:
        """Whether the whole file is one document, rather than rows."""
        return self.path.endswith(WHOLE)


class Form(NamedTuple):
    """How a file is to be read: the kind of its rows, and how they are compressed."""

    kind: Kind
    compression: Compression = ""


def open_file(file: TextFile) -> BinaryIO:
    """The open file.

    Raises:
        DataError: it cannot be read, or is gone or has another size than when it was listed.
    """
    try:
        opened = open(file.path, "rb", buffering=BUFFER)  # noqa: SIM115 (the callers close it)
    except OSError as error:
        hint = CHANGED_HINT if isinstance(error, FileNotFoundError) else None
        raise DataError(f"cannot read {file.path}: {error.strerror}", hint=hint) from error
    size = os.fstat(opened.fileno()).st_size
    if size != file.size:
        opened.close()
        raise DataError(f"{file.path} changed from {file.size} to {size} bytes since it was listed", hint=CHANGED_HINT)
    return opened


def form_of(file: TextFile) -> Form:
    """What a file is. Where name and content differ, the content counts: a .jsonl may be gzip, a .gz none, and JSON
    that begins with a bracket is one array.

    Raises:
        DataError: it is something that is not read; damaged in its beginning.
    """
    with open_file(file) as opened:
        head = opened.read(_HEAD)
    found = compression_of(head)
    _check_readable(file, head, f"is {found} data" if found and file.is_document else None)
    if file.is_document:
        return Form("text")
    if found:
        with reading(file, found) as (stream, _):
            head = stream.read(_HEAD)
        inner = compression_of(head)
        _check_readable(file, head, f"is {inner} data within {found} data" if inner else None)
        if head[257:262] == b"ustar":
            raise DataError(f"{file.path} holds a tar archive", hint="unpack it, and name the files in data.paths")
    name = file.path.removesuffix(".gz").removesuffix(".zst")
    kind = _TABLES[os.path.splitext(name)[1]]
    if head.startswith(b"PAR1"):
        kind = "parquet"
    if kind == "parquet" and found:
        raise DataError(
            f"{file.path} is {found} data; a parquet file is compressed within", hint=f"unpack it: {_command(found)}"
        )
    if kind == "lines" and head.removeprefix(BOM).lstrip()[:1] == b"[":
        kind = "array"
    return Form(kind, found)


def _check_readable(file: TextFile, head: bytes, problem: str | None) -> None:
    """Raise DataError for what is compressed where it cannot be read, and for other formats."""
    hint = f"unpack it: {_command(compression_of(head))}"
    for begin, (what, command) in _OTHERS.items():
        if head.startswith(begin) and not file.is_document:
            problem = f"is {what}"
            hint = f"unpack it: {command} {os.path.basename(file.path)}" if command else OTHER_HINT
    if problem:
        raise DataError(f"{file.path} {problem}, which is not read under this name", hint=hint)


OTHER_HINT = (
    'data.source = "hf" reads a folder of files of one kind that the datasets library knows (.arrow, .tsv, .ndjson): '
    'data.paths = [FOLDER]; "python-sources" reads .py files; token files become shards with: lighthouse data import'
)


def _command(compression: str) -> str:
    return "gunzip" if compression == "gzip" else "unzstd"


@contextmanager
def reading(file: TextFile, compression: Compression, byte: int = 0) -> Iterator[tuple[BinaryIO, Callable[[int], int]]]:
    """The text of a file as a stream of bytes, from a place on.

    Args:
        file: which.
        compression: how it is compressed.
        byte: of a `Place`; 0 for the beginning.

    Yields:
        The stream, and a function from bytes read of it to the `Place.byte` there; it is asked in rising order.
        Of a compressed file that is a number of `to_byte`.

    Raises:
        DataError: as `open_file`; on reading, as `Decompressed`.
    """
    opened = open_file(file)
    if not compression:
        with opened:
            opened.seek(byte)
            yield opened, lambda count: byte + count
        return
    part, inner = from_byte(byte, file.size)
    opened.seek(part)
    decompressed = Decompressed(file.path, opened, compression)
    with cast(BinaryIO, io.BufferedReader(decompressed, BUFFER)) as stream:
        left = inner
        while left and (passed := stream.read(min(left, BUFFER))):
            left -= len(passed)

        def at(count: int) -> int:
            return to_byte(*decompressed.part_at(inner + count), file.size)

        yield stream, at
