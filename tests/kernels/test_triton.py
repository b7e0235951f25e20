"""The Triton kernels against the plain PyTorch truth: values and every gradient, through the public API.

On a machine without a GPU the kernels run in Triton's interpreter at small shapes; `pytest -m gpu` runs all of them.
"""

from dataclasses import replace

import draws
import pytest
import torch
from against import CUDA, DEVICE, DTYPES, SHAPES, SMALL, assert_as_good, inputs, relative

from lighthouse_core import LighthouseConfig, lighthouse_attention, select_indices
from lighthouse_kernels.select import triton as select

# On a GPU all of it is the GPU's.
pytestmark = [pytest.mark.usefixtures("poison"), *([pytest.mark.gpu] if CUDA else [])]


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.use_deterministic_algorithms(False)


def gradients(call, tensors, grad):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = call(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype):
    q, k, v, cfg = inputs(shape, dtype)
    indices = select_indices(q, k, replace(cfg, backend="reference"))
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
    cfg = replace(cfg, dense_backend="math")

    def call(backend):
        return lambda *x: lighthouse_attention(*x, replace(cfg, backend=backend), indices=indices)

    got, got_grads = gradients(call("triton"), (q, k, v), grad.to(dtype))
    plain, plain_grads = gradients(call("reference"), (q, k, v), grad.to(dtype))
    exact, exact_grads = gradients(call("reference"), [x.double() for x in (q, k, v)], grad)
    assert_as_good(got, plain, exact, "out")
    for name, ours, theirs, truth in zip("qkv", got_grads, plain_grads, exact_grads, strict=True):
        assert_as_good(ours, theirs, truth, f"d{name}")


@pytest.mark.parametrize("cover_prefix", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_selection_from_scores(shape, cover_prefix):
    q, k, _, cfg = inputs(shape)
    cfg = replace(cfg, cover_prefix=cover_prefix)
    for scores in (draws.token_scores(q.cpu(), k.cpu(), seed=3), (q.norm(dim=-1), k.norm(dim=-1))):
        scores = tuple(x.to(DEVICE) for x in scores)
        expected = select_indices(q, k, replace(cfg, backend="reference"), scores=scores)
        assert torch.equal(select_indices(q, k, cfg, scores=scores), expected)


@pytest.mark.parametrize("shape", SHAPES[2:5:2])
def test_selection_from_more_candidates_than_a_block_holds(monkeypatch, shape):
    monkeypatch.setattr(select, "BLOCK", 4)
    q, k, _, cfg = inputs(shape)
    scores = tuple(x.to(DEVICE) for x in draws.token_scores(q.cpu(), k.cpu(), seed=3))
    expected = select_indices(q, k, replace(cfg, backend="reference"), scores=scores)
    assert torch.equal(select_indices(q, k, cfg, scores=scores), expected)


@pytest.mark.parametrize("scorer, block", [("random", 64), ("block", 64), ("block", 2)])
@pytest.mark.parametrize("shape", [*SHAPES[2:5], *SHAPES[len(SMALL) :]])
def test_selection_from_a_key(shape, scorer, block):
    q, k, _, cfg = inputs(shape)
    cfg = replace(cfg, scorer=scorer, score_block=block)
    for key in ((1, 2, 3), (-5, 2**33 + 1, 70, 9)):
        key = torch.tensor(key, device=DEVICE)
        expected = select_indices(q, k, replace(cfg, backend="reference"), key=key)
        assert torch.equal(select_indices(q, k, cfg, key=key), expected)


@pytest.mark.parametrize("shape", [*SHAPES[1:4], *SHAPES[len(SMALL) :]])
def test_norm_scores_choose_as_the_reference_does(shape):
    """Norms far enough apart that the last bit, which depends on the order of addition, decides nothing."""
    q, k, v, cfg = inputs(shape)
    ranks = [torch.randperm(x[..., 0].numel(), generator=torch.Generator().manual_seed(5)) for x in (q, k)]
    q, k = (
        torch.nn.functional.normalize(x, dim=-1) * (1 + r.view(x.shape[:3]).to(x)[..., None] / 1024)
        for x, r in zip((q, k), ranks, strict=True)
    )
    expected = select_indices(q, k, replace(cfg, backend="reference"))
    assert torch.equal(select_indices(q, k, cfg), expected)
    # The one pass that also pools chooses the same.
    whole = lighthouse_attention(q, k, v, cfg)
    assert torch.equal(whole, lighthouse_attention(q, k, v, cfg, indices=expected))


def test_scores_of_any_sign_and_size():
    q, k, _, cfg = inputs(SMALL[4])
    windows = 192 + 48 + 12 + 3
    generator = torch.Generator().manual_seed(7)
    pair = [torch.randn(1, 1, windows, generator=generator).exp().mul(10).to(DEVICE) - 0.99 for _ in range(2)]
    for scores in pair:
        # Both zeros, which are equal, among the largest and the smallest.
        scores[..., ::2] = 0.0
        scores[..., 1::4] = -0.0
    expected = select_indices(q, k, replace(cfg, backend="reference"), scores=tuple(pair))
    assert torch.equal(select_indices(q, k, cfg, scores=tuple(pair)), expected)


@pytest.mark.parametrize("shape", [SHAPES[3], *SHAPES[len(SMALL) :][::4]])
def test_two_runs_are_bitwise_equal(shape):
    """With torch asked to be deterministic, for the dense kernel's sake; nothing of ours heeds it."""
    runs = 20 if CUDA else 2
    torch.use_deterministic_algorithms(True)
    q, k, v, cfg = inputs(shape, torch.bfloat16 if CUDA else torch.float32)
    grad = torch.ones_like(q)
    first = gradients(lambda *x: lighthouse_attention(*x, cfg), (q, k, v), grad)
    for _ in range(runs - 1):
        again = gradients(lambda *x: lighthouse_attention(*x, cfg), (q, k, v), grad)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_strided_inputs_give_the_same(monkeypatch):
    q, k, v, cfg = inputs((21, *SMALL[1][1:]))
    tensors = [x.requires_grad_() for x in (q, k, v)]
    expected = lighthouse_attention(*tensors, cfg)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(lighthouse_attention(*heads_first, cfg), expected)
    last_strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert torch.equal(lighthouse_attention(*last_strided, cfg), expected)
    # Gradients whose rows are one element, or lie across.
    across = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for grad in (torch.ones((), device=DEVICE).expand(q.shape), across.transpose(1, 3).contiguous().transpose(1, 3)):
        strided, contiguous = (
            torch.autograd.grad(expected, tensors, each, retain_graph=True) for each in (grad, grad.contiguous())
        )
        assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))


def test_what_cannot_run_is_refused():
    q, k, v, cfg = inputs(SMALL[0], torch.float64)
    with pytest.raises(ValueError, match=r"takes no torch\.float64"):
        lighthouse_attention(q, k, v, cfg)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    """The last head's part of a call whose q, output and gradients need 64-bit offsets, against that head alone."""
    tokens, heads, kv_heads, dim = 2**20, 18, 9, 128
    assert tokens * heads * dim > 2**31
    generator = torch.Generator("cuda").manual_seed(2)

    def draw(count):
        return torch.randn(1, tokens, count, dim, device="cuda", dtype=torch.bfloat16, generator=generator)

    cfg = LighthouseConfig(levels=5, topk=1024, backend="triton", dense_backend="flash")
    tensors, grad = [draw(heads), draw(kv_heads), draw(kv_heads)], draw(heads)
    out, grads = gradients(lambda *x: lighthouse_attention(*x, cfg), tensors, grad)
    last = [tensors[0][:, :, -2:], tensors[1][:, :, -1:], tensors[2][:, :, -1:]]
    alone, alone_grads = gradients(lambda *x: lighthouse_attention(*x, cfg), last, grad[:, :, -2:])
    assert torch.equal(out[:, :, -2:], alone)
    for whole, part in zip(grads, alone_grads, strict=True):
        # The dense kernel splits its sums by the number of heads.
        assert relative(whole[:, :, -part.shape[2] :], part) < 1e-2


@pytest.mark.gpu
def test_rows_beyond_2_31_elements():
    """The same for the last row of a batch."""
    batch, tokens, heads, dim = 3, 2**20, 8, 128
    assert (batch - 1) * tokens * heads * dim >= 2**31
    generator = torch.Generator("cuda").manual_seed(2)
    cfg = LighthouseConfig(levels=5, topk=1024, backend="triton", dense_backend="flash")
    tensors = [torch.randn(batch, tokens, heads, dim, device="cuda", dtype=torch.bfloat16, generator=generator)] * 3
    with torch.no_grad():
        assert torch.equal(
            lighthouse_attention(*tensors, cfg)[-1:], lighthouse_attention(*(x[-1:] for x in tensors), cfg)
        )


@pytest.mark.gpu
def test_more_than_65535_entries():
    shape = (262144, 1, 1, 1, 64, 4, 2, 1024, 128)
    q, k, v, cfg = inputs(shape)
    indices = select_indices(q, k, replace(cfg, backend="reference"))
    assert indices.shape[2] > 65536
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def call(backend):
        return lambda *x: lighthouse_attention(*x, replace(cfg, backend=backend), indices=indices)

    ours, plain = (gradients(call(backend), (q, k, v), grad) for backend in ("triton", "reference"))
    for got, expected in zip((ours[0], *ours[1]), (plain[0], *plain[1]), strict=True):
        assert relative(got, expected) < 1e-5
