"""The source "python-sources": folders of Python files.

A document has an `identity` that is the same on every machine, a `size` in bytes known without reading it, and `read`.
"""

import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lighthouse_core.data.documents import CHANGED_HINT, Keep, Place, Record, checked, mark, stable_hash, without_end
from lighthouse_core.errors import DataError


class File(NamedTuple):
    """A file of a document: its name, the bytes of its text, and those of the byte-order mark before it."""

    name: str
    size: int
    skip: int = 0


@dataclass(frozen=True)
class Document:
    """The Python files that lie directly in one folder, concatenated in the order of their names.

    Attributes:
        identity: the label of the root and the folder's path below it, as in "stdlib/json".
        files: never empty, and no file in it is.
        folder: where the files are on this machine; no part of what the document is.
    """

    identity: str
    files: tuple[File, ...]
    folder: str = field(compare=False)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def read(self, first: int = 0, count: int | None = None) -> bytes:
        """The `count` bytes from `first` on, or all that follow; opens no other file than those that they are in.

        Raises:
            DataError: a file is gone or has another size than when it was listed. Going on would shift every later
                token, so that this run, its resumption and its other ranks would disagree on what sample i is.
        """
        end = self.size if count is None else min(first + count, self.size)
        parts, start = [], 0
        for file in self.files:
            if start < end and first < start + file.size:
                parts.append(self._read(file, max(first - start, 0), min(end - start, file.size)))
            start += file.size
        return b"".join(parts)

    def _read(self, file: File, first: int, end: int) -> bytes:
        path = os.path.join(self.folder, file.name)
        try:
            with open(path, "rb", buffering=0) as f:
                size = os.fstat(f.fileno()).st_size
                content = os.pread(f.fileno(), end - first, file.skip + first)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}", hint=CHANGED_HINT) from error
        listed = file.skip + file.size
        if size != listed or len(content) != end - first:
            change = f"from {listed} to {size} bytes"
            raise DataError(f"{path} changed {change} since it was listed", hint=CHANGED_HINT)
        return content


def list_documents(paths: Sequence[str], check: Callable[[], None] = without_end) -> list[Document]:
    """All documents of `[data] paths`, sorted by identity. Reads folder listings, and whether files begin with a
    byte-order mark, which is no part of the text.

    A path is "stdlib" (the running interpreter's), "site-packages", or a directory. Hidden folders and
    linked folders are not entered; files that are empty or cannot be read are left out. `check` is called for each
    folder and each Python file.

    Raises:
        DataError: a missing directory, a folder reached through two of the paths, or nothing found.
    """
    documents: dict[str, Document] = {}
    labels: list[str] = []
    for entry in paths:
        name, root = _resolve(entry)
        # A name seen before gets a number: src and other/src stay apart, and no machine's paths enter identities.
        labels.append(name)
        label = name if labels.count(name) == 1 else f"{name}:{labels.count(name)}"
        for folder, files in _walk(root, is_stdlib=entry == "stdlib", check=check):
            if folder in documents:
                raise DataError(
                    f"data.paths reaches {folder} twice",
                    hint="name each folder once: a copy of a held-out document could be trained on",
                )
            below = os.path.relpath(folder, root).replace(os.sep, "/")
            documents[folder] = Document(label if below == "." else f"{label}/{below}", files, folder)
    if not documents:
        raise DataError(
            f"no Python files under data.paths = {list(paths)}",
            hint='name a directory that holds .py files, or "stdlib"',
        )
    return sorted(documents.values(), key=lambda document: document.identity)


def fingerprint(documents: Sequence[Document]) -> int:
    """63 bits that change when a document or file is added, removed, renamed or resized."""
    return stable_hash(*((document.identity, *map(_listed, document.files)) for document in documents))


def _listed(file: File) -> tuple[object, ...]:
    return tuple(file) if file.skip else (file.name, file.size)


class PythonSource:
    """The documents as a source of text: each is a unit with one record. It has no rows, and so none without text."""

    nulls = 0

    def __init__(self, paths: Sequence[str], check: Callable[[], None] = without_end):
        self.documents = list_documents(paths, check)
        self.identities = [document.identity for document in self.documents]
        self.sizes = [document.size for document in self.documents]
        self.fingerprint = fingerprint(self.documents)

    def records(self, unit: int, place: Place, keep: Keep, end: int | None = None) -> Iterator[Record]:
        document = self.documents[unit]
        if place.row == 0 and keep(document.identity):
            yield Record(document.identity, document.read(), Place(), Place(1))

    def cuts(self, unit: int, size: int) -> list[tuple[Place, int]]:
        return [(Place(), self.sizes[unit])]


def _resolve(entry: str) -> tuple[str, str]:
    """(name, real path) of one entry of data.paths."""
    if entry in ("stdlib", "site-packages"):
        path = sysconfig.get_path("stdlib" if entry == "stdlib" else "purelib")
    else:
        path = os.path.expanduser(entry)
    root = os.path.realpath(path)
    if not os.path.isdir(root):
        raise DataError(
            f"data.paths: no directory {path}", hint='each path is "stdlib", "site-packages", or an existing directory'
        )
    return (entry if entry in ("stdlib", "site-packages") else os.path.basename(root)), root


# Folders that installing adds to a standard library; they differ between machines with the same Python version.
_ADDED = ("site-packages", "dist-packages", "config-")


def _walk(root: str, is_stdlib: bool, check: Callable[[], None]) -> Iterator[tuple[str, tuple[File, ...]]]:
    for folder, subfolders, names in checked(os.walk(root), check):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if is_stdlib:
            if folder == root:
                subfolders[:] = [name for name in subfolders if not name.startswith(_ADDED)]
            # Generated by the build, with its paths inside.
            names = [name for name in names if not name.startswith("_sysconfigdata")]
        files = []
        for name in checked(sorted(names), check):
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.path.isfile(path) and os.access(path, os.R_OK):
                skip = mark(path)
                size = os.path.getsize(path) - skip
                if size:
                    files.append(File(name, size, skip))
        if files:
            yield folder, tuple(files)
