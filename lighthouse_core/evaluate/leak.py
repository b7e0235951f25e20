"""The leak test: does a prediction change when only later tokens do?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor


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

    Returns:
        One row a distance, over B * len(cuts) pairs.

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
        means = x.mean(0)
        error = means.std().item() / sqrt(len(means)) if len(means) > 1 else float("nan")
        rows.append(LeakRow(d, x.mean().item(), error, x.numel(), x.abs().max().item()))
    return rows
