"""Stage-1 attention that is not the paper's, and the parts of a softmax it is made of, against masks written out."""

import dataclasses
import itertools
import math
import sys
import types

import pytest
import torch

from lighthouse_core import LighthouseConfig, dense_attention, gathered_length, lighthouse_attention, select_indices
from lighthouse_core.attention import AttentionContext
from lighthouse_core.attention.blocks import drawn_blocks, largest_blocks, take_blocks
from lighthouse_core.attention.dense import fa4
from lighthouse_core.attention.dense.call import KERNELS
from lighthouse_core.attention.methods import METHODS as registry
from lighthouse_core.attention.module import DenseAttention, LighthouseAttention
from lighthouse_core.attention.parts import far, merge, near, parts_kernel
from lighthouse_core.attention.settings import SettingError, Settings
from lighthouse_core.config import load_recipe
from lighthouse_core.errors import RecipeError
from lighthouse_core.estimate import flops_per_token
from lighthouse_core.titan.parallelize import kept_results

KEY = torch.tensor([1, 2, 3])
PYRAMID = {"pooling": 2, "levels": 3, "topk": 4, "tile_parents": 2}
METHODS = [
    {"method": "sliding", "window": 24},
    {"method": "chunked", "window": 24},
    {"method": "compressed", "window": 24, "compression": 8},
    {"method": "compressed", "window": 24, "compression": 8, "keep": 4, "score_block": 4},
    {"method": "compressed", "window": 24, "compression": 8, "keep": 4, "score_block": 4, "scorer": "random"},
    {"method": "pyramid", "window": 24, "scorer": "block", "score_block": 4, **PYRAMID},
    {"method": "blocks", "window": 24, "tile": 8, "block_size": 4, "blocks": 3},
    {"method": "blocks", "window": 24, "tile": 4, "block_size": 8, "blocks": 3, "block_score": "random"},
]
IDS = ["sliding", "chunked", "compressed", "kept", "drawn", "pyramid", "blocks", "random-blocks"]


def draw(tokens=100, heads=4, kv_heads=2, dim=8, batch=2, dtype=torch.float64, device="cpu"):
    generator = torch.Generator(device).manual_seed(tokens)
    return [
        torch.randn(batch, tokens, h, dim, dtype=dtype, device=device, generator=generator)
        for h in (heads, kv_heads, kv_heads)
    ]


def softmax(q, k, v, bias):
    """Output and log-sum-exp of attention with a bias [B, N, H or 1, M] on every score."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bnhd,bmhd->bnhm", q, k) / q.shape[-1] ** 0.5 + bias
    return torch.einsum("bnhm,bmhd->bnhd", scores.softmax(-1), v), scores.logsumexp(-1)


def mask(visible):
    """[1, N, 1, M] from [N, M]."""
    return torch.where(visible, 0.0, -torch.inf).double()[None, :, None]


def gradients(call, tensors, seed=3):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    outs = call(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    # On the CPU, as every device draws numbers of its own.
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x) for x in outs]
    total = sum((x * w).sum() for x, w in zip(outs, weights, strict=True))
    return [*(x.detach() for x in outs), *torch.autograd.grad(total, tensors)]


def assert_close(found, truth, tolerance=1e-12):
    for a, b in zip(found, truth, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max([1.0, *b.abs().flatten().tolist()]))


@pytest.mark.parametrize("tokens", [5, 100, 1100])
@pytest.mark.parametrize("window", [0, 1, 24, 2000])
def test_near_is_a_causal_window(tokens, window):
    tensors = draw(tokens, dim=4, batch=2 if tokens < 1000 else 1)
    at = torch.arange(tokens)
    age = at[:, None] - at
    visible = (age >= 0) & (age < (window or tokens))
    assert_close(
        gradients(lambda *x: tuple(near(*x, window)), tensors),
        gradients(lambda *x: softmax(*x, mask(visible)), tensors),
    )


@pytest.mark.parametrize(("ratio", "behind"), [(1, 5), (4, 1), (8, 3), (8, 100)])
def test_far_sees_whole_windows_behind(ratio, behind):
    q, *_ = draw(90)
    _, k, v = draw(-(-90 // ratio))
    at, keys = torch.arange(90), torch.arange(k.shape[1])
    visible = keys <= (at // ratio)[:, None] - behind
    some = visible.any(1)
    part = far(q, k, v, ratio, behind)
    out, lse = softmax(q, k, v, mask(visible))
    assert_close([part.out[:, some], part.lse[:, some]], [out[:, some], lse[:, some]])
    assert (part.lse[:, ~some] == -torch.inf).all() and (part.out[:, ~some] == 0).all()


@pytest.mark.parametrize("window", [1, 24, 99])
def test_parts_add_up_to_dense_attention(window):
    def parts(q, k, v):
        return merge([near(q, k, v, window), far(q, k, v, 1, window)])

    tensors = draw()
    assert_close(gradients(parts, tensors), gradients(dense_attention, tensors))


def compressed_truth(q, k, v, cfg, blocks=None):
    """`compressed` with every key written out beside its bias."""
    tokens, size = q.shape[1], cfg.compression
    at = torch.arange(tokens)
    age = at[:, None] - at
    keys, values, biases = [k], [v], [mask((age >= 0) & (age < cfg.window)).expand(len(q), -1, k.shape[2], -1)]
    for start in range(0, tokens - size + 1, size):
        keys.append(k[:, start : start + size].mean(1, keepdim=True))
        values.append(v[:, start : start + size].mean(1, keepdim=True))
        visible = at // size - cfg.window // size >= start // size
        biases.append(mask(visible[:, None]).expand(len(q), -1, k.shape[2], -1) + math.log(size))
    bias = torch.cat(biases, -1)
    if blocks is not None:
        width = cfg.score_block
        keys.append(blocks[0])
        values.append(blocks[1])
        group = torch.arange(blocks[0].shape[1]) // width
        row = torch.arange(blocks[0].shape[1])
        # One more key each `keep` tokens, after its group has ended.
        visible = row <= (at // cfg.keep)[:, None] - width - -(-cfg.window // cfg.keep)
        # Its whole group is further behind than the window.
        assert (((group + 1) * width * cfg.keep)[None] + cfg.window <= torch.where(visible, at[:, None], 10**9)).all()
        bias = torch.cat((bias, mask(visible).expand(len(q), -1, k.shape[2], -1)), -1)
    return softmax(q, torch.cat(keys, 1), torch.cat(values, 1), bias.repeat_interleave(q.shape[2] // k.shape[2], 2))[0]


@pytest.mark.parametrize("tokens", [100, 129])
@pytest.mark.parametrize("cfg", METHODS[2:5], ids=IDS[2:5])
def test_compressed_is_one_softmax(cfg, tokens):
    cfg = LighthouseConfig(**cfg)

    def truth(q, k, v):
        return compressed_truth(q, k, v, cfg, kept_blocks(k, v, cfg) if cfg.keep else None)

    tensors = draw(tokens)
    assert_close(
        gradients(lambda *x: lighthouse_attention(*x, cfg, key=KEY), tensors), gradients(truth, tensors), 1e-11
    )


def kept_blocks(k, v, cfg, key=KEY):
    """The keys and values that `compressed` keeps as they are."""
    shape = cfg.keep, cfg.score_block
    chosen = drawn_blocks(key, k, *shape) if cfg.draws else largest_blocks(k, *shape)
    return take_blocks(k, v, chosen, *shape)


def test_the_block_with_the_largest_key_is_kept():
    _, k, v = draw(100, batch=1, kv_heads=1)
    cfg = LighthouseConfig(method="compressed", window=24, compression=8, keep=4, score_block=4)
    k[0, 16 + 9] *= 100
    kept = kept_blocks(k, v, cfg)
    assert torch.equal(kept[0][:, 4:8], k[:, 24:28]) and torch.equal(kept[1][:, 4:8], v[:, 24:28])
    assert kept[0].shape[1] == 6 * 4


def test_drawn_blocks_follow_the_key_alone():
    _, k, v = draw(1000, dim=1)
    v = torch.arange(1000.0)[None, :, None, None].expand(2, -1, 2, 1)
    cfg = LighthouseConfig(method="compressed", window=24, compression=8, keep=4, score_block=4, scorer="random")

    def starts(key):
        return kept_blocks(k, v, cfg, torch.tensor(key))[1][:, ::4, :, 0]

    first = starts((1, 2, 3))
    assert torch.equal(first, starts((1, 2, 3)))
    assert not torch.equal(first, starts((1, 3, 3))) and not torch.equal(first[0], first[1])
    assert torch.equal(first[1], starts((1, 2, 3, 1))[0])
    assert torch.equal(first // 16, torch.arange(62.0)[None, :, None].expand_as(first))
    assert (first % 16 // 4).unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tokens", [96, 100])
def test_chunked_is_dense_in_each_chunk(tokens):
    q, k, v = draw(tokens)
    out = lighthouse_attention(q, k, v, LighthouseConfig(method="chunked", window=24))
    parts = [dense_attention(*(x[:, i : i + 24] for x in (q, k, v))) for i in range(0, tokens, 24)]
    assert_close([out], [torch.cat(parts, 1)])


def test_a_window_beside_the_pyramid():
    cfg = LighthouseConfig(**METHODS[5])
    q, k, v = draw()
    indices = select_indices(q, k, cfg, key=KEY)
    window, own = near(q, k, v, cfg.window)
    padded = 104
    levels = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padded - 100)) for x in (q, k, v)]
    flat = [torch.cat([x.unflatten(1, (-1, 2**i)).mean(2) for i in range(3)], 1) for x in levels]
    offsets = [0, padded, padded + padded // 2]
    total, mass = own.exp()[..., None] * window, own.exp()[..., None].clone()
    for b in range(2):
        for h in range(4):
            chosen = indices[b, h // 2].long()
            rows = [flat[0][b, chosen, h], *(x[b, chosen, h // 2] for x in flat[1:])]
            entry = near(*(x[None, :, None] for x in rows), 0)
            for s, index in enumerate(chosen.tolist()):
                level = 2 if index >= offsets[2] else 1 if index >= offsets[1] else 0
                size = 2**level
                first = (index - offsets[level]) * size + size - 1
                places = slice(first, min(first + size, 100))
                weight = entry.lse[0, s, 0].exp()
                total[b, places, h] += weight * entry.out[0, s, 0]
                mass[b, places, h] += weight
    assert_close([lighthouse_attention(q, k, v, cfg, key=KEY)], [total / mass], 1e-10)


@pytest.mark.parametrize("cfg", METHODS, ids=IDS)
def test_what_all_scores_have_in_common_does_not_count(cfg):
    cfg = LighthouseConfig(**cfg)

    def call(constant):
        def attend(q, k, v):
            # One more feature, which pooling leaves as it is.
            q, k, v = (
                torch.nn.functional.pad(x, (0, 1), value=value) for x, value in ((q, constant), (k, 1.0), (v, 0.0))
            )
            return lighthouse_attention(q, k, v, cfg, key=KEY, scale=0.3)[..., :-1]

        return attend

    tensors = draw()
    assert_close(gradients(call(1000.0), tensors), gradients(call(0.0), tensors), 1e-10)
    assert_close(gradients(call(-1000.0), tensors), gradients(call(0.0), tensors), 1e-10)


@pytest.mark.parametrize("cfg", METHODS, ids=IDS)
def test_no_position_sees_a_later_one(cfg):
    cfg = LighthouseConfig(**cfg)
    tensors = draw()
    out = lighthouse_attention(*tensors, cfg, key=KEY)
    for cut in (1, 23, 24, 50, 99):
        other = [torch.cat((x[:, :cut], 100 * torch.randn_like(x[:, cut:])), 1) for x in tensors]
        again = lighthouse_attention(*other, cfg, key=KEY)
        assert torch.equal(out[:, :cut], again[:, :cut])
        assert not torch.equal(out[:, cut:], again[:, cut:])


# But for the pyramid, whose entries count keys of the window again.
@pytest.mark.parametrize("cfg", METHODS[:5] + METHODS[6:], ids=IDS[:5] + IDS[6:])
def test_an_early_token_is_dense(cfg):
    """As long as a method leaves nothing out, it is dense attention."""
    cfg = LighthouseConfig(**cfg)
    q, k, v = draw()
    out = lighthouse_attention(q, k, v, cfg, key=KEY)
    assert_close([out[:, :24]], [dense_attention(q, k, v)[:, :24]])


@pytest.mark.parametrize("cfg", METHODS, ids=IDS)
def test_types(cfg):
    cfg = LighthouseConfig(**cfg)
    tensors = draw()
    exact = gradients(lambda *x: lighthouse_attention(*x, cfg, key=KEY), tensors)
    single = gradients(lambda *x: lighthouse_attention(*x, cfg, key=KEY), [x.float() for x in tensors])
    assert all(x.dtype == torch.float32 for x in single)
    assert_close(single, [x.float() for x in exact], 1e-4)


def but_slow(*names):
    """All methods; those of these names in the slow tests alone."""
    return [
        pytest.param(cfg, id=name, marks=[pytest.mark.slow] * (name in names))
        for cfg, name in zip(METHODS, IDS, strict=True)
    ]


# test_attention.py compiles pyramids with their gradients.
@pytest.mark.parametrize("cfg", but_slow("drawn", "pyramid", "random-blocks"))
def test_compilation(cfg):
    torch._dynamo.reset()
    cfg = LighthouseConfig(**cfg)
    tensors = draw()
    exact = gradients(lambda *x: lighthouse_attention(*x, cfg, key=KEY), tensors)
    compiled = torch.compile(lambda *x: lighthouse_attention(*x, cfg, key=KEY), fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled, tensors), exact, 1e-10)


@pytest.mark.parametrize("cfg", but_slow("drawn"))
def test_a_compiled_layer_takes_other_windows(cfg):
    seen = []

    def backend(graph, inputs):
        seen.append([type(x) for x in inputs])
        return graph

    torch._dynamo.reset()
    layers = torch.nn.ModuleList(LighthouseAttention(LighthouseConfig(**cfg)) for layer in range(2))
    for layer in layers:
        layer.compile(backend=backend, fullgraph=True)
    q, k, v = draw()
    for number, window in enumerate((24, 32, 48, 56, 64)):
        settings = LighthouseConfig(**cfg | {"window": window})
        for sample, layer in enumerate(layers):
            # Another step, and another window.
            context = AttentionContext(torch.tensor((1, number, sample, 3)), settings)
            out = layer(q, k, v, context)
            assert torch.equal(out, layer(q, k, v, context))
            assert_close([out], [layer.forward(q, k, v, context)], 1e-10)
    if settings.rule.window_is_a_shape:
        # A shape that is not known would cost time in every call.
        assert torch.SymInt not in itertools.chain(*seen) and int not in itertools.chain(*seen)
        assert len(seen) in (5, 10)
    else:
        # As a constant, and then as a number that may vary.
        assert len(seen) == 2


@pytest.mark.parametrize("tokens", [500, 7000, 16384])
@pytest.mark.parametrize(
    "cfg",
    [
        {"method": "sliding", "window": 1024},
        {"method": "chunked", "window": 2048},
        {"method": "compressed", "window": 512},
        {"method": "compressed", "window": 512, "compression": 32, "keep": 8},
        {"method": "blocks", "window": 512, "blocks": 4},
        {"window": 512, "topk": 128},
        {"window": 512, "levels": 1},
    ],
)
def test_keys_are_those_seen(cfg, tokens):
    """The arithmetic against counting; each query's own key counts half, as it does in N / 2 of dense attention."""
    cfg = LighthouseConfig(**cfg)
    at = torch.arange(tokens).double()
    window = (at + 0.5).clamp(max=cfg.window)
    if cfg.method == "sliding":
        counted = window
    elif cfg.method == "chunked":
        counted = at % cfg.window + 0.5
    elif cfg.method == "compressed":
        counted = window + (at // cfg.compression - cfg.window // cfg.compression + 1).clamp(min=0)
        if cfg.keep and tokens > cfg.window:
            counted = counted + (at // cfg.keep - 64 - -(-512 // cfg.keep) + 1).clamp(min=0)
    elif cfg.method == "blocks":
        behind = (at // cfg.tile * cfg.tile - cfg.window + 1).clamp(min=0) // cfg.block_size
        counted = window + cfg.block_size * behind.clamp(max=cfg.blocks)
    elif cfg.levels == 1 or tokens == 500:
        counted = at + 0.5
    else:
        length = gathered_length(tokens, cfg)
        counted = window + length**2 / (2 * tokens)
    assert cfg.keys(tokens) == pytest.approx(counted.mean().item(), rel=0.005)


def test_every_method_of_the_list_is_tested_here():
    assert {LighthouseConfig(**cfg).method for cfg in METHODS} == set(registry)


def test_the_fields_stay_where_they_are():
    """They may be given by position."""
    fields = [field.name for field in dataclasses.fields(LighthouseConfig)]
    assert fields[:9] == [
        *("pooling", "levels", "topk", "tile_parents", "cover_prefix", "scorer", "score_block", "backend"),
        "dense_backend",
    ]
    assert fields[9:13] == ["method", "window", "compression", "keep"]


def test_what_a_context_asks_for_is_not_passed_over():
    """By no method, nor by a dense layer, or one that is dense for a step."""
    tensors, context = draw(), AttentionContext(KEY, first_position=5)
    for cfg in METHODS:
        for dense in (False, True):
            with pytest.raises(ValueError, match="processes share"):
                LighthouseAttention(LighthouseConfig(**cfg))(*tensors, dataclasses.replace(context, dense=dense))
    with pytest.raises(ValueError, match="processes share"):
        DenseAttention()(*tensors, context)


def test_a_compiled_call_has_all_settings():
    """Every field, of any type."""
    cfg = LighthouseConfig(method="sliding", window=8, rotate="before", cover_prefix=False, scorer="gla")
    settings = cfg.constant()
    assert all(getattr(settings, one.name) == getattr(cfg, one.name) for one in dataclasses.fields(cfg))


def test_what_leaks_and_what_draws():
    assert LighthouseConfig().leaks and LighthouseConfig(window=64).leaks
    assert not LighthouseConfig(scorer="block").leaks
    assert not any(LighthouseConfig(**cfg).leaks for cfg in METHODS)
    assert [LighthouseConfig(**cfg).draws for cfg in METHODS] == [False] * 4 + [True, True, False, True]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "dense"}, "method must be one of"),
        ({"method": "sliding"}, "window must be a number of tokens"),
        ({"window": -1}, "window must be"),
        ({"method": "compressed", "window": 24, "compression": 16}, "divide the window"),
        ({"method": "compressed", "window": 24, "compression": 1}, "compression must be"),
        ({"keep": 1}, "keep must be 0 or at least 2"),
        ({"method": "sliding", "window": 8, "keep": 2}, "keep must be 0 for the method sliding"),
        ({"window": 2.0}, "window must be an integer"),
        ({"window": 64, "dense_backend": "cudnn"}, "dense_backend 'cudnn' gives no log-sum-exp"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValueError, match=words):
        LighthouseConfig(**settings)


def test_parts_want_a_fused_kernel_on_a_gpu():
    assert parts_kernel("auto", "cpu", torch.bfloat16, 64).name == "math"
    assert parts_kernel("math", "cuda", torch.float64, 64).name == "math"
    for backend, device in (("fa4", "cpu"), ("auto", "cuda")):
        with pytest.raises(ValueError, match="need a kernel for them: FlashAttention-4"):
            parts_kernel(backend, device, torch.float64, 64)


@pytest.mark.parametrize("cfg", METHODS[:5] + METHODS[6:], ids=IDS[:5] + IDS[6:])
def test_what_a_method_does_not_take(cfg):
    cfg = LighthouseConfig(**cfg)
    q, k, v = draw()
    for given in ({"indices": torch.zeros(1)}, {"scores": (q, k)}):
        with pytest.raises(ValueError, match=r"takes no (indices|scores)"):
            lighthouse_attention(q, k, v, cfg, **given)
    for call in (lambda: select_indices(q, k, cfg), lambda: gathered_length(100, cfg)):
        with pytest.raises(ValueError, match="has no pyramid"):
            call()


@pytest.mark.parametrize("key", [None, torch.zeros(3), torch.zeros(2, dtype=torch.int64), KEY.int()])
def test_a_key_of_another_kind(key):
    with pytest.raises(ValueError, match="int64"):
        lighthouse_attention(*draw(), LighthouseConfig(**METHODS[4]), key=key)


def test_a_choice_of_blocks_is_not_made_twice():
    chosen = torch.ops.lighthouse.largest_block.default
    for mode in ("selective", "full"):
        assert chosen in kept_results(mode, [LighthouseConfig(**METHODS[3])], "cpu")
    _, k, _ = draw(64)
    torch.library.opcheck(chosen, (k.unflatten(1, (4, 4, 4)),))


def test_a_recipe_of_another_method():
    settings = ['lighthouse.method="sliding"', "lighthouse.window=64", "lighthouse.topk=1024"]
    recipe = load_recipe("recipes/quickstart.toml", settings)
    model, counts = recipe.model, recipe.model.kind.parameters(recipe.model)
    width, tokens = model.heads * model.head_dim, recipe.training.seq_len
    pooled = model.layers - len(model.dense_layers)
    keys = 64 * (1 - 32 / tokens)
    expected = 6 * (counts.body + counts.head) + 12 * width * (len(model.dense_layers) * tokens / 2 + pooled * keys)
    assert flops_per_token(recipe, "lighthouse") == pytest.approx(expected)
    for wrong in (settings[:1], [*settings, "lighthouse.window=2048"]):
        with pytest.raises(RecipeError, match=r"lighthouse\.window"):
            load_recipe("recipes/quickstart.toml", wrong)


@pytest.fixture
def stub(monkeypatch):
    """FlashAttention-4's two functions as matrix products; what they were called with."""
    calls = []

    def forward(q, k, v, softmax_scale, causal, return_lse, window_size_left=-1, window_size_right=0):
        assert causal and return_lse and window_size_right == 0
        calls.append(window_size_left + 1)
        out, lse = near(q, k, v, window_size_left + 1, scale=softmax_scale, backend="math")
        return out.contiguous(), lse.transpose(1, 2).contiguous(), None

    def backward(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale,
        causal,
        deterministic,
        window_size_left=-1,
        window_size_right=0,
        dlse=None,
    ):
        assert all(x.is_contiguous() for x in (q, k, v, out, dout, lse))
        calls.append(dlse is not None)
        age = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        visible = (age >= 0) & (age <= (window_size_left if window_size_left >= 0 else q.shape[1]))
        group = q.shape[2] // k.shape[2]
        keys, values = (x.repeat_interleave(group, 2) for x in (k, v))
        p = (softmax_scale * torch.einsum("bnhd,bmhd->bhnm", q, keys) - lse[..., None]).exp() * visible
        own = (dout * out).sum(-1).transpose(1, 2) - (0 if dlse is None else dlse)
        ds = softmax_scale * p * (torch.einsum("bnhd,bmhd->bhnm", dout, values) - own[..., None])
        pairs = (ds, q), (p, dout)
        dk, dv = (torch.einsum("bhnm,bnhd->bmhd", *pair).unflatten(2, (-1, group)).sum(3) for pair in pairs)
        return torch.einsum("bhnm,bmhd->bnhd", ds, keys), dk, dv

    interface = types.ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    monkeypatch.setitem(KERNELS, "fa4", dataclasses.replace(fa4.KERNEL, obstacle=lambda *_: None))
    return calls


# But for blocks, which FlashAttention-4 attends to through flex_attention.
@pytest.mark.parametrize("cfg", METHODS[:6], ids=IDS[:6])
def test_through_the_fused_kernels(cfg, stub):
    cfg = LighthouseConfig(**cfg)
    tensors = draw(dtype=torch.float32)
    plain = gradients(
        lambda *x: lighthouse_attention(*x, dataclasses.replace(cfg, dense_backend="math"), key=KEY), tensors
    )
    assert not stub
    assert_close(gradients(lambda *x: lighthouse_attention(*x, cfg, key=KEY), tensors), plain, 1e-5)
    windows = {"chunked": [0], "sliding": [24], "compressed": [24, 0], "pyramid": [24, 0]}[cfg.method]
    assert stub[: len(windows)] == windows
    # A log-sum-exp that nobody uses has no gradient.
    assert stub[-1] == (cfg.method in ("compressed", "pyramid"))


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_of_one_result_alone(which, stub):
    tensors = draw(dtype=torch.float32)

    def one(backend):
        # The log-sum-exp does not depend on v.
        return gradients(lambda *x: near(*x, 24, backend=backend)[which] + 0 * x[2].sum(), tensors)

    assert_close(one("auto"), one("math"), 1e-5)
    assert stub[1] == bool(which)


def test_operations_with_a_window(stub):
    q, k, v = draw(64, dtype=torch.float32)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (q.requires_grad_(), k, v, 0.3, False, 8)
    torch.library.opcheck(torch.ops.lighthouse.flash4.default, arguments, test_utils=tests)


on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or fa4.obstacle("cuda", torch.bfloat16, 64) is not None,
    reason="needs FlashAttention-4 and a GPU that it has kernels for",
)


def of_gpu_sizes(cfg):
    """The settings, with tiles and blocks that kernels of a GPU take."""
    return cfg | {"tile": 256, "block_size": 128} if cfg["method"] == "blocks" else cfg


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("window", [0, 100, 512])
def test_fused_parts(window):
    tensors = draw(1000, dim=64, dtype=torch.bfloat16, device="cuda")
    exact = gradients(lambda *x: tuple(near(*x, window, backend="math")), [x.double() for x in tensors])
    plain = gradients(lambda *x: tuple(near(*x, window, backend="math")), tensors)
    ours = gradients(lambda *x: tuple(near(*x, window, backend="fa4")), tensors)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        error, usual = ((x.double() - truth).norm() / truth.norm() for x in (a, b))
        assert error <= 2 * usual + 5e-3


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("cfg", METHODS, ids=IDS)
def test_on_a_gpu(cfg):
    cfg = LighthouseConfig(**of_gpu_sizes(cfg))
    tensors = draw(1000, dim=64, dtype=torch.bfloat16, device="cuda")
    exact = gradients(lambda *x: lighthouse_attention(*x, cfg, key=KEY), [x.double().cpu() for x in tensors])
    for call in (
        lambda *x: lighthouse_attention(*x, cfg, key=KEY.cuda()),
        torch.compile(lambda *x: lighthouse_attention(*x, cfg, key=KEY.cuda()), fullgraph=True),
    ):
        for a, truth in zip(gradients(call, tensors), exact, strict=True):
            assert (a.double().cpu() - truth).norm() <= 2e-2 * truth.norm()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("cfg", METHODS, ids=IDS)
def test_on_a_gpu_no_position_sees_a_later_one(cfg):
    cfg = LighthouseConfig(**of_gpu_sizes(cfg))
    tensors = draw(1000, dim=128, dtype=torch.bfloat16, device="cuda")
    out = lighthouse_attention(*tensors, cfg, key=KEY.cuda())
    for cut in (1, 24, 500, 999):
        other = [torch.cat((x[:, :cut], 100 * torch.randn_like(x[:, cut:])), 1) for x in tensors]
        assert torch.equal(out[:, :cut], lighthouse_attention(*other, cfg, key=KEY.cuda())[:, :cut])


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_gradients_are_deterministic_where_torch_is_asked_to_be():
    tensors = draw(4096, heads=2, kv_heads=2, dim=128, dtype=torch.bfloat16, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(lambda *x: tuple(near(*x, 512)), tensors)
        for _ in range(5):
            again = gradients(lambda *x: tuple(near(*x, 512)), tensors)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# Another value of every setting, of which a call of 128 tokens takes note where it reads the setting.
OTHER = {
    **{"window": 48, "backend": "triton", "dense_backend": "fa4", "rotate": "after"},
    **{"pooling": 4, "levels": 2, "topk": 2, "tile_parents": 4, "cover_prefix": False, "scorer": "random"},
    **{"score_block": 8, "compression": 4, "keep": 8, "blocks": 1, "block_size": 8, "block_score": "bound", "tile": 16},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="fa4 may be there")
@pytest.mark.parametrize("name", registry)
def test_a_method_names_the_settings_that_it_reads(name):
    base = {"method": name, "window": 24, "scorer": "block", "score_block": 4, "compression": 8, **PYRAMID}
    base |= {"tile": 8, "block_size": 4, "blocks": 3}
    if name == "compressed":
        base |= {"keep": 4, "scorer": "random"}
    q, k, v = draw(128)

    def result(settings):
        try:
            return lighthouse_attention(q, k, v, LighthouseConfig(**settings), key=KEY)
        except ValueError as error:
            return error

    out = result(base)
    assert isinstance(out, torch.Tensor) and "method" in registry[name].reads
    assert {"method", *OTHER} == {field.name for field in dataclasses.fields(Settings)}
    for key, value in OTHER.items():
        value = "norm" if (key, name) == ("scorer", "compressed") else value
        changed = result(base | {key: value})
        if key in registry[name].reads:
            # Neither backend is for such tensors on a CPU, and no rotary table is given.
            refused = isinstance(changed, ValueError) and key in ("backend", "dense_backend", "rotate")
            assert refused or not torch.equal(changed, out), key
        else:
            # A setting that other methods alone can have is refused, and passes no more silently.
            refused = isinstance(changed, SettingError) and changed.field == key
            assert refused or torch.equal(changed, out), key
