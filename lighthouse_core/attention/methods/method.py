"""What a method is: one way to attend in stage 1."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lighthouse_core.attention.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import Tensor
    from torch._ops import OpOverload

    from lighthouse_core.attention.context import AttentionContext
    from lighthouse_kernels.geometry import Geometry


class Proposal(NamedTuple):
    """Settings of stage 1 that are worth a try.

    Attributes:
        settings: as [lighthouse] takes them, the dense kernel left open.
        call: what the call that is timed has in place of it.
        share: of the tokens that are gathered as they are, at level 0; 1 where every token is a key somewhere.
        coarsest: tokens of the coarsest window; 1 without a pyramid.
        gathered: S; None without a pyramid.
        dense_layers: whether the model's dense layers stay.
    """

    settings: dict[str, Any]
    call: dict[str, Any]
    share: float = 1.0
    coarsest: int = 1
    gathered: int | None = None
    dense_layers: bool = True

    @property
    def grows(self) -> bool:
        """Whether a window grows, for which recipes take only dense kernels that attend within documents."""
        return any("window_end" in phase for phase in self.settings.get("phases", ()))


class Method:
    """One way to attend in stage 1. Its file owns all that is known of it, and imports torch only where it runs.

    Attributes:
        name: as recipes have it.
        pools: whether it has a pyramid.
        keeps_blocks: whether it reads `keep`.
        needs_window: whether `window` must be at least 1.
        window_is_a_shape: whether tensors within a call have sizes that follow from the window.
        windows: whether a call is attention over the last `window` tokens, which not every dense kernel has.
        chooses_blocks: whether a call is attention to a window and to chosen blocks, which few dense kernels have.
        takes: arguments of the call beyond q, k and v that it reads: "indices", "scores", "rotary".
        shown: settings that a report names beside those of the method.
        reads: settings that can change what a call does. A phase with a key of its own beyond these is told so.
    """

    name: ClassVar[str]
    pools: ClassVar[bool] = False
    keeps_blocks: ClassVar[bool] = False
    needs_window: ClassVar[bool] = True
    window_is_a_shape: ClassVar[bool] = True
    windows: ClassVar[bool] = False
    chooses_blocks: ClassVar[bool] = False
    takes: ClassVar[frozenset[str]] = frozenset()
    shown: ClassVar[tuple[str, ...]] = ("method",)
    reads: ClassVar[frozenset[str]] = frozenset(field.name for field in fields(Settings))

    def check(self, settings: Settings) -> None:
        """Raise SettingError unless it can run with these settings."""

    def geometry(self, settings: Settings, tokens: int) -> Geometry:
        """The pyramid of a sequence.

        Raises:
            ValueError: the method has none.
        """
        raise ValueError(f"the method {self.name!r} selects nothing: it has no pyramid")

    def alignment(self, settings: Settings) -> int:
        """Tokens of which every document must take a whole multiple, where documents are kept apart."""
        return 1

    def leaks(self, settings: Settings) -> bool:
        """Whether later tokens take part in what a query sees."""
        return False

    def can(self, settings: Settings) -> frozenset[str]:
        """What a call does of what a context may ask for: "documents", "group", "budgets"."""
        return frozenset()

    def whole(self, settings: Settings, tokens: int, processes: int) -> str | None:
        """Why processes that share sequences of `tokens` attend to whole ones, each for some of the heads; None where
        each attends from its own tokens, and `run` exchanges what it needs of others. The same on all processes.
        Where the window is no shape, it is no constant here either, and cannot be part of the words."""
        return f"the method {self.name} attends to all tokens"

    def previous(self, settings: Settings) -> int:
        """Tokens before its own whose keys and values each process needs, where `whole` returns None."""
        return 0

    def nearest(self, settings: Settings, tokens: int, processes: int) -> dict[str, int]:
        """By name, values of single settings, and of N as "seq_len", with each of which `whole` is None; the nearest of
        each. Empty where none is."""
        return {}

    def draws(self, settings: Settings) -> bool:
        """Whether a call draws random numbers, and so takes a key."""
        return False

    def adds_parts(self, settings: Settings) -> bool:
        """Whether a call adds up parts of a softmax by their log-sum-exp, with its gradient."""
        return False

    def keys(self, settings: Settings, tokens: int, length: int | None = None, first: int = 0) -> float:
        """Keys that a query sees, on average over a causal sequence of `tokens`, or over a document of `length` tokens
        that begins with token `first` of such a sequence; dense attention has half of that."""
        raise NotImplementedError

    def kept_numbers(
        self, settings: Settings, tokens: int, q: int, kv: int, *, mode: str, copies: int = 0, compiled: bool = True
    ) -> float:
        """Numbers that autograd keeps of a layer's attention for each token of a process.

        Args:
            settings: of the call.
            tokens: N.
            q, kv: widths of the queries, H D, and of the keys, Hkv D.
            mode: of activation checkpointing: "none"; "selective", where every second matrix product is computed anew,
                that of the keys among them; "attention", where all of them are, and the output of attention is kept.
            copies: processes that are sent each key/value head, where processes share the sequences; else 0.
            compiled: whether torch.compile leaves out what the backward pass does not need.
        """
        # Queries, keys, values and the output; of shared sequences, also the output as the others have sent it.
        if mode == "none":
            return 2 * q + 2 * kv * max(1, copies) + (q if copies else 0)
        return 2 * q + kv if mode == "selective" else q

    def words(self, settings: Settings) -> str:
        """Which attention that is, in a report."""
        return f"{self.name}, window {settings.window}"

    def described(self, settings: Settings) -> str:
        """The method and the settings that it reads, but for its window, where a run begins."""
        read = [f"{key} {getattr(settings, key)}" for key in self.shown if key != "method"]
        return " ".join([self.name, *([f"({', '.join(read)})"] if read else [])])

    def enough_tokens(self, settings: Settings) -> int:
        """Tokens enough for a call to leave something out."""
        return 3 * settings.window

    def lean(self, settings: Settings) -> bool:
        """Whether plain PyTorch computes a call without the scores of all pairs, so that a long one can be checked."""
        return False

    def proposals(self, settings: Settings, tokens: int, floor: float, coarsest: int) -> Iterator[Proposal]:
        """What is worth a try in stage 1 at this length.

        Args:
            settings: give what a proposal does not name.
            tokens: N.
            floor: the least share of the tokens at level 0 of a pyramid, between 0 and 1.
            coarsest: tokens of the widest window of a pyramid.
        """
        return iter(())

    def examples(self, tokens: int) -> dict[str, dict[str, Any]]:
        """Settings to compare at this length, by a short name each, beside those of the other methods."""
        return {}

    def summary(self, settings: Mapping[str, Any]) -> str:
        """A proposal, or what a recipe chooses, in a few words."""
        return f"{self.name}, window {settings['window']}"

    def check_backends(self, settings: Settings, device_type: str, dtype: torch.dtype | None, dim: int | None) -> None:
        """Raise ValueError unless its operations are there on a device of this type, for tensors of this dtype and
        head dimension where these are known. What `auto` stands for is logged."""

    def kept(self, settings: Settings, mode: str, device_type: str) -> set[OpOverload]:
        """Operations whose results activation checkpointing keeps, beside those of the dense kernels: what decides a
        selection always, and under "selective" and "attention" what is better kept than made again."""
        return set()

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, settings: Settings, context: AttentionContext, *, scale: float | None
    ) -> Tensor:
        """Attend: q [B, N, H, D], k and v [B, N, Hkv, D] -> [B, N, H, D] in the dtype of q.

        Args:
            q, k, v: after RoPE, unless a method takes "rotary" and it was given.
            settings: of the call.
            context: of the batch.
            scale: factor on the attention scores; 1/sqrt(D) by default.
        """
        raise NotImplementedError


def last(tokens: float, window: float) -> float:
    """Keys that a query sees of the last `window` tokens, on average over a causal sequence."""
    window = min(window, tokens)
    return window * (1 - window / (2 * tokens))


def too_long(window: int, share: int) -> str | None:
    """Why a process with `share` tokens of a sequence cannot have the window from the process before alone."""
    # Without the window, which is no constant in a compiled call.
    return f"the window is longer than a share of {share} tokens" if window > share else None
