"""The loader: cuts the token stream into samples and hands one rank the batches that are its own."""

import atexit
import logging
import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from lighthouse_core.data.build import Stream, build_streams, shuffles
from lighthouse_core.data.documents import Split
from lighthouse_core.data.mixture import MixtureStream
from lighthouse_core.data.packing import apart
from lighthouse_core.data.shuffle import ShuffledStream
from lighthouse_core.data.stream import TokenStream, WalkingStream
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError

if TYPE_CHECKING:
    from lighthouse_core.config.data import DataSection

T = TypeVar("T")
_log = logging.getLogger(__name__)


class _Batch(NamedTuple):
    """A batch, and the data position after it."""

    inputs: dict[str, Any]
    labels: torch.Tensor
    samples: int
    position: tuple[int, ...]


class Drawn(NamedTuple):
    """What was taken of a source.

    Attributes:
        samples: sequences, by all ranks together.
        epoch: that the source is in, from 1.
    """

    samples: int
    epoch: int


class TokenLoader:
    """Batches of one rank from the endless global sequence of samples.

    Sample i holds tokens [i*seq_len, (i+1)*seq_len] of the stream, or is another one where samples are shuffled; its
    last token is a label only. A global micro-batch is the next world_size * local_batch_size samples, of which rank r
    has the r-th run of local_batch_size.

    The data position is global: `samples` handed out so far by all ranks together, and the stream's own position at
    which the next one begins (`Position`: epoch, document, offset; `SamplePosition`: epoch, sample; `WalkPosition`:
    epoch, file, row, byte, offset; of a mixture, the samples and the position of each source). No rank or batch size is
    in it, so any of them may change on resume, and seeking passes over no text.

    Attributes:
        names: of the sources, for reports.
        before_mending: the fingerprint before files were mended that could not be read: a position with it holds, too.
        documents: whether documents are kept apart, see `__iter__`.
        prefetch: batches that a thread makes ahead; 0 for none, and no thread.
    """

    def __init__(
        self,
        stream: Stream | ShuffledStream | MixtureStream,
        *,
        names: Sequence[str],
        seq_len: int,
        local_batch_size: int,
        rank: int,
        world_size: int,
        fingerprint: int,
        restart: bool,
        before_mending: int | None = None,
        documents: bool = False,
        prefetch: int = 2,
    ):
        assert seq_len > 0 and local_batch_size > 0 and 0 <= rank < world_size
        self.stream = stream
        self.names = names
        self.seq_len = seq_len
        self.local_batch_size = local_batch_size
        self.rank = rank
        self.world_size = world_size
        self.fingerprint = fingerprint
        self.restart = restart
        self.before_mending = before_mending
        self.documents = documents
        self.prefetch = prefetch
        self._samples = 0
        self._position: tuple[int, ...] = stream.start
        self._told: set[str] = set()

    def __iter__(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Yields ({"input": int64 [B, N], "positions": int32 [B, N]}, labels int64 [B, N]), for ever.

        B is local_batch_size, N is seq_len. `positions` is the index of each token within its document, from 0; a
        document that began in an earlier sample goes on counting, so documents begin where it is 0.

        Where documents are kept apart there are also "documents"; labels are -100 where the next token is of no
        document or of another one, and positions stay below N. `packing.apart` has each of them.

        Training goes on from the data position; validation begins anew with each iterator.

        Raises:
            DataError: a document cannot be read as it was listed.
        """
        if self.restart:
            self._samples, self._position = 0, self.stream.start
        return self._batches()

    def _batches(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        with closing(_ahead(self._cut(self._samples, self._position), self.prefetch)) as batches:
            for batch in batches:
                self._tell_of_nulls()
                before = self.drawn()
                self._samples, self._position = batch.samples, batch.position
                if not self.restart and self.rank == 0:
                    self._tell_of_epochs(before)
                yield batch.inputs, batch.labels

    def drawn(self) -> dict[str, Drawn]:
        """What was taken so far of each source, by its name."""
        if isinstance(self.stream, MixtureStream):
            parts = self.stream.split(self._position)
        else:
            parts = [(self._samples, self._position)]
        # Every position begins with its epoch.
        return {name: Drawn(samples, own[0] + 1) for name, (samples, own) in zip(self.names, parts, strict=True)}

    def _tell_of_epochs(self, before: dict[str, Drawn]) -> None:
        for name, drawn in self.drawn().items():
            # Of text that is passed many times, not every line.
            if drawn.epoch > before[name].epoch and (drawn.epoch <= 10 or drawn.epoch % 10 == 1):
                _log.info("source %s: epoch %d begins", name, drawn.epoch)

    def _tell_of_nulls(self) -> None:
        """Log once a source, on the first rank, that rows have no text."""
        if self.rank or self.restart:
            return
        streams = self.stream.streams if isinstance(self.stream, MixtureStream) else [self.stream]
        for name, stream in zip(self.names, streams, strict=True):
            if name not in self._told and isinstance(stream, WalkingStream) and (count := stream.source.nulls):
                self._told.add(name)
                of = f"source {name}: " if isinstance(self.stream, MixtureStream) else ""
                _log.warning("%srows whose text is null or empty are passed over: %d so far", of, count)

    def _cut(self, samples: int, position: tuple[int, ...]) -> Generator[_Batch, None, None]:
        local_tokens = self.local_batch_size * self.seq_len
        cursor = self.stream.cursor(position)
        while True:
            cursor.skip(self.rank * local_tokens)
            taken = [cursor.take(self.seq_len) for _ in range(self.local_batch_size)]
            ids, places = (np.stack(rows) for rows in zip(*taken, strict=True))
            cursor.skip((self.world_size - self.rank - 1) * local_tokens)
            samples += self.world_size * self.local_batch_size
            if self.documents:
                inputs, labels = apart(ids, places)
            else:
                ids, labels, places = (np.ascontiguousarray(x) for x in (ids[:, :-1], ids[:, 1:], places[:, :-1]))
                inputs = {"input": ids, "positions": places}
            arrays = {key: torch.from_numpy(x) for key, x in inputs.items() if isinstance(x, np.ndarray)}
            yield _Batch(inputs | arrays, torch.from_numpy(labels), samples, cursor.position)

    def state_dict(self) -> dict[str, int]:
        """The position after the batch last yielded, and what it holds for; plain integers, equal on every rank."""
        fields = self.stream.start._fields
        return {
            "samples": self._samples,
            **dict(zip(fields, map(int, self._position), strict=True)),
            **self._stream_identity(),
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Seek to a position that `state_dict` gave; reads no document.

        Raises:
            DataError: the position belongs to other data, another order of it, or another sequence length, so that
                the run would not see the tokens that an uninterrupted one would.
        """
        mended = self.before_mending is not None and state_dict["fingerprint"] == self.before_mending
        for key, here in self._stream_identity().items():
            there = state_dict[key]
            if there != here and not (mended and key == "fingerprint"):
                raise DataError(*_mismatch(key, there, here))
        self._samples = state_dict["samples"]
        position = {key: state_dict[key] for key in self.stream.start._fields}
        if mended:
            # Where rows begin may have changed, and rows are counted instead: these are the fields of `WalkPosition`.
            position |= {key: 0 for key in position if key.split("_")[-1] == "byte"}
        self._position = type(self.stream.start)(**position)

    def _stream_identity(self) -> dict[str, int]:
        return {"seq_len": self.seq_len, "seed": self.stream.seed, "fingerprint": self.fingerprint}


class _Maker(threading.Thread, Generic[T]):
    """Takes items from an iterator in the background, at most `count` that nobody has asked for."""

    def __init__(self, items: Generator[T, None, None], count: int):
        super().__init__(name="data", daemon=True)
        self.made: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        self.free = threading.Semaphore(count)
        self._items = items
        self._closed = False

    def run(self) -> None:
        try:
            while True:
                self.free.acquire()
                if self._closed:
                    return
                self.made.put((next(self._items), None))
        except BaseException as error:
            self.made.put((None, error))
        finally:
            # Here, rather than whenever the last reference goes: what reads files may be slow to end.
            self._items.close()

    def close(self) -> None:
        """Ends it after the item in progress."""
        self._closed = True
        self.free.release()


@atexit.register
def _end_makers() -> None:
    """A thread that the interpreter finds in native code as it goes down would abort the process."""
    makers = [thread for thread in threading.enumerate() if isinstance(thread, _Maker)]
    for maker in makers:
        maker.close()
    for maker in makers:
        maker.join(timeout=60)


def _ahead(items: Generator[T, None, None], count: int) -> Generator[T, None, None]:
    """The items, of which a thread makes `count` in advance; none, and no thread, for 0."""
    if not count:
        yield from items
        return
    maker = _Maker(items, count)
    maker.start()
    try:
        while True:
            item, error = maker.made.get()
            if error is not None:
                raise error
            assert item is not None
            maker.free.release()
            yield item
    finally:
        maker.close()


def _mismatch(key: str, there: int, here: int) -> tuple[str, str]:
    if key == "fingerprint":
        return (
            "the training data changed since the checkpoint was written "
            "(files, sizes, shards, tokenizer, split, data.shuffle, data.packing)",
            "restore the files (or the Python installation) that the run started with, or start a new run",
        )
    return (
        f"the checkpoint's place in the data was taken with training.{key} = {there}, not {here}",
        f"resume with training.{key} = {there}, or start a new run",
    )


def _shuffled(data: "DataSection", stream: Stream, seq_len: int) -> Stream | ShuffledStream:
    if not shuffles(data, stream):
        return stream
    assert isinstance(stream, TokenStream)
    return ShuffledStream(stream, seq_len)


def build_loader(
    data: "DataSection",
    seq_len: int,
    local_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    split: Split = "train",
    *,
    align: int | None = None,
    mended: Mapping[str, int] | None = None,
    prefetch: int = 2,
) -> TokenLoader:
    """The loader of one rank for the `[data]` section of a recipe.

    `rank` and `world_size` count data-parallel ranks. The validation order does not depend on `seed`, so runs with
    different seeds are measured on the same tokens. `align` is `Recipe.alignment`: with a number, documents are kept
    apart, and `seq_len` is a multiple of it. `mended` has the sizes that files of the source "files" had, by their
    identities, when something in them could not be read: a position from then holds, too.

    Raises:
        DataError: unknown source or tokenizer, missing files, or no documents in this split.
    """
    assert seq_len % (align or 1) == 0
    tokenizer, before_mending = build_tokenizer(data.tokenizer), None
    found, fingerprint = build_streams(data, tokenizer, seed, split, align=align)
    if mended:
        _, before_mending = build_streams(data, tokenizer, seed, split, align=align, sizes=mended)
    streams = [_shuffled(data, stream, seq_len) for stream in found]
    walks = any(isinstance(stream, WalkingStream) for stream in streams)
    if walks and split == "train" and world_size > 1 and rank == 0:
        _log.warning(
            "each of the %d processes tokenizes all of the text; lighthouse data prepare does it once, beforehand",
            world_size,
        )
    return TokenLoader(
        MixtureStream(streams, data.weights, seq_len) if data.sources else streams[0],
        names=data.names,
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        rank=rank,
        world_size=world_size,
        fingerprint=fingerprint,
        restart=split == "validation",
        before_mending=before_mending,
        documents=align is not None,
        prefetch=prefetch,
    )
