"""The method `blocks` against loops over tiles, blocks and queries, and its lists of blocks against the keys seen."""

import math
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lighthouse_core import LighthouseConfig, lighthouse_attention
from lighthouse_core.attention import AttentionContext, Documents
from lighthouse_core.attention.backends import uniform
from lighthouse_core.attention.call import attend
from lighthouse_core.attention.chosen import choose_blocks
from lighthouse_core.attention.dense import flex
from lighthouse_core.attention.dense.call import KERNELS
from lighthouse_core.attention.dense.kernel import Tiles
from lighthouse_core.attention.dense.math import seen
from lighthouse_core.attention.settings import BackendError, SettingError

KEY = torch.tensor([1, 2, 3, 4])
SCORES = ("mean", "bound", "random")
# tokens, query heads, KV heads, tile, block_size, blocks, window
SHAPES = {
    "usual": (96, 4, 2, 8, 4, 3, 6),
    "wide-blocks": (96, 2, 2, 4, 8, 2, 5),
    "equal": (64, 3, 1, 8, 8, 2, 1),
    "odd-length": (83, 4, 2, 8, 4, 3, 13),
    "all-blocks": (64, 2, 1, 8, 4, 50, 7),
    "long-window": (50, 2, 1, 8, 4, 2, 60),
    "one-tile": (7, 2, 1, 8, 4, 2, 3),
    "few-blocks": (40, 1, 1, 4, 2, 1, 9),
}


def config(shape, score="mean", **more):
    tile, size, blocks, window = shape[3:]
    settings = {"tile": tile, "block_size": size, "blocks": blocks, "window": window, "block_score": score}
    return LighthouseConfig(method="blocks", **settings | more)


def draw(shape, batch=2, dim=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = shape[1], shape[2], shape[2], shape[1]
    return [torch.randn(batch, shape[0], h, dim, dtype=dtype, generator=generator) for h in heads]


def block_scores(q, k, tile, block, cfg, row, head, number):
    """Of one block for one tile, from its keys [size, D] and the queries [tile, G, D] of the tile before."""
    if cfg.block_score == "random":
        return uniform(KEY, row + 1, head + 1, torch.tensor([tile * 65536 + number]))[row, head, 0].item()
    mean = q.flatten(0, 1).mean(0).tolist()
    if cfg.block_score == "mean":
        return sum(a * b for a, b in zip(mean, block.mean(0).tolist(), strict=True))
    columns = block.T.tolist()
    return sum(max(a * max(column), a * min(column)) for a, column in zip(mean, columns, strict=True))


def choices(q, k, cfg, row, head, starts=(0,), budgets=None):
    """The blocks that each tile of one sequence and KV head chooses; `budgets` are of the KV heads."""
    tokens, group, found = q.shape[1], q.shape[2] // k.shape[2], []
    for tile in range(-(-tokens // cfg.tile)):
        first = tile * cfg.tile
        start = max(x for x in starts if x <= first)
        scores = {}
        for number in range(tokens // cfg.block_size):
            begin, end = number * cfg.block_size, (number + 1) * cfg.block_size
            if begin >= start and end <= first - cfg.window + 1:
                queries = q[row, first - cfg.tile : first, head * group : (head + 1) * group]
                scores[number] = block_scores(queries, k, tile, k[row, begin:end, head], cfg, row, head, number)
        best = sorted(scores, key=lambda number: (-scores[number], number))
        found.append(sorted(best[: cfg.blocks if budgets is None else budgets[head]]))
    return found


def loop(q, k, v, cfg, starts=(0,), budgets=None):
    """Each query over the keys that the rule names, one after another."""
    group, rows = q.shape[2] // k.shape[2], []
    for row in range(q.shape[0]):
        heads = []
        for head in range(q.shape[2]):
            chosen = choices(q.detach(), k.detach(), cfg, row, head // group, starts, budgets)
            outs = []
            for at in range(q.shape[1]):
                start = max(x for x in starts if x <= at)
                keys = list(range(max(start, at - cfg.window + 1), at + 1))
                for number in chosen[at // cfg.tile]:
                    keys += range(number * cfg.block_size, (number + 1) * cfg.block_size)
                assert len(set(keys)) == len(keys) and max(keys) == at
                scores = k[row, keys, head // group] @ q[row, at, head] / math.sqrt(q.shape[3])
                outs.append(scores.softmax(0) @ v[row, keys, head // group])
            heads.append(torch.stack(outs))
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows)


def with_gradients(call, q, k, v, grad):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(found, truth, tolerance=1e-12):
    for ours, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_call_is_the_loop(shape, score):
    cfg, tensors = config(shape, score), draw(shape)
    call = partial(lighthouse_attention, cfg=cfg, key=KEY)
    assert_close(with_gradients(call, *tensors), with_gradients(partial(loop, cfg=cfg), *tensors))


def test_gradients():
    shape = SHAPES["few-blocks"]
    tensors = [x.requires_grad_() for x in draw(shape, batch=1, dim=2)[:3]]
    assert torch.autograd.gradcheck(partial(lighthouse_attention, cfg=config(shape)), tensors)


def budgeted(cfg, *budgets):
    """The call with these budgets of the KV heads."""
    context = AttentionContext(KEY, budgets=torch.tensor(budgets, dtype=torch.int32))
    return lambda q, k, v: attend(q, k, v, cfg, context)


UNEQUAL = [(0, 6), (5, 1), (8, 0), (0, 0)]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("budgets", UNEQUAL, ids=str)
@pytest.mark.parametrize("shape", ("usual", "wide-blocks", "odd-length"))
def test_a_call_with_budgets_is_the_loop(shape, budgets, score):
    cfg, tensors = config(SHAPES[shape], score), draw(SHAPES[shape])
    truth = with_gradients(partial(loop, cfg=cfg, budgets=budgets), *tensors)
    assert_close(with_gradients(budgeted(cfg, *budgets), *tensors), truth)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equal_budgets_change_no_bit(shape, score):
    cfg, tensors = config(shape, score), draw(shape, dtype=torch.float32)
    call = partial(lighthouse_attention, cfg=cfg, key=KEY)
    ours = with_gradients(budgeted(cfg, *[cfg.blocks] * shape[2]), *tensors)
    assert all(torch.equal(a, b) for a, b in zip(ours, with_gradients(call, *tensors), strict=True))


@pytest.mark.parametrize("budgets", UNEQUAL, ids=str)
def test_gradients_with_budgets(budgets):
    tensors = [x.requires_grad_() for x in draw((40, 2, 2), batch=1, dim=2)[:3]]
    assert torch.autograd.gradcheck(budgeted(config((40, 2, 2, 4, 2, 3, 9)), *budgets), tensors)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("budgets", UNEQUAL, ids=str)
def test_nothing_leaks_with_budgets(budgets, score):
    shape = SHAPES["usual"]
    call, tensors = budgeted(config(shape, score), *budgets), draw(shape, dtype=torch.float32)[:3]
    out = call(*tensors)
    for cut in range(1, shape[0], 5):
        other = [torch.cat((x[:, :cut], 100 * torch.randn_like(x[:, cut:])), 1) for x in tensors]
        assert torch.equal(out[:, :cut], call(*other)[:, :cut])


def test_other_budgets_compile_nothing_anew():
    torch._dynamo.reset()
    cfg, counter = config(SHAPES["usual"]), CompileCounterWithBackend("aot_eager")
    tensors = draw(SHAPES["usual"])

    def call(q, k, v, budgets):
        return attend(q, k, v, cfg, AttentionContext(KEY, budgets=budgets))

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for budgets in UNEQUAL:
        numbers = torch.tensor(budgets, dtype=torch.int32)
        ours = with_gradients(partial(compiled, budgets=numbers), *tensors)
        assert_close(ours, with_gradients(partial(call, budgets=numbers), *tensors))
    assert counter.frame_count == 1


@pytest.mark.parametrize("score", SCORES)
def test_the_choice_is_by_content_and_of_each_head(score):
    shape = SHAPES["usual"]
    q, k, *_ = draw(shape)
    cfg = config(shape, score)
    chosen = choose_blocks(q, k, cfg, AttentionContext(KEY))
    none = shape[0] // cfg.block_size
    assert chosen.dtype == torch.int32 and torch.equal(chosen, choose_blocks(q, k, cfg, AttentionContext(KEY)))
    for row in range(2):
        for head in range(2):
            found = [[x for x in tile if x != none] for tile in chosen[row, head].tolist()]
            assert found == choices(q, k, cfg, row, head)
    assert not torch.equal(chosen[:, 0], chosen[:, 1]) and not torch.equal(chosen[0], chosen[1])


def test_a_random_choice_follows_the_key_and_the_place_alone():
    shape = SHAPES["usual"]
    q, k, *_ = draw(shape)
    cfg = config(shape, "random")

    def chosen(key, tokens=96, heads=slice(None), rows=slice(None)):
        context = AttentionContext(torch.tensor(key))
        return choose_blocks(q[rows, :tokens, heads], k[rows, :tokens, heads], cfg, context)

    first = chosen((1, 2, 3))
    assert not any(torch.equal(first, chosen(key)) for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4)))
    # Of a sequence and a head by themselves, and of a shorter sequence, but for the number that stands for no block.
    assert torch.equal(first[1:], chosen((1, 2, 3, 1), rows=slice(1, 2)))
    assert torch.equal(first[:, 1:], chosen((1, 2, 3, 0, 1), heads=slice(1, 2)))
    assert torch.equal(first[:, :, 6:8], chosen((1, 2, 3), tokens=64)[:, :, 6:])


@pytest.mark.parametrize("score", ("mean", "bound"))
def test_of_equal_blocks_the_earlier_ones_are_chosen(score):
    shape = (128, 2, 1, 8, 4, 5, 6)
    cfg = config(shape, score)
    # Of small whole numbers, whose means and products are exact: equal blocks have equal scores on every machine.
    q, k, *_ = (x.round() for x in draw(shape, batch=1))
    k = k[:, :4].repeat(1, 32, 1, 1)
    chosen = choose_blocks(q, k, cfg, AttentionContext())
    assert chosen[0, 0, 4:].tolist() == [[0, 1, 2, 3, 4]] * 12
    # One is better, wherever it is.
    k[:, 48:52] = 100 * q[:, 88:96, :1].mean((1, 2), keepdim=True)
    q[:, :, 1] = q[:, :, 0]
    k[:, 48:52] = 100 * q[:, 88:96, :1].mean((1, 2), keepdim=True)
    assert choose_blocks(q, k, cfg, AttentionContext())[0, 0, 12].tolist() == [0, 1, 2, 3, 12]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_nothing_leaks(shape, score):
    cfg = config(shape, score)
    tensors = draw(shape, dtype=torch.float32)[:3]
    out = lighthouse_attention(*tensors, cfg, key=KEY)
    for cut in range(1, shape[0], 5):
        other = [torch.cat((x[:, :cut], 100 * torch.randn_like(x[:, cut:])), 1) for x in tensors]
        assert torch.equal(out[:, :cut], lighthouse_attention(*other, cfg, key=KEY)[:, :cut])


@pytest.mark.parametrize("score", SCORES)
def test_documents_are_the_loop_and_each_is_what_it_is_alone(score):
    shape = (96, 4, 2, 8, 4, 3, 11)
    cfg, tensors = config(shape, score), draw(shape, batch=1)
    starts = (0, 8, 48, 72)
    documents = Documents(torch.tensor([*starts, 96], dtype=torch.int32), 40)
    packed = with_gradients(partial(lighthouse_attention, cfg=cfg, key=KEY, documents=documents), *tensors)
    # The numbers of the loop's draws are those of the first row.
    assert_close(packed, with_gradients(partial(loop, cfg=cfg, starts=starts), *tensors))
    if score != "random":
        for begin, end in ((0, 8), (8, 48), (48, 72), (72, 96)):
            part = [x[:, begin:end] for x in tensors]
            alone = with_gradients(partial(lighthouse_attention, cfg=cfg), *part)
            assert_close([x[:, begin:end] for x in packed], alone)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_keys_are_counted(shape):
    """Each query's own key counts half, as it does in N / 2 of dense attention."""
    cfg = config(shape)
    q, k, *_ = draw(shape, batch=1)
    chosen = choices(q, k, cfg, 0, 0)
    counted = [min(at + 0.5, cfg.window) + len(chosen[at // cfg.tile]) * cfg.block_size for at in range(shape[0])]
    assert cfg.keys(shape[0]) == pytest.approx(sum(counted) / shape[0], abs=1e-9)


@pytest.mark.parametrize("budgets", [None, (0, 7), (9, 1)], ids=str)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [1, 5, 24, 200])
@pytest.mark.parametrize(("tile", "size"), [(8, 4), (4, 8), (8, 8), (16, 4)])
def test_the_lists_of_flex_attention_name_what_is_seen(tile, size, window, documents, budgets):
    """Each pair that is seen is in one list of each kind, once."""
    tokens = 96
    q, k, *_ = draw((tokens, 4, 2), dtype=torch.float32)
    starts = None
    if documents:
        starts = torch.tensor([[0, 32, 48], [0, 16, 64]], dtype=torch.int32)
        starts = starts.repeat_interleave(torch.tensor([2, 1, 3]), 1).repeat_interleave(16 // tile, 1)
        starts[0] = (torch.arange(0, tokens, tile) // 32 * 32).int()
        starts[1] = (torch.arange(0, tokens, tile) // 48 * 48).int()
    cfg = LighthouseConfig(method="blocks", window=window, blocks=3, block_size=size, tile=tile)
    context = AttentionContext(budgets=None if budgets is None else torch.tensor(budgets, dtype=torch.int32))
    tiles = Tiles(choose_blocks(q, k, cfg, context, starts), starts, window, tile, size)
    expected = seen(tiles, tokens).expand(2, 2, tokens, tokens).flatten(0, 1)
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    near = (age >= 0) & (age < window)
    found = list(flex.lists(tiles, tokens).values())
    for turned, (part_counts, part, full_counts, full) in enumerate((found[:4], found[4:])):
        assert part.stride() == full.stride() and all(x.dtype == torch.int32 for x in found)
        got = torch.zeros_like(expected)
        for counts, numbers, whole in ((part_counts, part, False), (full_counts, full, True)):
            for row, _, line in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
                for number in numbers[row, 0, line, : counts[row, 0, line]].tolist():
                    a, b = (number, line) if turned else (line, number)
                    pairs = slice(a * tile, (a + 1) * tile), slice(b * size, (b + 1) * size)
                    assert not got[row][pairs].any()
                    got[row][pairs] = True if whole else near[pairs]
        assert torch.equal(got, expected)


def test_settings_that_do_not_fit():
    for name, value, why in (
        ("blocks", 0, "at least 1"),
        ("block_size", 0, "at least 1"),
        ("tile", 192, "a multiple or a divisor of block_size"),
        ("block_score", "max", "must be one of mean, bound, random"),
        ("window", 0, "a number of tokens"),
        ("dense_backend", "cudnn", "attends to no chosen blocks"),
    ):
        with pytest.raises(SettingError, match=why) as error:
            LighthouseConfig(method="blocks", **{"window": 64} | {name: value})
        assert error.value.field == name
    with pytest.raises(BackendError, match="needs a CUDA device"):
        lighthouse_attention(*draw(SHAPES["usual"])[:3], config(SHAPES["usual"], dense_backend="flex"))
    with pytest.raises(BackendError, match="multiples of 128 tokens, not 8 and 4"):
        config(SHAPES["usual"]).rule.check_backends(config(SHAPES["usual"]), "cuda", torch.bfloat16, 128)


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(2, 4, 2), (1, 4, 4), (1, 4, 2), (1, 4, 1)])
def test_flex_attention_is_given_contiguous_tensors(batch, heads, kv_heads, monkeypatch):
    given = []

    def attention(q, k, v, **_):
        given.extend((q, k, v))
        return q

    monkeypatch.setattr(flex, "flex_attention", attention)
    q, k, v = (torch.randn(batch, 512, count, 16) for count in (heads, kv_heads, kv_heads))
    none = torch.empty(batch, kv_heads, 4, 0, dtype=torch.int32)
    out = flex._blocked(q, k, v, None, Tiles(none, None, 128, 128, 128), "FLASH")
    assert torch.equal(out, q)
    assert [x.shape for x in given] == [(batch * kv_heads, n, 512, 16) for n in (heads // kv_heads, 1, 1)]
    assert all(x.is_contiguous() for x in given)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "kv_heads", "documents"),
    [
        (2, 4000, 4, 4, False),
        (2, 4000, 8, 2, False),
        (2, 4000, 4, 2, True),
        # One sequence that needs no padding: nothing is copied on the way, so its heads are views.
        (1, 4096, 4, 4, False),
        (1, 4096, 4, 2, False),
        (1, 4096, 4, 1, False),
    ],
)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["fa4", "flex"])
def test_kernels_on_a_gpu(name, score, batch, tokens, heads, kv_heads, documents, compiled, monkeypatch):
    """In bfloat16 as far from float32 as a few times what matrix products in bfloat16 are."""
    kernel = KERNELS[name]
    if why_not := kernel.blocks("cuda", torch.bfloat16, 128, 256, 128):
        pytest.skip(why_not)
    torch._dynamo.reset()
    shape = (tokens, heads, kv_heads, 256, 128, 4, 700)
    given = [x.cuda().bfloat16() for x in draw(shape, batch=batch, dim=128, dtype=torch.float32)]
    more = {}
    if documents:
        starts = torch.tensor([0, 1024, 1280, 4000, 6304, 8000], dtype=torch.int32, device="cuda")
        more["documents"] = Documents(starts, 2720)

    def call(backend):
        cfg = config(shape, score, dense_backend=backend)
        return lambda *x: lighthouse_attention(*x, cfg, key=KEY, **more)

    ours = torch.compile(call(name), fullgraph=True, dynamic=False) if compiled else call(name)
    # The choice of float32 may be another one where two blocks score alike, so it is made from the same numbers.
    exact = with_gradients(call("math"), *(x.float() for x in given))
    for found, truth in zip(with_gradients(ours, *given), exact, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.float(), truth, rtol=0.02, atol=0.02 * truth.abs().max().item())
    before = torch.are_deterministic_algorithms_enabled()
    if name == "flex":
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        try:
            torch._dynamo.reset()
            runs = [with_gradients(call(name), *given) for _ in range(2)]
        finally:
            torch.use_deterministic_algorithms(before)
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["fa4", "flex"])
def test_budgets_on_a_gpu(name, compiled):
    """Unequal ones are near float32, and equal ones change no bit of the output."""
    kernel = KERNELS[name]
    if why_not := kernel.blocks("cuda", torch.bfloat16, 128, 256, 128):
        pytest.skip(why_not)
    torch._dynamo.reset()
    shape = (4000, 4, 2, 256, 128, 4, 700)
    given = [x.cuda().bfloat16() for x in draw(shape, batch=1, dim=128, dtype=torch.float32)]

    def call(backend, budgets):
        context = AttentionContext(budgets=None if budgets is None else torch.tensor(budgets).int().cuda())
        cfg = config(shape, dense_backend=backend)
        run = torch.compile(attend, fullgraph=True, dynamic=False) if compiled and backend == name else attend
        return lambda q, k, v: run(q, k, v, cfg, context)

    for budgets in ((0, 8), (16, 1), (0, 0)):
        exact = with_gradients(call("math", budgets), *(x.float() for x in given))
        for found, truth in zip(with_gradients(call(name, budgets), *given), exact, strict=True):
            torch.testing.assert_close(found.float(), truth, rtol=0.02, atol=0.02 * truth.abs().max().item())
    equal, without = (call(name, budgets)(*given[:3]) for budgets in ((4, 4), None))
    assert torch.equal(equal, without)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fa4", "flex"])
def test_on_a_gpu_no_bit_depends_on_another_document_or_a_later_token(name):
    """Of FlashAttention-4 the gradients of keys are added up in no fixed order, so its output alone is compared."""
    kernel = KERNELS[name]
    if why_not := kernel.blocks("cuda", torch.bfloat16, 128, 256, 128):
        pytest.skip(why_not)
    shape = (4096, 8, 2, 256, 128, 4, 700)
    tensors = [x.cuda().bfloat16() for x in draw(shape, batch=1, dim=128, dtype=torch.float32)]
    documents = Documents(torch.tensor([0, 512, 2048, 4096], dtype=torch.int32, device="cuda"), 2048)
    call = partial(lighthouse_attention, cfg=config(shape, dense_backend=name), documents=documents)
    other = [x.clone() for x in tensors]
    for x in other:
        x[:, 512:2048] = torch.randn_like(x[:, 512:2048])
    compared = slice(None) if name == "flex" else slice(1)
    before, after = (with_gradients(call, *x)[compared] for x in (tensors, other))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :512], b[:, :512]) and torch.equal(a[:, 2048:], b[:, 2048:])
        assert not torch.equal(a[:, 512:2048], b[:, 512:2048])
    for cut in (300, 1000, 3000):
        later = [torch.cat((x[:, :cut], 100 * torch.randn_like(x[:, cut:])), 1) for x in tensors[:3]]
        assert torch.equal(before[0][:, :cut], call(*later)[:, :cut])
