"""Where outputs land: values of one make every entry's output one, so a position's output counts its contributors."""

import draws
import pytest
import slow
import torch
from hypothesis import given

from lighthouse_core import lighthouse_attention, select_indices


def counts(q, k, v, cfg, indices):
    out = lighthouse_attention(q, k, torch.ones_like(v), cfg, indices=indices)
    assert (out - out.round()).abs().max() < 1e-9
    return out.round()


@given(draws.calls())
def test_contributors_are_those_of_the_rule(call):
    q, k, v, cfg, scores = call
    group = q.shape[2] // k.shape[2]
    indices = select_indices(q, k, cfg, scores=scores)
    found = counts(q, k, v, cfg, indices)
    assert found.max() <= cfg.levels
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            expected = slow.contributors(slow.parse(indices[b, h // group], q.shape[1], cfg), q.shape[1], cfg)
            assert found[b, :, h].tolist() == [[float(c)] * v.shape[3] for c in expected]


@given(draws.calls(cover_prefix=True))
def test_cover_prefix_leaves_no_position_empty(call):
    q, k, v, cfg, scores = call
    assert counts(q, k, v, cfg, select_indices(q, k, cfg, scores=scores)).min() >= 1


def test_a_position_without_a_contributor_is_zero():
    cfg = draws.config(4, 2, 2, 2, cover_prefix=False)
    q, k, v = (x.requires_grad_() for x in draws.qkv(64, 1, 1, 1, 3))
    scores = torch.zeros(1, 64, 1), torch.zeros(1, 64, 1)
    scores[0][0, 32], scores[1][0, 40] = 1.0, 1.0
    out = lighthouse_attention(q, k, v, cfg, scores=scores)
    assert torch.equal(out[:, :3], torch.zeros_like(out[:, :3])) and out[:, 3:].abs().amin() > 0
    grads = torch.autograd.grad(out[:, :3].sum(), (q, k, v))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("p, levels", [(2, 4), (4, 3), (8, 2)])
def test_an_entry_writes_from_its_last_token_on(p, levels):
    """Only one coarsest window has a value; under uniform attention its own output starts at its last token."""
    cfg = draws.config(p, levels, 2, 2, cover_prefix=False)
    c = p ** (levels - 1)
    n = 12 * c
    assert slow.geometry(n, cfg).entries < n
    scores = torch.zeros(1, n, 1), torch.zeros(1, n, 1)
    scores[0][0, 10 * c], scores[1][0, 11 * c] = 1.0, 1.0  # the descent happens far to the right
    v = torch.zeros(1, n, 1, 1, dtype=torch.float64)
    v[:, 3 * c : 4 * c] = 1.0
    q = torch.zeros_like(v)
    out = lighthouse_attention(q, q, v, cfg, scores=scores)[0, :, 0, 0]
    assert out[: 4 * c - 1].abs().max() == 0
    expected = torch.full((c,), 1 / 4, dtype=torch.float64)
    torch.testing.assert_close(out[4 * c - 1 : 5 * c - 1], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(out[5 * c - 1 : 6 * c - 1], expected * 4 / 5, rtol=1e-12, atol=0)
