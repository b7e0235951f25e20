"""A pyramid in shards of whole tiles: each selects and scatters as the whole sequence does there."""

import pytest
import torch
from against import CUDA, DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from lighthouse_core.attention.backends import kernels
from lighthouse_kernels.geometry import Geometry
from lighthouse_kernels.types import last_kept, with_edge

# N, p, L, k, m, R
SHAPES = [(24, 2, 3, 4, 2, 2), (64, 2, 3, 8, 2, 2), (96, 2, 3, 16, 4, 4), (256, 4, 3, 8, 2, 4), (192, 2, 5, 6, 2, 3)]
# Triton's interpreter, which a CPU has, is slow.
BACKENDS = [
    pytest.param(
        name,
        shape,
        id=f"{name}-{'-'.join(map(str, shape))}",
        marks=[pytest.mark.gpu] if name == "triton" and shape != SHAPES[0] else [],
    )
    for name in ("reference", "triton")
    for shape in SHAPES
]
by_backends = pytest.mark.parametrize(("backend", "shape"), BACKENDS)


@st.composite
def pyramids(draw):
    """A pyramid without padding, and a number of shards of whole tiles."""
    pooling, levels = draw(st.sampled_from([(2, 2), (2, 3), (2, 4), (4, 2), (4, 3), (8, 2)]))
    parents, count = draw(st.sampled_from([2, 4])), draw(st.integers(1, 4))
    tiles = count * draw(st.integers(1, 2))
    tokens = pooling ** (levels - 1) * tiles * draw(st.integers(parents, 4 * parents))
    return Geometry(tokens, pooling, levels, parents * tiles, parents, draw(st.booleans())), count


def of_whole(indices, g):
    """Flat indices of a shard as those of the whole sequence."""
    found = torch.zeros_like(indices)
    for level in range(g.levels):
        place = indices - g.offset(level)
        before = sum(g.whole // g.window(finer) for finer in range(level)) + g.first // g.window(level)
        found = torch.where((place >= 0) & (place < g.windows(level)), before + place, found)
    return found


def check_draws(ops, g, count, block, key, batch=2, heads=2):
    whole = ops.select_drawn(key, batch, heads, block, g).indices
    shards = [g.shard(number, count) for number in range(count)]
    assert [shard.selected_length for shard in shards] == [g.selected_length // count] * count
    parts = [of_whole(ops.select_drawn(key, batch, heads, block, shard).indices, shard) for shard in shards]
    assert torch.equal(torch.cat(parts, 2), whole)


@settings(max_examples=60)
@given(pyramids(), st.sampled_from([0, 1, 4, 64]), st.integers(-(2**62), 2**62))
def test_draws_are_those_of_the_whole_sequence(pyramid, block, seed):
    check_draws(kernels("reference", "cpu"), *pyramid, block, torch.tensor([seed, 3, 5, 7, 2]))


@by_backends
def test_every_backend_draws_alike(backend, shape):
    *sizes, count = shape
    for block in (0, 2):
        check_draws(
            kernels(backend, DEVICE), Geometry(*sizes), count, block, torch.tensor([9, 3, 5, 7, 2], device=DEVICE)
        )


@by_backends
def test_norms_select_as_in_the_whole_sequence(backend, shape):
    *sizes, count = shape
    ops, g = kernels(backend, DEVICE), Geometry(*sizes)
    q, k = (torch.randn(2, g.tokens, heads, 4, device=DEVICE) for heads in (4, 2))
    whole, parts = ops.select(ops.norm_scores(q, k, g), g).indices, []
    for number in range(count):
        shard = g.shard(number, count)
        own = slice(shard.first, shard.first + shard.tokens)
        parts.append(of_whole(ops.select(ops.norm_scores(q[:, own], k[:, own], shard), shard).indices, shard))
    assert torch.equal(torch.cat(parts, 2), whole)


def assembled(ops, g, count, key, inputs, grad, begins, merges):
    """The output of shards and the gradients of the rows that they were made of, as of the whole sequence."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outs, entries, kept = (
        [],
        g.selected_length // count,
        torch.zeros(2, 2, g.levels - 1, dtype=torch.int32, device=DEVICE),
    )
    for number in range(count):
        shard = g.shard(number, count)
        own = slice(shard.first, shard.first + shard.tokens)
        selection = ops.select_drawn(key, 2, 2, 4, shard)
        edge = with_edge(selection, kept)
        kept = last_kept(selection.indices, shard)
        of = torch.arange(number * entries, (number + 1) * entries, device=DEVICE)
        # The first shard gets rows of the last one, which serve nothing.
        of = torch.cat(
            (of, (number * entries - 1 - torch.arange(g.levels - 1, device=DEVICE).flip(0)) % g.selected_length)
        )
        if merges:
            x, lse, rows, row_lse = leaves
            first = None
            if begins is not None:
                first = (
                    begins[:, shard.first // g.window(g.levels - 1) :][:, : shard.windows(g.levels - 1)] - shard.first
                )
                first = first.contiguous()
            outs.append(ops.merge(x[:, own], lse[:, own], rows[:, of], row_lse[:, of], edge, shard, first))
        else:
            outs.append(ops.scatter(leaves[0][:, of], edge, shard))
    out = torch.cat(outs, 1)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@by_backends
@pytest.mark.parametrize("how", ["scatter", "merge", "documents"])
def test_rows_serve_the_next_shard(backend, shape, how):
    *sizes, count = shape
    ops, g = kernels(backend, DEVICE), Geometry(*sizes)
    key = torch.tensor([1, 2, 3, 4, 5], device=DEVICE)
    selection = ops.select_drawn(key, 2, 2, 4, g)
    grad, x = (torch.randn(2, g.tokens, 4, 4, device=DEVICE) for _ in range(2))
    rows = torch.randn(2, g.selected_length, 4, 4, device=DEVICE)
    begins = None
    if how == "documents":
        coarsest = g.windows(g.levels - 1)
        begin = (torch.rand(2, coarsest) < 0.3) * torch.arange(coarsest) * g.window(g.levels - 1)
        begins = begin.cummax(1).values.int().to(DEVICE)
    inputs = [rows] if how == "scatter" else [x, x[..., 0], rows, rows[..., 0]]
    leaves = [y.clone().requires_grad_() for y in inputs]
    out = ops.scatter(*leaves, selection, g) if how == "scatter" else ops.merge(*leaves, selection, g, begins)
    whole = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    parts = assembled(ops, g, count, key, inputs, grad, begins, how != "scatter")
    # The kernels add in the same order. What plain PyTorch adds up depends on the length.
    assert not CUDA or torch.equal(parts[0], whole[0])
    for ours, theirs in zip(parts, whole, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
