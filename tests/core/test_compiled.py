"""The call under torch.compile as one graph: shapes that vary, settings that do not, and what eager mode gives."""

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lighthouse_core import LighthouseConfig, dense_attention, lighthouse_attention, select_indices
from lighthouse_core.attention import AttentionContext
from lighthouse_core.attention.dense import math as products
from lighthouse_core.attention.module import LighthouseAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU all of it is the GPU's.
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []

PYRAMID = {"pooling": 2, "levels": 3, "topk": 4, "tile_parents": 2, "backend": "reference"}
COMPRESSED = {"method": "compressed", "window": 16, "compression": 4}
KEPT = {**COMPRESSED, "keep": 2, "score_block": 4}
# Without a fused kernel for float32, parts of a softmax are plain products on a GPU, too.
CALLS = {
    "dense": None,
    "pyramid": PYRAMID,
    "one-level": {**PYRAMID, "levels": 1},
    "window": {**PYRAMID, "window": 8, "dense_backend": "math"},
    "random": {**PYRAMID, "scorer": "random"},
    "block": {**PYRAMID, "scorer": "block", "score_block": 4},
    "chunked": {"method": "chunked", "window": 16},
    "sliding": {"method": "sliding", "window": 16, "dense_backend": "math"},
    "compressed": {**COMPRESSED, "dense_backend": "math"},
    "kept": {**KEPT, "dense_backend": "math"},
    "drawn": {**KEPT, "scorer": "random", "dense_backend": "math"},
    "blocks": {"method": "blocks", "window": 16, "tile": 8, "block_size": 4, "blocks": 3, "dense_backend": "math"},
}
if torch.cuda.is_available():
    # Triton's interpreter takes its time: tests/kernels has fewer of these on a CPU.
    CALLS |= {f"triton-{name}": {**CALLS[name], "backend": "triton"} for name in ("pyramid", "window", "block")}


def attention(settings):
    if settings is None:
        return dense_attention
    cfg = LighthouseConfig(**settings)
    key = torch.tensor([1, 2, 3, 0], device=DEVICE) if cfg.draws else None
    return lambda q, k, v: lighthouse_attention(q, k, v, cfg, key=key)


def tensors(batch, tokens, heads, kv_heads, dim=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * batch + tokens + heads)
    return [
        torch.randn(batch, tokens, h, dim, generator=generator).to(DEVICE, dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def assert_like_eager(compiled, call, inputs):
    outs = [attend(*inputs) for attend in (compiled, call)]
    assert outs[0].dtype == inputs[0].dtype
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def shapes(varying, group):
    """Four shapes (batch, tokens, heads, KV heads) that differ in what varies. In the first no sizes are equal, for a
    compiler takes such for one; the last is like the third, of a length that no window divides."""
    batches, lengths, heads = (3, 5, 7, 9), (96, 120, 131, 137), (2, 4, 6, 8)
    for i in range(4):
        n = heads[i if "heads" in varying else 0]
        yield batches[i if "batch" in varying else 0], lengths[i if "tokens" in varying else 0], n * group, n


ALL = ("batch", "tokens", "heads")
# torch 2.11 compiles the padding of the reference backend again for another length.
PADS_AGAIN = torch.__version__ < "2.12"


def check(settings, varying, *, dynamic, mark, group, backend):
    """Values and gradients at four shapes, the last of which must not be compiled again; how often others were.

    What is padded may be compiled again under torch 2.11.
    """
    torch._dynamo.reset()
    call, counter = attention(settings), CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=counter)
    padded = settings is not None and settings.get("backend") == "reference" and "tokens" in varying
    again = PADS_AGAIN and padded
    for number, shape in enumerate(shapes(varying, group)):
        # Gradients reach 30 here, where float32 alone may lose 2e-5. Kernels of a GPU take no float64.
        inputs = tensors(*shape, dtype=torch.float64 if DEVICE == "cpu" else torch.float32)
        if mark:
            for x, (place, name) in itertools.product(inputs, enumerate(ALL)):
                if name in varying:
                    torch._dynamo.mark_dynamic(x, place)
        with torch.compiler.set_stance("fail_on_recompile" if number == 3 and not again else "default"):
            assert_like_eager(compiled, call, inputs)
    return counter.frame_count


# The others take some seconds each: there is much to prove about the sizes of a padded pyramid.
@pytest.mark.parametrize("name, varying", [("dense", ALL), ("one-level", ALL), ("chunked", ALL), ("sliding", ALL)])
def test_one_graph_serves_every_shape(name, varying):
    """mark_dynamic raises where a size is taken for a constant."""
    assert check(CALLS[name], varying, dynamic=None, mark=True, group=2, backend="eager") == 1


def test_what_varies_may_be_found_on_the_way():
    """Without a hint the second shape is compiled again, and then no further one."""
    assert check(PYRAMID, ("heads",), dynamic=None, mark=False, group=1, backend="eager") == 2


@pytest.mark.slow
def test_inductor_and_a_second_head_count():
    assert check(None, ("heads",), dynamic=None, mark=False, group=1, backend="inductor") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "dynamic, mark, group",
    [(None, False, 1), (None, False, 2), (None, True, 2), (True, False, 1)],
    ids=["found", "found-grouped", "marked-grouped", "dynamic"],
)
@pytest.mark.parametrize("varying", [("heads",), ALL], ids="-".join)
@pytest.mark.parametrize("settings", [pytest.param(x, id=name) for name, x in CALLS.items()])
def test_every_way_to_vary(settings, varying, dynamic, mark, group):
    check(settings, varying, dynamic=dynamic, mark=mark, group=group, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [pytest.param(x, id=name) for name, x in CALLS.items()])
def test_inductor(settings):
    check(settings, ALL, dynamic=True, mark=True, group=2, backend="inductor")


def test_settings_are_constants():
    """Another configuration is compiled again, however many there were, and each gives its own result."""
    torch._dynamo.reset()
    inputs = tensors(1, 96, 4, 2)
    layer = LighthouseAttention(LighthouseConfig(method="sliding", window=4, dense_backend="math"))
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for window in (4, 8, 16, 1000):
        settings = LighthouseConfig(method="sliding", window=window, dense_backend="math")
        context = AttentionContext(settings=settings)
        torch.testing.assert_close(compiled(*inputs, context), layer(*inputs, context))


@pytest.mark.slow
def test_configurations_are_constants():
    torch._dynamo.reset()
    compiled = torch.compile(lighthouse_attention, fullgraph=True, backend="eager")
    inputs = tensors(1, 96, 4, 2)
    for change in ({}, {"levels": 2}, {"pooling": 4}, {"topk": 2, "window": 8}, {"topk": 2, "window": 12}):
        cfg = LighthouseConfig(**PYRAMID | change)
        torch.testing.assert_close(compiled(*inputs, cfg), lighthouse_attention(*inputs, cfg))


@pytest.mark.slow
@pytest.mark.parametrize("given, scale", [("indices", None), ("tokens", 0.3), ("windows", None)])
def test_given_selections_and_scores(given, scale):
    torch._dynamo.reset()
    cfg = LighthouseConfig(**PYRAMID)
    compiled = torch.compile(lighthouse_attention, fullgraph=True, backend="eager")
    for shape in list(shapes(("batch", "heads"), 2))[:3]:
        q, k, v = tensors(*shape)
        if given == "indices":
            how = {"indices": select_indices(q, k, cfg)}
        elif given == "tokens":
            how = {"scores": (q.detach().norm(dim=-1), k.detach().norm(dim=-1))}
        else:
            windows = sum(math.ceil(shape[1] / 4) * 4 // 2**level for level in range(3))
            scores = torch.rand(2, shape[0], shape[3], windows, generator=torch.Generator().manual_seed(1))
            how = {"scores": tuple(scores.to(DEVICE))}
        torch.testing.assert_close(
            compiled(q, k, v, cfg, scale=scale, **how), lighthouse_attention(q, k, v, cfg, scale=scale, **how)
        )


@pytest.mark.slow
def test_a_selection_is_one_graph():
    torch._dynamo.reset()
    cfg = LighthouseConfig(**PYRAMID)
    compiled = torch.compile(select_indices, fullgraph=True, dynamic=True, backend="eager")
    for shape in list(shapes(ALL, 2))[:2]:
        q, k, _ = tensors(*shape)
        assert torch.equal(compiled(q, k, cfg), select_indices(q, k, cfg))


@pytest.mark.parametrize("window, tokens", [(0, 7), (0, 17), (1, 17), (5, 16), (8, 33), (16, 33), (0, 33)])
def test_plain_products_as_an_operation(window, tokens, monkeypatch):
    """Values bit for bit, and autograd's gradients of both results, where blocks of rows begin and end."""
    monkeypatch.setattr(products, "_ROWS", 8)
    generator = torch.Generator().manual_seed(tokens)
    inputs = [
        torch.randn(1, tokens, heads, 3, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
        for heads in (4, 2, 2)
    ]
    calls = [products._compiled(*inputs, window, 0.4), products._products(*inputs, window, 0.4)]
    assert all(map(torch.equal, *calls))
    for factors in ((1, 0), (0, 1), (1, 1)):
        grads = [
            torch.autograd.grad(
                sum(f * x.sin().sum() for f, x in zip(factors, out, strict=True)), inputs, retain_graph=True
            )
            for out in calls
        ]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-11)
    if window == 5:
        torch.library.opcheck(torch.ops.lighthouse.plain_part.default, (*inputs, window, 0.4))
