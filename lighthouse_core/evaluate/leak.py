"""The leak test: does a prediction change when only later tokens do, or only another document?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from lighthouse_core.evaluate.text import PackedSequence

_Side = Literal["earlier", "later"]


@dataclass(frozen=True)
class LeakRow:
    """The leak at one distance.

    Attributes:
        distance: tokens between the one predicted and the first one replaced.
        mean: mean paired difference of the loss, replaced minus original, nats. 0 for a causal model; positive where
            the model reads the tokens that were replaced.
        standard_error: of the mean, over sequences: the pairs of one are not independent.
        pairs: number of pairs.
        largest: largest absolute difference of any pair, nats.
    """

    distance: int
    mean: float
    standard_error: float
    pairs: int
    largest: float


@torch.no_grad()
def leak(
    losses: Callable[[Tensor, Tensor], Tensor],
    sequences: Tensor,
    replacements: Tensor,
    cuts: Sequence[int],
    distances: Sequence[int] = (0, 1, 4, 16, 64),
    before: Tensor | None = None,
) -> list[LeakRow]:
    """Paired loss differences: every token from a cut t on is replaced by other text, and the loss of predicting
    token t - d is compared with that of the untouched sequence.

    Args:
        losses: of a model, `Subject.losses`: tokens and targets [B, N] int64 -> [B, N - 1] nats, of each target but the
            first after the tokens before it. It must answer the same to the same input.
        sequences: [B, N] int64, the text.
        replacements: [B, N] int64, other text.
        cuts: positions t of the first replaced token, each with 1 + max(distances) <= t < N.
        distances: d, tokens before the cut.
        before: int64 [B, N - 1] where documents are kept apart; 0 for the tokens whose loss does not count, which are
            in no pair. Means are then over sequences.

    Returns:
        One row a distance, over B * len(cuts) pairs or those of them that count; none for a distance without a pair.

    Raises:
        ValueError: for a cut without room before it.
    """
    tokens = sequences.shape[1]
    if not all(max(distances) < cut < tokens for cut in cuts):
        raise ValueError(f"every cut must lie between {max(distances) + 1} and {tokens - 1}")
    original = losses(sequences, sequences).double()
    differences: dict[int, list[Tensor]] = {d: [] for d in distances}
    for cut in cuts:
        other = torch.cat((sequences[:, :cut], replacements[:, cut:]), dim=1)
        raised = losses(other, sequences).double() - original
        for d in distances:
            differences[d].append(raised[:, cut - d - 1])
    rows = []
    for d, pairs in differences.items():
        x = torch.stack(pairs)
        if before is None:
            rows.append(LeakRow(d, x.mean().item(), _error(x.mean(0)), x.numel(), x.abs().max().item()))
            continue
        here = torch.stack([before[:, cut - d - 1] > 0 for cut in cuts])
        found = [column[counts] for column, counts in zip(x.T, here.T, strict=True) if counts.any()]
        if found:
            rows.append(LeakRow(d, *_summary(found)))
    return rows


@dataclass(frozen=True)
class AcrossRow:
    """The leak across documents that are kept apart.

    Attributes:
        replaced: whether the document that was replaced lies before ("earlier") or behind ("later") the token that is
            predicted, in its sequence.
        mean: mean over sequences of the mean paired difference of the loss, replaced minus original, nats. 0 where
            nothing of a document depends on another one.
        standard_error: of the mean, over sequences.
        pairs: number of pairs: a replaced document and a token of another one.
        largest: largest absolute difference of any pair, nats.
    """

    replaced: _Side
    mean: float
    standard_error: float
    pairs: int
    largest: float


@torch.no_grad()
def leak_across(
    losses: Callable[[Tensor, Tensor], Tensor],
    sequences: Tensor,
    replacements: Tensor,
    packed_sequences: Sequence[PackedSequence],
    most: int = 8,
) -> list[AcrossRow]:
    """Paired loss differences of the other documents of a sequence when one is replaced by another of the same length.

    Args:
        losses: see `leak`; it keeps the documents apart.
        sequences: [B, N] int64, the text.
        replacements: [B, N] int64, other text. What lies where the document does takes its place.
        packed_sequences: the documents of each sequence.
        most: replaced documents of a sequence, one at a time, from its first to its last at equal steps.

    Returns:
        One row for earlier and one for later documents; none for what no sequence has.
    """
    original = losses(sequences, sequences).double()
    chosen = [_spread(packed.spans, most) for packed in packed_sequences]
    found: dict[_Side, dict[int, list[Tensor]]] = {"earlier": {}, "later": {}}
    for number in range(max(map(len, chosen))):
        other = sequences.clone()
        replaced = {row: spans[number] for row, spans in enumerate(chosen) if number < len(spans)}
        for row, (start, end) in replaced.items():
            other[row, start:end] = replacements[row, start:end]
        raised = losses(other, sequences).double() - original
        for row, (start, end) in replaced.items():
            counts = packed_sequences[row].before > 0
            # Column i is of token i + 1; the first tokens of documents do not count.
            sides: dict[_Side, slice] = {"later": slice(0, max(start - 1, 0)), "earlier": slice(end, None)}
            for where, part in sides.items():
                if counts[part].any():
                    found[where].setdefault(row, []).append(raised[row, part][counts[part]])
    return [
        AcrossRow(where, *_summary([torch.cat(parts) for parts in rows.values()]))
        for where, rows in found.items()
        if rows
    ]


def _spread(spans: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """At most so many of them, at equal steps; none of one alone."""
    if len(spans) < 2:
        return []
    count = min(most, len(spans))
    return [spans[i * (len(spans) - 1) // max(count - 1, 1)] for i in range(count)]


def _summary(differences: list[Tensor]) -> tuple[float, float, int, float]:
    """(mean, standard error, pairs, largest) of the differences of each sequence."""
    means, pairs = torch.stack([x.mean() for x in differences]), torch.cat(differences)
    return means.mean().item(), _error(means), pairs.numel(), pairs.abs().max().item()


def _error(means: Tensor) -> float:
    """Standard error of the mean of these."""
    return means.std().item() / sqrt(len(means)) if len(means) > 1 else float("nan")
