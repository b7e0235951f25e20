"""Losses on held-out text: as a whole, by position, and with a short context.

Means are over sequences, each of which counts alike, and so are their standard errors: tokens of one text are not
independent of each other.
"""

from dataclasses import dataclass
from math import log, sqrt

import torch
from torch import Tensor

from lighthouse_core.evaluate.subject import Subject


@dataclass(frozen=True)
class Mean:
    """Over sequences.

    Attributes:
        mean: nats per token, unless it is said otherwise.
        standard_error: of the mean; NaN for one sequence.
        sequences: how many.
    """

    mean: float
    standard_error: float
    sequences: int


@dataclass(frozen=True)
class PositionLoss:
    """The loss of the tokens that have between `first` and `last` tokens before them."""

    first: int
    last: int
    loss: Mean


@dataclass(frozen=True)
class ContextLoss:
    """What the tokens beyond `context` lose where the model sees no more than that.

    Attributes:
        context: the most tokens that are seen before each; no token sees less than half as many.
        full: loss with all tokens before each.
        short: loss of the same tokens.
        gain: short - full, paired by sequence: what the far tokens are worth.
    """

    context: int
    full: Mean
    short: Mean
    gain: Mean


def mean_over(per_sequence: Tensor) -> Mean:
    """Of one number [B] a sequence."""
    count = len(per_sequence)
    error = per_sequence.std().item() / sqrt(count) if count > 1 else float("nan")
    return Mean(per_sequence.mean().item(), error, count)


def bits_per_byte(subject: Subject, tokens: Tensor, losses: Tensor) -> Mean | None:
    """The same losses per byte of the text that they predict, all bits over all bytes.

    The bytes are those that each token stands for by the vocabulary (`token_bytes` of a tokenizer). Where a sequence
    cuts a character, its bytes on this side count. Bytes that are not UTF-8 count as they are. BOS, EOS, special and
    unknown tokens and rows above the vocabulary stand for no text; they count with their loss alone.

    Args:
        subject: whose tokenizer says how many bytes a token stands for.
        tokens: [B, N].
        losses: [B, N - 1], nats.

    Returns:
        Bits per byte; None where the rules of the tokenizer do not tell the bytes, or there are none.
    """
    meanings = subject.tokenizer.token_bytes()
    if meanings is None:
        return None
    sizes = torch.tensor([*map(len, meanings), 0], dtype=torch.float64)
    length = sizes[tokens[:, 1:].clamp(max=len(meanings))].sum(1)
    if not length.sum():
        return None
    bits = losses.double().sum(1) / log(2)
    ratio = (bits.sum() / length.sum()).item()
    # Of a ratio of sums, to first order.
    error = mean_over((bits - ratio * length) / length.mean()).standard_error
    return Mean(ratio, error, len(tokens))


def by_position(losses: Tensor) -> list[PositionLoss]:
    """Losses in bins of doubling width: tokens with 1, 2 to 3, 4 to 7, ... tokens before them.

    Args:
        losses: [B, N - 1]; column i is of the token with i + 1 before it.
    """
    bins, first = [], 1
    while first <= losses.shape[1]:
        last = min(2 * first - 1, losses.shape[1])
        bins.append(PositionLoss(first, last, mean_over(losses[:, first - 1 : last].double().mean(1))))
        first = last + 1
    return bins


def short_context(subject: Subject, tokens: Tensor, losses: Tensor, context: int) -> ContextLoss:
    """Compare losses in full with those in windows of `context` tokens that overlap by half.

    Args:
        subject: the model.
        tokens: [B, N], N > context.
        losses: [B, N - 1] of the same tokens in full.
        context: even.

    Raises:
        ValueError: for a context that is odd, or not shorter than the sequences.
    """
    length = tokens.shape[1]
    if context < 2 or context % 2 or context >= length:
        raise ValueError(f"a context of {context} tokens must be even and below the length of {length}")
    half = context // 2
    short = torch.full_like(losses, torch.nan)
    # Each window gives the losses of its second half.
    for start in range(0, length - half, half):
        window = tokens[:, start : start + context + 1]
        if window.shape[1] > half + 1:
            short[:, start + half : start + context] = subject.losses(window)[:, half:]
    beyond = slice(context, None)
    full, cut = losses[:, beyond].double().mean(1), short[:, beyond].double().mean(1)
    return ContextLoss(context, mean_over(full), mean_over(cut), mean_over(cut - full))
