"""Dense causal attention within each chunk of `window` tokens: training on short sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lighthouse_core.attention.growth import mean_window
from lighthouse_core.attention.methods.method import Method, Proposal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from lighthouse_core.attention.context import AttentionContext
    from lighthouse_core.attention.settings import Settings


class Chunked(Method):
    """Windows that grow in stage 1 are SkyLadder's idea (arXiv 2503.15450).

    A chunk is a document to the dense kernel: the window is in the values of a tensor of boundaries, so that a compiled
    model takes any window. Where there is no such kernel, and in eager mode on a CPU, chunks are rows of a batch, a
    shape for each window.
    """

    name = "chunked"
    window_is_a_shape = False
    reads = frozenset(("method", "window", "dense_backend"))

    def can(self, settings: Settings) -> frozenset[str]:
        return frozenset(("documents",))

    def whole(self, settings: Settings, tokens: int, processes: int) -> str | None:
        share = tokens // processes
        return f"chunks do not fill a share of {share} tokens" if share % settings.window else None

    def keys(self, settings: Settings, tokens: int, length: int | None = None, first: int = 0) -> float:
        """A document may begin within a chunk."""
        window, length = settings.window, tokens if length is None else length
        begun = min(length, window - first % window)
        whole, rest = divmod(length - begun, window)
        return (begun**2 + whole * window**2 + rest**2) / (2 * length)

    def lean(self, settings: Settings) -> bool:
        return True

    def proposals(self, settings: Settings, tokens: int, floor: float, coarsest: int) -> Iterator[Proposal]:
        """Chunks that grow, in all layers, as recipes/evidence/REPORT.md recommends them."""
        first, last = growing_windows(tokens)
        phase = {"window": first, "window_end": last, "growth": "geometric"}
        # The time of a call is linear in its window.
        call = {"method": self.name, "window": mean_window(first, last, "geometric")}
        yield Proposal({"method": self.name, "phases": [phase]}, call, dense_layers=False)

    def examples(self, tokens: int) -> dict[str, dict[str, Any]]:
        return {"chunked": {"window": 2048}}

    def summary(self, settings: Mapping[str, Any]) -> str:
        phases = settings.get("phases") or [settings]
        windows = [" to ".join(str(phase[key]) for key in ("window", "window_end") if key in phase) for phase in phases]
        return f"chunks of {', '.join(windows)}" + " in turn" * (len(windows) > 1)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, settings: Settings, context: AttentionContext, *, scale: float | None
    ) -> Tensor:
        import operator

        from torch.nn.functional import pad

        from lighthouse_core.attention.dense.call import dense_unchecked, fuses_documents
        from lighthouse_core.attention.documents import cut, of_shard

        batch, tokens = q.shape[:2]
        within = context.documents
        if within is not None and context.group is not None:
            within = of_shard(within, batch, context.first_position, tokens, context.tokens(q))
        how: dict[str, Any] = {"scale": scale, "backend": settings.dense_backend}
        given = settings.dense_backend, q.device.type, q.dtype, q.shape[3]
        if within is not None or fuses_documents(*given):
            documents = cut(within, batch, tokens, settings.window, q.device)
            return dense_unchecked(q, k, v, **how, documents=documents)
        size = min(operator.index(settings.window), tokens)
        chunks = -(-tokens // size)
        short = (
            pad(x, (0, 0, 0, 0, 0, chunks * size - tokens)).unflatten(1, (chunks, size)).flatten(0, 1)
            for x in (q, k, v)
        )
        return dense_unchecked(*short, **how).unflatten(0, (-1, chunks)).flatten(1, 2)[:, :tokens]


def growing_windows(tokens: int) -> tuple[int, int]:
    """Windows of the first and the last step of stage 1: those of recipes/evidence/REPORT.md at 16384 and 65536 tokens,
    that of 530m_98k_growing at 98304, and something like them at other lengths."""
    last = max(tokens // 4, min(8192, tokens // 2), 1)
    return min(256, max(1, last // 4)), last
