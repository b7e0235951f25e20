"""FlashAttention-4 as operations of torch, against plain attention. Needs a GPU that has it."""

import pytest
import torch

from lighthouse_core import LighthouseConfig, dense_attention, lighthouse_attention
from lighthouse_core.attention.dense import fa4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or fa4.obstacle("cuda", torch.bfloat16, 64) is not None,
        reason="needs FlashAttention-4 and a GPU that it has kernels for",
    ),
]


def draw(tokens, heads, kv_heads, dim, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (
        torch.randn(2, tokens, h, dim, device="cuda", dtype=dtype, generator=generator)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    return [x.requires_grad_() for x in (q, k, v)], grad


def both(call, tensors, grad):
    out = call(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def errors(results, exact):
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(results, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens, heads, kv_heads, dim", [(777, 2, 2, 128), (1000, 4, 2, 64), (513, 8, 1, 96)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients(tokens, heads, kv_heads, dim, dtype, scale):
    tensors, grad = draw(tokens, heads, kv_heads, dim, dtype)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    exact = both(lambda *x: dense_attention(*x, scale=scale, backend="math"), doubles, grad.double())
    plain = errors(both(lambda *x: dense_attention(*x, scale=scale, backend="math"), tensors, grad), exact)
    ours = errors(both(lambda *x: dense_attention(*x, scale=scale, backend="fa4"), tensors, grad), exact)
    for got, reference in zip(ours, plain, strict=True):
        assert got <= 2 * reference + 1e-6


def test_operations_keep_the_rules_of_torch():
    (q, k, v), grad = draw(256, 4, 2, 64)
    ops = torch.ops.lighthouse
    detached = [x.detach() for x in (q, k, v)]
    # Its gradients are not bitwise equal between runs unless asked for.
    arguments = (*detached, 0.125, True)
    out, lse = ops.flash4(*arguments)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.flash4.default, arguments, test_utils=tests)
    torch.library.opcheck(ops.flash4_backward.default, (grad, *detached, out, lse, 0.125, True), test_utils=tests)


def test_whole_in_a_compiled_call():
    tensors, grad = draw(4096, 4, 2, 64)
    cfg = LighthouseConfig(topk=128, dense_backend="fa4", backend="triton")
    eager = both(lambda *x: lighthouse_attention(*x, cfg), tensors, grad)
    compiled = torch.compile(lambda *x: lighthouse_attention(*x, cfg), fullgraph=True)
    again = both(compiled, tensors, grad)
    assert torch.equal(eager[0], again[0])
    assert max(errors(again, [x.double() for x in eager])) < 1e-2


def test_deterministic_where_torch_is_asked_to_be():
    tensors, grad = draw(4096, 2, 2, 128)
    torch.use_deterministic_algorithms(True)
    try:
        first = both(lambda *x: dense_attention(*x, backend="fa4"), tensors, grad)
        for _ in range(20):
            again = both(lambda *x: dense_attention(*x, backend="fa4"), tensors, grad)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
