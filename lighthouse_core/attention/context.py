"""What changes from batch to batch, as one argument: model -> block -> attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from lighthouse_core.attention.config import LighthouseConfig


class Documents(NamedTuple):
    """The documents that a batch of sequences is packed from: no token sees one of another document.

    The tokens of the batch are numbered through, B sequences of N tokens. Every sequence begins a document.

    Attributes:
        starts: int32 [documents + 1] on the device of the batch: the first token of each, ascending, and B N at last.
            Repeated entries are documents without a token.
        longest: tokens of the longest document, or more.
    """

    starts: Tensor
    longest: int

    def to(self, device: torch.device | str) -> Documents:
        """The same for a batch on another device."""
        return self._replace(starts=self.starts.to(device))


class Heads(NamedTuple):
    """Which heads a call has of those of its layer, where processes share them out.

    Attributes:
        first: number of the first query head.
        copies: processes that have query heads of the same key/value head.
        group: the processes that share out the heads; None where `copies` is 1.
    """

    first: int
    copies: int
    group: ProcessGroup | None


@dataclass(frozen=True)
class AttentionContext:
    """One batch's facts for the attention of every layer. Nothing of it is written into a module.

    Attributes:
        key: what selectors draw from: int64 (seed, step, layer[, sample[, head]]) of one call, or [layers, 3 or 4] of a
            model; being a tensor, a new step compiles nothing anew.
        settings: of this part of training; None for those that a layer was built with.
        dense: attend densely in every layer.
        dense_layers: numbers of the layers that attend densely in this part of training.
        documents: that the whole sequences are packed from; None where all tokens of a sequence see each other.
        positions: int32 [B, N], the place of each token of the whole sequences within its document, by which RoPE turns
            it; None for its place within the sequence.
        group: processes that share the sequences, each as many tokens, in their order; None for one process.
        first_position: position of the first token within the sequence.
        heads: that a call has, where processes share them out; None for all heads of the layer.
        budgets: int32, how many blocks each KV head chooses, [Hkv] of one call, or [layers, Hkv] of a model; at most
            `budgets.WIDEST` times those of the settings. None for those of the settings in every head. Being a tensor,
            other numbers compile nothing anew.
    """

    key: Tensor | None = None
    settings: LighthouseConfig | None = None
    dense: bool = False
    dense_layers: tuple[int, ...] = ()
    documents: Documents | None = None
    positions: Tensor | None = None
    group: ProcessGroup | None = None
    first_position: int = 0
    heads: Heads | None = None
    budgets: Tensor | None = None

    def of_layer(self, number: int) -> AttentionContext:
        """The context of one layer's call, whose key is a row of the model's."""
        key = self.key if self.key is None or self.key.dim() == 1 else self.key[number]
        if key is self.key and not self.dense_layers and self.budgets is None:
            return self
        if self.dense or number in self.dense_layers:
            return replace(self.as_dense(), key=key)
        budgets = None if self.budgets is None else self.budgets[number]
        # The list itself stays here: a layer that is compiled does not depend on it.
        return replace(self, key=key, dense_layers=(), budgets=budgets)

    def as_dense(self) -> AttentionContext:
        """The context of the same batch with dense attention in every layer: it has no budgets."""
        return replace(self, dense=True, dense_layers=(), budgets=None)

    def tokens(self, x: Tensor) -> int:
        """N, the tokens of whole sequences, of which `x` [B, n, ...] has those of this process."""
        return x.shape[1] * (1 if self.group is None else self.group.size())

    @property
    def asks(self) -> frozenset[str]:
        """What it asks for that not every method can do: "documents", "group", "budgets"."""
        asked = {
            "documents": self.documents is not None,
            "group": self.group is not None or self.first_position > 0,
            "budgets": self.budgets is not None,
        }
        return frozenset(name for name, there in asked.items() if there)


_CANNOT = {
    "documents": "keeps no documents apart",
    "group": "is not for sequences that processes share",
    "budgets": "chooses no blocks for each KV head",
}
# What dense attention does of what a context may ask for.
DENSE_CAN = frozenset(("documents",))


def check_context(context: AttentionContext, can: frozenset[str], what: str) -> None:
    """Refuse a context that asks for what an attention cannot do: nothing of it is passed over.

    Args:
        context: of the batch.
        can: what the attention can do of "documents", "group" and "budgets".
        what: the attention, for the message.

    Raises:
        ValueError: it asks for something else.
    """
    for asked in sorted(context.asks - can):
        raise ValueError(f"the attention {what!r} {_CANNOT[asked]}")


def selection_keys(seed: int, step: int, sample: int, layers: int) -> Tensor:
    """Keys of all layers, int64 [layers, 4]: (seed, step, layer, sample), on the CPU.

    Args:
        seed: of the run.
        step: number of the training step.
        sample: number of the micro-batch's first row within the global batch.
        layers: of the model.
    """
    import torch

    return torch.tensor([(seed, step, layer, sample) for layer in range(layers)])


def checked_key(key: Tensor | None, scorer: str) -> Tensor:
    """The key that a scorer draws from.

    Raises:
        ValueError: there is none, or it is no int64 (seed, step, layer[, sample[, head]]).
    """
    import torch

    if key is None:
        raise ValueError(f"scorer {scorer!r} draws its scores from `key`, an int64 tensor (seed, step, layer)")
    if key.dtype != torch.int64 or key.dim() != 1 or key.numel() not in (3, 4, 5):
        raise ValueError(f"key must be int64 (seed, step, layer[, sample[, head]]); got {key.dtype} {tuple(key.shape)}")
    return key
