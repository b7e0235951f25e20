"""Reading .gz and .zst files as a stream: what they hold, how far it is, and going on from a place in them.

Both formats are a row of parts that are decompressed each on its own: members of gzip, frames of zstd. Reading can
begin at any part; within one, all before a place is decompressed again and thrown away: README has the cost. gzip and
zstd write a whole file as one part. bgzip, pzstd, zstd's seekable format and joined files (cat a.gz b.gz) have
many.
"""

import io
import os
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO, Literal

from lighthouse_core.errors import DataError

Compression = Literal["", "gzip", "zstd"]

GZIP = b"\x1f\x8b"
_ZSTD = 0xFD2FB528
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
# Of compressed bytes that are taken at once.
_CHUNK = 1 << 17
# In a place: the part is not the first one.
_LATER = 1 << 62
# The largest window of zstd that the library decompresses with; --long=28 and above write larger ones.
_WINDOW = 1 << 27
_HINT = "copy the file anew, or leave it out of data.paths"


def compression_of(head: bytes) -> Compression:
    """How a file that begins like this is compressed; "" where it is not."""
    if head.startswith(GZIP):
        return "gzip"
    number = int.from_bytes(head[:4], "little")
    return "zstd" if len(head) >= 4 and (number == _ZSTD or number in _SKIPPABLE) else ""


def to_byte(part: int, inner: int, size: int) -> int:
    """A place in a compressed file as one number, for `Place.byte`.

    Args:
        part: offset in the file of the part.
        inner: bytes of text between the beginning of the part and the place.
        size: of the file.

    Returns:
        Below 2^63. 0 where a number has no room for both: rows then count from the beginning of the file.
    """
    if not part:
        return inner
    number = inner * size + part
    return _LATER + number if number < _LATER else 0


def from_byte(byte: int, size: int) -> tuple[int, int]:
    """(part, inner) of a number of `to_byte`."""
    if byte < _LATER:
        return 0, byte
    inner, part = divmod(byte - _LATER, size)
    return part, inner


class Decompressed(io.RawIOBase):
    """The text of a compressed file from one of its parts on; wrapped in a BufferedReader, it has lines.

    Args:
        path: of the file, for errors.
        file: open at the beginning of a part; closed with this.
        compression: "gzip" or "zstd".

    Raises:
        DataError: on reading: the data is damaged, cut off, or followed by something else.
    """

    def __init__(self, path: str, file: BinaryIO, compression: Compression):
        self._path = path
        self._file = file
        self._begin = file.tell()
        # (bytes of text before a part, its offset in the file), of those that are still to be asked for.
        self._parts: deque[tuple[int, int]] = deque()
        self._text = 0
        self._pieces = self._gzip() if compression == "gzip" else self._zstd()
        self._wanted = 0

    def part_at(self, text: int) -> tuple[int, int]:
        """(offset in the file of the part in which a byte of text lies, bytes of text of that part before it).

        Args:
            text: bytes of text from where reading began; not less than at the call before.
        """
        while len(self._parts) > 1 and self._parts[1][0] <= text:
            self._parts.popleft()
        before, part = self._parts[0] if self._parts else (0, self._begin)
        return part, text - before

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._wanted = len(buffer)
        piece = next(self._pieces, b"")
        buffer[: len(piece)] = piece
        self._text += len(piece)
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._pieces.close()
            self._file.close()
        super().close()

    def _begin_part(self, offset: int) -> None:
        self._parts.append((self._text, offset))

    def _fault(self, what: str, offset: int) -> DataError:
        return DataError(f"{self._path}: {what} (byte {offset} of the file)", hint=_HINT)

    def _gzip(self) -> Generator[bytes, None, None]:
        """Pieces of text, none longer than is wanted."""
        member: Any = None
        # What is read and not yet decompressed, and where that begins.
        left, offset = b"", self._begin
        while True:
            more = b"" if left else self._file.read(_CHUNK)
            left = left or more
            if member is None:
                # Zeros may fill up what stands behind a member.
                stripped = left.lstrip(b"\0") if offset > self._begin else left
                left, offset = stripped, offset + len(left) - len(stripped)
                if not left:
                    if more:
                        continue
                    return
                if len(left) < len(GZIP):
                    left += self._file.read(_CHUNK)
                if not left.startswith(GZIP):
                    raise self._fault("its gzip data is followed by something else", offset)
                self._begin_part(offset)
                member = zlib.decompressobj(31)
            try:
                piece = member.decompress(left, self._wanted)
            except zlib.error as error:
                raise self._fault(f"damaged gzip data: {str(error).rpartition(': ')[2]}", offset) from None
            rest = member.unused_data if member.eof else member.unconsumed_tail
            if not (piece or member.eof or left):
                raise self._fault("cut off within its gzip data", offset)
            left, offset = rest, offset + len(left) - len(rest)
            if piece:
                yield piece
            if member.eof:
                member = None

    def _zstd(self) -> Generator[bytes, None, None]:
        import pyarrow as pa

        if not pa.Codec.is_available("zstd"):
            raise DataError(f"{self._path}: pyarrow was built without zstd", hint="pip install --upgrade pyarrow")
        while True:
            offset = self._file.tell()
            magic = int.from_bytes(head := self._file.read(4), "little")
            if not head:
                return
            if magic in _SKIPPABLE and len(head) == 4:
                self._file.seek(int.from_bytes(self._exactly(4), "little"), io.SEEK_CUR)
                continue
            if magic != _ZSTD:
                raise self._fault("its zstd data is followed by something else", offset)
            self._begin_part(offset)
            with pa.CompressedInputStream(pa.PythonFile(_Frame(self._frame(head)), mode="r"), "zstd") as text:
                while True:
                    try:
                        piece = text.read(self._wanted)
                    except (pa.ArrowException, OSError) as error:
                        why = str(error).removeprefix("ZSTD decompress failed: ")
                        raise self._fault(f"damaged zstd data: {why}", self._file.tell()) from None
                    if not piece:
                        break
                    yield piece

    def _frame(self, magic: bytes) -> Iterator[bytes]:
        """The bytes of a zstd frame: the library would read on into the next one, whose beginning is wanted."""
        offset = self._file.tell() - len(magic)
        descriptor = self._exactly(1)
        flags = descriptor[0]
        single = flags >> 5 & 1
        counted = (single, 2, 4, 8)[flags >> 6]
        head = self._exactly((not single) + (0, 1, 2, 4)[flags & 3] + counted)
        if single:
            # The window is the whole text; two bytes count from 256.
            window = int.from_bytes(head[len(head) - counted :], "little") + 256 * (counted == 2)
        else:
            window = (8 + (head[0] & 7)) << (head[0] >> 3) + 7
        if window > _WINDOW:
            raise DataError(
                f"{self._path}: zstd data with a window of {window / 2**20:.0f} MiB, more than the {_WINDOW >> 20} MiB "
                f"that can be read (byte {offset} of the file)",
                hint=f"decompress it: zstd -d --long=31 {os.path.basename(self._path)}, or compress it without --long",
            )
        yield magic + descriptor + head
        last = 0
        while not last:
            header = int.from_bytes(begin := self._exactly(3), "little")
            last, kind, size = header & 1, header >> 1 & 3, header >> 3
            if kind == 3 or size > 1 << 17:
                raise self._fault("damaged zstd data: a block of an unknown kind", self._file.tell())
            yield begin + self._exactly(1 if kind == 1 else size)
        if flags & 4:
            yield self._exactly(4)

    def _exactly(self, count: int) -> bytes:
        found = self._file.read(count)
        if len(found) < count:
            raise self._fault("cut off within its zstd data", self._file.tell())
        return found


class _Frame:
    """What pyarrow reads a frame from."""

    closed = False

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces = pieces
        self._left = b""

    def read(self, count: int) -> bytes:
        self._left = self._left or next(self._pieces, b"")
        found, self._left = self._left[:count], self._left[count:]
        return found

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True
