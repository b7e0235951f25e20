"""Kept entries and a window of tokens as one softmax: plain PyTorch against sums written out, the kernel against it."""

from dataclasses import replace

import draws
import pytest
import slow
import torch
from against import CUDA, DEVICE, DTYPES, SHAPES, assert_as_good, inputs
from hypothesis import given

from lighthouse_core import select_indices
from lighthouse_core.attention.backends import kernels

gpu = [pytest.mark.gpu] if CUDA else []
NAMES = ("out", "dx", "dlse", "drows", "drow_lse")


def parts(q, entries, dtype, seed=0):
    """A window's attention and the dense call's rows, with log-sum-exps so far apart that some count alone."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        x = torch.randn(q.shape[0], length, *q.shape[2:], generator=generator, dtype=torch.float64)
        return x, 4 * torch.randn(x.shape[:3], generator=generator, dtype=torch.float64)

    (x, lse), (rows, row_lse) = draw(q.shape[1]), draw(entries)
    wide = torch.promote_types(dtype, torch.float32)
    return [y.to(DEVICE, kind) for y, kind in ((x, dtype), (lse, wide), (rows, dtype), (row_lse, wide))]


def merged(backend, tensors, indices, g, grad, begins=None):
    """The output and the gradients of all four."""
    ops = kernels(backend, DEVICE, tensors[0].dtype)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = ops.merge(*leaves, ops.given(indices, g), g, begins)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))]


def case(shape):
    """A selection in a pyramid, and float32 parts of it."""
    q, k, _, cfg = inputs(shape)
    indices = select_indices(q, k, replace(cfg, backend="reference"))
    return q, indices, cfg.geometry(q.shape[1]), parts(q, indices.shape[2], torch.float32)


def assert_like_plain(tensors, indices, g, grad, begins=None):
    """The kernel's output and gradients are as near the truth as plain PyTorch's. Returns them."""
    ours, plain = (merged(backend, tensors, indices, g, grad, begins) for backend in ("triton", "reference"))
    exact = merged("reference", [x.double() for x in tensors], indices, g, grad, begins)
    for name, *found in zip(NAMES, ours, plain, exact, strict=True):
        assert_as_good(*found, name)
    return ours


@given(draws.calls())
def test_parts_are_those_of_the_rule(call):
    q, k, _, cfg, scores = call
    g, group = cfg.geometry(q.shape[1]), q.shape[2] // k.shape[2]
    indices = select_indices(q, k, cfg, scores=scores)
    x, lse, rows, row_lse = parts(q.cpu(), indices.shape[2], torch.float64)
    total, mass = x * lse.exp()[..., None], lse.exp()
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for e, entry in enumerate(slow.parse(indices[b, h // group], q.shape[1], cfg)):
                width = cfg.pooling**entry.level
                served = slice((entry.window + 1) * width - 1, (entry.window + 2) * width - 1)
                total[b, served, h] += row_lse[b, e, h].exp() * rows[b, e, h]
                mass[b, served, h] += row_lse[b, e, h].exp()
    found = kernels("reference", "cpu").merge(x, lse, rows, row_lse, kernels("reference", "cpu").given(indices, g), g)
    torch.testing.assert_close(found, total / mass[..., None], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_rows_serve_their_document_alone(seed):
    """The rule written out, for documents that begin at any window of the coarsest level."""
    generator = torch.Generator().manual_seed(seed)
    q, k, _, cfg = inputs(next(s.values[0] for s in SHAPES))
    g = cfg.geometry(q.shape[1])
    coarsest = g.windows(g.levels - 1)
    starts = torch.rand(q.shape[0], coarsest, generator=generator) < (0.1, 0.5, 1.0)[seed]
    starts[:, 0] = True
    begins = torch.where(starts, torch.arange(coarsest), -1).cummax(1).values * g.window(g.levels - 1)
    begins = begins.int().to(DEVICE)
    indices = select_indices(q, k, replace(cfg, backend="reference"))
    tensors = parts(q, indices.shape[2], torch.float32, seed)
    grad = torch.randn(tensors[0].shape, generator=generator).to(DEVICE)
    ours = assert_like_plain(tensors, indices, g, grad, begins)
    x, lse, rows, row_lse = (y.cpu().double() for y in tensors)
    group = q.shape[2] // k.shape[2]
    total, mass = x * lse.exp()[..., None], lse.exp()
    for b in range(q.shape[0]):
        of = begins[b].cpu().repeat_interleave(g.window(g.levels - 1))[: q.shape[1]]
        for h in range(q.shape[2]):
            for e, entry in enumerate(slow.parse(indices[b, h // group], q.shape[1], cfg)):
                width = cfg.pooling**entry.level
                for t in range((entry.window + 1) * width - 1, min((entry.window + 2) * width - 1, q.shape[1])):
                    if of[t] <= entry.window * width:
                        total[b, t, h] += row_lse[b, e, h].exp() * rows[b, e, h]
                        mass[b, t, h] += row_lse[b, e, h].exp()
    torch.testing.assert_close(ours[0].cpu().double(), total / mass[..., None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [pytest.param(*s.values, id=s.id, marks=[*s.marks, *gpu]) for s in SHAPES])
@pytest.mark.usefixtures("poison")
def test_values_and_gradients(shape, dtype):
    q, k, _, cfg = inputs(shape)
    g = cfg.geometry(q.shape[1])
    scores = tuple(x.to(DEVICE) for x in draws.token_scores(q.cpu(), k.cpu(), seed=3))
    indices = select_indices(q, k, replace(cfg, backend="reference"), scores=scores)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE, dtype)
    tensors = parts(q, indices.shape[2], dtype)
    ours = assert_like_plain(tensors, indices, g, grad)
    again = merged("triton", tensors, indices, g, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("shape", [pytest.param(*SHAPES[2].values, marks=gpu)])
def test_strided_parts_give_the_same(shape):
    q, indices, g, tensors = case(shape)
    expected = merged("triton", tensors, indices, g, torch.ones_like(q))
    strided = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in tensors]
    assert not any(x.is_contiguous() for x in strided)
    for a, b in zip(
        expected, merged("triton", strided, indices, g, torch.ones((), device=DEVICE).expand(q.shape)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [pytest.param(*SHAPES[1].values, marks=gpu)])
def test_a_part_that_outweighs_all_others(shape):
    """No overflow, and the others' gradients vanish."""
    q, indices, g, (x, lse, rows, row_lse) = case(shape)
    out, _, dlse, drows, drow_lse = merged(
        "triton", (x, lse + 1000, rows, row_lse - 1000), indices, g, torch.ones_like(q)
    )
    assert torch.equal(out, x) and not any(y.any() for y in (dlse, drows, drow_lse))


@pytest.mark.parametrize("shape", [pytest.param(*SHAPES[8].values, marks=gpu)])
def test_a_row_that_outweighs_the_window_over_hundreds_of_positions(shape):
    """Its log-sum-exp's gradient is a sum of small differences."""
    q, indices, g, (x, lse, rows, row_lse) = case(shape)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_like_plain((x, lse, rows, row_lse + 12), indices, g, grad)
