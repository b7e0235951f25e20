"""Rows of text files: lines of JSON, one JSON array, CSV. Each reader goes from place to place and holds one row.

A row without text (null, a null or empty text) is `None`; blank lines are no rows. A place is a row and the byte where
that row begins. Where a place has no byte, rows are counted from the beginning of the file.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

from lighthouse_core.data.documents import CHANGED_HINT, Keep, Place
from lighthouse_core.data.forms import BUFFER, Form, TextFile, reading
from lighthouse_core.errors import DataError
from lighthouse_core.shown import shortened
from lighthouse_core.text import BOM, why_not_utf8

_HINT = "mend the line, or leave the file out of data.paths"
_ROWS = "a file of JSON is one array, or an object a line"
# Of a row of what is compressed, or has no lines that end it: some kilobytes can unpack to what fills the memory.
LARGEST = 256 << 20
# What decides where a value of JSON ends: a string, or the part of one that is there; brackets; a comma.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[][{},]', re.DOTALL)


class Row(NamedTuple):
    """A row whose identity is kept: its number from 0, its text or None, and the places before and after it."""

    number: int
    text: str | None
    start: Place
    end: Place


def read_rows(file: TextFile, form: Form, place: Place, keep: Keep, text_key: str) -> Iterator[Row]:
    """The rows of a file from a place on whose identity is kept.

    Raises:
        DataError: naming file and row, what cannot be read.
    """
    readers = {"lines": _lines, "array": _array, "csv": _csv}
    try:
        yield from readers[form.kind](file, form, place, keep, text_key)
    except DataError as error:
        if form.compression and not isinstance(error, _TooLarge):
            # Damaged data may still unpack, to something else, up to the checksum at the end of its part.
            with reading(file, form.compression, place.byte) as (stream, _):
                while stream.read(BUFFER):
                    pass
            if form.compression == "zstd":
                error.hint = f"{error.hint}; the file may be damaged, which zstd data without a checksum does not show"
        raise


def row_identity(file: TextFile, row: int) -> str:
    return f"{file.identity}:{row}"


def _limited(stream: BinaryIO, where: Callable[[int], str]) -> Iterator[bytes]:
    """The lines of a stream; `where` says what a line is called that so many others come before."""
    for number, line in enumerate(iter(partial(stream.readline, LARGEST + 1), b"")):
        if len(line) > LARGEST:
            raise _too_large(where(number))
        yield line


class _TooLarge(DataError):
    """A row, or what is taken for one."""


def _too_large(where: str, why: str = "") -> DataError:
    return _TooLarge(
        f"{where}: longer than {LARGEST >> 20} MiB{why}", hint="cut it up, or leave the file out of data.paths"
    )


def _lines(file: TextFile, form: Form, place: Place, keep: Keep, text_key: str) -> Iterator[Row]:
    row = first = place.row if place.byte else 0
    offset = 0
    with reading(file, form.compression, place.byte) as (stream, byte):
        # A plain file has no more than its size.
        limited = _limited(stream, lambda count: f"{file.path}:{first + count + 1}")
        for line in limited if form.compression else stream:
            begin, number = offset, row
            offset, row = offset + len(line), row + 1
            if number < place.row or not keep(row_identity(file, number)):
                continue
            start = Place(number, byte(begin))
            if not number:
                line = line.removeprefix(BOM)
            if not line or line.isspace():
                continue
            text = text_of_json(line, text_key, partial("{}:{}".format, file.path, row))
            yield Row(number, text, start, Place(row, byte(offset)))


def text_of_json(raw: bytes, text_key: str, where: Callable[[], str]) -> str | None:
    """The text of a row of JSON: an object, or the text itself; None where there is none.

    Raises:
        DataError: it is no JSON, or has no such key, or no text in it.
    """
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        problem, hint = why_not_utf8(raw, f"byte {error.start} of the line")
        raise DataError(f"{where()}: {problem}", hint=hint or _HINT) from None
    except RecursionError:
        raise DataError(f"{where()}: not valid JSON: nested too deeply", hint=_HINT) from None
    except ValueError as error:
        # Written over several lines, as by an indent.
        if isinstance(error, json.JSONDecodeError) and raw.endswith(b"\n") and error.pos >= len(raw.decode().rstrip()):
            problem = "not valid JSON: the value goes on after its line"
            raise DataError(
                f"{where()}: {problem}", hint=f"{_ROWS}; jq -c . FILE writes each object on a line"
            ) from None
        raise DataError(f"{where()}: not valid JSON: {error}", hint=_HINT) from None
    if value is None:
        return None
    if isinstance(value, str):
        value = {text_key: value}
    if not isinstance(value, dict):
        raise DataError(
            f"{where()}: not a JSON object", hint="each row is an object with the text in data.text_key, or a string"
        )
    if text_key not in value:
        inner = next((key for key, one in value.items() if isinstance(one, list)), None)
        more = (
            f'; if the rows are in "{inner}", write that array alone to the file: {_ROWS}' if inner is not None else ""
        )
        raise _no_key(value, text_key, where, more)
    # Only an escape can bring half a surrogate pair, which is no text.
    return checked_text(value, text_key, where, maybe_surrogates=b"\\u" in raw)


def checked_text(
    row: dict[str, Any], text_key: str, where: Callable[[], str], *, maybe_surrogates: bool = False
) -> str | None:
    """The text of a row; None where it is null or empty.

    Raises:
        DataError: no such key, or something else in it.
    """
    if text_key not in row:
        raise _no_key(row, text_key, where)
    text = row[text_key]
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(
            f'{where()}: "{text_key}" is not a string but {type(text).__name__}',
            hint="set data.text_key to one that holds text",
        )
    if maybe_surrogates:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f'{where()}: "{text_key}" has half a surrogate pair, which is no text',
                hint="write the text as UTF-8, or leave the file out of data.paths",
            ) from None
    return text or None


def _no_key(row: dict[str, Any], text_key: str, where: Callable[[], str], more: str = "") -> DataError:
    keys = ", ".join(sorted(row)[:10]) or "none"
    return DataError(
        f'{where()}: no key "{text_key}" (data.text_key); there are: {keys}',
        hint=f"set data.text_key to the one that holds the text{more}",
    )


def _array(file: TextFile, form: Form, place: Place, keep: Keep, text_key: str) -> Iterator[Row]:
    """The elements of an array. A place is at the bracket or comma before one, or at the bracket after the last."""
    first = place.row if place.byte else 0

    def where(number: int) -> str:
        return f"{file.path}: row {number + 1}"

    with reading(file, form.compression, place.byte) as (stream, byte):
        elements = _elements(stream, lambda count: where(first + count), first=not place.byte)
        for number, (raw, begin, end) in enumerate(elements, first):
            if number < place.row or not keep(row_identity(file, number)):
                continue
            start = Place(number, byte(begin))
            yield Row(number, text_of_json(raw, text_key, partial(where, number)), start, Place(number + 1, byte(end)))


def _elements(stream: BinaryIO, where: Callable[[int], str], *, first: bool) -> Iterator[tuple[bytes, int, int]]:
    """(an element of a JSON array, where the bracket or comma before and the one after it is), in bytes read."""
    held, base, count = bytearray(), 0, 0

    def fill() -> bool:
        # Twice as much each time: a string that goes on is searched again from its beginning.
        held.extend(more := stream.read(max(BUFFER, len(held))))
        return bool(more)

    fill()
    if first and held.startswith(BOM):
        held[: len(BOM)] = b" " * len(BOM)
    before = len(held) - len(held.lstrip())
    if bytes(held[before : before + 1]) not in (b"[", b",", b"]"):
        raise DataError(f"{where(count)}: no bracket or comma before it: the file changed", hint=CHANGED_HINT)
    ended = not first and held[before : before + 1] == b"]"
    at, depth = before + 1, 0
    while not ended:
        match = _TOKEN.search(held, at)
        # While a match is there, what is held cannot grow.
        begin, end, closed = (match.start(), match.end(), match[1] != b"") if match else (len(held), 0, False)
        del match
        found = bytes(held[begin : begin + 1])
        if not found or (found == b'"' and not closed):
            at = begin
            if len(held) - before > LARGEST:
                raise _too_large(where(count), "; is a quote or a bracket not closed?")
            del held[:before]
            base, at, before = base + before, at - before, 0
            if not fill():
                raise DataError(f"{where(count)}: the array is not closed: the file is cut off", hint=_HINT)
            continue
        at = end
        if found in (b"{", b"["):
            depth += 1
        elif depth and found in (b"}", b"]"):
            depth -= 1
        elif not depth and found != b'"':
            raw = bytes(held[before + 1 : begin]).strip()
            if found == b"}" or not (raw or (first and found == b"]")):
                raise DataError(
                    f"{where(count)}: not valid JSON: {found.decode()} and no value before it",
                    hint=_HINT,
                )
            if raw:
                yield raw, base + before, base + begin
                count += 1
            before, ended, first = begin, found == b"]", False
    del held[: before + 1]
    while held or fill():
        if held.strip():
            raise DataError(f"{where(count)}: something follows the array", hint=_ROWS)
        held.clear()


def _csv(file: TextFile, form: Form, place: Place, keep: Keep, text_key: str) -> Iterator[Row]:
    """The rows of a table with a header, by Python's csv: commas, quotes that are doubled within quotes."""
    # The library's own limit, 131072 characters, is less than many documents have.
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST))
    with reading(file, form.compression) as (stream, byte):
        rows = _Table(file, stream, -1).rows()
        header = next(rows, ([], 0, 0))[0]
        if header.count(text_key) != 1:
            there = shortened(", ".join(header))
            found = "is there more than once" if text_key in header else f"is missing; there are: {there}"
            raise DataError(
                f'{file.path}: the column "{text_key}" (data.text_key) {found}',
                hint="the first row names the columns, with commas between; set data.text_key to the one with the text",
            )
        if not place.byte:
            yield from _cells(file, rows, byte, place, keep, header, text_key)
            return
    with reading(file, form.compression, place.byte) as (stream, byte):
        yield from _cells(file, _Table(file, stream, place.row).rows(), byte, place, keep, header, text_key)


def _cells(
    file: TextFile,
    rows: "Iterator[tuple[list[str], int, int]]",
    byte: Callable[[int], int],
    place: Place,
    keep: Keep,
    header: list[str],
    text_key: str,
) -> Iterator[Row]:
    column = header.index(text_key)
    for number, (cells, begin, end) in enumerate(rows, place.row if place.byte else 0):
        if number < place.row or not keep(row_identity(file, number)):
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{file.path}: row {number + 1}: {len(cells)} cells, and the header has {len(header)}", hint=_HINT
            )
        start = Place(number, byte(begin))
        yield Row(number, cells[column] or None, start, Place(number + 1, byte(end)))


class _Table:
    """The rows of a CSV stream.

    Args:
        row: number of the first; -1 for the header.
    """

    def __init__(self, file: TextFile, stream: BinaryIO, row: int):
        self._file, self._stream, self._row = file, stream, row
        # Bytes read: of the rows before, and all.
        self._before = self._read = 0

    def rows(self) -> Iterator[tuple[list[str], int, int]]:
        """(cells, bytes read before the row, bytes read after it); blank lines are left out."""
        reader = csv.reader(self._lines(), strict=True)
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                # Python's own words are about how the file was opened.
                why = "a carriage return outside quotes" if "new-line" in str(error) else error
                raise DataError(f"{self._where()}: not valid CSV: {why}", hint=_HINT) from None
            if cells is None:
                return
            if cells:
                yield cells, self._before, self._read
                self._row += 1
            self._before = self._read

    def _lines(self) -> Iterator[str]:
        for line in _limited(self._stream, lambda count: self._where()):
            if not self._read and self._row < 0:
                self._read, line = len(line), line.removeprefix(BOM)
            else:
                self._read += len(line)
            if self._read - self._before > LARGEST:
                raise _too_large(self._where(), "; is a quote not closed?")
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                problem, hint = why_not_utf8(line, f"byte {error.start} of the line")
                raise DataError(f"{self._where()}: {problem}", hint=hint or _HINT) from None

    def _where(self) -> str:
        return f"{self._file.path}: row {self._row + 1}" if self._row >= 0 else f"{self._file.path}: the header"
