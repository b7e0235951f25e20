"""Sequences of held-out text, and the documents that each is packed from where these are kept apart.

B sequences, N tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lighthouse_core.attention.context import Documents
from lighthouse_core.models.labels import IGNORED


class PackedSequence(NamedTuple):
    """The documents of one sequence.

    Attributes:
        documents: of the sequence; the padding behind a document belongs to it.
        positions: int32 [1, N], by which RoPE turns each token.
        before: int64 [N - 1], of each token but the first of the sequence: the tokens of its document before it in this
            sequence, which are those that it may see. 0 where the label is ignored: the first token of a document, and
            padding.
    """

    documents: Documents
    positions: Tensor
    before: Tensor

    @classmethod
    def of(cls, inputs: dict[str, Any], labels: Tensor) -> "PackedSequence":
        """That of a batch of one sequence, as `TokenLoader` yields it."""
        documents = inputs["documents"]
        starts = documents.starts.long()
        token = torch.arange(1, labels.shape[1])
        before = token - starts[torch.searchsorted(starts, token, right=True) - 1]
        return cls(documents, inputs["positions"], before.where(labels[0, :-1] != IGNORED, 0))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first token of each document, and the one behind its last, padding counted."""
        return [(start, end) for start, end in pairwise(self.documents.starts.tolist()) if start < end]


@dataclass(frozen=True)
class Text:
    """Held-out text.

    Attributes:
        tokens: int64 [B, N].
        packed_sequences: one a sequence; none where the tokens of a sequence all see each other.
    """

    tokens: Tensor
    packed_sequences: tuple[PackedSequence, ...] = ()

    def __getitem__(self, which: slice) -> "Text":
        return Text(self.tokens[which], self.packed_sequences[which])

    def __iter__(self) -> Iterator[tuple[Tensor, PackedSequence | None]]:
        """The sequences, [1, N] each, with their documents where these are kept apart."""
        yield from zip(self.tokens.split(1), self.packed_sequences or [None] * len(self.tokens), strict=True)

    @property
    def before(self) -> Tensor | None:
        """int64 [B, N - 1], see `PackedSequence`; None where every label counts."""
        return torch.stack([packed.before for packed in self.packed_sequences]) if self.packed_sequences else None
