"""The stream: documents in a seeded order, epoch after epoch, as one endless sequence BOS document EOS BOS ..."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lighthouse_core.data.sources import Document, stable_hash
from lighthouse_core.data.tokenizer import BytesTokenizer


class Position(NamedTuple):
    """A place in the stream.

    Attributes:
        epoch: times the data was passed before.
        document: index into this epoch's order.
        offset: tokens of that document already passed, BOS counted; less than its length.
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0


class TokenStream:
    """Random access to the endless token stream.

    The bytes tokenizer gives one id a byte, so file sizes are token counts and passing over text reads no file.
    """

    def __init__(self, documents: Sequence[Document], tokenizer: BytesTokenizer, seed: int):
        self.documents = documents
        self.tokenizer = tokenizer
        self.seed = seed
        self._lengths = np.array([document.size + 2 for document in documents], dtype=np.int64)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._tokens_of: tuple[int, np.ndarray] | None = None

    def advance(self, position: Position, count: int) -> Position:
        """The position `count` tokens further on; reads no document."""
        starts = self._order(position.epoch)[1]
        # Every epoch has the same documents, hence the same length: starts[-1].
        epochs, place = divmod(int(starts[position.document]) + position.offset + count, int(starts[-1]))
        epoch = position.epoch + epochs
        starts = self._order(epoch)[1]
        document = int(np.searchsorted(starts, place, side="right")) - 1
        return Position(epoch, document, place - int(starts[document]))

    def read(self, position: Position, count: int) -> np.ndarray:
        """The `count` tokens from `position` on, int64 [count].

        Raises:
            DataError: a document cannot be read as it was listed.
        """
        out = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            tokens = self._document(position)[position.offset :][: count - filled]
            out[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
            position = self.advance(position, len(tokens))
        return out

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices of documents in this epoch's order, token offset at which each begins and, last, the total)."""
        if epoch not in self._orders:
            ranked = sorted(
                range(len(self.documents)),
                key=lambda i: (stable_hash("order", self.seed, epoch, self.documents[i].identity), i),
            )
            order = np.array(ranked)
            starts = np.concatenate([[0], np.cumsum(self._lengths[order])])
            # A global micro-batch straddles at most a few epochs, of which the neighbour is the one asked for again.
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) == 1} | {epoch: (order, starts)}
        return self._orders[epoch]

    def _document(self, position: Position) -> np.ndarray:
        """BOS, ids, EOS of the document at `position`. The last one is kept: long documents hold many samples."""
        index = int(self._order(position.epoch)[0][position.document])
        if self._tokens_of is None or self._tokens_of[0] != index:
            self._tokens_of = None
            ids = self.tokenizer.encode(self.documents[index].read())
            tokens = np.concatenate([[self.tokenizer.bos_id], ids, [self.tokenizer.eos_id]], dtype=np.int32)
            self._tokens_of = index, tokens
        return self._tokens_of[1]
