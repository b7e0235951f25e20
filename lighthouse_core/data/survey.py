"""What is in a recipe's data: how many documents, how long, and what they look like as tokens."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lighthouse_core.data.build import build_stream
from lighthouse_core.data.checks import checked_tokenizer
from lighthouse_core.data.documents import Split, TimeIsUp, Tokenizer, timely
from lighthouse_core.data.stream import NoDocuments, Position, TokenStream

if TYPE_CHECKING:
    from lighthouse_core.config import Recipe


@dataclass(frozen=True)
class Survey:
    """One split.

    Attributes:
        split: "train" or "validation".
        lengths: tokens of each document, BOS and EOS counted.
        complete: whether these are all documents, rather than the first ones of the order of training.
        seq_len: the recipe's context.
        samples: the first tokens of some documents, decoded.
    """

    split: Split
    lengths: np.ndarray
    complete: bool
    seq_len: int
    samples: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def share_in_long(self) -> float:
        """Share of the tokens that are in documents longer than the context."""
        return float(self.lengths[self.lengths > self.seq_len].sum() / self.tokens) if self.tokens else 0.0


def survey(recipe: "Recipe", split: Split, *, seconds: float, samples: int, sample_tokens: int = 100) -> Survey:
    """Look at one split of a recipe's data, which may be empty.

    Args:
        recipe: its data, context and seed.
        split: which.
        seconds: at most so long, where documents must be read to know their lengths.
        samples: how many documents to decode the beginning of: the first of the order of training.
        sample_tokens: tokens to decode of each.

    Raises:
        DataError: as training would, but for a split without documents.
    """
    tokenizer = checked_tokenizer(recipe)
    try:
        return _survey(recipe, tokenizer, split, seconds, samples, sample_tokens)
    except NoDocuments:
        return Survey(split, np.zeros(0, dtype=np.int64), True, recipe.training.seq_len, ())


def _survey(
    recipe: "Recipe", tokenizer: Tokenizer, split: Split, seconds: float, samples: int, sample_tokens: int
) -> Survey:
    # The order of samples is no matter here, and not every tokenizer's can be shuffled.
    data = recipe.data.model_copy(update={"shuffle": "documents"})
    stream, _ = build_stream(data, tokenizer, recipe.training.seed, split)
    texts: list[str] = []

    def decode(tokens: np.ndarray) -> None:
        begin = int(tokenizer.bos_id is not None)
        texts.append(tokenizer.decode(tokens[begin : begin + sample_tokens]))

    if isinstance(stream, TokenStream):
        lengths = np.concatenate([unit.document_lengths() for unit in stream.units])
        position = stream.start
        while len(texts) < samples and position.epoch == 0:
            # The document ends where another begins, or goes on beyond what is shown.
            tokens, places = stream.read(position, sample_tokens + 2)
            following = np.flatnonzero(places[1:] == 0)
            decode(tokens[: following[0] if len(following) else None])
            position = _next_document(stream, position, sample_tokens)
        return Survey(split, lengths, True, recipe.training.seq_len, tuple(texts))

    found: list[int] = []
    complete, length = False, 0
    try:
        for before, _, tokens, last in stream.documents(stream.start, timely(stream.keep, time.monotonic() + seconds)):
            if before.epoch:
                complete = True
                break
            if not length and len(texts) < samples:
                decode(tokens[: -1 if last else None])
            length += len(tokens)
            if last:
                found.append(length)
                length = 0
    except TimeIsUp:
        pass
    return Survey(split, np.array(found, dtype=np.int64), complete, recipe.training.seq_len, tuple(texts))


def _next_document(stream: TokenStream, position: Position, block: int) -> Position:
    """The position at which the document after the one at `position` begins."""
    while True:
        places = stream.read(position, block)[1]
        following = np.flatnonzero(places[1:] == 0)
        if len(following):
            return stream.advance(position, int(following[0]) + 1)
        position, block = stream.advance(position, block - 1), 2 * block
