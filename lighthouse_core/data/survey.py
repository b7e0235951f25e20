"""What is in a recipe's data: how many documents, how long, and what they look like as tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lighthouse_core.data.build import Stream, build_stream, check_apart, of_source
from lighthouse_core.data.checks import checked_tokenizer
from lighthouse_core.data.documents import Split, TimeIsUp, Tokenizer, timely
from lighthouse_core.data.files import FilesSource
from lighthouse_core.data.padding import padded
from lighthouse_core.data.stream import NoDocuments, Position, TokenStream, WalkingStream

if TYPE_CHECKING:
    from lighthouse_core.config import Recipe


# Documents whose mean stands for all.
_ENOUGH = 1 << 20


@dataclass(frozen=True)
class Survey:
    """One split.

    Attributes:
        split: "train" or "validation".
        lengths: tokens of each document, BOS and EOS counted, and no padding; empty where they were not asked for.
        complete: whether these are all documents, rather than the first ones of the order of training.
        seq_len: the recipe's context.
        samples: the first tokens of some documents, decoded.
        align: `Recipe.alignment`; None where documents are not kept apart.
        size: bytes of the files, of prepared tokens and of Python sources of this split alone; None where not known.
        compressed: whether these are of files that are, or some are, compressed, by their names.
        source: the name of the source.
        share: of the source in the sequences of a mixture.
        epochs: times that the steps of the recipe, those of its recovery counted, pass the split; None where not known.
        nulls: rows passed over, as their text is null or empty; 0 for prepared tokens, which have no rows.
        known: tokens of an epoch, where they are known without reading.
    """

    split: Split
    lengths: np.ndarray
    complete: bool
    seq_len: int
    samples: tuple[str, ...]
    align: int | None = None
    size: int | None = None
    compressed: bool = False
    source: str = ""
    share: float = 1.0
    epochs: float | None = None
    nulls: int = 0
    known: int | None = None

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum()) if self.known is None else self.known

    @property
    def share_in_long(self) -> float:
        """Share of the tokens that are in documents longer than the context."""
        return float(self.lengths[self.lengths > self.seq_len].sum() / self.tokens) if self.tokens else 0.0

    @property
    def longer(self) -> int:
        """Documents longer than the context."""
        return int((self.lengths > self.seq_len).sum())

    @property
    def padded(self) -> int:
        """Tokens, padding counted."""
        return int(padded(self.lengths, self.align or 1).sum())

    @property
    def pieces(self) -> np.ndarray:
        """Tokens of what attention takes for a document where documents are kept apart: they lie one behind another,
        each with its padding, and are cut where samples end."""
        ends = np.cumsum(padded(self.lengths, self.align or 1))
        cuts = np.arange(0, ends[-1] if len(ends) else 0, self.seq_len)
        return np.diff(np.union1d(cuts, ends))

    @property
    def padding(self) -> float:
        """Share of what training sees that is padding behind documents."""
        return 1 - self.tokens / self.padded if self.tokens else 0.0

    @property
    def ignored(self) -> float:
        """Share of the labels that are ignored where documents are kept apart: of padding, and of the last token of
        each document."""
        return (self.padded - self.tokens + len(self.lengths)) / self.padded if self.tokens else 0.0


class Quantiles(NamedTuple):
    """Lengths of documents in tokens: what half, 90% and 99% of them have at most, and the longest one."""

    median: int
    p90: int
    p99: int
    longest: int


def quantiles(lengths: np.ndarray) -> Quantiles:
    """Of the lengths of documents; zeros where there are none."""
    if not len(lengths):
        return Quantiles(0, 0, 0, 0)
    return Quantiles(*np.quantile(lengths, (0.5, 0.9, 0.99, 1.0), method="higher").tolist())


def mixed_padding(surveys: Sequence[Survey]) -> float:
    """Share of what training sees of all sources that is padding behind documents."""
    return sum(one.share * one.padding for one in surveys)


def mixed_ignored(surveys: Sequence[Survey]) -> float:
    """Share of the labels of all sources that are ignored where documents are kept apart."""
    return sum(one.share * one.ignored for one in surveys)


def mixed_pieces(surveys: Sequence[Survey]) -> list[int]:
    """`Survey.pieces` of all sources: of each as many tokens as its share of the sequences has, and at most the first
    2^20 pieces. Every source has documents."""
    tokens = min(one.padded / one.share for one in surveys)
    pieces = [one.pieces[: np.searchsorted(one.pieces.cumsum(), one.share * tokens) + 1] for one in surveys]
    return np.concatenate([some[:_ENOUGH] for some in pieces]).tolist()


def _size(stream: Stream) -> int | None:
    if isinstance(stream, TokenStream):
        return sum(unit.size for unit in stream.units)
    return sum(stream.source.sizes) if all(stream.source.sizes) else None


def _compressed(stream: Stream) -> bool:
    source = stream.source if isinstance(stream, WalkingStream) else None
    return isinstance(source, FilesSource) and any(file.is_compressed for file in source.files)


def _tokens_of_run(recipe: "Recipe", share: float) -> float:
    training = recipe.training
    return share * (training.steps + recipe.recover.steps) * training.global_batch_size * training.seq_len


def survey(
    recipe: "Recipe", split: Split, *, seconds: float, samples: int, sample_tokens: int = 100, lengths: bool = True
) -> list[Survey]:
    """Look at one split of each source of a recipe's data, which may be empty.

    Args:
        recipe: its data, context and seed.
        split: which.
        seconds: at most so long for each source, where documents must be read to know their lengths.
        samples: how many documents of each source to decode the beginning of: the first of the order of training.
        sample_tokens: tokens to decode of each.
        lengths: whether to read how long documents are where their tokens are known without it.

    Raises:
        DataError: as training would, but for a split without documents.
    """
    tokenizer, data = checked_tokenizer(recipe), recipe.data
    check_apart(data)
    found = []
    for name, part, share in zip(data.names, data.parts, data.shares, strict=True):
        alone = recipe.model_copy(update={"data": part})
        try:
            with of_source(data, name):
                one = _survey(alone, tokenizer, split, seconds, samples, sample_tokens, lengths)
        except NoDocuments:
            one = Survey(split, np.zeros(0, dtype=np.int64), True, recipe.training.seq_len, ())
        known = one.complete and one.tokens and split == "train"
        one = replace(one, source=name, share=share, align=recipe.alignment)
        epoch = one.padded if len(one.lengths) else one.tokens
        found.append(replace(one, epochs=_tokens_of_run(recipe, share) / epoch) if known else one)
    return found


def _survey(
    recipe: "Recipe",
    tokenizer: Tokenizer,
    split: Split,
    seconds: float,
    samples: int,
    sample_tokens: int,
    read_lengths: bool,
) -> Survey:
    # The order of samples is no matter here, and not every tokenizer's can be shuffled. Documents come without padding.
    data = recipe.data.model_copy(update={"shuffle": "documents"})
    stream, _ = build_stream(data, tokenizer, recipe.training.seed, split)
    texts: list[str] = []

    def decode(tokens: np.ndarray) -> None:
        begin = int(tokenizer.bos_id is not None)
        texts.append(tokenizer.decode(tokens[begin : begin + sample_tokens]))

    if isinstance(stream, TokenStream):
        found_lengths = [unit.document_lengths() for unit in stream.units] if read_lengths else []
        position = stream.start
        while len(texts) < samples and position.epoch == 0:
            # The document ends where another begins, or goes on beyond what is shown.
            tokens, places = stream.read(position, sample_tokens + 2)
            following = np.flatnonzero(places[1:] == 0)
            decode(tokens[: following[0] if len(following) else None])
            position = _next_document(stream, position, sample_tokens)
        return Survey(
            split,
            np.concatenate([np.zeros(0, dtype=np.int64), *found_lengths]),
            True,
            recipe.training.seq_len,
            tuple(texts),
            size=_size(stream),
            known=sum(unit.tokens for unit in stream.units),
        )

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
    nulls = stream.source.nulls if stream.nulls is None else stream.nulls
    return Survey(
        split,
        np.array(found, dtype=np.int64),
        complete,
        recipe.training.seq_len,
        tuple(texts),
        size=_size(stream),
        compressed=_compressed(stream),
        nulls=nulls,
    )


def _next_document(stream: TokenStream, position: Position, block: int) -> Position:
    """The position at which the document after the one at `position` begins."""
    while True:
        places = stream.read(position, block)[1]
        following = np.flatnonzero(places[1:] == 0)
        if len(following):
            return stream.advance(position, int(following[0]) + 1)
        position, block = stream.advance(position, block - 1), 2 * block
