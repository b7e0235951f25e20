"""Causal attention over the last `window` tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lighthouse_core.attention.methods.method import Method, last, too_long

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lighthouse_core.attention.context import AttentionContext, Documents
    from lighthouse_core.attention.settings import Settings


class Sliding(Method):
    """See the module."""

    name = "sliding"
    window_is_a_shape = False
    windows = True
    reads = frozenset(("method", "window", "dense_backend"))

    def can(self, settings: Settings) -> frozenset[str]:
        return frozenset(("documents",))

    def whole(self, settings: Settings, tokens: int, processes: int) -> str | None:
        return too_long(settings.window, tokens // processes)

    def previous(self, settings: Settings) -> int:
        return settings.window

    def keys(self, settings: Settings, tokens: int, length: int | None = None, first: int = 0) -> float:
        return last(length or tokens, settings.window)

    def examples(self, tokens: int) -> dict[str, dict[str, Any]]:
        return {"sliding": {"window": 1024}}

    def check_backends(self, settings: Settings, device_type: str, dtype: torch.dtype | None, dim: int | None) -> None:
        from lighthouse_core.attention.parts import check_window

        check_window(settings.dense_backend, device_type, dtype, dim)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, settings: Settings, context: AttentionContext, *, scale: float | None
    ) -> Tensor:
        from lighthouse_core.attention.parts import windowed
        from lighthouse_core.attention.sharing import with_last_tokens

        def call(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> tuple[Tensor]:
            how: dict[str, Any] = {"scale": scale, "backend": settings.dense_backend}
            return (windowed(q, k, v, settings.window, **how, documents=documents),)

        if context.group is None:
            return call(q, k, v, context.documents)[0]
        return with_last_tokens(call, q, k, v, settings.window, context)[0]
