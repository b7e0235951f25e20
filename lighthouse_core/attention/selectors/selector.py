"""What a selector is: how the entries of a pyramid are chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from lighthouse_core.attention.context import AttentionContext
    from lighthouse_core.attention.settings import Settings
    from lighthouse_kernels.geometry import Geometry
    from lighthouse_kernels.types import Selection

    Scores = tuple[Tensor, Tensor]


class Inputs(NamedTuple):
    """What a selector of one call may read.

    Attributes:
        q: [B, N, H, D], after RoPE, but for a call that rotates gathered rows.
        k, v: [B, N, Hkv, D].
        context: of the batch; has the key.
        geometry: the pyramid.
        settings: of the call.
        ops: the pyramid's operations; see lighthouse_kernels.reference.
        norms: what the pass over q, k and v gave, where the selector is `in_pass` and there was one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    context: AttentionContext
    geometry: Geometry
    settings: Settings
    ops: Any
    norms: Any = None


class Selector:
    """One way to choose what a pyramid keeps. Its file owns all that is known of it, and imports torch only where it
    runs.

    Attributes:
        name: as recipes have it, under `scorer`.
        leaks: whether tokens decide that come after the first position that the decision can influence. Comparing
            windows of one tile by what is in them does.
        draws: whether it draws from the context's key.
        attends: whether it attends to make its scores: it then needs v, and q and k after RoPE.
        by_shard: whether what a shard of whole tiles keeps follows from its tokens and its place, `geometry.first`.
        in_pass: whether its scores are the norms that the pass over q, k and v gives that pools them.
    """

    name: ClassVar[str]
    leaks: ClassVar[bool]
    draws: ClassVar[bool] = False
    attends: ClassVar[bool] = False
    by_shard: ClassVar[bool] = False
    in_pass: ClassVar[bool] = False

    def select(self, given: Inputs) -> Selection | Scores:
        """The selection, or scores that it follows from by the paper's descent. No gradient goes through it.

        Returns:
            A selection; or (s_Q, s_K) float32, of tokens ([B, N, H] and [B, N, Hkv]) or of windows (both [B, Hkv, M]),
            above -1.
        """
        raise NotImplementedError

    def before_qk_norm(self, q: Tensor, k: Tensor) -> Scores | None:
        """Scores of tokens, ([B, N, H], [B, N, Hkv]) float32, that a norm of each head's q [B, N, H, D] and
        k [B, N, Hkv, D] would level; None where they are not of such."""
        return None

    def scores(self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Scores | None:
        """(s_Q, s_K) of all windows, each [B, Hkv, M] float32, to be looked at; None where there is nothing to see."""
        return None
