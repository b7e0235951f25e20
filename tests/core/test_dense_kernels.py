"""Every dense kernel says what it is; those that cannot run here are called as their packages want to be called."""

import importlib
import sys
import types
from functools import partial

import pytest
import torch

from lighthouse_core import LighthouseConfig, dense_attention, lighthouse_attention
from lighthouse_core.attention.context import Documents
from lighthouse_core.attention.dense import BACKENDS, fa2, fa3, packages, varlen
from lighthouse_core.attention.dense.call import KERNELS
from lighthouse_core.attention.parts import near, windowed_kernel
from lighthouse_core.attention.settings import SettingError

KEY = torch.tensor([1, 2, 3])
# What needs parts of a softmax, and what needs a window alone.
PARTS = [
    {"method": "compressed", "window": 24, "compression": 8},
    {"method": "compressed", "window": 24, "compression": 8, "keep": 4, "score_block": 4},
    {"pooling": 2, "levels": 2, "topk": 8, "tile_parents": 4, "window": 24, "scorer": "block", "backend": "reference"},
]
SLIDING = {"method": "sliding", "window": 24}


def draw(tokens=100, dim=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(2, tokens, heads, dim, generator=generator, dtype=dtype) for heads in (4, 2, 2)]


def gradients(call, tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = call(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def test_the_list_says_what_the_kernels_do():
    assert [name for name in BACKENDS if name != "auto"] == list(KERNELS)
    for name, kernel in KERNELS.items():
        assert kernel.name == name and kernel.label
        does = kernel.part, kernel.windowed, kernel.packed, kernel.blocked
        assert BACKENDS[name] == tuple(part is not None for part in does)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("settings", [*PARTS, SLIDING], ids=str)
def test_a_kernel_that_cannot_is_refused_where_settings_are_read(name, settings):
    can = BACKENDS[name].window if settings == SLIDING else BACKENDS[name].lse
    if can:
        assert LighthouseConfig(**settings, dense_backend=name).dense_backend == name
    else:
        with pytest.raises(SettingError, match=f"dense_backend '{name}' .* use one of auto, fa4") as error:
            LighthouseConfig(**settings, dense_backend=name)
        assert error.value.field == "dense_backend"


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_not_there_says_why(name):
    q, k, v = draw()
    why_not = KERNELS[name].obstacle("cpu", torch.float32, 8)
    assert why_not == KERNELS[name].absence("cpu")
    if why_not is None:
        torch.testing.assert_close(dense_attention(q, k, v, backend=name), dense_attention(q, k, v, backend="math"))
    else:
        with pytest.raises(ValueError, match=f"dense backend '{name}' needs a"):
            dense_attention(q, k, v, backend=name)


def test_obstacles_on_a_gpu(monkeypatch):
    for module, major in ((varlen, 8), (packages, 9)):
        monkeypatch.setattr(module, "_major", lambda major=major: major)
    assert varlen.obstacle("cuda", torch.bfloat16, 128) is None
    assert "float32" in varlen.obstacle("cuda", torch.float32, 128)
    assert "250" in varlen.obstacle("cuda", torch.bfloat16, 250) and "256" in varlen.obstacle(
        "cuda", torch.bfloat16, 256
    )
    for kernel in (fa2.KERNEL, fa3.KERNEL):
        assert "is not installed" in kernel.obstacle("cuda", torch.bfloat16, 128)
    assert "does not load" in packages.from_package("x", "X", "x", True, range(9, 10), "").absence("cuda")
    monkeypatch.setitem(sys.modules, "x", types.SimpleNamespace(flash_attn_func=len, flash_attn_varlen_func=len))
    there = packages.from_package("x", "X", "x", True, range(9, 10), "")
    assert there.obstacle("cuda", torch.float16, 256) is None
    assert "float64" in there.obstacle("cuda", torch.float64, 64)
    monkeypatch.setattr(packages, "_major", lambda: 8)
    assert "9.0" in there.obstacle("cuda", torch.float16, 64)


def causal(q, k, window):
    """Which keys a query sees, [N, N]."""
    age = torch.arange(q.shape[-3])[:, None] - torch.arange(k.shape[-3])
    return (age >= 0) & (age < (window or q.shape[-3]))


def windows_last(call, window, q, k, v):
    return call(q, k, v, 0.3, window)


@pytest.mark.parametrize("name, module", [("fa2", "flash_attn"), ("fa3", "flash_attn_interface")])
@pytest.mark.parametrize("returns_lse", [False, True])
def test_packages_are_called_as_they_want_to_be(monkeypatch, name, module, returns_lse):
    calls = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False):
        assert causal and window_size[1] in (-1, 0) and isinstance(deterministic, bool)
        if not torch.compiler.is_compiling():
            calls.append(window_size)
        out, lse = near(q, k, v, window_size[0] + 1, scale=softmax_scale, backend="math")
        return (out, lse) if returns_lse else out

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
        window_size=(-1, -1), deterministic=False,
    ):  # fmt: skip
        assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == 60
        documents = Documents(cu_seqlens_q, max_seqlen_q)
        out, lse = KERNELS["math"].packed(q, k, v, softmax_scale, window_size[0] + 1, documents)
        return (out, lse) if returns_lse else out

    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    sys.modules[module].flash_attn_func = flash_attn_func
    sys.modules[module].flash_attn_varlen_func = flash_attn_varlen_func
    kernel = packages.from_package(name, name, module, True, range(20), "")
    monkeypatch.setitem(KERNELS, name, kernel)
    monkeypatch.setattr(packages, "_major", lambda: 9)
    tensors = draw()
    for window in (0, 24):
        got, expected = (
            gradients(partial(windows_last, one.windowed, window), tensors) for one in (kernel, KERNELS["math"])
        )
        for ours, exact in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, exact)
    assert calls == [(-1, -1), (23, 0)]
    documents = Documents(torch.tensor([0, 40, 40, 100], dtype=torch.int32), 60)
    for window in (0, 24):
        flat = [x[0] for x in tensors]
        packed, plain = (one.packed(*flat, 0.3, window, documents) for one in (kernel, KERNELS["math"]))
        assert packed[1] is None
        torch.testing.assert_close(packed[0], plain[0])
    torch._dynamo.reset()
    compiled = torch.compile(partial(windows_last, kernel.windowed, 24), fullgraph=True, backend="aot_eager")
    for ours, exact in zip(gradients(compiled, tensors), got, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.fixture
def stub(monkeypatch):
    """torch's operations as matrix products, the backward pass as FlashAttention writes it: delta from dO and O."""

    def sequences(starts):
        return [slice(a, b) for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]

    def checked(q, starts, starts_k, longest, longest_k, rest):
        assert starts is starts_k and starts.dtype == torch.int32 and longest == longest_k == starts.diff().max()
        assert starts[-1] == q.shape[0] and all(x.is_contiguous() for x in rest)

    def forward(q, k, v, starts, starts_k, longest, longest_k, dropout, causal, mask, *, scale, **sides):
        assert (dropout, causal, mask) == (0.0, True, False)
        checked(q, starts, starts_k, longest, longest_k, (q, k, v))
        window = sides["window_size_left"] + 1 if sides else 0
        parts = [near(*(x[s][None] for x in (q, k, v)), window, scale=scale, backend="math") for s in sequences(starts)]
        out, lse = (torch.cat([part[0] for part in several]) for several in zip(*parts, strict=True))
        return out, lse.T.contiguous(), None, None, None

    def backward(
        grad, q, k, v, out, lse, starts, starts_k, longest, longest_k, dropout, causal, state, unused, *, scale, **sides
    ):
        checked(q, starts, starts_k, longest, longest_k, (grad, q, k, v, out, lse))
        group = q.shape[1] // k.shape[1]
        found = [torch.zeros_like(x) for x in (q, k, v)]
        for s in sequences(starts):
            a, b, c = q[s], k[s].repeat_interleave(group, 1), v[s].repeat_interleave(group, 1)
            visible = causal_of(a, b, sides)
            p = (scale * torch.einsum("nhd,mhd->hnm", a, b) - lse[:, s, None]).exp() * visible
            delta = (grad[s] * out[s]).sum(-1).T[..., None]
            ds = scale * p * (torch.einsum("nhd,mhd->hnm", grad[s], c) - delta)
            found[0][s] = torch.einsum("hnm,mhd->nhd", ds, b)
            for i, (x, y) in enumerate(((ds, a), (p, grad[s])), 1):
                found[i][s] = torch.einsum("hnm,nhd->mhd", x, y).unflatten(1, (-1, group)).sum(2)
        return *found, None

    def causal_of(q, k, sides):
        return causal(q, k, sides["window_size_left"] + 1 if sides else 0)

    monkeypatch.setattr(varlen, "_kernel_forward", forward)
    monkeypatch.setattr(varlen, "_kernel_backward", backward)
    monkeypatch.setitem(
        KERNELS, "varlen", varlen.KERNEL.__class__(**vars(varlen.KERNEL) | {"obstacle": lambda *_: None})
    )


@pytest.mark.parametrize("window", [0, 1, 24, 100])
def test_varlen(stub, window):
    tensors = draw()
    names = {"backend": "varlen", "scale": 0.3}
    for got, exact in zip(
        gradients(lambda *x: near(*x, window, **names).out, tensors),
        gradients(lambda *x: near(*x, window, backend="math", scale=0.3).out, tensors),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("window", [0, 24])
def test_the_gradient_of_a_log_sum_exp_comes_in_by_more_columns(stub, window):
    """In bfloat16, too, it loses no more than float32 numbers made of three of bfloat16 do."""
    tensors = draw()

    def both(backend):
        def call(*x):
            out, lse = near(*x, window, backend=backend)
            return torch.cat((out, lse[..., None] * 3), -1)

        return call

    for got, exact in zip(gradients(both("varlen"), tensors), gradients(both("math"), tensors), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    grad_lse = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)) * 100
    q = torch.randn(50, 4, 8).bfloat16()
    *_, out, grad = varlen.carry(q, q, q, q, q, grad_lse)
    carried = (out[..., 8:].float() * grad[..., 8:].float()).sum(-1)
    torch.testing.assert_close(-carried.T, grad_lse, rtol=2**-23, atol=1e-5)


@pytest.mark.parametrize("settings", [*PARTS, SLIDING], ids=str)
def test_windows_need_no_flash_attention_4(stub, settings):
    tensors, cfg = draw(), LighthouseConfig(**settings, dense_backend="varlen")
    plain = LighthouseConfig(**settings, dense_backend="math")
    got = gradients(lambda *x: lighthouse_attention(*x, cfg, key=KEY), tensors)
    expected = gradients(lambda *x: lighthouse_attention(*x, plain, key=KEY), tensors)
    for ours, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: lighthouse_attention(*x, cfg, key=KEY), fullgraph=True, backend="aot_eager")
    for ours, exact in zip(gradients(compiled, tensors), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_auto_takes_what_there_is(monkeypatch):
    assert windowed_kernel("auto", "cpu", torch.float32, 8).name == "math"
    monkeypatch.setattr(varlen, "_major", lambda: 8)
    found = windowed_kernel("auto", "cuda", torch.bfloat16, 64).name
    assert found == ("fa4" if KERNELS["fa4"].obstacle("cuda", torch.bfloat16, 64) is None else "varlen")
    with pytest.raises(
        ValueError, match=r"FlashAttention-4 .*; variable-length attention \(torch\) takes no torch.float64"
    ):
        windowed_kernel("auto", "cuda", torch.float64, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "math"])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
@pytest.mark.parametrize("dim", [64, 128])
def test_on_a_gpu(name, window, heads, dim):
    """Output, and gradients of output and log-sum-exp, beside float32's; at most 4 times what bfloat16 itself loses."""
    kernel = KERNELS[name]
    if why_not := kernel.obstacle("cuda", torch.bfloat16, dim):
        pytest.skip(f"{kernel.label} {why_not}")
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(2, 1000, h, dim, generator=generator).cuda() for h in (heads[0], heads[1], heads[1])]
    calls = {"out": lambda k, *x: k.forward(*x, 0.2) if not window else k.windowed(*x, 0.2, window)}
    if window and kernel.windowed is None:
        return
    if kernel.part is not None:
        calls["lse"] = lambda k, *x: torch.cat([y.float().flatten(2) for y in k.part(*x, 0.2, window)], -1)
    for what, call in calls.items():

        def found(kernel, dtype, call=call):
            leaves = [x.to(dtype).requires_grad_() for x in tensors]
            out = call(kernel, *leaves)
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
            return [out.float(), *(x.float() for x in torch.autograd.grad(out, leaves, grad))]

        exact = found(KERNELS["math"], torch.float32)
        usual = found(KERNELS["math"], torch.bfloat16)
        for got, plain, wanted in zip(found(kernel, torch.bfloat16), usual, exact, strict=True):
            error, allowed = ((x - wanted).norm() / wanted.norm() for x in (got, plain))
            assert error <= 4 * allowed + 1e-3, (what, error, allowed)


def test_kernels_are_loaded_by_their_names():
    for name in KERNELS:
        assert importlib.import_module(f"lighthouse_core.attention.dense.{name}").KERNEL.name == name


@pytest.mark.parametrize("name", ["varlen", "fa4"])
def test_what_is_kept_for_the_backward_pass_is_read_once(stub, monkeypatch, name):
    """Activation checkpointing that keeps chosen results hands a tensor out a single time."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    kernel = KERNELS[name]
    if name == "fa4":
        interface = types.ModuleType("flash_attn.cute.interface")
        interface._flash_attn_fwd = lambda q, k, v, **how: (*map(torch.Tensor.clone, (q, q[..., 0].transpose(1, 2))),)
        interface._flash_attn_bwd = lambda q, k, v, *rest, **how: (q.clone(), k.clone(), v.clone())
        for package in ("flash_attn", "flash_attn.cute"):
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)

    def policy(context, operation, *arguments, **options):
        return CheckpointPolicy.MUST_SAVE if operation in kernel.kept else CheckpointPolicy.PREFER_RECOMPUTE

    leaves = [x.requires_grad_() for x in draw()]
    out = checkpoint(
        lambda *x: kernel.forward(*(2 * y for y in x), None),
        *leaves,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
    )
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
