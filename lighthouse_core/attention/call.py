"""The Lighthouse attention call: pool, score, select, gather, attend, scatter; kernels/README.md has the rule.

Shapes: B batch, N tokens, H query heads, Hkv key/value heads, D head dimension, M windows of all levels, S entries.
"""

import torch
from torch import Tensor

from lighthouse_core.attention.config import LighthouseConfig, known
from lighthouse_core.attention.dense import check_inputs, dense_attention
from lighthouse_core.attention.methods import checked_key, chunked, compressed, sliding
from lighthouse_core.attention.parts import near
from lighthouse_core.backends import Geometry, geometry, kernels, log_once, window_scores

Scores = tuple[Tensor, Tensor]


def choose(ops, q: Tensor, kv_heads: int, cfg: LighthouseConfig, g: Geometry, scores: Scores | None, key):
    """The selection from window scores, or else from those that a content-free scorer draws from the key."""
    if scores is not None:
        return ops.select(scores, g)
    known("scorer that draws", cfg.scorer, ("random", "block"))
    key = checked_key(key, cfg)
    block = cfg.score_block if cfg.scorer == "block" else 0
    return ops.select_drawn(key.to(q.device), q.shape[0], kv_heads, block, g)


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
        v: [B, N, Hkv, D]; only scorers that attend read it. None of the present ones does.
        scores: replaces the scorer. A pair (s_Q, s_K), per token ([B, N, H] and [B, N, Hkv]; a window takes the
            maximum of its tokens, a KV head the maximum of its query heads) or per window (both [B, Hkv, M] in flat
            pyramid order). Finite and above -1, the score of padding; what NaN selects is not defined.
        key: int64 (seed, step, layer) or (seed, step, layer, sample), for the scorers `random` and `block`;
            `sample` numbers the first row within the global batch.

    Returns:
        [B, Hkv, S] int32 flat pyramid indices (level 0 first) in causal order; 0..N-1 when the call is dense.

    Raises:
        ValueError: for shapes that do not fit, or a missing key.
    """
    check_inputs(q, k, k if v is None else v)
    cfg.check_names()
    with torch.autocast(q.device.type, enabled=False):
        return _select_indices(q, k, cfg.constant() if torch.compiler.is_compiling() else cfg, scores, key)


def _select_indices(q: Tensor, k: Tensor, cfg: LighthouseConfig, scores: Scores | None, key: Tensor | None) -> Tensor:
    g = geometry(q.shape[1], cfg)
    ops = kernels(cfg.backend, q.device.type, q.dtype)
    if g.dense:
        return torch.arange(g.tokens, dtype=torch.int32, device=q.device).repeat(q.shape[0], k.shape[2], 1)
    if scores is not None:
        scores = window_scores(scores, tuple(q.shape[:3]), k.shape[2], g)
    elif cfg.scorer == "norm":
        scores = ops.norm_scores(q.detach(), k.detach(), g)
    return choose(ops, q, k.shape[2], cfg, g, scores, key).indices


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
) -> Tensor:
    """Lighthouse attention (arXiv 2605.06554; kernels/README.md has the rule), or what `cfg.method` names.
    Differentiable in q, k and v, by the Triton kernels once.

    It computes in the dtype of the inputs, also within torch.autocast: cast them before the call for another. Under
    torch.compile batch, tokens and heads may be dynamic. The settings are constants, and so are which arguments there
    are, whether the call is dense, and whether windows fill the sequence: each is compiled once. With torch 2.11 the
    reference backend is compiled again for another padded length.

    Args:
        q: [B, N, H, D], after RoPE.
        k, v: [B, N, Hkv, D]; H is a multiple of Hkv, which share one selection per KV head.
        cfg: settings of the call.
        indices: [B, Hkv, S] int32 or int64 that fix the selection, as `select_indices` returns them; no window twice.
        scores, key: see `select_indices`.
        scale: factor on the attention scores; 1/sqrt(D) by default.

    Returns:
        [B, N, H, D] in the dtype of `q`. A position without a contributor (possible only with
        ``cover_prefix=False``) is 0. When S >= N the call is dense attention, and says so once in the log.

    Raises:
        ValueError: for shapes that do not fit, a missing key, or a backend that is not there.
    """
    check_inputs(q, k, v)
    cfg.check_names()
    if cfg.method != "pyramid" and not (indices is None and scores is None):
        raise ValueError(f"the method {cfg.method!r} selects nothing: it takes neither indices nor scores")
    if torch.compiler.is_compiling():
        cfg = cfg.constant()
    with torch.autocast(q.device.type, enabled=False):
        if cfg.method == "compressed":
            return compressed(q, k, v, cfg, scale=scale, key=key)
        if cfg.method == "sliding":
            return sliding(q, k, v, cfg, scale=scale)
        if cfg.method == "chunked":
            return chunked(q, k, v, cfg, scale=scale)
        return _pyramid(q, k, v, cfg, indices, scores, scale, key)


def _pyramid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cfg: LighthouseConfig,
    indices: Tensor | None,
    scores: Scores | None,
    scale: float | None,
    key: Tensor | None,
) -> Tensor:
    """The paper's rule: see `lighthouse_attention`."""
    g = geometry(q.shape[1], cfg)
    ops = kernels(cfg.backend, q.device.type, q.dtype)
    if g.dense:
        if not torch.compiler.is_compiling():
            # A compiler would take what is written out for a constant.
            why = "one level" if g.levels == 1 else f"the selection would hold {g.selected_length} entries"
            log_once(f"lighthouse attention of {g.tokens} tokens runs dense: {why}")
        return dense_attention(q, k, v, scale=scale, backend=cfg.dense_backend)
    expected = [q.shape[0], k.shape[2], g.gathered_length]
    if indices is not None and (indices.dtype not in (torch.int32, torch.int64) or list(indices.shape) != expected):
        raise ValueError(
            f"indices must be int32 or int64 [B, Hkv, S] = {expected}; got {indices.dtype} {tuple(indices.shape)}"
        )
    by_norm = indices is None and scores is None and cfg.scorer == "norm"
    pyramid = ops.pyramid(q, k, v, g, scored=by_norm)
    if indices is not None:
        selection = ops.given(indices, g)
    else:
        if scores is not None:
            scores = window_scores(scores, tuple(q.shape[:3]), k.shape[2], g)
        selection = choose(ops, q, k.shape[2], cfg, g, pyramid.scores if by_norm else scores, key)
    gathered = ops.gather(q, k, v, pyramid, selection, g)
    if cfg.window:
        how = {"scale": scale, "backend": cfg.dense_backend}
        return ops.merge(*near(q, k, v, cfg.window, **how), *near(*gathered, 0, **how), selection, g)
    rows = dense_attention(*gathered, scale=scale, backend=cfg.dense_backend)
    return ops.scatter(rows, selection, g)
