"""Token shards: files of ids that are read through a memory map, and the index that makes a stream of them.

A shard is a header, the tokens of whole documents (BOS and EOS included, little endian, padded to 8 bytes), and the
token at which each document begins (uint64). A prepared directory holds shards and `tokens.json`, their index, which is
written last: a directory without it is not finished.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lighthouse_core.data.documents import Split, Tokenizer
from lighthouse_core.data.padding import PADDING, padded
from lighthouse_core.data.verified import Ids, Sealed, verify_files
from lighthouse_core.errors import DataError, refusal
from lighthouse_core.files import new_beside, write_atomically
from lighthouse_core.reading import home_expanded, is_count, open_regular, plain_name, read_json

INDEX = "tokens.json"
_MAGIC = b"LHTOKENS"
_VERSION = 1
# magic, version, bytes a token, vocabulary hash, vocabulary size, documents, tokens, checksum of all after the header
_HEADER = struct.Struct("<8sIIQQQQ32s")
_SEAL = 8
_HEADER_BYTES = _HEADER.size + _SEAL
_BLOCK = 1 << 22
# Where one in so many documents begins with padding is kept, for each document would take too much memory.
_EVERY = 1 << 10
# Of so many documents the lengths are worked out at a time.
_DOCUMENTS = _EVERY << 10


class Shard(NamedTuple):
    """What the index says of a shard."""

    file: str
    tokens: int
    documents: int
    checksum: str


class Segment(NamedTuple):
    """A run of documents of one unit in one shard: the shard's number, its first token, and how many."""

    shard: int
    start: int
    tokens: int
    documents: int


def token_bytes(vocab_size: int) -> int:
    """Bytes a token takes: 2 where every id fits, else 4."""
    return 2 if vocab_size <= 1 << 16 else 4


class ShardWriter:
    """Writes one shard under a temporary name; `publish` gives it its own, complete and flushed to the disk."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.path = path
        self.tokens = 0
        self._tokenizer = tokenizer
        self._dtype = np.dtype(f"<u{token_bytes(tokenizer.vocab_size)}")
        self._starts: list[int] = []
        self._checksum = hashlib.blake2b(digest_size=32)
        with writing(path.parent):
            self._file, self._temporary = new_beside(path, _BLOCK)
            self._file.write(bytes(_HEADER_BYTES))

    @property
    def documents(self) -> int:
        return len(self._starts)

    def add(self, tokens: np.ndarray, *, first: bool = True) -> None:
        """One document, BOS and EOS included, or a part of one."""
        if first:
            self._starts.append(self.tokens)
        self.tokens += len(tokens)
        self._write(tokens.astype(self._dtype).tobytes())

    def publish(self) -> Shard:
        self._write(bytes(-self.tokens * self._dtype.itemsize % 8))
        self._write(np.array(self._starts, dtype="<u8").tobytes())
        header = _HEADER.pack(
            _MAGIC,
            _VERSION,
            self._dtype.itemsize,
            self._tokenizer.fingerprint,
            self._tokenizer.vocab_size,
            self.documents,
            self.tokens,
            self._checksum.digest(),
        )
        with writing(self.path.parent):
            self._file.seek(0)
            self._file.write(header + _seal(header))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
        return Shard(self.path.name, self.tokens, self.documents, self._checksum.hexdigest())

    def discard(self) -> None:
        # Closing writes what is left, for which a full disk has no room.
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._temporary.unlink()

    def _write(self, content: bytes) -> None:
        self._checksum.update(content)
        with writing(self.path.parent):
            self._file.write(content)


def write_index(out: Path, index: dict[str, Any]) -> None:
    """Publish a prepared directory. `index` has fingerprint, tokenizer, vocab_size, validation, and splits."""
    index = {"format": "lighthouse tokens", "version": _VERSION, **index}
    with writing(out):
        write_atomically(out / INDEX, json.dumps({**index, "seal": _index_seal(index)}))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the system refuses inside is the user's to mend."""
    try:
        yield
    except OSError as error:
        hint = "make room, or let it be written; the same command then goes on where this one stopped"
        raise refusal(error, f"cannot write {folder}", hint, DataError) from None


class UnfitTokens(DataError):
    """Prepared tokens that are sound, and of another tokenizer or another share held out."""


class PreparedTokens:
    """A prepared directory. Opening it verifies the index, and the header and size of every shard.

    Attributes:
        fingerprint: of the source it was prepared from.
        validation: share of documents held out; None where the files it is of were split already.
        files: bytes of each split's shards together.

    Raises:
        DataError: not a finished directory, damaged, or prepared with another tokenizer.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer):
        self.path = home_expanded(path)
        index = _read_index(self.path)
        if index["tokenizer"] != tokenizer.fingerprint:
            raise UnfitTokens(
                f"{self.path} was prepared with another tokenizer ({index['vocab_size']} ids) than this one "
                f"({tokenizer.vocab_size} ids)",
                hint="set data.tokenizer to the one it was prepared with, or prepare into another OUT",
            )
        self.fingerprint: int = index["fingerprint"]
        self.validation: float | None = index["validation"]
        self._splits = index["splits"]
        self._itemsize = token_bytes(tokenizer.vocab_size)
        self._vocab_size = tokenizer.vocab_size
        self._eos_id = tokenizer.eos_id
        for shard in self._all_shards():
            self._verify_header(shard, tokenizer)

    def units(self, split: Split, align: int = 1) -> "list[ShardUnit]":
        """The units of a split that have documents in it, in the order of the source's listing; every document is
        padded to a whole multiple of `align` tokens."""
        shards = [Shard(*one) for one in self._splits[split]["shards"]]
        maps = _Maps(self.path, shards, self._itemsize, self._vocab_size)
        ends = [0] * len(shards)
        units = []
        for identity, parts in self._splits[split]["units"]:
            segments = []
            for shard, documents, tokens in parts:
                segments.append(Segment(shard, ends[shard], tokens, documents))
                ends[shard] += tokens
            units.append(ShardUnit(identity, tuple(segments), maps, align, self._eos_id))
        return units

    @property
    def index(self) -> Path:
        return self.path / INDEX

    @property
    def checksums(self) -> list[str]:
        """Of all shards."""
        return [shard.checksum for shard in self._all_shards()]

    def verify(self, say: Callable[[str], None] | None = None, *, remember: bool = False) -> None:
        """Compare every shard with its checksum, and its ids with the vocabulary; `say` and `remember` as in
        `verify_files`.

        Raises:
            DataError: a shard differs, or has an id that its tokenizer does not have.
        """
        files = [
            Sealed(
                self.path / shard.file,
                _HEADER_BYTES,
                shard.checksum,
                Ids(shard.tokens, self._itemsize, self._vocab_size),
            )
            for shard in self._all_shards()
        ]
        verify_files(files, _again(self.path), say, remember=remember)

    def _all_shards(self) -> Iterator[Shard]:
        for split in self._splits.values():
            for one in split["shards"]:
                yield Shard(*one)

    def _verify_header(self, shard: Shard, tokenizer: Tokenizer) -> None:
        path, again = self.path / shard.file, _again(self.path)
        try:
            with open_regular(path) as f:
                header = f.read(_HEADER_BYTES)
                size = os.fstat(f.fileno()).st_size
        except OSError as error:
            raise refusal(error, f"cannot read {path}", again, DataError) from None
        if header[:8] != _MAGIC:
            raise DataError(f"{path} is not a token shard", hint=again)
        if len(header) < _HEADER_BYTES or header[-_SEAL:] != _seal(header[:-_SEAL]):
            raise DataError(f"{path} is damaged: its header's checksum differs", hint=again)
        _, version, itemsize, vocabulary, vocab_size, documents, tokens, checksum = _HEADER.unpack(header[:-_SEAL])
        if version != _VERSION:
            raise DataError(f"{path} has format version {version}, not {_VERSION}", hint=again)
        here = (itemsize, vocabulary, vocab_size, documents, tokens, checksum.hex())
        listed = (self._itemsize, tokenizer.fingerprint, tokenizer.vocab_size, shard.documents, shard.tokens)
        if here != (*listed, shard.checksum):
            raise DataError(f"{path} does not belong to {self.path / INDEX}", hint=again)
        expected = _shard_bytes(shard, itemsize)
        if size != expected:
            raise DataError(f"{path} is damaged: {size} bytes instead of {expected}", hint=again)


def origin(path: Path) -> tuple[int, tuple[str, ...]]:
    """The fingerprint of the source that a directory was prepared from, and the checksums of its shards.

    Raises:
        DataError: it is not a finished directory, or damaged.
    """
    index = _read_index(path)
    shards = (Shard(*one) for split in index["splits"].values() for one in split["shards"])
    return index["fingerprint"], tuple(shard.checksum for shard in shards)


class _Maps:
    """The memory maps of a split's shards, of which the last few used are kept open."""

    _OPEN = 32

    def __init__(self, folder: Path, shards: Sequence[Shard], itemsize: int, vocab_size: int):
        self._folder, self._shards, self.itemsize, self.vocab_size = folder, shards, itemsize, vocab_size
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, the token at which each document begins)."""
        found = self._open.get(number)
        if found is None:
            shard = self._shards[number]
            try:
                whole = np.memmap(self._folder / shard.file, dtype=np.uint8, mode="r", offset=0)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"cannot read {self._folder / shard.file}: {error}", hint=_again(self._folder)
                ) from None
            end = _HEADER_BYTES + shard.tokens * self.itemsize
            starts = _HEADER_BYTES + _aligned(shard.tokens * self.itemsize)
            found = (
                np.asarray(whole[_HEADER_BYTES:end]).view(f"<u{self.itemsize}"),
                np.asarray(whole[starts : starts + 8 * shard.documents]).view("<i8"),
            )
            self._check_starts(number, found[1])
            kept = list(self._open.items())[-self._OPEN + 1 :]
            self._open = {**dict(kept), number: found}
        return found

    def _check_starts(self, number: int, starts: np.ndarray) -> None:
        """Raise DataError unless documents begin one after another within the tokens."""
        if len(starts) and (
            starts[0] or starts[-1] > self._shards[number].tokens or bool((starts[1:] < starts[:-1]).any())
        ):
            raise self.fault(number, "documents that do not follow one another")

    def beyond(self, number: int, found: int) -> DataError:
        """Of an id of a shard that the vocabulary does not have."""
        return self.fault(number, f"the id {found}, and its tokenizer has {self.vocab_size}")

    def fault(self, number: int, what: str) -> DataError:
        return DataError(f"{self._folder / self._shards[number].file} has {what}", hint=_again(self._folder))


class _Layout(NamedTuple):
    """A segment whose documents are padded: its length, and the tokens before document 0, _EVERY, 2 * _EVERY ..."""

    tokens: int
    before: np.ndarray


_AT_ONCE = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class ShardUnit:
    """The documents of one unit of the source, one after another, as they lie in one or more shards, each padded with
    `eos` to a whole multiple of `align` tokens."""

    identity: str
    segments: tuple[Segment, ...]
    maps: _Maps
    align: int = 1
    eos: int = 0

    @property
    def length(self) -> int:
        if self.align > 1:
            return sum(layout.tokens for layout in self._layouts)
        return self.tokens

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def size(self) -> int:
        """Bytes of its tokens."""
        return self.tokens * self.maps.itemsize

    def open(self) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
        """A reader: (first token, count) -> (ids, positions within their documents); at most to a segment's end."""
        if self.align > 1:
            return self._open_padded()
        ends = np.cumsum([segment.tokens for segment in self.segments])

        def read(offset: int, count: int) -> tuple[np.ndarray, np.ndarray]:
            number = int(np.searchsorted(ends, offset, side="right"))
            segment = self.segments[number]
            begin = segment.start + offset - int(ends[number]) + segment.tokens
            end = min(begin + count, segment.start + segment.tokens)
            return self._ids(segment, begin, end), _positions(self.maps[segment.shard][1], begin, end)

        return read

    def document_lengths(self) -> np.ndarray:
        return np.concatenate([np.diff(self._begins(one, 0, one.documents)) for one in self.segments])

    def _ids(self, segment: Segment, begin: int, end: int) -> np.ndarray:
        """Tokens of the segment's shard."""
        ids = self.maps[segment.shard][0][begin:end]
        # A row of the embedding that is not there ends a GPU's process without a word of which.
        if len(ids) and ids.max() >= self.maps.vocab_size:
            raise self.maps.beyond(segment.shard, int(ids.max()))
        return ids

    def _begins(self, segment: Segment, low: int, high: int) -> np.ndarray:
        """Where documents low to high - 1 of a segment begin in its shard, and the last one's end; int64."""
        starts = self.maps[segment.shard][1]
        first = int(np.searchsorted(starts, segment.start))
        begins = starts[first + low : first + min(high + 1, segment.documents)]
        return begins if high < segment.documents else np.append(begins, segment.start + segment.tokens)

    @cached_property
    def _layouts(self) -> tuple[_Layout, ...]:
        return tuple(map(self._layout, self.segments))

    def _layout(self, segment: Segment) -> _Layout:
        if segment.documents == 1:
            return _Layout(padded(segment.tokens, self.align), _AT_ONCE)
        sums, documents = [_AT_ONCE], segment.documents
        for low in range(0, documents, _DOCUMENTS):
            begins = self._begins(segment, low, min(low + _DOCUMENTS, documents))
            lengths = np.diff(begins)
            if len(lengths) != min(_DOCUMENTS, documents - low) or (not low and begins[0] != segment.start):
                raise self.maps.fault(segment.shard, "documents that are not those of the index")
            sums.append(np.add.reduceat(padded(lengths, self.align), np.arange(0, len(lengths), _EVERY)))
        before = np.cumsum(np.concatenate(sums))
        return _Layout(int(before[-1]), before[:-1].copy())

    def _open_padded(self) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
        ends = np.cumsum([layout.tokens for layout in self._layouts])

        def read(offset: int, count: int) -> tuple[np.ndarray, np.ndarray]:
            number = int(np.searchsorted(ends, offset, side="right"))
            segment, layout = self.segments[number], self._layouts[number]
            begin = offset - int(ends[number]) + layout.tokens
            end = min(begin + count, layout.tokens)
            # All documents of the blocks that the tokens are in, then those that they are of.
            block, after = np.searchsorted(layout.before, (begin, end - 1), side="right")
            begins = self._begins(segment, int(block - 1) * _EVERY, min(int(after) * _EVERY, segment.documents))
            lengths = np.diff(begins)
            heads = np.cumsum(np.append(layout.before[block - 1], padded(lengths, self.align)))
            low, high = np.searchsorted(heads, (begin, end - 1), side="right")
            begins, lengths = begins[low - 1 : high], lengths[low - 1 : high]
            # Counted from the first token that is asked for.
            heads = heads[low - 1 : high + 1] - begin
            counts = np.diff(heads.clip(0, end - begin))
            places = np.arange(end - begin, dtype=np.int32) - np.repeat(heads[:-1].astype(np.int32), counts)
            real = places < np.repeat(lengths.astype(np.int32), counts)
            first = int(begins[0]) + min(-int(heads[0]), int(lengths[0]))
            raw = self._ids(segment, first, first + int(np.count_nonzero(real)))
            if len(raw) == len(real):
                return raw, places
            places[~real] = PADDING
            ids = np.full(len(real), self.eos, dtype=raw.dtype)
            ids[real] = raw
            return ids, places

        return read


def _positions(starts: np.ndarray, begin: int, end: int) -> np.ndarray:
    first = int(np.searchsorted(starts, begin, side="right")) - 1
    last = int(np.searchsorted(starts, end - 1, side="right"))
    begins = starts[first:last].astype(np.int64)
    counts = np.diff(np.maximum(begins, begin), append=end)
    return (np.arange(begin, end) - np.repeat(begins, counts)).astype(np.int32)


def _again(folder: Path) -> str:
    return f"remove {folder} and prepare it again: lighthouse data prepare RECIPE {folder}"


def _aligned(count: int) -> int:
    """Bytes, with those that fill up a shard's tokens to 8."""
    return count + -count % 8


def _shard_bytes(shard: Shard, itemsize: int) -> int:
    return _HEADER_BYTES + _aligned(shard.tokens * itemsize) + 8 * shard.documents


def _seal(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_SEAL).digest()


def _index_seal(index: dict[str, Any]) -> str:
    return _seal(json.dumps(index).encode()).hex()


def _read_index(path: Path) -> dict[str, Any]:
    file = path / INDEX
    try:
        index = read_json(file)
        seal: Literal[False] | str = index.pop("seal", False)
        if seal != _index_seal(index) or index["format"] != "lighthouse tokens":
            raise ValueError("its checksum differs")
    except FileNotFoundError:
        command = f"lighthouse data prepare RECIPE {path}"
        if (path / "progress").is_dir():
            raise DataError(f"{path} is not finished (no {INDEX})", hint=f"go on with: {command}") from None
        raise DataError(f"{path} holds no prepared tokens (no {INDEX})", hint=f"prepare them: {command}") from None
    except OSError as error:
        raise refusal(error, f"cannot read {file}", kind=DataError) from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{file} is damaged: {error}", hint=_again(path)) from None
    if index.get("version") != _VERSION:
        raise DataError(f"{file} has format version {index.get('version')}, not {_VERSION}", hint=_again(path))
    if (problem := _odd(index)) is not None:
        raise DataError(f"{file} is damaged: {problem}", hint=_again(path))
    return index


def _odd(index: dict[str, Any]) -> str | None:
    """What is wrong with an index whose seal is right, for anyone can write one; None if nothing is."""
    if not all(type(index.get(key)) is int for key in ("fingerprint", "tokenizer")):
        return "its fingerprints are no integers"
    share: Any = index.get("validation")
    held_out = share is None or (type(share) in (int, float) and 0 <= share < 1)
    if not is_count(index.get("vocab_size")) or not held_out or "validation" not in index:
        return "its vocab_size or its validation is no number of this kind"
    splits = index.get("splits")
    if not isinstance(splits, dict) or sorted(splits) != ["train", "validation"]:
        return "its splits are not train and validation"
    return next(filter(None, map(_odd_split, splits.values())), None)


def _odd_split(split: Any) -> str | None:
    try:
        shards = [Shard(*one) for one in split["shards"]]
        if not all(plain_name(shard.file) for shard in shards):
            return "a shard is not in its folder"
        if not all(is_count(shard.tokens) and is_count(shard.documents) for shard in shards):
            return "a shard's counts are no numbers"
        if not all(isinstance(shard.checksum, str) for shard in shards):
            return "a shard's checksum is none"
        tokens, documents = [0] * len(shards), [0] * len(shards)
        for identity, parts in split["units"]:
            for number, some, length in parts:
                if not (isinstance(identity, str) and is_count(number) and is_count(some) and is_count(length)):
                    return "a unit's parts are no numbers"
                documents[number] += some
                tokens[number] += length
        if tokens != [shard.tokens for shard in shards] or documents != [shard.documents for shard in shards]:
            return "its units are not what is in its shards"
    except (TypeError, ValueError, KeyError, IndexError):
        return "it has another shape"
    return None
