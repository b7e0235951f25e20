"""One uniform a block of `score_block` tokens, so that fine detail comes in contiguous spans. A wider window takes the
largest of its blocks. Content-free, so nothing leaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lighthouse_core.attention.selectors.random import Random

if TYPE_CHECKING:
    from lighthouse_core.attention.settings import Settings


class Block(Random):
    """See the module."""

    name = "block"

    def block(self, settings: Settings) -> int:
        return settings.score_block
