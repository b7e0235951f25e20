"""What reaches the dense kernel: pooled vectors, read off calls whose attention weights are known."""

import draws
import pytest
import slow
import torch
from hypothesis import given

from lighthouse_core import lighthouse_attention, select_indices


@given(draws.calls())
def test_uniform_attention_averages_the_pooled_values(call):
    """Queries of zero weigh every earlier entry alike, so an entry's output is the running mean of the kept means."""
    q, k, v, cfg, scores = call
    n, group = q.shape[1], q.shape[2] // k.shape[2]
    indices = select_indices(q, k, cfg, scores=scores)
    out = lighthouse_attention(torch.zeros_like(q), k, v, cfg, indices=indices)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            expected = torch.zeros_like(out[b, :, h])
            total = torch.zeros_like(expected[0])
            for seen, e in enumerate(slow.parse(indices[b, h // group], n, cfg), start=1):
                total = total + slow.pool(v[b, :, h // group], e, cfg)
                for t in e.writes(cfg.pooling):
                    if t < n:
                        expected[t] += total / seen
            torch.testing.assert_close(out[b, :, h], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_every_vector_is_the_mean_over_its_window(which):
    """Adding a vector that sums to zero over every window of every level changes only what level 0 reads."""
    cfg = draws.config(4, 2, 2, 2, cover_prefix=False)
    tensors = dict(zip("qkv", draws.qkv(64, 1, 1, 1, 3), strict=True))
    scores = torch.zeros(1, 64, 1), torch.zeros(1, 64, 1)
    scores[0][0, 32], scores[1][0, 40] = 1.0, 1.0  # parents 8 and 10: level 0 keeps tokens 32..35 and 40..43
    indices = select_indices(tensors["q"], tensors["k"], cfg, scores=scores)
    before = lighthouse_attention(*tensors.values(), cfg, indices=indices)
    wave = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64).repeat(16)[None, :, None, None]
    tensors[which] = tensors[which] + 3 * wave
    after = lighthouse_attention(*tensors.values(), cfg, indices=indices)
    torch.testing.assert_close(after[:, :32], before[:, :32], rtol=1e-10, atol=1e-12)
    assert (after[:, 32:36] - before[:, 32:36]).abs().amin() > 1e-3
