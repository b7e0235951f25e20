"""What selectors have in common whose scores are the L2 norms of what an attention gives a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lighthouse_core.attention.selectors.selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from lighthouse_core.attention.selectors.selector import Inputs, Scores
    from lighthouse_core.attention.settings import Settings
    from lighthouse_kernels.types import Selection


class Attending(Selector):
    """The attention is taken twice, of (Q, K, V) for the queries and of (K, Q, V) for the keys.

    A score is causal; that windows of a tile are compared by their scores is not, and leaks.
    """

    leaks = True
    attends = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, settings: Settings, first: int) -> Tensor:
        """[B, N, H, D] from q, k and v, each [B, N, H, D]; `first` is the number of the first head in its layer."""
        raise NotImplementedError

    def select(self, given: Inputs) -> Selection | Scores:
        """See `Selector.select`. Of a group of heads, the key's score is the largest."""
        import torch

        first = 0 if given.context.heads is None else given.context.heads.first
        kv_heads = given.k.shape[2]
        with torch.no_grad():
            q = given.q.detach()
            k, v = (x.detach().repeat_interleave(q.shape[2] // kv_heads, 2) for x in (given.k, given.v))
            outs = (self.attend(a, b, v, given.settings, first) for a, b in ((q, k), (k, q)))
            by_query, by_key = (out.float().norm(dim=-1) for out in outs)
            return by_query, by_key.unflatten(2, (kv_heads, -1)).amax(-1)
