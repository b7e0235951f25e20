"""Token files of other programs as a source of documents that are ids already.

| format | files | documents |
|---|---|---|
| megatron | .idx, and a .bin beside it: Megatron-LM's indexed data set | by its index |
| olmo | .npy: uint16, uint32 or uint64, mostly without NumPy's header | ended by EOS |
| nanogpt | .bin: uint16, no header; uint32 or uint64 where its content shows it | ended by EOS |
| llmc | .bin: 256 int32, then uint16 (GPT-2) or uint32 (Llama 3) | ended by EOS, or begun by BOS |

Wherever documents are not indexed, one ends after an EOS and before a BOS. BOS and EOS at its ends are left out here,
and are put around it as around any text.

Files may be split already, and say so in their names: nanoGPT's train.bin and val.bin, llm.c's x_train_000001.bin and
x_val_000000.bin, folders called train and valid.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from lighthouse_core.data.documents import Keep, Place, Record, Split, Tokenizer, stable_hash
from lighthouse_core.errors import DataError, refusal
from lighthouse_core.reading import home_expanded, open_regular

Format = Literal["megatron", "olmo", "nanogpt", "llmc"]
FORMATS: tuple[Format, ...] = get_args(Format)

_MEGATRON = b"MMIDIDX\x00\x00"
# Megatron's codes of integer types.
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_NUMPY = b"\x93NUMPY"
_LLMC = {20240520: "<u2", 20240801: "<u4"}
_LLMC_BYTES = 1024
# Of a file without a header: so many pieces of so many bytes, from its beginning to its end, tell how wide ids are.
_PIECES, _PIECE = 64, 1 << 14
# Above the upper half of an id of 4 bytes in any vocabulary of up to 2^18 ids.
_UPPER = 4
# Of so many upper halves one would be larger if they were ids of two bytes.
_ENOUGH = 64
# Ids that are looked at and handed on at once.
_PART = 1 << 20
# Of names of files and folders.
_WORDS: dict[str, Split | Literal["test"]] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
_HINT = "copy the file anew, or name its format with --format"


@dataclass(frozen=True)
class TokenFile:
    """A file of ids.

    Attributes:
        identity: the same wherever the files lie.
        format: that it was read as.
        path: of the ids, on this machine.
        dtype: of an id, in NumPy's words.
        offset: bytes before the first id.
        count: how many ids.
        index: Megatron's, of the documents; None where they are told by EOS.
        split: all of it, where the files are split by their names; else None.
    """

    identity: str
    format: Format
    path: str = field(compare=False)
    dtype: str
    offset: int
    count: int
    index: "_Index | None" = None
    split: Split | None = None


class _Index(NamedTuple):
    """Where the arrays of an .idx begin: it is mapped, not held.

    Attributes:
        path: of the .idx.
        sequences, documents: how many; the list of documents has one number more.
        offset: bytes before the sizes of the sequences.
    """

    path: str
    sequences: int
    documents: int
    offset: int

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids of each sequence, the byte at which each begins, the sequence at which each document begins)."""
        whole = np.memmap(self.path, np.uint8, mode="r", offset=0)
        at = self.offset
        sizes = whole[at : (at := at + 4 * self.sequences)].view("<i4")
        begins = whole[at : (at := at + 8 * self.sequences)].view("<i8")
        return sizes, begins, whole[at : at + 8 * (self.documents + 1)].view("<i8")


class AsIds:
    """A tokenizer that takes int32 ids, as bytes, for text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
        self.bos_id, self.eos_id = tokenizer.bos_id, tokenizer.eos_id

    def encode(self, text: str | bytes) -> np.ndarray:
        assert isinstance(text, bytes)
        return np.frombuffer(text, dtype=np.int32)

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def token_bytes(self) -> list[bytes] | None:
        return self._tokenizer.token_bytes()


class TokenFiles:
    """Files of ids as a source: each is a unit, each record a document of int32 ids as bytes, in parts where it is
    long. Documents without an id besides BOS and EOS are passed over.

    Attributes:
        split_by_names: whether each file is of one split as its name says, see `_named_splits`.
        left_out: the files that are not read, as they are of another split.

    Args:
        path, tokenizer, format: of `import_tokens`.
        by_names: False: the files are one text, whatever their names.

    Raises:
        DataError: no files; one that is not what its name says, or has an id that the tokenizer does not have.
    """

    nulls = 0

    def __init__(self, path: str, tokenizer: Tokenizer, format: Format | None = None, *, by_names: bool = True):
        self.files = list_token_files(path, tokenizer.vocab_size, format)
        splits = _named_splits(self.files)
        self.split_by_names = by_names and splits is not None
        self.left_out: list[str] = []
        if by_names and splits is not None:
            self.left_out = [file.path for file in self.files if splits[file.identity] == "test"]
            kept = ((file, splits[file.identity]) for file in self.files)
            self.files = [replace(file, split=split) for file, split in kept if split != "test"]
        self.identities = [file.identity for file in self.files]
        self.sizes = [file.count * np.dtype(file.dtype).itemsize for file in self.files]
        listed = ((file.identity, file.dtype, file.offset, file.count, file.index is None) for file in self.files)
        self.fingerprint = stable_hash("import", *listed, *(file.split for file in self.files if self.split_by_names))
        self._bos, self._eos, self._limit = tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size

    def __str__(self) -> str:
        kinds = Counter((file.format, np.dtype(file.dtype).name) for file in self.files)
        found = ", ".join(
            f"{format} {width}" + f" ({count} files)" * (count > 1) for (format, width), count in kinds.items()
        )
        words = f"read as {found}: {sum(file.count for file in self.files):,} tokens"
        if self.split_by_names:
            held_out = [os.path.basename(file.path) for file in self.files if file.split == "validation"]
            words += f"; validation is {_some(held_out)}, and training all else (--validation SHARE pools them)"
        if self.left_out:
            words += f"; left out, as the names say test: {_some(list(map(os.path.basename, self.left_out)))}"
        return words

    def records(self, unit: int, place: Place, keep: Keep, end: int | None = None) -> Iterator[Record]:
        """See the protocol. In files without an index, `Place.byte` is the number of the id."""
        file = self.files[unit]
        parts = self._by_eos(file, place) if file.index is None else self._by_index(file, place)
        first = True
        for row, ids, start, after, last in parts:
            if end is not None and row >= end:
                return
            identity = f"{file.identity}:{row}"
            if first and self._bos is not None and len(ids) and ids[0] == self._bos:
                ids = ids[1:]
            if last and len(ids) and ids[-1] == self._eos:
                ids = ids[:-1]
            # A document may end with the part before this one.
            if (len(ids) or not first) and keep(identity):
                yield Record(identity, ids.astype(np.int32).tobytes(), start, after, first, last)
            first = last

    def cuts(self, unit: int, size: int) -> list[tuple[Place, int]]:
        file, step = self.files[unit], np.dtype(self.files[unit].dtype).itemsize
        places, begins = [Place()], [0]
        if file.index is not None:
            sizes, _, documents = file.index.arrays()
            ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[documents]
            while True:
                row = int(np.searchsorted(ends, begins[-1] // step + size // step))
                if row >= file.index.documents:
                    break
                places.append(Place(row))
                begins.append(int(ends[row]) * step)
        else:
            for row, _, start, _, last in self._by_eos(file, Place()):
                if last and start.byte * step - begins[-1] >= size and row > places[-1].row:
                    places.append(start)
                    begins.append(start.byte * step)
        lengths = [after - before for before, after in zip(begins, [*begins[1:], self.sizes[unit]], strict=True)]
        return list(zip(places, lengths, strict=True))

    def _by_eos(self, file: TokenFile, place: Place) -> Iterator[tuple[int, np.ndarray, Place, Place, bool]]:
        """(number, ids, place before and after, whether it is the last part) of the parts of each document."""
        ids = np.memmap(file.path, file.dtype, mode="r", offset=file.offset, shape=(file.count,))
        row, at = place
        start, part = place, at
        while part < file.count:
            block = self._checked(file, ids[part : part + _PART], part)
            ends = np.flatnonzero(block == self._eos) + 1
            if self._bos is not None and self._bos != self._eos:
                ends = np.union1d(ends, np.flatnonzero(block == self._bos))
            # A BOS that begins the document does not end one.
            ends = ends[ends > 0] if part == at else ends
            begin = 0
            for stop in map(int, ends):
                after = Place(row + 1, part + stop)
                yield row, block[begin:stop], start, after, True
                row, at, start, begin = row + 1, part + stop, after, stop
            whole = part + len(block) == file.count
            if whole and begin < len(block):
                yield row, block[begin:], start, Place(row + 1, file.count), True
            if not whole and not len(ends):
                yield row, block, start, start, False
            part = part + len(block) if whole or not len(ends) else at

    def _by_index(self, file: TokenFile, place: Place) -> Iterator[tuple[int, np.ndarray, Place, Place, bool]]:
        """As `_by_eos`."""
        assert file.index is not None
        ids = np.memmap(file.path, file.dtype, mode="r", shape=(file.count,))
        sizes, begins, documents = file.index.arrays()
        step = ids.dtype.itemsize
        for row in range(place.row, file.index.documents):
            start, after = Place(row), Place(row + 1)
            held = np.empty(0, dtype=ids.dtype)
            for sequence in range(int(documents[row]), int(documents[row + 1])):
                at, stop = int(begins[sequence]) // step, int(begins[sequence]) // step + int(sizes[sequence])
                while at < stop:
                    if len(held) >= _PART:
                        yield row, held, start, start, False
                        held = held[:0]
                    block = self._checked(file, ids[at : min(stop, at + _PART)], at)
                    held = np.concatenate([held, block])
                    at += len(block)
            yield row, held, start, after, True

    def _checked(self, file: TokenFile, block: np.ndarray, at: int) -> np.ndarray:
        wrong = (block >= self._limit) | (block < 0)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise DataError(
                f"{file.path}: token {at + first} is the id {int(block[first])}, and the tokenizer has {self._limit} "
                "ids",
                hint="name the tokenizer that the file was made with, or its format with --format",
            )
        return block


def list_token_files(path: str, vocab_size: int, format: Format | None = None) -> list[TokenFile]:
    """The token files of a path, sorted by identity. Reads their headers, and samples of files without one.

    Raises:
        DataError: as of `TokenFiles`.
    """
    root = home_expanded(path)
    if root.is_dir():
        found = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
        suffixes = {"olmo": (".npy",), None: (".npy", ".bin", ".idx")}.get(format, (".bin", ".idx"))
        found = [file for file in found if file.suffix in suffixes and not file.name.startswith(".")]
        # An index and its ids are one.
        found = [file for file in found if file.suffix != ".bin" or not file.with_suffix(".idx").is_file()]
        if not found:
            raise DataError(
                f"{root} has no token files: {', '.join(suffixes)}", hint="text is prepared by: lighthouse data prepare"
            )
    else:
        found = [root]
    base = root if root.is_dir() else root.parent
    label = os.path.basename(os.path.realpath(base))
    files = []
    for file in found:
        identity = f"{label}/{file.relative_to(base).as_posix()}"
        try:
            files.append(_token_file(file, identity, vocab_size, format))
        except OSError as error:
            raise refusal(error, f"cannot read {error.filename or file}", kind=DataError) from None
    files = sorted((file for file in files if file.count), key=lambda file: file.identity)
    if not files:
        raise DataError(f"{root} holds no ids", hint="name files with ids")
    return files


def _some(names: list[str]) -> str:
    """Names in a line that stays readable."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _named_splits(files: Sequence[TokenFile]) -> dict[str, Split | Literal["test"]] | None:
    """The split of each file by its identity, where names tell it: some file is of validation and some is not. A file
    that says nothing is then of training."""
    named = {file.identity: _named_split(file.identity) for file in files}
    found: dict[str, Split | Literal["test"]] = {identity: split or "train" for identity, split in named.items()}
    return found if {"train", "validation"} <= set(found.values()) else None


def _named_split(identity: str) -> Split | Literal["test"] | None:
    """The split that the name of a file says, or else that of the innermost folder, below the one that is imported."""
    for name in reversed(identity.split("/")[1:]):
        said = {_WORDS[word] for word in re.findall("[a-z]+", name.lower()) if word in _WORDS}
        if said:
            return said.pop() if len(said) == 1 else None
    return None


def _token_file(path: Path, identity: str, vocab_size: int, format: Format | None) -> TokenFile:
    with open_regular(path) as file:
        head = file.read(_LLMC_BYTES)
        size = os.fstat(file.fileno()).st_size
    stated, format = format, format or _format(path, head)
    if format == "megatron":
        return _megatron(path.with_suffix(".idx"), identity)
    if format == "llmc":
        return _llmc(path, identity, head, size)
    if format == "olmo" and head.startswith(_NUMPY):
        return _numpy(path, identity, size)
    if stated == "nanogpt" and vocab_size <= 1 << 16:
        return _raw(path, identity, format, "<u2", 0, size)
    return _raw(path, identity, format, f"<u{_width(path, size, vocab_size)}", 0, size)


def _format(path: Path, head: bytes) -> Format:
    if path.suffix == ".idx" or (path.suffix == ".bin" and path.with_suffix(".idx").is_file()):
        return "megatron"
    if path.suffix == ".npy":
        return "olmo"
    if path.suffix == ".bin":
        return "llmc" if int.from_bytes(head[:4], "little") in _LLMC else "nanogpt"
    raise DataError(
        f"{path} does not end as token files do: .bin, .idx, .npy",
        hint=f"name its format: --format {'|'.join(FORMATS)}",
    )


def _width(path: Path, size: int, vocab_size: int) -> int:
    """Bytes of an id of a file without a header: the most whose upper halves are 0, or small, all over the file.

    Ids of 2 bytes would be read from ids of 4 as well, with a 0 after each; so the wider reading counts. Where ids are
    wider and too large for the vocabulary, reading them says so.

    Raises:
        DataError: it is all zeros, which any width fits.
    """
    halves = _sampled(path, size)
    if len(halves) and not halves.any():
        raise DataError(
            f"{path} is zeros wherever it was looked at, so how many bytes an id has is not known",
            hint="--format nanogpt takes 2; for others write it with NumPy's header (numpy.save) as .npy",
        )
    groups = halves[: len(halves) // 4 * 4].reshape(-1, 4)
    if len(groups) and groups[:, :2].any() and not groups[:, 2:].any():
        return 8
    lower, upper = halves[::2], halves[1::2]
    wide = len(upper) > 0 and not upper.any()
    # Ids that the vocabulary does not have, which two bytes each would hide.
    beyond = len(upper) >= _ENOUGH and bool(upper.max() < _UPPER <= lower.max())
    return 4 if vocab_size > 1 << 16 or wide or beyond else 2


def _sampled(path: Path, size: int) -> np.ndarray:
    """uint16, from pieces that begin at multiples of 8 bytes."""
    pieces = []
    with open_regular(path) as file:
        if size <= _PIECES * _PIECE:
            pieces.append(file.read(size // 2 * 2))
        else:
            for begin in np.linspace(0, size - _PIECE, _PIECES):
                file.seek(int(begin) // 8 * 8)
                pieces.append(file.read(_PIECE))
            # What rounding left out at the end.
            pieces.append(file.read((size - file.tell()) // 2 * 2))
    return np.frombuffer(b"".join(pieces), dtype="<u2")


def _raw(
    path: Path, identity: str, format: Format, dtype: str, offset: int, size: int, count: int | None = None
) -> TokenFile:
    """A file that is ids from an offset to its end."""
    step = np.dtype(dtype).itemsize
    whole, rest = divmod(size - offset, step)
    if rest or (count is not None and count != whole):
        expected = f"{count} ids" if count is not None else "whole ids"
        raise DataError(f"{path}: {size} bytes are not {expected} of {step} bytes after {offset}", hint=_HINT)
    return TokenFile(identity, format, str(path), dtype, offset, whole)


def _llmc(path: Path, identity: str, head: bytes, size: int) -> TokenFile:
    if len(head) < _LLMC_BYTES or (magic := int.from_bytes(head[:4], "little")) not in _LLMC:
        raise DataError(f"{path} does not begin as llm.c's files do", hint=_HINT)
    _, version, count = np.frombuffer(head[:12], dtype="<i4").tolist()
    if version != 1:
        raise DataError(f"{path} has version {version} of llm.c's format, not 1", hint=_HINT)
    return _raw(path, identity, "llmc", _LLMC[magic], _LLMC_BYTES, size, count)


def _numpy(path: Path, identity: str, size: int) -> TokenFile:
    try:
        with open_regular(path) as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
            offset = file.tell()
    except ValueError as error:
        raise DataError(f"{path}: damaged header of NumPy: {error}", hint=_HINT) from None
    if len(shape) != 1 or dtype.kind not in "iu":
        raise DataError(f"{path} is an array of {dtype} {list(shape)}, not a row of integers", hint=_HINT)
    return _raw(path, identity, "olmo", dtype.str, offset, size, shape[0])


def _megatron(path: Path, identity: str) -> TokenFile:
    with open_regular(path) as file:
        head = file.read(34)
        size = os.fstat(file.fileno()).st_size
    if not head.startswith(_MEGATRON) or len(head) < 34:
        raise DataError(f"{path} is no index of Megatron's", hint=_HINT)
    version, kind = int.from_bytes(head[9:17], "little"), head[17]
    sequences, listed = (int.from_bytes(head[at : at + 8], "little") for at in (18, 26))
    if version != 1 or kind not in _TYPES:
        raise DataError(
            f"{path} has version {version} and type {kind}; only version 1 with integers is read", hint=_HINT
        )
    expected = 34 + 12 * sequences + 8 * listed
    # A data set of several media has a byte more a sequence.
    if size not in (expected, expected + sequences) or not listed:
        raise DataError(f"{path}: {size} bytes are not {sequences} sequences and {listed} documents", hint=_HINT)
    if size != expected and sequences:
        raise DataError(f"{path} holds images or other media besides text", hint="only data sets of text are imported")
    index = _Index(str(path), sequences, listed - 1, 34)
    sizes, begins, documents = index.arrays()
    data, step = path.with_suffix(".bin"), np.dtype(_TYPES[kind]).itemsize
    with open_regular(data) as file:
        held = os.fstat(file.fileno()).st_size
    beyond = bool((sizes < 0).any() or (begins < 0).any() or (begins % step).any())
    if beyond or bool((begins + sizes.astype(np.int64) * step > held).any()):
        raise DataError(f"{path} has sequences that are not in {data}", hint="copy both anew: one may be cut off")
    if documents[0] != 0 or documents[-1] != sequences or bool((documents[1:] < documents[:-1]).any()):
        raise DataError(f"{path} has documents that do not follow one another", hint=_HINT)
    return TokenFile(identity, "megatron", str(data), _TYPES[kind], 0, held // step, index)
