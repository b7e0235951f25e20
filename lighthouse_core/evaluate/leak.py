"""The leak test: does a prediction change when only later tokens do?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class LeakRow:
    """The leak at one distance.

    Attributes:
        distance: tokens between the one predicted and the first one replaced.
        mean: mean paired difference of the loss, replaced minus original, nats. 0 for a causal model; positive where
            the model reads the tokens that were replaced.
        standard_error: of the mean, over pairs.
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
    logits: Callable[[Tensor], Tensor],
    sequences: Tensor,
    replacements: Tensor,
    cuts: Sequence[int],
    distances: Sequence[int] = (0, 1, 4, 16, 64),
) -> list[LeakRow]:
    """Paired loss differences: every token from a cut t on is replaced by other text, and the loss of predicting
    token t - d is compared with that of the untouched sequence.

    Args:
        logits: a model, tokens [B, N] int64 -> [B, N, V]; it must answer the same to the same input.
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
    original = logits(sequences)
    differences: dict[int, list[Tensor]] = {d: [] for d in distances}
    for cut in cuts:
        replaced = logits(torch.cat((sequences[:, :cut], replacements[:, cut:]), dim=1))
        for d in distances:
            target = sequences[:, cut - d]
            before, after = (
                cross_entropy(x[:, cut - d - 1].double(), target, reduction="none") for x in (original, replaced)
            )
            differences[d].append(after - before)
    rows = []
    for d, pairs in differences.items():
        x = torch.cat(pairs)
        error = x.std().item() / sqrt(len(x)) if len(x) > 1 else float("nan")
        rows.append(LeakRow(d, x.mean().item(), error, len(x), x.abs().max().item()))
    return rows
