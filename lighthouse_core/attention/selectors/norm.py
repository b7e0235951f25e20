"""The paper's rule: the L2 norms of the tokens' queries and keys; a window takes the largest of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lighthouse_core.attention.selectors.selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from lighthouse_core.attention.selectors.selector import Inputs, Scores
    from lighthouse_kernels.geometry import Geometry
    from lighthouse_kernels.types import Selection


class Norm(Selector):
    """See the module."""

    name = "norm"
    leaks = True
    in_pass = True
    by_shard = True

    def select(self, given: Inputs) -> Selection | Scores:
        from lighthouse_core.attention.sharing import of_all_query_heads

        ops, norms = given.ops, given.norms
        if norms is None:
            norms = ops.norm_scores(given.q.detach(), given.k.detach(), given.geometry)
        by_query, by_key = norms
        return ops.select((of_all_query_heads(by_query, 1, given.context.heads), by_key), given.geometry)

    def before_qk_norm(self, q: Tensor, k: Tensor) -> Scores | None:
        return q.float().norm(dim=-1), k.float().norm(dim=-1)

    def scores(self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Scores:
        from lighthouse_core.attention.backends import norm_scores

        return norm_scores(q, k, geometry)
