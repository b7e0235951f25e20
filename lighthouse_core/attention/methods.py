"""Attention of stage 1 that is not the paper's. No position sees a later one, whatever the scorer, and every query
keeps its own resolution.

B batch, N tokens, H query heads, Hkv key/value heads, D head dimension.
"""

from math import log

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import pad

from lighthouse_core.attention.config import SCORERS, LighthouseConfig, known
from lighthouse_core.attention.dense import dense_attention
from lighthouse_core.attention.parts import far, merge, near
from lighthouse_core.backends import uniform


def chunked(q: Tensor, k: Tensor, v: Tensor, cfg: LighthouseConfig, *, scale: float | None = None) -> Tensor:
    """Dense causal attention within each chunk of `cfg.window` tokens: training on short sequences.

    Shapes and types as of `dense_attention`.
    """
    tokens = q.shape[1]
    size = min(cfg.window, tokens)
    chunks = -(-tokens // size)
    short = (
        pad(x, (0, 0, 0, 0, 0, chunks * size - tokens)).unflatten(1, (chunks, size)).flatten(0, 1) for x in (q, k, v)
    )
    out = dense_attention(*short, scale=scale, backend=cfg.dense_backend)
    return out.unflatten(0, (-1, chunks)).flatten(1, 2)[:, :tokens]


def sliding(q: Tensor, k: Tensor, v: Tensor, cfg: LighthouseConfig, *, scale: float | None = None) -> Tensor:
    """Causal attention over the last `cfg.window` tokens. Shapes and types as of `dense_attention`."""
    return near(q, k, v, cfg.window, scale=scale, backend=cfg.dense_backend).out


def compressed(
    q: Tensor, k: Tensor, v: Tensor, cfg: LighthouseConfig, *, scale: float | None = None, key: Tensor | None = None
) -> Tensor:
    """One softmax over what is near as it is and what is far in fewer keys.

    - the last `window` tokens, exactly;
    - every earlier window of `compression` tokens as the mean of its keys and of its values, with the weight of as many
      tokens: the logarithm of `compression` is added to its score. No token lies between the two; up to compression - 1
      tokens are in both;
    - if `keep` is not 0, one block of `score_block` tokens of every `keep` blocks as it is, too. `scorer` says which:
      "norm" that with the key of largest L2 norm; the others one at random. When the last block of these is further
      behind than the window, the first token of the block takes part, and every `keep` tokens another one.

    A key takes part only after the last token that decided it, so nothing leaks. (Memory-compressed attention, Liu et
    al. 2018, arXiv 1801.10198, beside a local window; the weight of a pooled key is ours.)

    Args:
        q: [B, N, H, D].
        k, v: [B, N, Hkv, D].
        cfg: settings.
        scale: factor on the scores; 1/sqrt(D) by default.
        key: int64 (seed, step, layer[, sample]) where the scorer draws.

    Returns:
        [B, N, H, D] in the dtype of `q`.
    """
    tokens, size = q.shape[1], cfg.compression
    how = {"scale": scale, "backend": cfg.dense_backend}
    parts = [near(q, k, v, cfg.window, **how)]
    if cfg.window >= tokens:
        return parts[0].out
    pooled = (x[:, : tokens // size * size].unflatten(1, (-1, size)).mean(2) for x in (k, v))
    coarse = far(q, *pooled, size, cfg.window // size, **how)
    parts.append(coarse._replace(lse=coarse.lse + log(size)))
    if cfg.keep and tokens > cfg.keep * cfg.blocks_behind:
        parts.append(far(q, *kept_blocks(k, v, cfg, key), cfg.keep, cfg.blocks_behind, **how))
    return merge(parts)


def kept_blocks(k: Tensor, v: Tensor, cfg: LighthouseConfig, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The blocks that stay as they are, one of each whole group of `keep` blocks, [B, groups * score_block, Hkv, D]."""
    batch, _, kv_heads, dim = k.shape
    groups = k.shape[1] // (cfg.keep * cfg.score_block)
    k, v = (
        x[:, : groups * cfg.keep * cfg.score_block].unflatten(1, (groups, cfg.keep, cfg.score_block)) for x in (k, v)
    )
    if known("scorer", cfg.scorer, SCORERS) == "norm":
        chosen = _largest(k.detach())
    else:
        drawn = uniform(checked_key(key, cfg).to(k.device), batch, kv_heads, torch.arange(groups, device=k.device))
        chosen = (drawn * cfg.keep).long().transpose(1, 2)
    index = chosen[:, :, None, None, :, None].expand(-1, -1, 1, cfg.score_block, -1, dim)
    return tuple(x.gather(2, index).flatten(1, 3) for x in (k, v))


@custom_op("lighthouse::largest_block", mutates_args=())
def _largest(k: Tensor) -> Tensor:
    """Of every group in [B, groups, keep, score_block, Hkv, D] the block with the largest key, [B, groups, Hkv] int64.

    An operation of its own: fused by a compiler, norms would round differently than they do elsewhere.
    """
    return k.float().square().sum(-1).amax(3).argmax(2)


@_largest.register_fake
def _(k):
    return k.new_empty(k.shape[0], k.shape[1], k.shape[4], dtype=torch.int64)


# What decides which keys there are: activation checkpointing must not decide it again.
SELECTING = (torch.ops.lighthouse.largest_block.default,)


def checked_key(key: Tensor | None, cfg: LighthouseConfig) -> Tensor:
    """The key that a scorer draws from.

    Raises:
        ValueError: there is none, or it is no int64 (seed, step, layer) or (seed, step, layer, sample).
    """
    if key is None:
        raise ValueError(f"scorer {cfg.scorer!r} draws its scores from `key`, an int64 tensor (seed, step, layer)")
    if key.dtype != torch.int64 or key.dim() != 1 or key.numel() not in (3, 4):
        raise ValueError(
            f"key must be int64 (seed, step, layer) or (seed, step, layer, sample); got {key.dtype} {tuple(key.shape)}"
        )
    return key
