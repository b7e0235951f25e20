"""The attention call as a user makes it: values, gradients, causality, precision, compilation, and its errors."""

import subprocess
import sys

import draws
import pytest
import slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from lighthouse_core import (
    LighthouseConfig,
    dense_attention,
    gathered_length,
    lighthouse_attention,
    select_indices,
)
from lighthouse_core.attention import backends
from lighthouse_core.errors import LighthouseError

USER_ERRORS = (ValueError, LighthouseError)
KEY = torch.tensor([1, 2, 3])


def with_gradients(call, q, k, v, seed=9):
    """[out, dq, dk, dv] for one random gradient of the output."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = call(q, k, v)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient)]


def relative_error(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def assert_same(found, truth, tolerance=1e-11):
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, truth, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        worst = ((a - b).abs().max() / b.abs().max().clamp_min(1)).item()
        assert worst <= tolerance, f"{name} differs by {worst:.3g}"


def assert_bitwise(found, truth):
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, truth, strict=True):
        assert torch.equal(a, b), name


# Values and gradients


@pytest.mark.parametrize("cover_prefix", [True, False])
@pytest.mark.parametrize("shape", draws.SHAPES, ids=draws.SHAPE_IDS)
def test_against_the_slow_truth(shape, cover_prefix):
    q, k, v, cfg = draws.make(shape, cover_prefix=cover_prefix)
    found = with_gradients(lambda *x: lighthouse_attention(*x, cfg), q, k, v)
    assert_same(found, with_gradients(lambda *x: slow.attention(*x, cfg), q, k, v))


@given(draws.calls(), st.sampled_from([None, 0.3, 2.0]))
def test_against_the_slow_truth_with_given_scores(call, scale):
    q, k, v, cfg, scores = call
    found = lighthouse_attention(q, k, v, cfg, scores=scores, scale=scale)
    torch.testing.assert_close(found, slow.attention(q, k, v, cfg, scores=scores, scale=scale), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", [None, 0.25, 1.5])
def test_scale_reaches_the_gradients(scale):
    q, k, v, cfg = draws.make(draws.SHAPES[1])
    found = with_gradients(lambda *x: lighthouse_attention(*x, cfg, scale=scale), q, k, v)
    assert_same(found, with_gradients(lambda *x: slow.attention(*x, cfg, scale=scale), q, k, v))


def test_the_recorded_call(golden_case):
    case, cfg = golden_case
    q, k, v = (case[name].clone().requires_grad_() for name in "qkv")
    out = lighthouse_attention(q, k, v, cfg)
    found = [out, *torch.autograd.grad(out, (q, k, v), case["go"])]
    for name, x in zip(("out", "dq", "dk", "dv"), found, strict=True):
        assert x.dtype == torch.float32
        assert relative_error(x, case[name]) < 1e-5, name
        torch.testing.assert_close(x, case[name], rtol=1e-5, atol=1e-5 * case[name].abs().max().item())


def test_gradcheck_with_fixed_indices():
    for rest, cover_prefix, h in (((2, 3, 2, 2), True, 2), ((4, 2, 2, 2), False, 1)):
        cfg = draws.config(*rest, cover_prefix=cover_prefix)
        q, k, v = (x.requires_grad_() for x in draws.qkv(19, 1, h, 1, 2))
        indices = select_indices(q, k, cfg)
        assert indices.shape[-1] < 19
        assert torch.autograd.gradcheck(
            lambda q, k, v, cfg=cfg, i=indices: lighthouse_attention(q, k, v, cfg, indices=i), (q, k, v)
        )


@pytest.mark.parametrize("shape", draws.SHAPES[:3], ids=draws.SHAPE_IDS[:3])
def test_given_indices_replace_the_selection(shape):
    q, k, v, cfg = draws.make(shape)
    indices = select_indices(q, k, cfg)
    chosen = with_gradients(lambda *x: lighthouse_attention(*x, cfg), q, k, v)
    assert_bitwise(with_gradients(lambda *x: lighthouse_attention(*x, cfg, indices=indices), q, k, v), chosen)
    scores = draws.token_scores(q, k, seed=1)
    others = select_indices(q, k, cfg, scores=scores)
    assert not torch.equal(indices, others)
    by_indices = lighthouse_attention(q, k, v, cfg, indices=others)
    assert torch.equal(by_indices, lighthouse_attention(q, k, v, cfg, scores=scores))
    assert not torch.allclose(by_indices, chosen[0])


@pytest.mark.parametrize("which", [0, 1, 2], ids=list("qkv"))
def test_gradients_of_one_input_alone(which, small):
    q, k, v, cfg = small
    inputs = [q, k, v]
    inputs[which] = inputs[which].clone().requires_grad_()
    (alone,) = torch.autograd.grad(lighthouse_attention(*inputs, cfg).square().sum(), inputs[which])
    together = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(lighthouse_attention(*together, cfg).square().sum(), together)
    torch.testing.assert_close(alone, grads[which], rtol=1e-12, atol=1e-12)


def test_strided_views_are_accepted(small):
    """Projections and RoPE hand over [B,H,N,D] views and slices of one fused tensor."""
    q, k, v, cfg = small
    fused = torch.cat([q, k, v], dim=2).transpose(1, 2).contiguous().transpose(1, 2)
    views = fused.split([q.shape[2], k.shape[2], v.shape[2]], dim=2)
    assert not views[0].is_contiguous()
    call = lambda *x: lighthouse_attention(*x, cfg)  # noqa: E731
    assert_same(with_gradients(call, *views), with_gradients(call, q, k, v))


def test_inputs_are_not_changed(small):
    q, k, v, cfg = small
    copies = [x.clone() for x in (q, k, v)]
    with_gradients(lambda *x: lighthouse_attention(*x, cfg), q, k, v)
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, v), copies, strict=True))


# Dense calls


@pytest.mark.parametrize("n, b, h, hkv, d", [(1, 1, 1, 1, 1), (2, 2, 2, 1, 3), (29, 2, 4, 2, 5), (33, 1, 3, 3, 8)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_dense_attention(n, b, h, hkv, d, scale):
    q, k, v = draws.qkv(n, b, h, hkv, d)
    found = with_gradients(lambda *x: dense_attention(*x, scale=scale), q, k, v)
    assert_same(found, with_gradients(lambda *x: slow.attend(*x, draws.config(2, 1, 2, 2), scale=scale), q, k, v))


@pytest.mark.parametrize(
    "n, rest", [(1, (4, 3, 2, 2)), (2, (2, 2, 2, 2)), (18, (4, 3, 2, 2)), (40, (2, 1, 2, 2))], ids=str
)
def test_a_call_that_would_keep_n_or_more_is_dense(n, rest):
    cfg = draws.config(*rest)
    q, k, v = draws.qkv(n, 2, 4, 2, 3)
    found = with_gradients(lambda *x: lighthouse_attention(*x, cfg, scale=0.4), q, k, v)
    assert_bitwise(found, with_gradients(lambda *x: dense_attention(*x, scale=0.4), q, k, v))
    assert_same(found, with_gradients(lambda *x: slow.attend(*x, cfg, scale=0.4), q, k, v))


def test_one_token_attends_to_itself():
    q, k, v = draws.qkv(1, 2, 4, 2, 3)
    out = lighthouse_attention(q, k, v, draws.config(2, 4, 2, 2))
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=2), rtol=1e-15, atol=0)


def test_a_sparse_call_is_not_dense_attention():
    """It does not reduce to dense attention: coarse entries stay in the sequence and write as well."""
    q, k, v, cfg = draws.make(draws.SHAPES[1])
    assert relative_error(lighthouse_attention(q, k, v, cfg), dense_attention(q, k, v)) > 0.1


# Causality, and what selection gives away


@given(draws.calls(), st.data())
def test_values_are_causal_with_indices_held_fixed(call, data):
    q, k, v, cfg, scores = call
    n = q.shape[1]
    t = data.draw(st.integers(0, n - 1), label="t")
    indices = select_indices(q, k, cfg, scores=scores)
    before = lighthouse_attention(q, k, v, cfg, indices=indices)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, t] = 50 * x[:, t] + 7
    after = lighthouse_attention(*changed, cfg, indices=indices)
    torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-12)


@given(draws.calls(cover_prefix=True), st.data())
def test_values_flow_forward(call, data):
    """Changing v at token t changes the output at t or later: the test above cannot pass by reading nothing."""
    q, k, v, cfg, scores = call
    n, coarse = q.shape[1], cfg.pooling ** (cfg.levels - 1)
    t = data.draw(st.integers(0, n // coarse * coarse - 1), label="t")
    indices = select_indices(q, k, cfg, scores=scores)
    changed = v.clone()
    changed[:, t] += 7
    moved = (
        lighthouse_attention(q, k, changed, cfg, indices=indices) - lighthouse_attention(q, k, v, cfg, indices=indices)
    ).abs()
    assert moved[:, t:].max() > 1e-9


@given(draws.calls(), st.data())
def test_gradients_are_causal(call, data):
    q, k, v, cfg, scores = call
    t = data.draw(st.integers(0, q.shape[1] - 1), label="t")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = lighthouse_attention(q, k, v, cfg, scores=scores)
    for g in torch.autograd.grad(out[:, : t + 1].square().sum(), (q, k, v)):
        assert torch.equal(g[:, t + 1 :], torch.zeros_like(g[:, t + 1 :]))


def other_tail(q, k, v, t, seed=5):
    """The same tokens before t, others from t on."""
    tails = draws.qkv(q.shape[1], q.shape[0], q.shape[2], k.shape[2], q.shape[3], seed=seed)
    return [torch.cat([x[:, :t], 3 * y[:, t:].to(x.dtype)], dim=1) for x, y in zip((q, k, v), tails, strict=True)]


def test_norm_selection_depends_on_later_tokens():
    """Existence is not causal under `norm`: a louder future takes parents away from the past, whose outputs change."""
    q, k, v, cfg = draws.make((101, 1, 1, 1, 4, 4, 3, 2, 2))
    t = 64
    later = other_tail(q, k, v, t)
    assert not torch.equal(select_indices(q, k, cfg), select_indices(*later[:2], cfg))
    leak = (lighthouse_attention(q, k, v, cfg) - lighthouse_attention(*later, cfg))[:, :t].abs().max()
    assert leak > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scorer", ["random", "block"])
@pytest.mark.parametrize("shape", draws.SHAPES, ids=draws.SHAPE_IDS)
def test_content_free_scorers_do_not_leak(shape, scorer, dtype):
    q, k, v, cfg = draws.make(shape, dtype=dtype, scorer=scorer, score_block=8)
    n = q.shape[1]
    before = lighthouse_attention(q, k, v, cfg, key=KEY)
    for t in (1, n // 2):
        after = lighthouse_attention(*other_tail(q, k, v, t), cfg, key=KEY)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("scorer", ["random", "block"])
def test_content_free_calls_against_the_slow_truth(scorer):
    q, k, v, cfg = draws.make(draws.SHAPES[2], scorer=scorer, score_block=4)
    indices = select_indices(q, k, cfg, key=KEY)
    kept = [[slow.parse(head.tolist(), q.shape[1], cfg) for head in row] for row in indices]
    found = with_gradients(lambda *x: lighthouse_attention(*x, cfg, key=KEY), q, k, v)
    assert_same(found, with_gradients(lambda *x: slow.attend(*x, cfg, kept), q, k, v))


@pytest.mark.parametrize("scorer", ["random", "block"])
def test_a_batch_may_be_split(scorer):
    q, k, v, cfg = draws.make((61, 4, 2, 2, 5, 2, 3, 4, 4), scorer=scorer, score_block=4)
    whole = lighthouse_attention(q, k, v, cfg, key=torch.tensor([1, 2, 3, 8]))
    parts = [
        lighthouse_attention(q[i : i + 2], k[i : i + 2], v[i : i + 2], cfg, key=torch.tensor([1, 2, 3, 8 + i]))
        for i in (0, 2)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


# Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [8, 80, 100])
def test_precision(dtype, d):
    """No more error than the slow truth makes when it runs in the same dtype, itself plain PyTorch.

    Measured with torch 2.13 on CPU, in the slow truth's error: float32 1.0 to 2.4, 16-bit types 0.4 to 0.95.
    """
    allowed = 4 if dtype == torch.float32 else 1.25
    q, k, v, cfg = draws.make((101, 1, 2, 1, d, 4, 3, 2, 2), dtype=dtype)
    kept = slow.orders(q, k, cfg)
    call = lambda *x: slow.attend(*x, cfg, kept)  # noqa: E731
    truth = with_gradients(call, q.double(), k.double(), v.double())
    plain = with_gradients(call, q, k, v)
    found = with_gradients(lambda *x: lighthouse_attention(*x, cfg), q, k, v)
    for name, x, y, t in zip(("out", "dq", "dk", "dv"), found, plain, truth, strict=True):
        assert x.dtype == dtype, name
        assert relative_error(x, t) <= allowed * relative_error(y, t), name


def test_float64_is_computed_in_float64():
    q, k, v, cfg = draws.make(draws.SHAPES[4])
    found = lighthouse_attention(q, k, v, cfg)
    assert found.dtype == torch.float64
    assert relative_error(found, slow.attention(q, k, v, cfg)) < 1e-14


# Reproducibility, recomputation, compilation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_bitwise_equal(dtype):
    q, k, v = draws.qkv(1000, 2, 4, 2, 16, dtype=dtype)
    cfg = draws.config(4, 3, 8, 4)
    call = lambda *x: lighthouse_attention(*x, cfg)  # noqa: E731
    first = with_gradients(call, q, k, v)
    for _ in range(3):
        assert_bitwise(with_gradients(call, q, k, v), first)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scorer", ["norm", "random", "block"])
def test_activation_checkpointing_agrees(scorer, reentrant):
    q, k, v, cfg = draws.make(draws.SHAPES[1], scorer=scorer, score_block=4)

    def call(q, k, v):
        return lighthouse_attention(q, k, v, cfg, key=KEY)

    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = checkpoint(call, *inputs, use_reentrant=reentrant)
    out.square().sum().backward()
    recomputed = [out, *(x.grad for x in inputs)]
    plain = call(*inputs)
    assert_bitwise(recomputed, [plain, *torch.autograd.grad(plain.square().sum(), inputs)])


@pytest.fixture
def compiled():
    """torch.compile of a function, in one graph, with the number of graphs compiled so far."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    yield lambda f: torch.compile(f, fullgraph=True, backend=counter), counter
    torch._dynamo.reset()


@pytest.mark.parametrize("scorer", ["norm", "random", "block"])
def test_compile_agrees_and_a_new_step_recompiles_nothing(compiled, scorer):
    q, k, v, cfg = draws.make(draws.SHAPES[1], dtype=torch.float32, scorer=scorer, score_block=4)

    def call(q, k, v, key):
        return lighthouse_attention(q, k, v, cfg, key=key)

    compile_, counter = compiled
    fast = compile_(call)
    for step in range(3):
        key = torch.tensor([1, step, 3])
        found = with_gradients(lambda *x, key=key: fast(*x, key), q, k, v)
        assert_same(found, with_gradients(lambda *x, key=key: call(*x, key), q, k, v), 1e-5)
    assert counter.frame_count == 1


def test_selection_compiles(compiled):
    q, k, _, cfg = draws.make(draws.SHAPES[1], dtype=torch.float32)
    assert torch.equal(compiled[0](lambda q, k: select_indices(q, k, cfg))(q, k), select_indices(q, k, cfg))


# Errors


def refused(change):
    """Makes one change to a valid call and expects it to be refused in words."""
    q, k, v, cfg = draws.make(draws.SHAPES[1], dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, "cfg": cfg}
    lighthouse_attention(**arguments)
    arguments.update(change(q, k, v, cfg))
    with pytest.raises(USER_ERRORS) as error:
        lighthouse_attention(**arguments)
    assert len(str(error.value)) > 10


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, cfg: {"q": q[0]},
        lambda q, k, v, cfg: {"q": q[:1]},
        lambda q, k, v, cfg: {"q": q[:, :-1]},
        lambda q, k, v, cfg: {"q": q[..., :-1]},
        lambda q, k, v, cfg: {"q": q[:, :, :3]},
        lambda q, k, v, cfg: {"k": k[:, :, :1]},
        lambda q, k, v, cfg: {"v": v[:, :, :1]},
        lambda q, k, v, cfg: {"v": v[:, :-1]},
        lambda q, k, v, cfg: {"k": k.double()},
        lambda q, k, v, cfg: {"q": q[:, :0], "k": k[:, :0], "v": v[:, :0]},
    ],
    ids=["rank", "batch", "length", "dim", "heads", "kv-heads", "v-heads", "v-length", "dtypes", "empty"],
)
def test_wrong_shapes_are_refused(change):
    refused(change)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, cfg: {"scores": (q[..., 0], k[:, :-1, :, 0])},
        lambda q, k, v, cfg: {"scores": (k[..., 0], k[..., 0])},
        lambda q, k, v, cfg: {"scores": (torch.zeros(2, 2, 7), torch.zeros(2, 2, 7))},
        lambda q, k, v, cfg: {"indices": select_indices(q, k, cfg)[..., :-1]},
        lambda q, k, v, cfg: {"indices": select_indices(q, k, cfg)[:, :1]},
    ],
    ids=["token-scores-length", "token-scores-heads", "window-scores-length", "indices-length", "indices-heads"],
)
def test_wrong_scores_and_indices_are_refused(change):
    refused(change)


@pytest.mark.parametrize("scorer", ["random", "block"])
def test_content_free_scorers_need_a_key(scorer):
    q, k, v, cfg = draws.make(draws.SHAPES[1], scorer=scorer)
    with pytest.raises(USER_ERRORS, match="key"):
        lighthouse_attention(q, k, v, cfg)
    with pytest.raises(USER_ERRORS, match="key"):
        select_indices(q, k, cfg)
    for wrong in (torch.tensor([1, 2]), torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1.0, 2.0, 3.0])):
        with pytest.raises(USER_ERRORS, match="key"):
            select_indices(q, k, cfg, key=wrong)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"pooling": 3}, "pooling"),
        ({"pooling": 1}, "pooling"),
        ({"levels": 0}, "levels"),
        ({"topk": 100, "tile_parents": 64}, "topk"),
        ({"topk": 0}, "topk"),
        ({"tile_parents": 3, "topk": 6}, "tile_parents"),
        ({"tile_parents": 0}, "tile_parents"),
        ({"scorer": "gla2"}, "scorer"),
        ({"score_block": 48}, "score_block"),
        ({"backend": "cuda"}, "backend"),
        ({"dense_backend": "fa9"}, "dense_backend"),
    ],
    ids=str,
)
def test_a_configuration_out_of_range_is_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        LighthouseConfig(**settings)


def test_dense_attention_refuses_what_it_cannot_do():
    q, k, v = draws.qkv(8, 1, 4, 2, 4)
    for arguments in ((q, k, v[:, :-1]), (q[:, :, :3], k, v), (q, k[:, :, :1], v), (q[0], k[0], v[0])):
        with pytest.raises(USER_ERRORS):
            dense_attention(*arguments)
    with pytest.raises(USER_ERRORS, match="backend"):
        dense_attention(q, k, v, backend="nope")


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_compiled_code_selects_what_eager_code_does(device):
    """Through inductor: fused into a kernel, the norms of grouped heads were wrong on CUDA under torch 2.11."""
    cfg = LighthouseConfig(topk=256)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(2, 5000, heads, 64, device=device, generator=generator) for heads in (4, 2, 2))
    compiled = torch.compile(lighthouse_attention, fullgraph=True)
    assert torch.equal(torch.compile(select_indices, fullgraph=True)(q, k, cfg), select_indices(q, k, cfg))
    expected = lighthouse_attention(q, k, v, cfg)
    error = (compiled(q, k, v, cfg) - expected).norm() / expected.norm()
    assert error < 1e-6


def test_a_pyramid_of_more_windows_than_indices_is_refused():
    with pytest.raises(USER_ERRORS, match="too large"):
        gathered_length(2**20, LighthouseConfig(pooling=16, levels=6, topk=2048))


def test_a_backend_that_is_not_there_is_refused_though_the_call_is_dense(monkeypatch):
    monkeypatch.setattr(backends, "_INTERPRETED", False)
    q, k, v = draws.qkv(8, 1, 4, 2, 4)
    with pytest.raises(USER_ERRORS, match="needs a CUDA device"):
        lighthouse_attention(q, k, v, LighthouseConfig(backend="triton"))


def test_another_flash_attention_is_not_taken_for_the_fourth(tmp_path):
    """Nor imported: one built for another torch fails there."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol')")
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from lighthouse_core.attention.dense import call, fa4"
    subprocess.run(
        [sys.executable, "-c", code + "; assert not fa4.INSTALLED; import os; os._exit(0)"], check=True, timeout=100
    )
