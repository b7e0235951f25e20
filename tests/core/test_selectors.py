"""What each selector scores, against formulas written out in full, and that every one of them gives a whole call."""

import pytest
import torch

from lighthouse_core import LighthouseConfig, lighthouse_attention, select_indices
from lighthouse_core.attention import AttentionContext
from lighthouse_core.attention.backends import kernels, window_scores
from lighthouse_core.attention.scan import log_decay, scan
from lighthouse_core.attention.selectors import SELECTORS, selector_of
from lighthouse_core.attention.selectors.selector import Inputs

KEY = torch.tensor([1, 2, 3])
PYRAMID = {"pooling": 2, "levels": 3, "topk": 8, "tile_parents": 4, "backend": "reference"}


def draw(tokens=150, heads=4, kv_heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(2, tokens, h, 8, generator=generator, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def scores_of(name, q, k, v):
    cfg = LighthouseConfig(**PYRAMID, scorer=name)
    given = Inputs(q, k, v, AttentionContext(KEY), cfg.geometry(q.shape[1]), cfg, kernels("reference", "cpu"))
    return selector_of(name).select(given)


def expected(weights, q, k, v):
    """(s_Q, s_K) by a formula for the weights, [B, H, N, N], of (queries, keys)."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    outs = [torch.einsum("bhnm,bmhd->bnhd", weights(a, b), v) for a, b in ((q, k), (k, q))]
    by_query, by_key = (out.norm(dim=-1) for out in outs)
    return by_query, by_key.unflatten(2, (-1, group)).amax(-1)


def every_fourth(q, k):
    at = torch.arange(q.shape[1])
    age = at[:, None] - at
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[3] ** 0.5
    return scores.masked_fill((age < 0) | (age % 4 != 0), -torch.inf).softmax(-1)


def decaying(q, k):
    at = torch.arange(q.shape[1])
    age = (at[:, None] - at).double()
    decay = 1 - 2.0 ** (-5.0 - torch.arange(q.shape[2]).double())
    within = (decay[:, None, None] ** age).masked_fill(age < 0, 0.0)
    return torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[3] ** 0.5 * within


@pytest.mark.parametrize("tokens", [1, 3, 64, 65, 150])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (2, 1)])
@pytest.mark.parametrize("name, weights, tolerance", [("dilated", every_fourth, 1e-12), ("gla", decaying, 1e-5)])
def test_scores_are_norms_of_outputs(name, weights, tolerance, tokens, heads, kv_heads):
    q, k, v = draw(tokens, heads, kv_heads)
    for got, wanted in zip(scores_of(name, q, k, v), expected(weights, q, k, v), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6 + tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["dilated", "gla"])
def test_a_score_is_causal(name):
    q, k, v = draw()
    other = [torch.cat((x[:, :70], torch.randn_like(x[:, 70:])), 1) for x in (q, k, v)]
    for before, after in zip(scores_of(name, q, k, v), scores_of(name, *other), strict=True):
        torch.testing.assert_close(after[:, :70], before[:, :70], rtol=1e-12, atol=0)
        assert not torch.allclose(after[:, 70:], before[:, 70:])


def test_a_head_forgets_slower_than_the_one_before():
    decay = log_decay(12, "cpu").double()
    assert (decay < 0).all() and (decay.diff() > 0).all()
    assert decay.exp()[0].item() == pytest.approx(1 - 1 / 32)


def test_the_scan_takes_any_chunks(monkeypatch):
    from lighthouse_core.attention import scan as module

    q, k, v = draw(kv_heads=4, dtype=torch.float32)
    whole = scan(q, k, v)
    monkeypatch.setattr(module, "_CHUNK", 7)
    torch.testing.assert_close(scan(q, k, v), whole)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_makes_a_call(name):
    """The selection that `select_indices` returns is that of the call, compiled or not, and gradients go by values."""
    cfg = LighthouseConfig(**PYRAMID, scorer=name)
    inputs = [x.float().requires_grad_() for x in draw()]
    indices = select_indices(*inputs[:2], cfg, v=inputs[2], key=KEY)
    assert not indices.requires_grad and indices.shape == (2, 2, cfg.geometry(150).gathered_length)
    out = lighthouse_attention(*inputs, cfg, key=KEY)
    assert torch.equal(out, lighthouse_attention(*inputs, cfg, indices=indices))
    # The others are compiled, and with gradients, in test_attention.py.
    if name not in ("norm", "random", "block"):
        torch._dynamo.reset()
        compiled = torch.compile(lighthouse_attention, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs, cfg, key=KEY), out)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize(
    "name", [name if name == "gla" else pytest.param(name, marks=pytest.mark.slow) for name in SELECTORS]
)
def test_a_selector_is_compiled_once_for_all_lengths(name):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    cfg = LighthouseConfig(**PYRAMID, scorer=name)
    compiled = torch.compile(lighthouse_attention, fullgraph=True, backend=backend, dynamic=True)
    # None fills its last window.
    for tokens in (150, 202):
        inputs = draw(tokens, dtype=torch.float32)
        torch.testing.assert_close(compiled(*inputs, cfg, key=KEY), lighthouse_attention(*inputs, cfg, key=KEY))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", SELECTORS)
def test_what_a_selector_says_of_itself(name):
    """Later tokens take part in the selection of those that say so, and the key in that of those that draw."""
    cfg = LighthouseConfig(**PYRAMID, scorer=name)
    q, k, v = draw()
    first = select_indices(q, k, cfg, v=v, key=KEY)
    noise = [torch.cat((x[:, :140], 100 * torch.randn_like(x[:, 140:])), 1) for x in (q, k, v)]
    later = select_indices(*noise[:2], cfg, v=noise[2], key=KEY)
    assert torch.equal(first, later) is not cfg.leaks
    other = select_indices(q, k, cfg, v=v, key=KEY + 1)
    assert torch.equal(first, other) is not cfg.draws
    if not cfg.draws:
        assert torch.equal(first, select_indices(q, k, cfg, v=v))
    seen = selector_of(name).scores(q, k, v, cfg.geometry(150))
    if seen is not None:
        ops, g = kernels("reference", "cpu"), cfg.geometry(150)
        assert torch.equal(ops.select(window_scores(seen, (2, 150, 4), 2, g), g).indices, first)


@pytest.mark.parametrize("name", ["dilated", "gla"])
def test_a_selector_that_attends_wants_its_inputs(name):
    q, k, _ = draw()
    with pytest.raises(ValueError, match="needs v"):
        select_indices(q, k, LighthouseConfig(**PYRAMID, scorer=name))
    with pytest.raises(ValueError, match="rotate must be 'before' for the scorer"):
        LighthouseConfig(**PYRAMID, scorer=name, rotate="after")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [500, 4096])
def test_the_fused_kernel_scans_too(tokens):
    pytest.importorskip("fla")
    from lighthouse_core.attention.scan import _fused

    q, k, v = (x.float().cuda() for x in draw(tokens, 4, 4))
    torch.testing.assert_close(_fused(q, k, v), scan(q, k, v), rtol=1e-2, atol=1e-2)
