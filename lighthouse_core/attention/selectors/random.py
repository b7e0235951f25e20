"""One independent uniform a window of every level above 0: content-free, so nothing leaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lighthouse_core.attention.context import checked_key
from lighthouse_core.attention.selectors.selector import Selector

if TYPE_CHECKING:
    from lighthouse_core.attention.selectors.selector import Inputs, Scores
    from lighthouse_core.attention.settings import Settings
    from lighthouse_kernels.types import Selection


class Random(Selector):
    """See the module."""

    name = "random"
    leaks = False
    draws = True
    by_shard = True

    def block(self, settings: Settings) -> int:
        """Tokens that share one draw; 0 for one draw a window."""
        return 0

    def select(self, given: Inputs) -> Selection | Scores:
        key = checked_key(given.context.key, self.name).to(given.q.device)
        batch, kv_heads = given.q.shape[0], given.k.shape[2]
        return given.ops.select_drawn(key, batch, kv_heads, self.block(given.settings), given.geometry)
