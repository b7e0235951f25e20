"""The chunked loss against torch's own linear and cross_entropy."""

from collections import Counter

import pytest
import torch
from torch._inductor import config as inductor
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lighthouse_core.models.labels import IGNORED
from lighthouse_core.models.loss import linear_cross_entropy

TOKENS, DIM, VOCABULARY = 37, 12, 300


def inputs(dtype=torch.float64, tokens=TOKENS, dim=DIM, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, dim, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, dim, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[3] = labels[-1] = IGNORED
    return hidden, weight, labels


def plain(hidden, weight, labels):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return cross_entropy(linear(hidden, weight).to(wide), labels, reduction="sum")


def results(loss, hidden, weight, scale=1.0):
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_any_chunk_gives_the_plain_loss_and_gradients(chunk):
    hidden, weight, labels = inputs()
    expected = results(plain(hidden, weight, labels), hidden, weight, scale=0.37)
    got = results(linear_cross_entropy(hidden, weight, labels, chunk=chunk), hidden, weight, scale=0.37)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_rows_beyond_one_part_of_a_chunk():
    hidden, weight, labels = inputs(tokens=700)
    expected = results(plain(hidden, weight, labels), hidden, weight)
    for ours, theirs in zip(
        results(linear_cross_entropy(hidden, weight, labels, chunk=600), hidden, weight), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_loses_no_more_than_the_plain_one(device, dtype, compiled):
    """Against float64 from the same rounded inputs, with the scale of a real step, which bfloat16 does not hold. The
    factor covers a second rounding of the hidden states' gradient."""
    # float16 trains with a loss scale.
    scale = (2**16 if dtype == torch.float16 else 1) / 98304
    hidden, weight, labels = inputs(dtype, tokens=512, dim=64)
    hidden, weight = (x.detach().to(device).requires_grad_() for x in (hidden, weight))
    labels = labels.to(device)
    truth = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = results(plain(*truth, labels), *truth, scale=scale)
    theirs = results(plain(hidden, weight, labels), hidden, weight, scale=scale)
    ours = results(linear_cross_entropy(hidden, weight, labels, chunk=100, compiled=compiled), hidden, weight, scale)
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert error(a, truth) <= 1.5 * error(b, truth) + 1e-6
        # Nothing that all of it has in common.
        assert abs((a.double() * truth).sum() / truth.square().sum() - 1) < (1e-6 if dtype == torch.float32 else 1e-3)


def error(x, truth):
    return (x.double() - truth).norm() / truth.norm()


def test_float16_keeps_the_gradients_of_unlikely_tokens():
    """Probabilities of a large vocabulary that float16 would round to 0."""
    generator = torch.Generator().manual_seed(2)
    # Whose product with the likely token's weights float16 holds.
    hidden = torch.full((8, 16), 0.25)
    weight = 0.1 * torch.randn(60000, 16, generator=generator)
    weight[0] = 4.5
    hidden, weight = (x.half().requires_grad_() for x in (hidden, weight))
    labels = torch.zeros(8, dtype=torch.int64)
    # float32 loses as much of the sum that a softmax divides by.
    truth = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    assert torch.softmax(linear(*truth), -1)[:, 1:].mean().half() == 0
    _, *ours = results(linear_cross_entropy(hidden, weight, labels), hidden, weight, 2.0**16)
    _, *exact = results(plain(*truth, labels), *truth, scale=2.0**16)
    assert error(ours[0], exact[0].double()) < 1e-2 and error(ours[1], exact[1].double()) < 1e-2
    # Without the likely one, which has nearly all of it.
    assert error(ours[1][1:], exact[1][1:].double()) < 2e-2


def test_extreme_logits_stay_finite():
    hidden, weight, labels = inputs(torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, labels, chunk=8)
    torch.testing.assert_close(loss, plain(hidden * 1e4, weight, labels))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_a_number_that_is_not_finite_stays_one():
    hidden, weight, labels = inputs(torch.float32)
    bad = hidden.detach().clone()
    bad[5, 0] = torch.nan
    assert linear_cross_entropy(bad, weight, labels).isnan()


def test_an_ignored_token_is_none_whatever_it_holds():
    hidden, weight, labels = inputs(torch.float32)
    bad = hidden.detach().clone()
    bad[3] = torch.nan
    bad.requires_grad_()
    loss, bad_grad, _ = results(linear_cross_entropy(bad, weight, labels, chunk=8), bad, weight)
    torch.testing.assert_close(loss, plain(hidden, weight, labels).detach())
    assert not bad_grad[3].any()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made, and the calls of each operation."""

    seen = 0

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls[function.__name__.split(".")[0]] += 1
        self.seen = max([self.seen, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("differentiated", [True, False])
def test_the_logits_of_all_tokens_never_exist(differentiated):
    hidden, weight, labels = inputs(torch.float32, tokens=512)
    with Largest() as largest, torch.set_grad_enabled(differentiated):
        loss = linear_cross_entropy(hidden, weight, labels, chunk=16)
        if differentiated:
            loss.backward()
    assert 16 * VOCABULARY <= largest.seen <= max(16 * VOCABULARY, 512 * DIM)
    assert (hidden.grad is None) is not differentiated


def test_without_gradients_none_is_made():
    hidden, weight, labels = inputs()
    with Largest() as seen, torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, chunk=8)
    # One product a chunk, and no second one for a gradient.
    assert seen.calls["mm"] == 5 and seen.calls["addmm_"] == 0
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, labels).detach())


def test_autocast_casts_it_as_it_does_linear():
    hidden, weight, labels = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(hidden, weight, labels)
        got = linear_cross_entropy(hidden, weight, labels, chunk=8)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    assert not torch.allclose(got, plain(hidden, weight, labels), rtol=1e-5, atol=0)
    assert torch.autograd.grad(got, weight)[0].dtype == torch.float32


def test_second_derivatives_are_refused():
    hidden, weight, labels = inputs()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    grad, *_ = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) * scale, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Without vector instructions: finding out which of them compile takes longer than all else. A slow test above has them.
@inductor.patch({"cpp.vec_isa_ok": False})
def test_compiled_it_is_the_same():
    hidden, weight, labels = inputs(torch.float32)
    expected = results(plain(hidden, weight, labels), hidden, weight)
    got = results(linear_cross_entropy(hidden, weight, labels, chunk=16, compiled=True), hidden, weight)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_head_of_the_paper_takes_less_than_a_gibibyte(compiled):
    """98304 tokens of 128256 rows, beyond hidden states, weight and their gradients."""
    torch.manual_seed(0)
    hidden = torch.randn(98304, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(128256, 1024, device="cuda") / 32).bfloat16().requires_grad_()
    labels = torch.randint(128256, (98304,), device="cuda")
    for _ in range(2):
        hidden.grad = torch.zeros_like(hidden)
        weight.grad = torch.zeros_like(weight)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_cross_entropy(hidden, weight, labels, compiled=compiled).backward()
        peak = torch.cuda.max_memory_allocated() - before
    # Beside the gradient of the hidden states, which any loss would make.
    assert peak - hidden.nbytes < 2**30
    part = slice(0, 2048)
    h = hidden.detach()[part].clone().requires_grad_()
    loss = cross_entropy(linear(h, weight.detach()).float(), labels[part], reduction="sum")
    loss.backward()
    expected = h.grad
    difference = (hidden.grad[part] - expected).float().norm() / expected.float().norm()
    assert difference < 0.01
