"""The paper's (arXiv 2605.06554): pool, score, select, gather, attend, scatter; kernels/README.md has the rule.

With a `window`, the last tokens before each query are merged into the same softmax at full resolution.
"""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any

from lighthouse_core.attention.methods.method import Method, Proposal, last, too_long
from lighthouse_core.attention.selectors import selector_of
from lighthouse_core.attention.settings import SettingError
from lighthouse_kernels.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import Tensor
    from torch._ops import OpOverload

    from lighthouse_core.attention.context import AttentionContext
    from lighthouse_core.attention.settings import Settings


# What is tried, and the settings that a proposal names.
_POOLINGS, _LEVELS = (2, 4, 8, 16), (2, 3, 4, 5)
_PROPOSED = (
    *("method", "pooling", "levels", "topk", "tile_parents", "cover_prefix", "scorer", "score_block", "window"),
    "backend",
)


class Pyramid(Method):
    """See the module."""

    name = "pyramid"
    pools = True
    needs_window = False
    window_is_a_shape = False
    takes = frozenset(("indices", "scores", "rotary"))
    shown = ("pooling", "levels", "topk", "scorer")
    reads = frozenset((*_PROPOSED, "rotate", "dense_backend"))

    def geometry(self, settings: Settings, tokens: int) -> Geometry:
        s = settings
        return Geometry(tokens, s.pooling, s.levels, s.topk, s.tile_parents, s.cover_prefix)

    def check(self, settings: Settings) -> None:
        selector = selector_of(settings.scorer)
        if settings.rotate == "after" and selector.attends:
            problem = f"must be 'before' for the scorer {settings.scorer}, which attends after RoPE"
            raise SettingError("rotate", problem)

    def alignment(self, settings: Settings) -> int:
        """The tokens of the coarsest window: none then holds two documents."""
        return settings.pooling ** (settings.levels - 1)

    def leaks(self, settings: Settings) -> bool:
        return selector_of(settings.scorer).leaks

    def can(self, settings: Settings) -> frozenset[str]:
        """Within a document each position is served by its own token at least, which is in its window."""
        return frozenset(("documents",) if settings.window else ())

    def whole(self, settings: Settings, tokens: int, processes: int) -> str | None:
        g = self.geometry(settings, tokens)
        if g.dense:
            return "the call is dense"
        if not selector_of(settings.scorer).by_shard:
            return f"the scorer {settings.scorer} scores a token by others"
        if g.padded != tokens:
            return f"the tiles end at {g.padded} tokens"
        if g.tiles % processes:
            return f"{processes} processes cannot share out {g.tiles} tiles (topk / tile_parents)"
        return too_long(settings.window, tokens // processes)

    def previous(self, settings: Settings) -> int:
        return settings.window

    def nearest(self, settings: Settings, tokens: int, processes: int) -> dict[str, int]:
        g, s = self.geometry(settings, tokens), settings
        coarsest = g.window(g.levels - 1)
        unit, most = lcm(processes, coarsest * g.tiles), tokens // coarsest
        candidates = {
            "seq_len": (tokens // unit * unit, -(-tokens // unit) * unit),
            # More parents than windows make padding.
            "topk": range(s.tile_parents, min(2 * s.topk + s.tile_parents * processes, most) + 1, s.tile_parents),
            "tile_parents": [m for m in range(2, min(s.topk, most) + 1, 2) if s.topk % m == 0 and s.topk <= most],
        }
        found: dict[str, int] = {}
        for name, values in candidates.items():
            now = tokens if name == "seq_len" else getattr(s, name)
            for value in sorted(values, key=lambda value: (abs(value - now), -value)):
                changed: dict[str, Any] = {name: value}
                length, other = (value, s) if name == "seq_len" else (tokens, replace(s, **changed))
                if length > 0 and self.whole(other, length, processes) is None:
                    found[name] = value
                    break
        return found if self.whole(settings, tokens, processes) else {}

    def draws(self, settings: Settings) -> bool:
        return selector_of(settings.scorer).draws

    def adds_parts(self, settings: Settings) -> bool:
        return settings.window > 0

    def keys(self, settings: Settings, tokens: int, length: int | None = None, first: int = 0) -> float:
        """The gathered queries are fewer than the tokens, which is counted here: S^2 / (2 N). Of each document the same
        share is taken to be gathered."""
        gathered, length = self.geometry(settings, tokens).gathered_length, length or tokens
        near = last(length, settings.window) if gathered < tokens else 0.0
        return gathered**2 / (2 * tokens) * (length / tokens) + near

    def kept_numbers(
        self, settings: Settings, tokens: int, q: int, kv: int, *, mode: str, copies: int = 0, compiled: bool = True
    ) -> float:
        """Of what was gathered; with a window of the tokens, too."""
        gathered = self.geometry(settings, tokens).gathered_length / tokens
        if gathered >= 1:
            return super().kept_numbers(settings, tokens, q, kv, mode=mode, copies=copies)
        there = max(1, copies)
        kept = gathered * (2 * q + 2 * kv * there)
        if mode == "none":
            # The output is another tensor than that of the dense kernel, and of shared sequences, too, kept once.
            return kept + q + (2 * q + 2 * kv * there if settings.window else 0)
        if settings.window:
            return kept + super().kept_numbers(settings, tokens, q, kv, mode=mode)
        # The backward pass needs no product of the tokens, but repeats an exchange of them; and eager mode keeps all.
        return kept + (q + kv if mode == "selective" and (copies or not compiled) else 0)

    def words(self, settings: Settings) -> str:
        return f"{self.name}, window {settings.window}" if settings.window else ""

    def described(self, settings: Settings) -> str:
        return super().described(settings) + ", rotated after pooling" * (settings.rotate == "after")

    def enough_tokens(self, settings: Settings) -> int:
        entries = (settings.levels - 1) * settings.pooling + settings.pooling ** (settings.levels - 1)
        return max(3 * settings.window, 2 * settings.topk * entries)

    def lean(self, settings: Settings) -> bool:
        return not settings.window

    def proposals(self, settings: Settings, tokens: int, floor: float, coarsest: int) -> Iterator[Proposal]:
        """Those that gather at least the floor at level 0, with the fewest parents that do.

        For each pooling factor p and number of levels L, k is the smallest multiple of `tile_parents` with
        p k >= floor N; windows are at most `coarsest` tokens wide, and the sequence needs no padding for k parents.
        """
        for pooling in _POOLINGS:
            unit = settings.tile_parents
            topk = max(unit, -(-round(floor * tokens) // pooling // unit) * unit)
            while pooling * topk < floor * tokens:
                topk += unit
            for levels in _LEVELS:
                window = pooling ** (levels - 1)
                if window > coarsest or window * topk > tokens:
                    continue
                found = self.proposal(replace(settings, pooling=pooling, levels=levels, topk=topk), tokens)
                if found is not None:
                    yield found

    def proposal(self, settings: Settings, tokens: int) -> Proposal | None:
        """The proposal of these settings, without a window; None where the call would be dense."""
        g = self.geometry(settings, tokens)
        if g.dense:
            return None
        chosen = {name: getattr(settings, name) for name in _PROPOSED} | {"method": self.name, "window": 0}
        share = min(1.0, settings.pooling * settings.topk / tokens)
        return Proposal(chosen, chosen, share, g.window(g.levels - 1), g.gathered_length)

    def examples(self, tokens: int) -> dict[str, dict[str, Any]]:
        """At the ratio of recipes/evidence: k = N / 64, about 1000 keys a query at 16384 tokens."""
        topk = tokens // 64
        return {
            "norm": {"topk": topk},
            "block": {"topk": topk, "scorer": "block"},
            "block-window": {"topk": topk, "scorer": "block", "window": 512},
        }

    def summary(self, settings: Mapping[str, Any]) -> str:
        return f"p {settings['pooling']}, L {settings['levels']}, k {settings['topk']}"

    def check_backends(self, settings: Settings, device_type: str, dtype: torch.dtype | None, dim: int | None) -> None:
        from lighthouse_core.attention.backends import kernels
        from lighthouse_core.attention.parts import check_parts

        kernels(settings.backend, device_type, dtype)
        if settings.window:
            check_parts(settings.dense_backend, device_type, dtype, dim)

    def kept(self, settings: Settings, mode: str, device_type: str) -> set[OpOverload]:
        from lighthouse_core.attention.backends import kernels

        ops = kernels(settings.backend, device_type)
        # Kept, the gathered rows spare a compiled block the pyramid and, for the call, the tokens' q, k and v.
        return {*ops.SELECTING, *(() if mode == "full" else ops.GATHERING)}

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        settings: Settings,
        context: AttentionContext,
        *,
        scale: float | None,
        indices: Tensor | None = None,
        scores: tuple[Tensor, Tensor] | None = None,
        rotary: Tensor | None = None,
    ) -> Tensor:
        import torch

        from lighthouse_core.attention.backends import kernels, log_once
        from lighthouse_core.attention.dense.call import dense_unchecked
        from lighthouse_core.attention.rotary import rotate
        from lighthouse_core.attention.stages import run, stages

        g = self.geometry(settings, context.tokens(q))
        # Also for a call that turns out dense: a backend that is not there is refused.
        ops = kernels(settings.backend, q.device.type, q.dtype)
        if g.dense:
            if not torch.compiler.is_compiling():
                # A compiler would take what is written out for a constant.
                why = "one level" if g.levels == 1 else f"the selection would hold {g.selected_length} entries"
                log_once(f"lighthouse attention of {g.tokens} tokens runs dense: {why}")
            if rotary is not None:
                q, k = rotate(q, rotary), rotate(k, rotary)
            how: dict[str, Any] = {"scale": scale, "backend": settings.dense_backend}
            return dense_unchecked(q, k, v, **how, documents=context.documents)
        if context.group is not None:
            g = g.shard(context.group.rank(), context.group.size())
            if rotary is not None:
                own = slice(g.first, g.first + g.tokens)
                rotary = rotary[own] if rotary.dim() == 3 else rotary[:, own]
        values = {"q": q, "k": k, "v": v}
        given: dict[str, Any] = {"scale": scale, "indices": indices, "scores": scores, "rotary": rotary}
        for stage in stages(q, k.shape[2], settings, context, g, ops, **given):
            run(stage, values)
        return values["out"]
