"""What every source of text shares: units, the records in them, and which of these are held out."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from lighthouse_core.errors import DataError
from lighthouse_core.text import BOM

Split = Literal["train", "validation"]
Keep = Callable[[str], bool]
_Item = TypeVar("_Item")

CHANGED_HINT = "training files must not change during a run; put them back and resume, or start a new run"


class Place(NamedTuple):
    """A place between two records of a unit.

    Attributes:
        row: records before it, those that are empty or held out counted: line, parquet row, or example number.
        byte: offset of that row in its file, or in a compressed file a number of `compressed.to_byte`; 0 where the row
            is enough to seek.
    """

    row: int = 0
    byte: int = 0


class Record(NamedTuple):
    """One document as a source gives it, or one part of a document that is too large to be held whole.

    Attributes:
        identity: the same on every machine; decides whether the document is held out.
        content: never empty.
        start, end: the places before and after the document.
        first, last: whether the content begins and ends it; its parts follow each other.
    """

    identity: str
    content: str | bytes
    start: Place
    end: Place
    first: bool = True
    last: bool = True


class Source(Protocol):
    """Text in units: files, folders or parts of a data set. An epoch orders units; records keep their order inside.

    Attributes:
        identities: of the units, the same on every machine.
        sizes: of the units in bytes; 0 where unknown.
        fingerprint: 63 bits that change with the listing and with what is read of it.
        nulls: rows that this object has passed over so far, as their text is null or empty.
    """

    @property
    def identities(self) -> Sequence[str]: ...

    @property
    def sizes(self) -> Sequence[int]: ...

    @property
    def fingerprint(self) -> int: ...

    @property
    def nulls(self) -> int: ...

    def records(self, unit: int, place: Place, keep: Keep, end: int | None = None) -> Iterator[Record]:
        """The records of a unit from a place on whose identity is kept; others are passed over unparsed. With an `end`,
        which is the row of one of the unit's cuts, those of the rows before it.

        Raises:
            DataError: naming file and line, what cannot be read.
        """

    def cuts(self, unit: int, size: int) -> list[tuple[Place, int]]:
        """Places that cut a unit into pieces of about `size` bytes, each with its own size; the first is Place()."""


class Tokenizer(Protocol):
    """What training needs of a tokenizer.

    Attributes:
        vocab_size: ids are below it; a model's vocabulary must be at least as large.
        bos_id, eos_id: what every document begins and ends with; bos_id is None where documents begin without a BOS.
        fingerprint: 63 bits of the vocabulary and the rules; tokenizers with the same one give the same ids.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def fingerprint(self) -> int: ...

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of `text`, int32 [length], without BOS and EOS; DataError if it cannot take the text."""

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Text of `ids`, without BOS and EOS."""

    def token_bytes(self) -> list[bytes] | None:
        """The bytes of text that each id stands for, [vocab_size]; empty for BOS, EOS and special tokens.

        They follow from the vocabulary alone, whatever stands beside a token in a text: a part of a character is as
        many bytes as it has. A space that a tokenizer puts before a text is a byte. None where the tokenizer's rules do
        not tell.
        """


def stable_hash(*parts: object) -> int:
    """A 63-bit hash that is equal on every machine, Python and numpy version; it fits a signed 64-bit integer."""
    text = "\0".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def mark(path: str) -> int:
    """Bytes of the byte-order mark that a text file begins with, which is no part of its text; 0 where there is none,
    and where the file cannot be read, which whoever reads it says."""
    try:
        with open(path, "rb", buffering=0) as file:
            return len(BOM) if file.read(len(BOM)) == BOM else 0
    except OSError:
        return 0


def held_out(identity: str, validation: float) -> bool:
    """Whether a document belongs to validation, by the hash of its identity alone, whatever else is listed.

    `validation` is the expected share of documents held out, 0 <= validation < 1.
    """
    # This salt keeps the top folder of the standard library, a sixth of its bytes, in training; "split" holds it out.
    return stable_hash("heldout", identity) < int(validation * 2**63)


def keeper(split: Split, validation: float) -> Keep:
    """Which identities belong to a split."""
    if not validation:
        return lambda identity: split == "train"
    wanted = split == "validation"
    return lambda identity: held_out(identity, validation) == wanted


class TimeIsUp(Exception):
    """A walk over records, or a listing of files, has lasted as long as it may."""


def without_end() -> None:
    """The check of a listing that may last as long as it takes."""


def until(deadline: float) -> Callable[[], None]:
    """A check that raises TimeIsUp from a time of time.monotonic on."""

    def check() -> None:
        if time.monotonic() > deadline:
            raise TimeIsUp

    return check


def checked(items: Iterable[_Item], check: Callable[[], None]) -> Iterator[_Item]:
    """`items`, with a check before each."""
    for item in items:
        check()
        yield item


def timely(keep: Keep, deadline: float) -> Keep:
    """`keep`, until a time of time.monotonic; TimeIsUp from then on, also where records that are kept are rare."""

    check = until(deadline)

    def keep_in_time(identity: str) -> bool:
        check()
        return keep(identity)

    return keep_in_time


def epoch_order(identities: Sequence[str], seed: int, epoch: int) -> list[int]:
    """Indices of units in the order of one epoch. Sorting by hash, any subset of the units has the same order."""
    return sorted(range(len(identities)), key=lambda i: (stable_hash("order", seed, epoch, identities[i]), i))


def with_ends(tokenizer: Tokenizer, content: str | bytes, *, first: bool = True, last: bool = True) -> np.ndarray:
    """BOS, the ids of a document, EOS; int32. A part that is not the first has no BOS, one that is not the last no EOS.
    Nor has any part a BOS where the tokenizer has none.

    Parts are encoded each on its own: no id reaches across their border, and a tokenizer that puts a space before a
    text (sentencepiece's add_dummy_prefix) puts one before every part. Bytes that are not UTF-8 (Python files may hold
    any) become U+FFFD for a tokenizer that takes text alone.
    """
    try:
        ids = tokenizer.encode(content)
    except DataError:
        if isinstance(content, str):
            raise
        ids = tokenizer.encode(content.decode("utf-8", errors="replace"))
    bos = tokenizer.bos_id if first else None
    begin = bos is not None
    tokens = np.empty(begin + len(ids) + last, dtype=np.int32)
    tokens[begin : begin + len(ids)] = ids
    if bos is not None:
        tokens[0] = bos
    if last:
        tokens[-1] = tokenizer.eos_id
    return tokens
