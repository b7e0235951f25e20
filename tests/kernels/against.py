"""What the Triton kernels are held against plain PyTorch with: shapes, types, and how close is close enough."""

from dataclasses import replace

import draws
import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# (N, B, H, Hkv, D, p, L, k, m)
SMALL = [
    (64, 1, 1, 1, 4, 2, 3, 4, 2),
    (37, 2, 4, 2, 3, 2, 2, 2, 2),
    (50, 1, 4, 1, 8, 2, 4, 2, 2),
    (61, 1, 2, 1, 5, 2, 5, 2, 2),
    (150, 1, 2, 1, 3, 4, 4, 2, 2),
    (165, 1, 2, 2, 4, 8, 3, 4, 4),
    (21, 2, 2, 1, 4, 4, 3, 2, 2),
    (400, 1, 1, 1, 8, 16, 2, 4, 4),
    (900, 1, 2, 1, 4, 4, 5, 2, 2),  # the coarsest windows are wider than the block that the first launch reduces
]
LARGE = [
    (4096, 2, 4, 2, 64, 4, 3, 64, 16),
    (4099, 1, 16, 1, 80, 4, 3, 64, 32),
    (5000, 3, 2, 2, 96, 2, 2, 128, 128),
    (8191, 1, 8, 4, 128, 2, 6, 64, 64),
    (8192, 1, 2, 1, 256, 8, 2, 128, 64),
    (7001, 2, 3, 3, 16, 8, 3, 32, 16),
    (20000, 1, 2, 2, 128, 16, 2, 128, 128),
    (40000, 1, 2, 1, 32, 16, 3, 32, 16),
    (30000, 1, 2, 1, 8, 4, 5, 32, 32),
    (70000, 1, 1, 1, 64, 4, 6, 32, 16),
    (32768, 1, 2, 2, 128, 4, 3, 1024, 128),
    (65537, 1, 1, 1, 128, 4, 2, 128, 128),  # more candidates in a tile than a program looks at together
]
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float16, id="float16", marks=pytest.mark.gpu),
    # Triton's interpreter cuts off bits where hardware rounds.
    pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.gpu),
]


def ident(shape):
    return "N{}-B{}-H{}-Hkv{}-D{}-p{}-L{}-k{}-m{}".format(*shape)


def on_gpu(shapes):
    return [pytest.param(shape, id=ident(shape), marks=pytest.mark.gpu) for shape in shapes]


SHAPES = [pytest.param(shape, id=ident(shape)) for shape in SMALL] + on_gpu(LARGE)


def inputs(shape, dtype=torch.float32, seed=0):
    q, k, v, cfg = draws.make(shape, seed=seed, dtype=dtype)
    return *(x.to(DEVICE) for x in (q, k, v)), replace(cfg, backend="triton")


def relative(got, exact):
    assert got.isfinite().all()
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def assert_as_good(got, plain, exact, what):
    """`got` loses little more than plain PyTorch loses in the same dtype, and both are near the float64 truth."""
    ours, theirs = relative(got, exact), relative(plain, exact)
    # Two roundings instead of one, and float32 sums in another order.
    assert ours <= 2 * theirs + 1e-6, f"{what}: {ours:.2e}, plain PyTorch {theirs:.2e}"
