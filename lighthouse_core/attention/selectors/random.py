"""One independent uniform a window of every level above 0: content-free, so nothing leaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lighthouse_core.attention.context import checked_key
from lighthouse_core.attention.selectors.selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from lighthouse_core.attention.context import AttentionContext
    from lighthouse_core.attention.selectors.selector import Scores
    from lighthouse_core.attention.settings import Settings
    from lighthouse_kernels.geometry import Geometry
    from lighthouse_kernels.types import Selection


class Random(Selector):
    """See the module."""

    name = "random"
    leaks = False
    draws = True

    def block(self, settings: Settings) -> int:
        """Tokens that share one draw; 0 for one draw a window."""
        return 0

    def select(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: AttentionContext,
        geometry: Geometry,
        *,
        settings: Settings,
        ops: Any,
        norms: Any = None,
    ) -> Selection | Scores:
        key = checked_key(context.key, self.name).to(q.device)
        return ops.select_drawn(key, q.shape[0], k.shape[2], self.block(settings), geometry)
