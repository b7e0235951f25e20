"""A model to be evaluated: what gives hidden states, and what makes logits of them, a few positions at a time.

B sequences, N tokens, D width, V vocabulary rows.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.data.documents import Tokenizer
from lighthouse_core.errors import UserError
from lighthouse_core.evaluate.text import PackedSequence
from lighthouse_core.models.decoder import Decoder

# Positions whose logits exist at once.
_POSITIONS = 1024


@dataclass(frozen=True)
class Subject:
    """A causal language model, frozen.

    Attributes:
        name: what it is, for reports.
        hidden: tokens [B, N] int64 -> hidden states [B, N, D].
        head: hidden states [..., D] -> logits [..., V].
        tokenizer: of its text.
        tokenizer_name: what a recipe calls it.
        tokens: the length N that it was trained at, or is to be measured at, if that is longer.
        device: of its inputs.
        leaky: whether its attention may have seen later tokens.
        model: that of a run in stage 1, whose attention is looked into; None for others.
        packed: a sequence [1, N] and its documents -> hidden states [1, N, D] in which no document depends on another;
            None for a model that runs one document after the other.
        alignment: tokens, a document begins at a multiple of it; None where the attention keeps no documents apart.
    """

    name: str
    hidden: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    tokenizer: Tokenizer
    tokens: int
    device: torch.device
    tokenizer_name: str = "bytes"
    leaky: bool = False
    model: Decoder | None = None
    packed: Callable[[Tensor, PackedSequence], Tensor] | None = None
    alignment: int | None = 1

    def within(self, context: AttentionContext) -> "Subject":
        """The same model of stage 1 with another context for its attention."""
        assert self.model is not None
        hidden = partial(self.model.hidden, context=context)
        return replace(self, hidden=hidden, packed=partial(hidden_of_documents, self.model, context))

    def states(self, tokens: Tensor, packed: PackedSequence | None = None) -> Tensor:
        """Hidden states [B, N, D] of tokens [B, N] int64; with `packed`, of which B is 1, documents do not mix."""
        tokens = tokens.to(self.device)
        if packed is None:
            return self.hidden(tokens)
        if self.packed is not None:
            return self.packed(tokens, packed)
        return torch.cat([self.hidden(tokens[:, start:end]) for start, end in packed.spans], 1)

    @torch.no_grad()
    def losses(self, tokens: Tensor, targets: Tensor | None = None, packed: PackedSequence | None = None) -> Tensor:
        """Cross-entropy of each target but the first, given the tokens before it.

        Args:
            tokens: [B, N] int64.
            targets: [B, N] int64; the tokens themselves by default.
            packed: of the documents that are kept apart; B is 1 then.

        Returns:
            [B, N - 1] float32 on the CPU, nats. With `packed`, those that count are where its `before` is not 0.
        """
        hidden = self.states(tokens, packed)[:, :-1]
        targets = (tokens if targets is None else targets)[:, 1:].to(self.device)
        parts = []
        for h, y in zip(hidden.split(_POSITIONS, 1), targets.split(_POSITIONS, 1), strict=True):
            log_p = torch.log_softmax(self.head(h), -1, dtype=torch.float32)
            parts.append(-log_p.gather(-1, y[..., None])[..., 0])
        return torch.cat(parts, 1).cpu()

    @torch.no_grad()
    def next_logits(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] float32, on the CPU, of what follows `tokens` [B, N]."""
        return self.head(self.hidden(tokens.to(self.device))[:, -1]).float().cpu()


def hidden_of_documents(model: Decoder, context: AttentionContext, tokens: Tensor, packed: PackedSequence) -> Tensor:
    """Hidden states [1, N, D] of a decoder for one sequence [1, N] of documents that are kept apart.

    Args:
        model: whose attention can do that.
        context: of its attention, without documents.
        tokens: on the model's device.
        packed: of the sequence.
    """
    documents, positions = packed.documents.to(tokens.device), packed.positions.to(tokens.device)
    return model.hidden(tokens, replace(context, documents=documents, positions=positions))


@contextlib.contextmanager
def looking(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """While a subject is looked into by these hooks, which are then removed."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def fitting(tokens: int) -> Iterator[None]:
    """While sequences of so many tokens go through a model.

    Raises:
        UserError: they do not fit the memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(f"a sequence of {tokens} tokens does not fit: {reason}") from None
