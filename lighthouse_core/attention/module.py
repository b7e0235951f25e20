"""The attention calls as modules that take the place of a model's own attention."""

from __future__ import annotations

from torch import Tensor, nn

from lighthouse_core.attention.call import Scores, attend, by_shard
from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.context import DENSE_CAN, AttentionContext, check_context
from lighthouse_core.attention.dense.call import dense_attention
from lighthouse_core.attention.selectors import selector_of
from lighthouse_core.attention.sharing import by_heads


class LighthouseAttention(nn.Module):
    """Lighthouse attention. Has no parameters, and saves nothing in a checkpoint.

    Args:
        cfg: settings of the call, where a context has none.
    """

    def __init__(self, cfg: LighthouseConfig):
        super().__init__()
        self.cfg = cfg

    def rotates(self, context: AttentionContext) -> bool:
        """Whether a call takes q and k before RoPE, and the rotary table."""
        return (self.cfg if context.settings is None else context.settings).rotates

    def scores(self, q: Tensor, k: Tensor, context: AttentionContext) -> Scores | None:
        """What `forward` is given of q [B, N, H, D] and k [B, N, Hkv, D] as they are before QK-norm; None where the
        selection does not depend on them."""
        cfg = self.cfg if context.settings is None else context.settings
        if "scores" not in cfg.rule.takes or context.dense:
            return None
        return selector_of(cfg.scorer).before_qk_norm(q.detach(), k.detach())

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: AttentionContext,
        *,
        rotary: Tensor | None = None,
        scores: Scores | None = None,
    ) -> Tensor:
        """Attend causally.

        Args:
            q: [B, N, H, D], after RoPE unless it `rotates`. Where processes share the sequences, here and in the output
                the tokens of this one.
            k, v: [B, N, Hkv, D].
            context: of the batch, with the key of this layer.
            rotary, scores: see `lighthouse_attention`. The rotary table is of the whole sequences.

        Returns:
            [B, N, H, D].
        """

        def call(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, scores: Scores | None) -> Tensor:
            return attend(q, k, v, self.cfg, context, rotary=rotary, scores=scores)

        cfg = self.cfg if context.settings is None else context.settings
        if by_shard(cfg, context, context.tokens(q)):
            return call(q, k, v, context, scores)
        return by_heads(call, q, k, v, context, scores)

    def extra_repr(self) -> str:
        return str(self.cfg)


class DenseAttention(nn.Module):
    """Dense causal attention, whatever the context says of stage 1.

    Args:
        backend: see `dense_attention`; settings of the context have their own.
    """

    def __init__(self, backend: str = "auto"):
        super().__init__()
        self.backend = backend

    def rotates(self, context: AttentionContext) -> bool:
        """See `LighthouseAttention.rotates`."""
        return False

    def scores(self, q: Tensor, k: Tensor, context: AttentionContext) -> None:
        """See `LighthouseAttention.scores`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, *, scores: None = None) -> Tensor:
        """See `LighthouseAttention.forward`."""

        def call(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, scores: Scores | None) -> Tensor:
            check_context(context, DENSE_CAN, "dense")
            backend = self.backend if context.settings is None else context.settings.dense_backend
            return dense_attention(q, k, v, backend=backend, documents=context.documents)

        return by_heads(call, q, k, v, context)

    def extra_repr(self) -> str:
        return self.backend
