"""The attention call of stage 1.

Shapes: B batch, N tokens, H query heads, Hkv key/value heads, D head dimension, M windows of all levels, S entries.
"""

from typing import Any

import torch
from torch import Tensor

from lighthouse_core.attention.backends import kernels, log_once
from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.context import DENSE_CAN, AttentionContext, Documents, check_context
from lighthouse_core.attention.dense.call import (
    KERNELS,
    check_backend,
    check_inputs,
    choose,
    dense_unchecked,
    documents_kernel,
)
from lighthouse_core.attention.documents import check_documents
from lighthouse_core.attention.rotary import rotate
from lighthouse_core.attention.selectors import selector_of
from lighthouse_core.attention.stages import selected

Scores = tuple[Tensor, Tensor]


def select_indices(
    q: Tensor,
    k: Tensor,
    cfg: LighthouseConfig,
    *,
    v: Tensor | None = None,
    scores: Scores | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """The entries one call attends over: score, select, order. Carries no gradient.

    Args:
        q: [B, N, H, D], after RoPE.
        k: [B, N, Hkv, D], after RoPE.
        cfg: settings of the call.
        v: [B, N, Hkv, D], which selectors that attend need.
        scores: replaces the selector's. A pair (s_Q, s_K), per token ([B, N, H] and [B, N, Hkv]; a window takes the
            maximum of its tokens, a KV head the maximum of its query heads) or per window (both [B, Hkv, M] in flat
            pyramid order). Finite and above -1, the score of padding; what NaN selects is not defined.
        key: int64 (seed, step, layer) or (seed, step, layer, sample), for selectors that draw;
            `sample` numbers the first row within the global batch.

    Returns:
        [B, Hkv, S] int32 flat pyramid indices (level 0 first) in causal order; 0..N-1 when the call is dense.

    Raises:
        ValueError: for shapes that do not fit, a missing key, or values that the selector needs.
    """
    check_inputs(q, k, k if v is None else v)
    cfg.check_names()
    if v is None:
        if scores is None and cfg.pools and selector_of(cfg.scorer).attends:
            raise ValueError(f"the scorer {cfg.scorer!r} attends, and needs v")
        v = k
    settings = cfg.constant() if torch.compiler.is_compiling() else cfg
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        g = cfg.rule.geometry(settings, q.shape[1])
        ops = kernels(cfg.backend, q.device.type, q.dtype)
        if g.dense:
            return torch.arange(g.tokens, dtype=torch.int32, device=q.device).repeat(q.shape[0], k.shape[2], 1)
        return selected(q, k, v, settings, AttentionContext(key=key), g, ops, scores=scores).indices


def lighthouse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cfg: LighthouseConfig,
    *,
    indices: Tensor | None = None,
    scores: Scores | None = None,
    scale: float | None = None,
    key: Tensor | None = None,
    rotary: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Lighthouse attention (arXiv 2605.06554; kernels/README.md has the rule), or what `cfg.method` names.
    Differentiable in q, k and v, by the Triton kernels once.

    It computes in the dtype of the inputs, also within torch.autocast: cast them before the call for another. Under
    torch.compile batch, tokens and heads may be dynamic. The settings are constants, and so are which arguments there
    are, whether the call is dense, and whether windows fill the sequence: each is compiled once. With torch 2.11 the
    reference backend is compiled again for another padded length.

    Args:
        q: [B, N, H, D], after RoPE; before RoPE where `cfg.rotate` is "after".
        k, v: [B, N, Hkv, D]; H is a multiple of Hkv, which share one selection per KV head.
        cfg: settings of the call.
        indices: [B, Hkv, S] int32 or int64 that fix the selection, as `select_indices` returns them; no window twice.
        scores, key: see `select_indices`.
        scale: factor on the attention scores; 1/sqrt(D) by default.
        rotary: float32, cosine and sine of every position, [at least N, D/2, 2], or of every token, [B, N, D/2, 2],
            where `cfg.rotate` is "after"; it turns neighbouring pairs of D.
        documents: that the sequences are packed from: attention stays within each. In a pyramid each begins at a
            multiple of the coarsest window, `cfg.alignment`.

    Returns:
        [B, N, H, D] in the dtype of `q`. A position without a contributor (possible only with
        ``cover_prefix=False``) is 0. When S >= N the call is dense attention, and says so once in the log.

    Raises:
        ValueError: for shapes that do not fit, a missing key, or a backend that is not there.
    """
    given = {"indices": indices, "scores": scores, "rotary": rotary}
    return attend(q, k, v, cfg, AttentionContext(key=key, documents=documents), scale=scale, **given)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cfg: LighthouseConfig,
    context: AttentionContext,
    *,
    scale: float | None = None,
    **given: Any,
) -> Tensor:
    """`lighthouse_attention` within a batch that `context` describes; its settings take the place of `cfg`.

    Args:
        q, k, v, scale: see `lighthouse_attention`.
        cfg: settings of the layer.
        context: of the batch.
        given: arguments that the method takes; see `Method.takes`. None stands for nothing given.

    Raises:
        ValueError: the method does not take an argument, or cannot do what the context asks for.
    """
    check_inputs(q, k, v)
    cfg = cfg if context.settings is None else context.settings
    cfg.check_names()
    given = {name: value for name, value in given.items() if value is not None}
    if cfg.rotates != ("rotary" in given):
        raise ValueError(f"rotate {cfg.rotate!r} {'needs the' if cfg.rotates else 'takes no'} rotary table")
    method = cfg.rule
    can, what = (DENSE_CAN, "dense") if context.dense else (method.can(cfg), cfg.method)
    tokens = context.tokens(q)
    if by_shard(cfg, context, tokens):
        can = can.union(("group",))
    check_context(context, can, what)
    if context.documents is not None:
        alignment = 1 if context.dense else cfg.alignment
        check_documents(context.documents, q.shape[0], tokens, alignment, "that the attention method needs")
    if context.dense:
        if cfg.rotates:
            q, k = (rotate(x, given["rotary"]) for x in (q, k))
        return dense_unchecked(q, k, v, scale=scale, backend=cfg.dense_backend, documents=context.documents)
    for name in given:
        if name not in method.takes:
            raise ValueError(f"the method {cfg.method!r} takes no {name}")
    settings = cfg.constant() if torch.compiler.is_compiling() else cfg
    with torch.autocast(q.device.type, enabled=False):
        return method.run(q, k, v, settings, context, scale=scale, **given)


def by_shard(cfg: LighthouseConfig, context: AttentionContext, tokens: int) -> bool:
    """Whether processes share the sequences and each calls `attend` with its own tokens, not with all tokens of some of
    the heads.

    Args:
        cfg: settings of the call.
        context: of the batch.
        tokens: N, of whole sequences.
    """
    if context.group is None or context.dense:
        return False
    settings = cfg.constant() if torch.compiler.is_compiling() else cfg
    return cfg.rule.whole(settings, tokens, context.group.size()) is None


def check_backends(cfg: LighthouseConfig, device_type: str, *, pooled: bool = True) -> None:
    """Raise ValueError unless the backends that `cfg` names are there on a device of this type, `pooled` for its
    Lighthouse calls, too. Touches no GPU."""
    if pooled:
        cfg.rule.check_backends(cfg, device_type, None, None)
    check_backend(cfg.dense_backend, device_type)


def log_choices(
    cfg: LighthouseConfig,
    device_type: str,
    dtype: torch.dtype,
    dim: int,
    *,
    pooled: bool,
    documents: bool = False,
    shared: tuple[int, int] | None = None,
) -> None:
    """Say in the log which backends such calls take, and why: a compiled call cannot.

    Args:
        cfg: settings of the calls.
        device_type, dtype, dim: of their inputs; dim is D.
        pooled: whether any of them is a Lighthouse call.
        documents: whether they keep documents apart.
        shared: N, and how many processes share sequences of it; None for one process.

    Raises:
        ValueError: for a backend that is not there.
    """
    if pooled:
        cfg.rule.check_backends(cfg, device_type, dtype, dim)
    if pooled and shared is not None and (why := cfg.rule.whole(cfg, *shared)):
        log_once(f"shared sequences: all {shared[0]} tokens are exchanged: {why}")
    if documents:
        documents_kernel(cfg.dense_backend, device_type, dtype, dim)
    else:
        choose(cfg.dense_backend, device_type, dtype, dim)
    if cfg.dense_backend in KERNELS:
        # Which `choose` says of "auto" alone.
        log_once(f"dense attention on {device_type}: {KERNELS[cfg.dense_backend].label}")
