"""Gated linear attention with fixed gates, for scores: no gradient.

B batch, N tokens, H heads, D head dimension.
"""

import importlib.util

import torch
from torch import Tensor
from torch.library import custom_op

_INSTALLED = importlib.util.find_spec("fla") is not None
_CHUNK = 64


@custom_op("lighthouse::gated_linear_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    """One operation, which a compiler leaves whole: the scan goes over as many chunks as there are."""
    return (_fused if _INSTALLED and q.is_cuda else scan)(q, k, v, first).float()


@_attend.register_fake
def _(q, k, v, first):
    return torch.empty(q.shape, dtype=torch.float32, device=q.device)


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, first: int = 0) -> Tensor:
    """By flash-linear-attention's kernel where it is installed, on a GPU; else by `scan`, whose arguments it has."""
    return _attend(q, k, v, first)


def log_decay(heads: int, device: torch.device | str, first: int = 0) -> Tensor:
    """Logarithm of what is left of each head's state after a token, float32 [H], of heads that begin with `first`."""
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(first, first + heads, device=device, dtype=torch.float32))))


def _fused(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    decay = log_decay(q.shape[2], q.device, first)
    out, _ = chunk_simple_gla(q, k, v, g=decay.expand(q.shape[:3]), scale=q.shape[3] ** -0.5)
    return out


def scan(q: Tensor, k: Tensor, v: Tensor, first: int = 0) -> Tensor:
    """o_t = sum over s <= t of decay^(t - s) (q_t . k_s) / sqrt(D) v_s, a chunk of tokens at a time, in float32.

    Args:
        q, k, v: [B, N, H, D].
        first: number of the first head in its layer.

    Returns:
        [B, N, H, D] float32.
    """
    q, k, v = q.float() * q.shape[3] ** -0.5, k.float(), v.float()
    decay = log_decay(q.shape[2], q.device, first)
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], q.shape[3])
    outs = []
    for start in range(0, q.shape[1], _CHUNK):
        a, b, c = (x[:, start : start + _CHUNK] for x in (q, k, v))
        at = torch.arange(a.shape[1], device=q.device, dtype=torch.float32)
        age = at[:, None] - at
        within = (age * decay[:, None, None]).exp().masked_fill(age < 0, 0.0)
        scores = torch.einsum("bnhd,bmhd->bhnm", a, b) * within
        # What the state of the chunks before has lost by each token, and by the chunk's end.
        lost = ((at[:, None] + 1) * decay).exp()
        out = torch.einsum("bhnm,bmhd->bnhd", scores, c)
        outs.append(out + torch.einsum("bnhd,bhde->bnhe", a * lost[..., None], state))
        kept = ((a.shape[1] - 1 - at[:, None]) * decay).exp()
        added = torch.einsum("bnhd,bnhe->bhde", b * kept[..., None], c)
        state = state * (a.shape[1] * decay).exp()[:, None, None] + added
    return torch.cat(outs, 1)
