"""The L2 norm of what a token gets from gated linear attention.

A window takes the largest of its tokens.

An attention call has no projection that makes gates. So head h keeps a fixed share of its state, 1 - 2^(-5-h) a token,
as in RetNet (arXiv 2307.08621). The kernel of flash-linear-attention runs on a GPU where that package is installed, a
plain scan elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lighthouse_core.attention.selectors.attending import Attending

if TYPE_CHECKING:
    from torch import Tensor

    from lighthouse_core.attention.settings import Settings


class Gla(Attending):
    """See the module."""

    name = "gla"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, settings: Settings, first: int) -> Tensor:
        from lighthouse_core.attention.scan import gated_linear_attention

        return gated_linear_attention(q, k, v, first)
