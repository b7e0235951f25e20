"""The paper's second scorer: the L2 norm of what a token gets from causal attention among every fourth token.

A window takes the largest of its tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lighthouse_core.attention.selectors.attending import Attending

if TYPE_CHECKING:
    from torch import Tensor

    from lighthouse_core.attention.settings import Settings

_STRIDE = 4


class Dilated(Attending):
    """See the module."""

    name = "dilated"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, settings: Settings, first: int) -> Tensor:
        return _among_every_fourth(q, k, v, settings.dense_backend)


def _among_every_fourth(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Attention of each token over those before it whose places differ from its own by multiples of the stride."""
    from torch.nn.functional import pad

    from lighthouse_core.attention.dense.call import dense_attention

    tokens = q.shape[1]
    rows = -(-tokens // _STRIDE)
    # Tokens of one remainder are a sequence of their own; padding comes after all of them, and no token sees it.
    apart = (
        pad(x, (0, 0, 0, 0, 0, rows * _STRIDE - tokens)).unflatten(1, (rows, _STRIDE)).transpose(1, 2).flatten(0, 1)
        for x in (q, k, v)
    )
    out = dense_attention(*apart, backend=backend)
    return out.unflatten(0, (-1, _STRIDE)).transpose(1, 2).flatten(1, 2)[:, :tokens]
