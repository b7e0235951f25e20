"""The L2 norm of what a token gets from gated linear attention.

It is taken twice, of (Q, K, V) for the queries and of (K, Q, V) for the keys. A window takes the largest of its tokens.

An attention call has no projection that makes gates. So head h keeps a fixed share of its state, 1 - 2^(-5-h) a token,
as in RetNet (arXiv 2307.08621). The kernel of flash-linear-attention runs on a GPU where that package is installed, a
plain scan elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lighthouse_core.attention.selectors.selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from lighthouse_core.attention.context import AttentionContext
    from lighthouse_core.attention.selectors.selector import Scores
    from lighthouse_core.attention.settings import Settings
    from lighthouse_kernels.geometry import Geometry
    from lighthouse_kernels.types import Selection


class Gla(Selector):
    """See the module. A score is causal; that windows of a tile are compared by their scores is not, and leaks."""

    name = "gla"
    leaks = True
    attends = True

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
        from lighthouse_core.attention.scan import gated_linear_attention
        from lighthouse_core.attention.selectors.outputs import twice

        return twice(gated_linear_attention, q, k, v)
