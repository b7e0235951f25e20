"""The source "files": .txt and .md (a file is a document), and rows of .jsonl, .json, .csv and .parquet, of which all
but the last may be compressed (.gz, .zst). All are read as a stream.

A row is held whole, a file that is a document in parts. Going on from a place costs a seek in plain .jsonl, .json and
.csv, the rest of a row group in .parquet, and in a compressed file the part of it (a gzip member or a zstd frame) that
the place is in: that is decompressed again up to the place. Rows are counted, and parsed again, from the beginning only
where the file is too large for a place to name the part and the byte in it: about 2^62 bytes, size times bytes.
"""

import glob
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lighthouse_core.data.documents import CHANGED_HINT, Keep, Place, Record, checked, mark, stable_hash, without_end
from lighthouse_core.data.forms import BUFFER, OTHER_HINT, SUFFIXES, WHOLE, TextFile, form_of, open_file
from lighthouse_core.data.rows import Row, checked_text, read_rows, row_identity
from lighthouse_core.errors import DataError
from lighthouse_core.text import why_not_utf8

# Of text that is held and encoded at once.
_PART = 4 << 20
# Rows decoded at a time; long documents make a batch of any number of rows large.
_BATCH_ROWS = 64
# A row is sought by decoding what is before it in its row group.
_GROUP_PIECES = 8


class FilesSource:
    """Files found by globs; each is a unit. Rows without text are passed over and counted, blank lines passed over.

    Attributes:
        nulls: rows passed over so far, by this object, as their text is null or empty.
    """

    def __init__(self, paths: Sequence[str], text_key: str, check: Callable[[], None] = without_end):
        self.files = list_files(paths, check)
        self.text_key = text_key
        self.identities = [file.identity for file in self.files]
        self.sizes = [file.size for file in self.files]
        self.fingerprint = self.fingerprint_with({})
        self.nulls = 0

    def fingerprint_with(self, sizes: Mapping[str, int]) -> int:
        """The fingerprint that the listing would have if files, by their identities, had these sizes."""
        listed = (replace(file, size=sizes.get(file.identity, file.size)) for file in self.files)
        return stable_hash("files", self.text_key, *(file.fingerprint for file in listed))

    def records(self, unit: int, place: Place, keep: Keep, end: int | None = None) -> Iterator[Record]:
        file = self.files[unit]
        try:
            yield from self._records(file, place, keep, end)
        except DataError as error:
            error.file = file.identity, file.size
            raise

    def _records(self, file: TextFile, place: Place, keep: Keep, end: int | None) -> Iterator[Record]:
        form = form_of(file)
        if form.kind == "text":
            yield from _text(file, place, keep)
            return
        if form.kind == "parquet":
            rows = _rows(file, place, keep, self.text_key)
        else:
            rows = read_rows(file, form, place, keep, self.text_key)
        for row in rows:
            if end is not None and row.number >= end:
                return
            if row.text is None:
                self.nulls += 1
            else:
                yield Record(row_identity(file, row.number), row.text, row.start, row.end)

    def cuts(self, unit: int, size: int) -> list[tuple[Place, int]]:
        """See the protocol. Only lines and parquet, and of these only what is not compressed, can be cut."""
        file = self.files[unit]
        if file.size > size and not file.is_document:
            form = form_of(file)
            if form == ("lines", ""):
                return _cut_lines(file, size)
            if form.kind == "parquet":
                return _cut_rows(file, size, self.text_key)
        return [(Place(), file.size)]


def list_files(paths: Sequence[str], check: Callable[[], None] = without_end) -> list[TextFile]:
    """The files that the globs of `[data] paths` match, sorted by identity. Reads folder listings, and of .txt and .md
    files whether they begin with a byte-order mark.

    An identity is the name of the glob's fixed folder and the path below it: "corpus/a/b.jsonl" for corpus/**/*.jsonl
    wherever corpus lies. Hidden and empty files are left out. `**` follows links to folders, but comes to every folder
    once: links may lead back to where they are found, or around in a ring. `check` is called for each folder and each
    file.

    Raises:
        DataError: a glob without files, another kind of file, a file matched twice, a link to nothing, a folder that
            cannot be listed.
    """
    files: dict[str, TextFile] = {}
    roots: list[str] = []
    for entry in paths:
        # Two separators are one: an empty part would stand for the root.
        pattern = re.sub(f"{os.sep}+", os.sep, os.path.expanduser(entry))
        # A file's own name may hold what means something in a glob.
        literal = os.path.isfile(pattern)
        folder = os.path.dirname(pattern) or "." if literal else _fixed_folder(pattern)
        root = os.path.realpath(folder)
        if root not in roots:
            roots.append(root)
        names = [os.path.basename(one) for one in roots[: roots.index(root) + 1]]
        # A name seen before gets a number: no machine's paths enter identities.
        label = names[-1] if names.count(names[-1]) == 1 else f"{names[-1]}:{names.count(names[-1])}"
        if not literal:
            _check_readable(pattern, check)
        found = [pattern] if literal else list(_matches(pattern, check))
        if broken := [path for path in checked(found, check) if not os.path.exists(path)]:
            raise DataError(
                f"data.paths: {broken[0]} is a link to nothing", hint="remove it, or restore what it links to"
            )
        matched = [path for path in checked(found, check) if os.path.isfile(path)]
        if not matched:
            if os.path.lexists(pattern) and not os.path.isdir(pattern):
                raise DataError(f"data.paths: {entry} is no ordinary file", hint="pipes and devices are not read")
            raise DataError(f"data.paths: no files match {entry}", hint=_folder_hint(pattern))
        for path in checked(matched, check):
            if not path.endswith(SUFFIXES):
                raise DataError(
                    f"data.paths: {path} is not one of {', '.join(SUFFIXES)}",
                    hint=f"name one of these in the glob. {OTHER_HINT}",
                )
            real = os.path.realpath(path)
            if real in files:
                raise DataError(
                    f"data.paths matches {path} twice",
                    hint="match each file once: a copy of a held-out document could be trained on",
                )
            below = os.path.relpath(path, folder).replace(os.sep, "/")
            file = TextFile(f"{label}/{below}", os.path.getsize(path), real)
            files[real] = replace(file, skip=mark(real)) if path.endswith(WHOLE) else file
    listed = sorted((file for file in files.values() if file.size > file.skip), key=lambda file: file.identity)
    if not listed:
        raise DataError(
            f"every file under data.paths = {list(paths)} is empty", hint="name files with text in data.paths"
        )
    return listed


def _fixed_folder(pattern: str) -> str:
    parts = pattern.split(os.sep)
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return os.sep.join(parts[:fixed]) or (os.sep if pattern.startswith(os.sep) else ".")


def _check_readable(pattern: str, check: Callable[[], None]) -> None:
    """Raise DataError for a folder that cannot be listed; glob passes over it in silence."""
    parts = pattern.split(os.sep)
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    for above in {os.sep.join(parts[: i + (parts[i] == "**")]) for i in range(first, len(parts))}:
        # With a separator at its end a glob matches folders alone.
        for folder in _matches(os.path.join(above, ""), check):
            if not os.access(folder, os.R_OK | os.X_OK):
                raise DataError(
                    f"data.paths: cannot list {folder}", hint=f"make it readable, or leave it out of {pattern}"
                )


def _matches(pattern: str, check: Callable[[], None] = without_end) -> Iterator[str]:
    """What glob.glob(pattern, recursive=True) gives, though `**` comes to a folder once, however many links lead to it:
    glob follows them until the system refuses, and two that lead back to where they are make 2^40 paths."""
    folders, parts = [""], pattern.split(os.sep)
    while "**" in parts:
        first = parts.index("**")
        folders = _below([base for folder in folders for base in _named(folder, parts[:first], check)], check)
        # At the end of a pattern it matches files, too.
        parts = parts[first + 1 :] or ["*"]
    for folder in folders:
        yield from _globbed(folder, parts, check)


def _named(folder: str, parts: list[str], check: Callable[[], None]) -> list[str]:
    """What parts of a pattern without `**` match in a folder."""
    if any(map(glob.has_magic, parts)):
        return sorted(_globbed(folder, parts, check))
    return [_join(folder, parts)]


def _globbed(folder: str, parts: list[str], check: Callable[[], None]) -> Iterator[str]:
    """What glob.iglob gives in a folder. It goes down one part at a time, so that the check is called also where many
    folders and no files match."""
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if not any(map(glob.has_magic, parts[first + 1 :])):
        yield from checked(glob.iglob(_join(glob.escape(folder), parts)), check)
        return
    for base in checked(glob.iglob(_join(glob.escape(folder), parts[: first + 1])), check):
        yield from _globbed(base, parts[first + 1 :], check)


def _join(folder: str, parts: list[str]) -> str:
    path = os.sep.join(parts)
    # "" before the first separator stands for the root.
    return os.path.join(folder, (path or os.sep) if parts[:1] == [""] and not folder else path) if parts else folder


def _below(bases: list[str], check: Callable[[], None]) -> list[str]:
    """Folders and all below them but the hidden ones, each once; those that links alone lead to come last."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    folders = deque(base for base in bases if not os.path.islink(base))
    links = deque(base for base in bases if os.path.islink(base))
    while folders or links:
        check()
        folder = (folders or links).popleft()
        try:
            state = os.stat(folder or os.curdir)
        except OSError:
            continue
        if (state.st_dev, state.st_ino) in seen or not stat.S_ISDIR(state.st_mode):
            continue
        seen.add((state.st_dev, state.st_ino))
        found.append(folder)
        # Of a folder that cannot be listed `_check_readable` speaks.
        with suppress(OSError), os.scandir(folder or os.curdir) as listing:
            for entry in sorted(checked(listing, check), key=lambda entry: entry.name):
                if not entry.name.startswith(".") and entry.is_dir():
                    (links if entry.is_symlink() else folders).append(os.path.join(folder, entry.name))
    return found


def _folder_hint(pattern: str) -> str:
    if os.path.isdir(pattern):
        return f'a folder is written as a glob: "{pattern.rstrip(os.sep)}/**/*.jsonl"'
    return 'for example "corpus/**/*.jsonl"; relative paths begin where the command runs'


def _text(file: TextFile, place: Place, keep: Keep) -> Iterator[Record]:
    """The file as one document, in parts of at most _PART bytes that end after a line where they can."""
    if place.row or not keep(file.identity):
        return
    with open_file(file) as opened:
        opened.seek(file.skip)
        rest, byte, lines = b"", file.skip, 0
        while byte < file.size and keep(file.identity):
            read = opened.read(_PART - len(rest))
            if not read:
                raise DataError(f"{file.path} changed since it was listed", hint=CHANGED_HINT)
            part = rest + read
            last = byte + len(part) == file.size
            cut = len(part) if last else part.rfind(b"\n") + 1 or _last_character(part)
            part, rest = part[:cut], part[cut:]
            try:
                text = part.decode()
            except UnicodeDecodeError as error:
                line = lines + part.count(b"\n", 0, error.start) + 1
                beginning = part if byte == file.skip else b""
                problem, hint = why_not_utf8(beginning, f"byte {byte + error.start} of the file")
                raise DataError(f"{file.path}:{line}: {problem}", hint=hint) from None
            yield Record(file.identity, text, Place(), Place(1, file.size), byte == file.skip, last)
            byte, lines = byte + len(part), lines + part.count(b"\n")


def _last_character(part: bytes) -> int:
    """Where the last character of UTF-8 text begins."""
    return next((at for at in range(len(part) - 1, len(part) - 5, -1) if part[at] & 0xC0 != 0x80), len(part) - 1)


def _cut_lines(file: TextFile, size: int) -> list[tuple[Place, int]]:
    """Reads the whole file once, to count lines: a place needs both its row and its byte."""
    places = [Place()]
    row = byte = 0
    with open_file(file) as opened:
        while block := opened.read(size):
            row, byte = row + block.count(b"\n"), byte + len(block)
            if not block.endswith(b"\n"):
                rest = opened.readline()
                row, byte = row + 1, byte + len(rest)
            if byte < file.size:
                places.append(Place(row, byte))
    return _with_sizes(places, [place.byte for place in places], file.size)


def _with_sizes(places: list[Place], begins: list[int], end: int) -> list[tuple[Place, int]]:
    sizes = [after - before for before, after in zip(begins, [*begins[1:], end], strict=True)]
    return list(zip(places, sizes, strict=True))


def _parquet(file: TextFile, text_key: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{file.path} needs pyarrow", hint="pip install pyarrow") from None
    open_file(file).close()
    try:
        # Without pre_buffer a row group's column is read page by page.
        opened = pq.ParquetFile(file.path, pre_buffer=False, buffer_size=BUFFER)
        schema = opened.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.path}: not a parquet file: {_first_line(error)}",
            hint="copy the file anew, or leave it out of data.paths",
        ) from None
    kinds = [schema.field(i).type for i, name in enumerate(schema.names) if name == text_key]
    plain = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    if len(kinds) != 1 or str(plain[0]) not in ("string", "large_string", "string_view"):
        found = f"is missing; there are: {', '.join(schema.names)}"
        if kinds:
            found = f"has the type {plain[0]}" if len(kinds) == 1 else "is there more than once"
        opened.close()
        raise DataError(
            f'{file.path}: the column "{text_key}" (data.text_key) {found}',
            hint="set data.text_key to a column of text",
        )
    return opened


def _rows(file: TextFile, place: Place, keep: Keep, text_key: str) -> Iterator[Row]:
    import pyarrow as pa

    with _parquet(file, text_key) as opened:
        first = 0
        for group in range(opened.metadata.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            if first + count > place.row:
                row = first
                try:
                    for batch in opened.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[text_key]):
                        column = batch.column(0)
                        for i in range(max(place.row - row, 0), len(column)):
                            if keep(row_identity(file, row + i)):
                                text = _text_of_cell(column[i], file, row + i, text_key)
                                yield Row(row + i, text, Place(row + i), Place(row + i + 1))
                        row += len(column)
                except (pa.ArrowException, OSError) as error:
                    raise DataError(
                        f"{file.path}: row {row + 1} or later cannot be read: {_first_line(error)}",
                        hint="copy the file anew, or leave it out of data.paths",
                    ) from None
            first += count


def _text_of_cell(cell: Any, file: TextFile, row: int, text_key: str) -> str | None:
    try:
        return checked_text({text_key: cell.as_py()}, text_key, lambda: f"{file.path}: row {row + 1}")
    except UnicodeDecodeError:
        raise DataError(
            f'{file.path}: row {row + 1}: "{text_key}" is not UTF-8 text',
            hint="write the column as UTF-8, or leave the file out of data.paths",
        ) from None


def _cut_rows(file: TextFile, size: int, text_key: str) -> list[tuple[Place, int]]:
    with _parquet(file, text_key) as opened:
        groups = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
    # Other columns are not read; the share of the file is what progress is counted in.
    total = sum(group.total_byte_size for group in groups) or 1
    places, begins, row, byte = [Place()], [0], 0, 0
    for group in groups:
        share = group.total_byte_size * file.size // total
        pieces = min(max(share // size, 1), _GROUP_PIECES, group.num_rows)
        for piece in range(pieces):
            first, begin = row + group.num_rows * piece // pieces, byte + share * piece // pieces
            if begin - begins[-1] >= size and first:
                places.append(Place(first))
                begins.append(begin)
        row += group.num_rows
        byte += share
    return _with_sizes(places, begins, file.size)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
