"""Losses on held-out text: as a whole, by position, and with a short context.

Means are over sequences, each of which counts alike, and so are their standard errors: tokens of one text are not
independent of each other.

Where documents are kept apart, `before` [B, N - 1] has for each loss the tokens of its document before its token, or 0
where the loss does not count (see `PackedSequence`). The mean of a sequence is then that of the losses that count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt

import torch
from torch import Tensor

from lighthouse_core.evaluate.subject import Subject
from lighthouse_core.evaluate.text import PackedSequence


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
    """The loss of the tokens that have between `first` and `last` tokens before them, of their document where documents
    are kept apart."""

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


def per_sequence(losses: Tensor, before: Tensor | None = None) -> Tensor:
    """Means [B] float64 of the losses [B, N - 1] of each sequence that count; a sequence without one is left out."""
    if before is None:
        return losses.double().mean(1)
    rows = [row[here].double().mean() for row, here in zip(losses, before > 0, strict=True) if here.any()]
    return torch.stack(rows) if rows else torch.empty(0, dtype=torch.float64)


def mean_over(per_sequence: Tensor) -> Mean:
    """Of one number [B] a sequence."""
    count = len(per_sequence)
    error = per_sequence.std().item() / sqrt(count) if count > 1 else float("nan")
    return Mean(per_sequence.mean().item(), error, count)


def bits_per_byte(subject: Subject, tokens: Tensor, losses: Tensor, before: Tensor | None = None) -> Mean | None:
    """The same losses per byte of the text that they predict, all bits over all bytes.

    The bytes are those that each token stands for by the vocabulary (`token_bytes` of a tokenizer). Where a sequence
    cuts a character, its bytes on this side count. Bytes that are not UTF-8 count as they are. BOS, EOS, special and
    unknown tokens and rows above the vocabulary stand for no text; they count with their loss alone.

    Args:
        subject: whose tokenizer says how many bytes a token stands for.
        tokens: [B, N].
        losses: [B, N - 1], nats.
        before: where documents are kept apart; tokens whose loss does not count have no bytes either.

    Returns:
        Bits per byte; None where the rules of the tokenizer do not tell the bytes, or there are none.
    """
    meanings = subject.tokenizer.token_bytes()
    if meanings is None:
        return None
    sizes = torch.tensor([*map(len, meanings), 0], dtype=torch.float64)
    bytes_ = sizes[tokens[:, 1:].clamp(max=len(meanings))]
    if before is not None:
        bytes_, losses = bytes_.where(before > 0, 0), losses.where(before > 0, 0)
    length = bytes_.sum(1)
    if not length.sum():
        return None
    bits = losses.double().sum(1) / log(2)
    ratio = (bits.sum() / length.sum()).item()
    # Of a ratio of sums, to first order.
    error = mean_over((bits - ratio * length) / length.mean()).standard_error
    return Mean(ratio, error, len(tokens))


def by_position(losses: Tensor, before: Tensor | None = None) -> list[PositionLoss]:
    """Losses in bins of doubling width: tokens with 1, 2 to 3, 4 to 7, ... tokens before them.

    Args:
        losses: [B, N - 1]; column i is of the token with i + 1 before it.
        before: where documents are kept apart. The mean of a bin is over the sequences that have a token in it.
    """
    bins, first = [], 1
    most = losses.shape[1] if before is None else int(before.max())
    while first <= most:
        last = min(2 * first - 1, most)
        if before is None:
            means = per_sequence(losses[:, first - 1 : last])
        else:
            means = per_sequence(losses, before.where((before >= first) & (before <= last), 0))
        bins.append(PositionLoss(first, last, mean_over(means)))
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
    short = _windows(subject, tokens, losses, context)
    beyond = slice(context, None)
    return _context_loss(context, per_sequence(losses[:, beyond]), per_sequence(short[:, beyond]))


def short_context_of_documents(
    subject: Subject, tokens: Tensor, losses: Tensor, context: int, packed_sequences: Sequence[PackedSequence]
) -> ContextLoss | None:
    """`short_context` within documents that are kept apart: a window of `context` tokens lies in one of them.

    What is measured are the tokens that have more than `context` tokens of their document before them in the sequence.
    A document without such a token loses nothing, and is not measured. A sequence of such documents is left out of the
    means.

    Args:
        subject: the model.
        tokens: [B, N].
        losses: [B, N - 1] of the same tokens in full, documents kept apart.
        context: even.
        packed_sequences: of the sequences.

    Returns:
        None where no token is measured.
    """
    means = []
    for row, own, packed in zip(tokens, losses, packed_sequences, strict=True):
        parts = []
        for start, end in packed.spans:
            # Without the padding behind it.
            count = int((packed.before[start : end - 1] > 0).sum())
            if count > context:
                full = own[None, start : start + count]
                short = _windows(subject, row[None, start : start + count + 1], full, context)
                parts.append(torch.cat((full, short))[:, context:])
        if parts:
            means.append(torch.cat(parts, 1).double().mean(1))
    return _context_loss(context, *torch.stack(means, 1)) if means else None


def _context_loss(context: int, full: Tensor, short: Tensor) -> ContextLoss:
    """Of the means [B] of each sequence."""
    return ContextLoss(context, mean_over(full), mean_over(short), mean_over(short - full))


def _windows(subject: Subject, tokens: Tensor, losses: Tensor, context: int) -> Tensor:
    """Losses [B, N - 1] of tokens [B, N] in windows of `context` tokens that overlap by half, NaN before these."""
    length, half = tokens.shape[1], context // 2
    short = torch.full_like(losses, torch.nan)
    # Each window gives the losses of its second half.
    for start in range(0, length - half, half):
        window = tokens[:, start : start + context + 1]
        if window.shape[1] > half + 1:
            short[:, start + half : start + context] = subject.losses(window)[:, half:]
    return short
