"""Every call computes in the dtype it is given: torch.autocast changes neither values nor gradients nor dtypes."""

import itertools

import pytest
import torch

from lighthouse_core import LighthouseConfig, dense_attention, lighthouse_attention, select_indices
from lighthouse_core.attention import AttentionContext
from lighthouse_core.attention.dense import fa4
from lighthouse_core.attention.module import DenseAttention, LighthouseAttention

PYRAMID = {"pooling": 2, "levels": 2, "topk": 2, "tile_parents": 2}
KEPT = {"method": "compressed", "window": 8, "compression": 4, "keep": 2, "score_block": 4}
METHODS = {
    "dense": None,
    "pyramid": PYRAMID,
    "window": {**PYRAMID, "window": 4},
    "drawn": {**PYRAMID, "scorer": "random"},
    "chunked": {"method": "chunked", "window": 8},
    "sliding": {"method": "sliding", "window": 8},
    "compressed": {"method": "compressed", "window": 8, "compression": 4},
    "kept": KEPT,
    "blocks": {"method": "blocks", "window": 8, "tile": 4, "block_size": 4, "blocks": 2},
}
KEY = torch.tensor([1, 2, 3, 0])


def call(settings, dense_backend):
    if settings is None:
        return lambda *qkv: dense_attention(*qkv, backend=dense_backend)
    cfg = LighthouseConfig(**settings, dense_backend=dense_backend)
    return lambda *qkv: lighthouse_attention(*qkv, cfg, key=KEY.to(qkv[0].device) if cfg.draws else None)


def results(attend, dtype, device, autocast=None, dim=8, tokens=37, batch=2):
    generator = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(batch, tokens, heads, dim, generator=generator).to(device, dtype).requires_grad_()
        for heads in (4, 2, 2)
    )
    with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        out = attend(q, k, v)
    # Outside of autocast, as torch has it: it would cast the matrix products of torch's own backward passes.
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]


def assert_untouched(attend, dtype, device, autocast, same_bits=True, **shape):
    plain, within = (results(attend, dtype, device, one, **shape) for one in (None, autocast))
    for ours, theirs in zip(within, plain, strict=True):
        assert ours.dtype == dtype
        if same_bits:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs)


CASES = [(name, "reference") for name in METHODS] + [("window", "triton")]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, backend", CASES)
def test_autocast_leaves_the_call_alone(name, backend, autocast):
    settings = METHODS[name] and METHODS[name] | {"backend": backend}
    if backend == "triton":
        if torch.cuda.is_available():
            pytest.skip("the kernels' interpreter is for machines without a GPU")
        # It is exact in float32 alone, and takes its time.
        assert_untouched(call(settings, "auto"), torch.float32, "cpu", autocast, tokens=13, batch=1)
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert_untouched(call(settings, "auto"), dtype, "cpu", autocast)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", METHODS)
def test_autocast_leaves_the_call_alone_on_a_gpu(name, backend, autocast):
    """By torch's kernels in every dtype; where FlashAttention-4 is there, by it in 16 bits."""
    settings = METHODS[name] and METHODS[name] | {"backend": backend}
    cfg = None if settings is None else LighthouseConfig(**settings)
    parts = cfg is not None and (cfg.adds_parts or cfg.rule.windows)
    with torch.random.fork_rng(["cuda"]):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                fused = fa4.obstacle("cuda", dtype, 64) is None
                kernels = ["math"] + ["fa4"] * fused + ["flash"] * (dtype.itemsize == 2 and not parts)
                for kernel in kernels:
                    # torch's flash attention adds up gradients in any order where it is only warned of that.
                    same = kernel != "flash"
                    assert_untouched(call(settings, kernel), dtype, "cuda", autocast, same, dim=64, tokens=300)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_selections_are_the_same(autocast):
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, 90, heads, 8, generator=generator) for heads in (4, 2))
    for scorer, scored in itertools.product(("norm", "random"), (False, True)):
        cfg = LighthouseConfig(**PYRAMID, scorer=scorer, backend="reference")
        scores = (q.norm(dim=-1), k.norm(dim=-1)) if scored else None
        plain = select_indices(q, k, cfg, key=KEY, scores=scores)
        with torch.autocast("cpu", dtype=autocast):
            assert torch.equal(select_indices(q, k, cfg, key=KEY, scores=scores), plain)


def test_modules_within_a_layer_that_is_autocast():
    """As in data-parallel training: what autocast's projections give is bfloat16, and stays so."""
    layer = torch.nn.Linear(16, 64)
    x = torch.randn(2, 37, 16)
    for module in (DenseAttention(), LighthouseAttention(LighthouseConfig(**PYRAMID, backend="reference"))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            q = layer(x).unflatten(-1, (4, 16))
            out = module(q, q[:, :, :2], q[:, :, :2], AttentionContext())
        assert q.dtype == out.dtype == torch.bfloat16
