"""The paper's rule: the L2 norms of the tokens' queries and keys; a window takes the largest of its tokens."""

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


class Norm(Selector):
    """See the module."""

    name = "norm"
    leaks = True
    in_pass = True

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
        return ops.select(ops.norm_scores(q.detach(), k.detach(), geometry) if norms is None else norms, geometry)

    def before_qk_norm(self, q: Tensor, k: Tensor) -> Scores | None:
        return q.float().norm(dim=-1), k.float().norm(dim=-1)

    def scores(self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Scores:
        from lighthouse_core.attention.backends import norm_scores

        return norm_scores(q, k, geometry)
