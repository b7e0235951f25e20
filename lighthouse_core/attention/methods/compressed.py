"""One softmax over what is near as it is and what is far in fewer keys.

- the last `window` tokens, exactly;
- every earlier window of `compression` tokens as the mean of its keys and of its values, with the weight of as many
  tokens: the logarithm of `compression` is added to its score. No token lies between the two; up to compression - 1
  tokens are in both;
- if `keep` is not 0, one block of `score_block` tokens of every `keep` blocks as it is, too. `scorer` says which:
  "norm" that with the key of largest L2 norm; "random" and "block" one at random. When the last block of these is
  further behind than the window, the first token of the block takes part, and every `keep` tokens another one.

A key takes part only after the last token that decided it, so nothing leaks. (Memory-compressed attention, Liu et al.
2018, arXiv 1801.10198, beside a local window; the weight of a pooled key is ours.)
"""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING, Any

from lighthouse_core.attention.methods.method import Method, last
from lighthouse_core.attention.settings import SettingError, Settings, known

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch._ops import OpOverload

    from lighthouse_core.attention.context import AttentionContext

# How a kept block is chosen.
_LARGEST, _DRAWN = ("norm",), ("random", "block")


class Compressed(Method):
    """See the module."""

    name = "compressed"
    keeps_blocks = True
    shown = ("method", "compression")
    reads = frozenset(("method", "window", "compression", "keep", "scorer", "score_block", "dense_backend"))

    def check(self, settings: Settings) -> None:
        if settings.compression < 2 or settings.window % settings.compression:
            raise SettingError(
                "compression",
                f"must be at least 2 and divide the window of {settings.window}, not {settings.compression}",
            )
        if settings.keep:
            known("scorer", settings.scorer, _LARGEST + _DRAWN)

    def draws(self, settings: Settings) -> bool:
        return settings.keep > 0 and settings.scorer in _DRAWN

    def adds_parts(self, settings: Settings) -> bool:
        return True

    def keys(self, settings: Settings, tokens: int, length: int | None = None, first: int = 0) -> float:
        assert length in (None, tokens), "it keeps no documents apart"
        if settings.window >= tokens:
            return tokens / 2
        beyond = (tokens - settings.window) ** 2 / (2 * tokens * settings.compression)
        kept = 0.0
        if settings.keep:
            kept = max(0, tokens - settings.keep * blocks_behind(settings)) ** 2 / (2 * tokens * settings.keep)
        return last(tokens, settings.window) + beyond + kept

    def examples(self, tokens: int) -> dict[str, dict[str, Any]]:
        return {"kept": {"window": 512, "compression": 32, "keep": 32}, "compressed": {"window": 512}}

    def described(self, settings: Settings) -> str:
        kept = f", keep {settings.keep}, scorer {settings.scorer}" if settings.keep else ""
        return f"{self.name} (compression {settings.compression}{kept})"

    def kept_numbers(
        self, settings: Settings, tokens: int, q: int, kv: int, *, mode: str, copies: int = 0, compiled: bool = True
    ) -> float:
        """More than dense attention by so many rows of the queries as recipes/evidence has peaks for."""
        more = 11 if settings.keep else 6
        # The output is merged of several, and of shared sequences, too, kept once.
        there = max(1, copies) if mode == "none" else 1
        return super().kept_numbers(settings, tokens, q, kv * there, mode=mode) + more * q

    def check_backends(self, settings: Settings, device_type: str, dtype: torch.dtype | None, dim: int | None) -> None:
        from lighthouse_core.attention.parts import check_parts

        check_parts(settings.dense_backend, device_type, dtype, dim)

    def kept(self, settings: Settings, mode: str, device_type: str) -> set[OpOverload]:
        from lighthouse_core.attention.blocks import SELECTING

        return set(SELECTING)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, settings: Settings, context: AttentionContext, *, scale: float | None
    ) -> Tensor:
        from lighthouse_core.attention.blocks import drawn_blocks, largest_blocks, take_blocks
        from lighthouse_core.attention.context import checked_key
        from lighthouse_core.attention.parts import far, merge, near

        tokens, size = q.shape[1], settings.compression
        how: dict[str, Any] = {"scale": scale, "backend": settings.dense_backend}
        parts = [near(q, k, v, settings.window, **how)]
        if settings.window >= tokens:
            return parts[0].out
        pooled_k, pooled_v = (x[:, : tokens // size * size].unflatten(1, (-1, size)).mean(2) for x in (k, v))
        coarse = far(q, pooled_k, pooled_v, size, settings.window // size, **how)
        parts.append(coarse._replace(lse=coarse.lse + log(size)))
        if settings.keep and tokens > settings.keep * (behind := blocks_behind(settings)):
            shape = settings.keep, settings.score_block
            if known("scorer", settings.scorer, _LARGEST + _DRAWN) in _LARGEST:
                chosen = largest_blocks(k, *shape)
            else:
                chosen = drawn_blocks(checked_key(context.key, settings.scorer), k, *shape)
            kept_k, kept_v = take_blocks(k, v, chosen, *shape)
            parts.append(far(q, kept_k, kept_v, settings.keep, behind, **how))
        return merge(parts)


def blocks_behind(settings: Settings) -> int:
    """Of the keys of kept blocks, how far the newest one that a query sees lies behind its own place: a group, and
    then the window."""
    return settings.score_block - (-settings.window // settings.keep)
