"""Mixtures: each sample is of one source, and every source has its share of the samples at any time."""

from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import numpy as np

from lighthouse_core.data.documents import stable_hash
from lighthouse_core.data.shuffle import ShuffledStream
from lighthouse_core.data.stream import TokenStream, WalkingStream

_Stream = TokenStream | WalkingStream | ShuffledStream


def next_source(counts: Sequence[int], weights: Sequence[int], seed: int) -> int:
    """Of which source the next sample is.

    With c_s of n samples so far, a source of share w_s may give the next one while c_s < w_s (n + 1). Of
    those that may, the one whose next sample is due first gives it: it is due by sample ceil((c_s + 1) / w_s). No
    sample comes late, as on one processor that serves its tasks by earliest deadline, so c_s differs from w_s n by less
    than 1 at any n.

    Args:
        counts: samples of each source so far.
        weights: of each source, above 0.
        seed: decides among sources whose samples are due at once.
    """
    total, samples = sum(weights), sum(counts)
    due = {
        source: -(-(count + 1) * total // weight)
        for source, (count, weight) in enumerate(zip(counts, weights, strict=True))
        if count * total < weight * (samples + 1)
    }
    first = [source for source in due if due[source] == min(due.values())]
    return min(first, key=lambda source: stable_hash("mixture", seed, samples, source)) if len(first) > 1 else first[0]


class MixtureStream:
    """Samples of several streams. A stream goes on where its last sample ended.

    Args:
        streams: of the sources.
        weights: of the sources, in their ratio.
        seq_len: tokens of a sample.

    Attributes:
        start: a named tuple of plain integers: how many samples each source has given, and its own position.
    """

    def __init__(self, streams: Sequence[_Stream], weights: Sequence[int], seq_len: int):
        self.streams = streams
        self.weights = weights
        self.seq_len = seq_len
        # That of the validation order, which does not depend on a recipe's, is theirs.
        self.seed = streams[0].seed
        names, values = [], []
        for number, stream in enumerate(streams):
            names += [f"source_{number}_{name}" for name in ("samples", *stream.start._fields)]
            values += [0, *stream.start]
        # How many fields there are depends on the sources.
        self._kind: Any = namedtuple("MixturePosition", names)  # type: ignore[misc]
        self.start: Any = self._kind(*values)

    def split(self, position: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        """(samples, own position) of each source."""
        parts: list[tuple[int, tuple[int, ...]]] = []
        begin = 0
        for stream in self.streams:
            end = begin + 1 + len(stream.start)
            parts.append((position[begin], type(stream.start)(*position[begin + 1 : end])))
            begin = end
        return parts

    def join(self, parts: Sequence[tuple[int, tuple[int, ...]]]) -> Any:
        """The position that `split` takes apart."""
        return self._kind(*(value for samples, own in parts for value in (samples, *own)))

    def cursor(self, position: Sequence[int]) -> "_Mixer":
        return _Mixer(self, position)


class _Mixer:
    def __init__(self, stream: MixtureStream, position: Sequence[int]):
        self.stream = stream
        parts = stream.split(position)
        self._counts = [samples for samples, _ in parts]
        self._cursors = [one.cursor(own) for one, (_, own) in zip(stream.streams, parts, strict=True)]

    @property
    def position(self) -> Any:
        return self.stream.join([(count, one.position) for count, one in zip(self._counts, self._cursors, strict=True)])

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        assert count == self.stream.seq_len
        return self._cursors[self._next()].take(count)

    def skip(self, count: int) -> None:
        assert count % self.stream.seq_len == 0
        before = list(self._counts)
        for _ in range(count // self.stream.seq_len):
            self._next()
        for cursor, first, last in zip(self._cursors, before, self._counts, strict=True):
            if last > first:
                cursor.skip((last - first) * self.stream.seq_len)

    def _next(self) -> int:
        source = next_source(self._counts, self.stream.weights, self.stream.seed)
        self._counts[source] += 1
        return source
