"""The stream: documents in a seeded order, epoch after epoch, as one endless sequence BOS document EOS BOS ...
Without the BOS where the tokenizer has none.

Two streams give it. Where token counts are known without reading, `TokenStream` has random access. Elsewhere
`WalkingStream` tokenizes one document after another, on every process. Both hand out cursors.

With an `align` above 1 every document takes a whole multiple of so many tokens: EOS tokens behind it are padding, whose
position within the document is -1. Lengths, places and offsets in a stream count them, so that cutting, seeking and
shuffling know nothing of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lighthouse_core.data.documents import Keep, Place, Source, Split, Tokenizer, epoch_order, keeper, with_ends
from lighthouse_core.data.padding import PADDING, padded
from lighthouse_core.data.sources import Document
from lighthouse_core.errors import DataError

Reader = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


class Cursor(Protocol):
    """A place in a stream that moves on.

    Attributes:
        position: plain integers from which the same stream's `cursor` goes on.
    """

    position: tuple[int, ...]

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next tokens and the one after them, int64 [count + 1], and the index of each within its document (its
        first token, BOS if there is one, is 0; padding is -1), int32 [count + 1]."""

    def skip(self, count: int) -> None:
        """Pass over tokens."""


class Position(NamedTuple):
    """A place in a stream whose token counts are known.

    Attributes:
        epoch: times the data was passed before.
        document: index into this epoch's order of units: documents, or in prepared tokens the files that held them.
        offset: tokens of that unit already passed, BOS, EOS and padding counted; less than its length.
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0


class Unit(Protocol):
    """Tokens that stay together in every epoch; `open` gives a reader (first, count) -> (ids, positions), which may
    return fewer than count. Padding counts in `length`, and neither in `tokens` nor in
    `document_lengths`. `size` is that of what they are read from, in bytes."""

    @property
    def identity(self) -> str: ...

    @property
    def length(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def size(self) -> int: ...

    def open(self) -> Reader: ...

    def document_lengths(self) -> np.ndarray: ...


class BytesUnit:
    """A document of Python files under the bytes tokenizer: one id a byte, so its size is its token count."""

    def __init__(self, document: Document, tokenizer: Tokenizer, align: int = 1):
        self.document = document
        self.tokenizer = tokenizer
        self.identity = document.identity
        self.size = document.size
        self.tokens = document.size + 2
        self.length = padded(self.tokens, align)

    def open(self) -> Reader:
        def read(offset: int, count: int) -> tuple[np.ndarray, np.ndarray]:
            end = min(offset + count, self.length)
            if end > self.tokens:
                part, within = read(offset, self.tokens - offset) if offset < self.tokens else _NOTHING
                return padding_behind(part, within, end - offset, self.tokenizer.eos_id)
            # BOS is token 0, byte i is token i + 1.
            content = self.document.read(max(offset - 1, 0), end - 1 - max(offset - 1, 0))
            part = with_ends(self.tokenizer, content, first=offset == 0, last=end == self.tokens)
            return part, np.arange(offset, end, dtype=np.int32)

        return read

    def document_lengths(self) -> np.ndarray:
        return np.array([self.tokens])


_NOTHING = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)


def padding_behind(ids: np.ndarray, places: np.ndarray, count: int, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their positions, and padding up to `count`."""
    more = count - len(ids)
    return np.pad(ids, (0, more), constant_values=eos), np.pad(places, (0, more), constant_values=PADDING)


class TokenStream:
    """Random access to the endless token stream; passing over text reads nothing.

    Attributes:
        length: tokens of an epoch.
        align: tokens of which every document has a whole multiple.
    """

    start = Position()

    def __init__(self, units: Sequence[Unit], seed: int, align: int = 1):
        self.units = units
        self.seed = seed
        self.align = align
        self._identities = [unit.identity for unit in units]
        self._lengths = np.array([unit.length for unit in units], dtype=np.int64)
        self.length = int(self._lengths.sum())
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._opened: tuple[int, Reader] | None = None

    def cursor(self, position: Sequence[int]) -> "_Seeker":
        return _Seeker(self, Position(*position))

    def advance(self, position: Position, count: int) -> Position:
        """The position `count` tokens further on; reads no document."""
        starts = self._order(position.epoch)[1]
        # Every epoch has the same documents, hence the same length: starts[-1].
        epochs, place = divmod(int(starts[position.document]) + position.offset + count, int(starts[-1]))
        epoch = position.epoch + epochs
        starts = self._order(epoch)[1]
        document = int(np.searchsorted(starts, place, side="right")) - 1
        return Position(epoch, document, place - int(starts[document]))

    def read(self, position: Position, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, positions within their documents) from `position` on: int64 and int32, [count].

        Raises:
            DataError: a document cannot be read as it was listed.
        """
        tokens, places = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int32)
        filled = 0
        while filled < count:
            index = int(self._order(position.epoch)[0][position.document])
            left = min(count - filled, int(self._lengths[index]) - position.offset)
            ids, within = self._open(index)(position.offset, left)
            end = filled + len(ids)
            tokens[filled:end], places[filled:end] = ids, within
            filled = end
            position = self.advance(position, len(ids))
        return tokens, places

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices of units in this epoch's order, token offset at which each begins and, last, the total)."""
        found = self._orders.get(epoch)
        if found is None:
            order = np.array(epoch_order(self._identities, self.seed, epoch))
            found = order, np.concatenate([[0], np.cumsum(self._lengths[order])])
            # A global micro-batch straddles at most a few epochs, of which the neighbour is the one asked for again.
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) == 1} | {epoch: found}
        return found

    def _open(self, index: int) -> Reader:
        """The last unit read stays open: long documents hold many samples."""
        opened = self._opened
        if opened is None or opened[0] != index:
            self._opened = None
            self._opened = opened = index, self.units[index].open()
        return opened[1]


class _Seeker:
    def __init__(self, stream: TokenStream, position: Position):
        self.stream = stream
        self.position = position

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        taken = self.stream.read(self.position, count + 1)
        self.skip(count)
        return taken

    def skip(self, count: int) -> None:
        self.position = self.stream.advance(self.position, count)


class WalkPosition(NamedTuple):
    """A place in a stream whose token counts are not known.

    Attributes:
        epoch: times the data was passed before.
        file: index into this epoch's order of units (files, or shards of a data set).
        row: records of that unit already passed.
        byte: offset of the next record in a line file, else 0.
        offset: tokens of the next record already passed, BOS and padding counted. A document in parts is read from its
            beginning to find them.
    """

    epoch: int = 0
    file: int = 0
    row: int = 0
    byte: int = 0
    offset: int = 0


class WalkingStream:
    """The endless token stream of a source of text, tokenized on the way.

    Attributes:
        nulls: rows without text in the first epoch that this object read to its end, None before.
    """

    start = WalkPosition()

    def __init__(
        self, source: Source, tokenizer: Tokenizer, seed: int, split: Split, validation: float, align: int = 1
    ):
        self.source = source
        self.tokenizer = tokenizer
        self.seed = seed
        self.split: Split = split
        self.validation = validation
        self.align = align
        self.keep = keeper(split, validation)
        self.nulls: int | None = None

    def cursor(self, position: Sequence[int]) -> "_Walker":
        return _Walker(self, WalkPosition(*position))

    def documents(
        self, position: WalkPosition, keep: Keep | None = None
    ) -> Iterator[tuple[WalkPosition, WalkPosition, np.ndarray, bool]]:
        """(place before, place after, tokens with BOS and EOS, True) of every document from `position` on, for ever;
        without padding.

        A document in parts comes as several, of which all but the last have False for True. `keep` takes the place of
        `self.keep`.

        Raises:
            DataError: text that cannot be read, or a whole epoch without a document.
        """
        keep = keep or self.keep
        epoch, first, place = position.epoch, position.file, Place(position.row, position.byte)
        while True:
            found = first > 0 or place != Place()
            order = epoch_order(self.source.identities, self.seed, epoch)
            for number in range(first, len(order)):
                for record in self.source.records(order[number], place, keep):
                    found = True
                    before = WalkPosition(epoch, number, *record.start)
                    after = WalkPosition(epoch, number, *record.end)
                    tokens = with_ends(self.tokenizer, record.content, first=record.first, last=record.last)
                    yield before, after, tokens, record.last
                place = Place()
            if not found:
                raise no_documents(self.split, self.validation)
            self.nulls = self.source.nulls if self.nulls is None else self.nulls
            epoch, first = epoch + 1, 0


class _Walker:
    def __init__(self, stream: WalkingStream, position: WalkPosition):
        self.position = position
        self._documents = stream.documents(position)
        self._align, self._eos = stream.align, stream.tokenizer.eos_id
        # The part that is held, with the padding behind the last one, and the tokens of its document before it.
        self._tokens = np.empty(0, dtype=np.int32)
        self._passed, self._last = 0, True
        # Tokens of the document up to this part's end, without padding.
        self._end = 0
        self._before = self._after = position
        self._bos = stream.tokenizer.bos_id
        # Whether the part that is held is of the document at `position`.
        self._held = False
        if position.offset:
            self._next_part()
            self._held = True
            # A position without a byte counts rows.
            if self._before._replace(byte=0) != position._replace(byte=0, offset=0):
                raise _changed()
            self._hold()

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, places = np.empty(count + 1, dtype=np.int64), np.empty(count + 1, dtype=np.int32)
        filled = 0
        for offset, part in self._pass(count):
            end = filled + len(part)
            tokens[filled:end] = part
            places[filled:end] = np.arange(offset, offset + len(part))
            places[filled + max(0, self._end - offset) : end] = PADDING
            filled = end
        tokens[count], places[count] = self._peek()
        return tokens, places

    def _peek(self) -> tuple[int, int]:
        """The next token, and its position."""
        offset = self.position.offset
        if not offset and self._bos is not None:
            return self._bos, 0  # of a document that need not be read for it
        self._hold()
        return int(self._tokens[offset - self._passed]), offset if offset < self._end else PADDING

    def skip(self, count: int) -> None:
        for _ in self._pass(count):
            pass

    def _pass(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        while count:
            self._hold()
            offset = self.position.offset
            part = self._tokens[offset - self._passed :][:count]
            count -= len(part)
            done = self._last and offset + len(part) == self._passed + len(self._tokens)
            self.position = self._after if done else self._before._replace(offset=offset + len(part))
            self._held = not done
            yield offset, part

    def _hold(self) -> None:
        """Have the part that the next token is in."""
        if not self._held:
            self._next_part()
            self._held = True
        while self.position.offset >= self._passed + len(self._tokens):
            if self._last:
                raise _changed()
            self._next_part()

    def _next_part(self) -> None:
        self._passed = 0 if self._last else self._passed + len(self._tokens)
        self._before, self._after, self._tokens, self._last = next(self._documents)
        self._end = self._passed + len(self._tokens)
        if self._last and (more := -self._end % self._align):
            self._tokens = np.pad(self._tokens, (0, more), constant_values=self._eos)


def _changed() -> DataError:
    return DataError(
        "the training data changed since the checkpoint was written: its place is not in the data any more",
        hint="restore the files that the run started with, or start a new run",
    )


class NoDocuments(DataError):
    """A split that has none."""


def no_documents(split: Split, validation: float) -> NoDocuments:
    if split == "train" and not validation:
        return NoDocuments("every document is empty", hint="name documents with text in data.paths")
    return NoDocuments(
        f"data.validation = {validation} leaves no documents for {split}",
        hint="hold none out where there are few: --set data.validation=0 --set metrics.validation_every=0; else name "
        "more in data.paths",
    )
