"""The operations as torch sees them: registered right, whole in compiled graphs, the same when recomputed."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import draws
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lighthouse_core import lighthouse_attention, select_indices
from lighthouse_kernels import triton as operations  # registers them

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU all of it is the GPU's.
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
# On a CPU all but the last step, whose code would be that of plain PyTorch alone.
COMPILER = "inductor" if torch.cuda.is_available() else "aot_eager"
KEY = (3, 1, 4, 1, 0)


def call(tokens=21, batch=2, heads=4, **settings):
    # Few of them: the interpreter takes its time.
    q, k, v, cfg = draws.make((tokens, batch, heads, 2, 3, 2, 2, 2, 2), dtype=torch.float32)
    return *(x.to(DEVICE).requires_grad_() for x in (q, k, v)), replace(cfg, backend="triton", **settings)


def attention(q, k, v, cfg):
    return lighthouse_attention(q, k, v, cfg, key=torch.tensor(KEY, device=DEVICE))


def test_operations_keep_the_rules_of_torch():
    """torch's own check: schema, fake tensors, autograd registration, and ahead-of-time dispatch."""
    q, k, v, cfg = call(batch=1)
    ops = torch.ops.lighthouse
    assert operations
    shape = cfg.geometry(q.shape[1]).shape
    detached = [x.detach() for x in (q, k, v)]
    *rows, by_query, by_key = ops.pyramid(*detached, shape, True, True)
    indices, slots = ops.select(by_query, by_key, shape)
    gathered = ops.gather(q, k, v, *rows, indices, slots, shape)
    scattered = ops.scatter(gathered[0], indices, slots, shape)
    heads_first = [(x.shape[0], x.shape[2], x.shape[1]) for x in (q, gathered[0])]
    sums = [torch.zeros(size, device=DEVICE) for size in heads_first]
    parts = [x.detach().requires_grad_() for x in (q, sums[0], gathered[0], sums[1])]
    merged = ops.merge(*parts, indices, slots, None, shape)
    calls = [
        (ops.pyramid, (*detached, shape, True, True)),
        (ops.pyramid, (*detached, shape, False, True)),
        (ops.select, (by_query, by_key, shape)),
        (ops.select_drawn, (torch.tensor(KEY, device=DEVICE), q.shape[0], k.shape[2], 4, shape)),
        (ops.gather, (q, k, v, *rows, indices, slots, shape)),
        (ops.gather_backward, (*(torch.ones_like(x) for x in gathered), slots, shape)),
        (ops.scatter, (gathered[0].detach().requires_grad_(), indices, slots, shape)),
        (ops.scatter_backward, (torch.ones_like(scattered), indices, shape)),
        (ops.merge, (*parts, indices, slots, None, shape)),
        (ops.merge_backward, (q.detach(), *(x.detach() for x in (merged[1], *parts)), indices, slots, None, shape)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("scorer", ["norm", "block"])
def test_one_graph_and_the_same_results(scorer):
    q, k, v, cfg = call(scorer=scorer, dense_backend="math")
    grad = torch.ones_like(q)
    eager = attention(q, k, v, cfg)
    compiled = torch.compile(attention, fullgraph=True, backend=COMPILER)(q, k, v, cfg)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(
        torch.autograd.grad(compiled, (q, k, v), grad), torch.autograd.grad(eager, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "shapes",
    [
        ((21, 2, 2), (37, 3, 4)),
        # Compiled three times, with more and more numbers that vary.
        pytest.param(((21, 1, 2), (32, 1, 4), (37, 2, 2)), marks=pytest.mark.slow),
    ],
    ids=["all at once", "one by one"],
)
def test_a_compiled_call_takes_any_shape(shapes):
    """Tokens, sequences and heads vary."""
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend=COMPILER)
    for tokens, batch, heads in shapes:
        *tensors, cfg = call(tokens, batch, heads, dense_backend="math")
        results = [attend(*tensors, cfg) for attend in (compiled, attention)]
        torch.testing.assert_close(*results)
        grads = [torch.autograd.grad(x.square().sum(), tensors) for x in results]
        torch.testing.assert_close(*grads)


def test_a_second_derivative_is_refused():
    q, k, v, cfg = call(dense_backend="math")
    grads = torch.autograd.grad(attention(q, k, v, cfg).square().sum(), (q, k, v), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(x.square().sum() for x in grads).backward()


@pytest.mark.parametrize("scorer", ["norm", "random"])
def test_recomputation_selects_the_same(scorer):
    q, k, v, cfg = call(scorer=scorer, dense_backend="math")
    kept = torch.autograd.grad(attention(q, k, v, cfg).square().sum(), (q, k, v))
    again = checkpoint(attention, q, k, v, cfg, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(again.square().sum(), (q, k, v)), kept, strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_of_full_length_is_kept_for_the_backward_pass():
    q, k, v, cfg = call(dense_backend="math")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        lighthouse_attention(q, k, v, cfg)
    entries = select_indices(q, k, cfg).shape[2]
    of_full_length = [x.shape for x in kept if x.is_floating_point() and q.shape[1] in x.shape]
    assert entries != q.shape[1] and of_full_length == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_every_kernel_compiles_for_hopper_without_a_gpu():
    """Triton's interpreter accepts what its compiler does not."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = done.stdout.split()
    assert {name for name in compiled if "kernel" in name} == {
        "_reduce_kernel",
        "_select_kernel",
        "_gather_kernel",
        "_gather_backward_kernel",
        "_scatter_kernel",
        "_scatter_backward_kernel",
        "_merge_kernel",
        "_merge_backward_tokens_kernel",
        "_merge_backward_rows_kernel",
    }
