"""Samples in a seeded order: neighbours in a batch are then of different documents, however long these are."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lighthouse_core.data.documents import stable_hash
from lighthouse_core.data.stream import Position, TokenStream


class SamplePosition(NamedTuple):
    """A place in a stream of shuffled samples.

    Attributes:
        epoch: times the data was passed before.
        sample: samples of this epoch already passed.
    """

    epoch: int = 0
    sample: int = 0


class ShuffledStream:
    """The samples that each epoch of `stream` can be cut into, in another order.

    What makes no whole sample is passed over, at the beginning and at the end of an epoch: how much of it at which is
    drawn anew, so every epoch is cut at other places, also where it is one document. It is a whole multiple of the
    stream's `align`, and `seq_len` must be one, so that documents begin at multiples of it in the samples, too.
    """

    start = SamplePosition()

    def __init__(self, stream: TokenStream, seq_len: int):
        self.stream = stream
        assert seq_len % stream.align == 0
        self.seq_len = seq_len
        self.seed = stream.seed
        # Text shorter than one sample is repeated.
        self.samples = max(1, stream.length // seq_len)

    def cursor(self, position: Sequence[int]) -> "_Drawer":
        return _Drawer(self, SamplePosition(*position))

    def read(self, position: SamplePosition) -> tuple[np.ndarray, np.ndarray]:
        """The sample at a place and the token after it, int64, and their positions within documents, int32; both
        [seq_len + 1]."""
        key, align = f"{self.seed} {position.epoch}", self.stream.align
        left = self.stream.length - self.samples * self.seq_len
        first = stable_hash("cut", key) % (left // align + 1 if left >= 0 else self.stream.length // align) * align
        first += permuted(position.sample, self.samples, key) * self.seq_len
        return self.stream.read(self.stream.advance(Position(position.epoch), first), self.seq_len + 1)


class _Drawer:
    def __init__(self, stream: ShuffledStream, position: SamplePosition):
        self.stream = stream
        self.position = position

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        assert count == self.stream.seq_len
        taken = self.stream.read(self.position)
        self.skip(count)
        return taken

    def skip(self, count: int) -> None:
        assert count % self.stream.seq_len == 0
        passed = self.position.sample + count // self.stream.seq_len
        epochs, sample = divmod(passed, self.stream.samples)
        self.position = SamplePosition(self.position.epoch + epochs, sample)


def permuted(index: int, count: int, key: object) -> int:
    """Where `index` goes in an order of `count` that `key` decides, without the order being made: a Feistel network
    over the next power of four, repeated until it stays below `count`.

    Args:
        index: 0 <= index < count.
        count: of all indices.
        key: another one gives another order.
    """
    half = max(1, -(-(count - 1).bit_length() // 2))
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (stable_hash("shuffle", key, turn, right) & mask)
        index = left << half | right
        if index < count:
            return index
