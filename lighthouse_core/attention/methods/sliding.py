"""Causal attention over the last `window` tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lighthouse_core.attention.methods.method import Method, last

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lighthouse_core.attention.context import AttentionContext
    from lighthouse_core.attention.settings import Settings


class Sliding(Method):
    """See the module."""

    name = "sliding"
    window_is_a_shape = False
    windows = True

    def can(self, settings: Settings) -> frozenset[str]:
        return frozenset(("documents",))

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

        how: dict[str, Any] = {"scale": scale, "backend": settings.dense_backend}
        return windowed(q, k, v, settings.window, **how, documents=context.documents)
