"""Packed documents never mix: not a bit of one depends on another, and each is what it is alone."""

import random
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from lighthouse_core import LighthouseConfig, dense_attention, lighthouse_attention, select_indices
from lighthouse_core.attention import AttentionContext, Documents
from lighthouse_core.attention.backends import kernels
from lighthouse_core.attention.context import selection_keys
from lighthouse_core.attention.dense.call import KERNELS
from lighthouse_core.attention.documents import cut, of_entries, of_windows
from lighthouse_core.attention.methods import METHODS
from lighthouse_core.attention.rotary import last_tokens
from lighthouse_core.models.decoder import Decoder, DecoderArgs, use_lighthouse
from lighthouse_kernels.geometry import Geometry

KEY = torch.tensor([1, 2, 3, 0])
PYRAMID = {"pooling": 2, "levels": 3, "topk": 16, "tile_parents": 4, "window": 13}
# What each method is tried with, by a short name.
SETTINGS = {
    "random": PYRAMID | {"scorer": "random"},
    "block": PYRAMID | {"scorer": "block", "score_block": 16},
    "norm": PYRAMID | {"scorer": "norm"},
    "wide": PYRAMID | {"pooling": 4, "levels": 3, "topk": 8, "scorer": "random"},
    "sliding": {"method": "sliding", "window": 21},
    "chunked": {"method": "chunked", "window": 50},
    "blocks": {"method": "blocks", "window": 9, "tile": 8, "block_size": 4, "blocks": 3},
    "dense": {"levels": 1, "window": 5},
}
GPU_KERNELS = [name for name, kernel in KERNELS.items() if kernel.packed is not None and name != "math"]


def packing(seed: int, tokens: int, align: int, batch: int = 1) -> Documents:
    """Random documents that fill the sequences: many, one of the fewest tokens, one that is a whole sequence."""
    draw = random.Random(seed)
    starts = []
    for sequence in range(batch):
        wanted = (200, 1, 2, 7)[seed % 4] if sequence == 0 else draw.choice([1, 2, 7])
        inner = range(align, tokens, align)
        cuts = {0, *draw.sample(inner, min(wanted - 1, len(inner)))}
        if wanted > 1:
            cuts |= {align}
        starts += [sequence * tokens + start for start in sorted(cuts)]
    bounds = [*starts, batch * tokens]
    longest = max(b - a for a, b in pairwise(bounds))
    # As the loader pads the number of documents: with ones without a token.
    return Documents(torch.tensor(bounds + bounds[-1:] * draw.choice([0, 3]), dtype=torch.int32), longest)


def spans(documents: Documents) -> list[tuple[int, int]]:
    bounds = documents.starts.tolist()
    return [(a, b) for a, b in pairwise(bounds) if b > a]


def inputs(batch: int, tokens: int, heads: int, kv_heads: int, seed: int = 0, dim: int = 16):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, h, dim, generator=generator) for h in (heads, kv_heads, kv_heads, heads)]


def with_gradients(call, q, k, v, grad):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check_isolated(call, tensors, documents: Documents, which: int):
    """`call` with one document replaced by another one: what belongs to the others is the same, bit for bit."""
    start, end = spans(documents)[which]
    other = [x.clone() for x in tensors]
    for x in other:
        flat = x.flatten(0, 1)
        flat[start:end] = torch.randn(flat[start:end].shape, generator=torch.Generator().manual_seed(9)).to(x)
    before, after = with_gradients(call, *tensors), with_gradients(call, *other)
    for name, a, b in zip(("output", "dq", "dk", "dv"), before, after, strict=True):
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        assert torch.equal(a[:start], b[:start]) and torch.equal(a[end:], b[end:]), name
        assert a.isfinite().all(), name
    assert not torch.equal(before[0].flatten(0, 1)[start:end], after[0].flatten(0, 1)[start:end])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(20))
def test_no_document_depends_on_another(name, seed):
    heads, kv_heads = ((4, 4), (4, 2), (3, 1))[seed % 3]
    batch = 1 + seed % 2
    cfg = LighthouseConfig(backend="reference", **SETTINGS[name])
    # 200 documents once: each costs its calls.
    tokens = 208 if seed == 0 else 96 if cfg.alignment == 16 else 94 + seed % 3
    documents = packing(seed, tokens, cfg.alignment, batch)
    tensors = inputs(batch, tokens, heads, kv_heads, seed)
    given = {"indices": select_indices(*tensors[:2], cfg)} if name == "norm" else {}

    def call(q, k, v):
        return lighthouse_attention(q, k, v, cfg, key=KEY, documents=documents, **given)

    last = len(spans(documents)) - 1
    check_isolated(call, tensors, documents, (last // 2, 0, last)[seed % 3])


@pytest.mark.parametrize("dense_backend", ["auto", "math"])
@pytest.mark.parametrize("window", [None, 1, 30])
@pytest.mark.parametrize("seed", range(4))
def test_a_packed_batch_is_its_documents_one_at_a_time(dense_backend, window, seed):
    documents = packing(seed, 150, 1, 2)
    tensors = inputs(2, 150, 4, 2, seed)
    cfg = LighthouseConfig(method="sliding", window=window or 1, dense_backend=dense_backend)

    def packed(q, k, v, documents=documents):
        if window is None:
            return dense_attention(q, k, v, backend=dense_backend, documents=documents)
        return lighthouse_attention(q, k, v, cfg, documents=documents)

    def apart(q, k, v):
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        outs = [packed(*(x[None, a:b] for x in flat), documents=None)[0] for a, b in spans(documents)]
        return torch.cat(outs).view(q.shape)

    for a, b in zip(with_gradients(packed, *tensors), with_gradients(apart, *tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 40, 64, 500])
def test_chunks_of_documents_are_cut_where_chunks_begin(window):
    documents = packing(3, 150, 1, 2)
    tensors = inputs(2, 150, 4, 2)
    cfg = LighthouseConfig(method="chunked", window=window)
    flat = [x.flatten(0, 1) for x in tensors]

    def apart(q, k, v):
        flat, outs = [x.flatten(0, 1) for x in (q, k, v)], []
        for a, b in spans(documents):
            sequence = a // 150 * 150
            cuts = [a, *(c for c in range(sequence, sequence + 150, window) if a < c < b), b]
            for start, end in pairwise(cuts):
                outs.append(dense_attention(*(x[None, start:end] for x in flat))[0])
        return torch.cat(outs).view(q.shape)

    assert len(flat[0]) == 300
    packed = with_gradients(lambda *x: lighthouse_attention(*x, cfg, documents=documents), *tensors)
    for a, b in zip(packed, with_gradients(apart, *tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # Without documents, and by a kernel that takes chunks as documents.
    whole = lighthouse_attention(*tensors[:3], cfg)
    plain = LighthouseConfig(method="chunked", window=window, dense_backend="math")
    torch.testing.assert_close(lighthouse_attention(*tensors[:3], plain), whole, rtol=1e-5, atol=1e-5)


def by_hand(q, k, v, indices, documents: Documents, cfg: LighthouseConfig):
    """A pyramid with a window, position by position: every sum is written out."""
    from lighthouse_kernels.pyramid.reference import pool

    batch, tokens, heads, dim = q.shape
    g, group = cfg.geometry(tokens), heads // k.shape[2]
    begins = torch.zeros(batch * tokens, dtype=torch.int64)
    for start, end in spans(documents):
        begins[start:end] = start
    rows_q, rows_k, rows_v = (pool(x, g) for x in (q, k, v))
    lasts = last_tokens(indices, g)
    outs = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            chosen, last = indices[b, h // group].tolist(), lasts[b, h // group].tolist()
            owner = [int(begins[b * tokens + min(t, tokens - 1)]) for t in last]
            place = {index: row for row, index in enumerate(chosen)}
            result = []
            for row, index in enumerate(chosen):
                seen = [c for r, c in enumerate(chosen[: row + 1]) if owner[r] == owner[row]]
                scores = rows_k[b, seen, h // group] @ rows_q[b, index, h] / dim**0.5
                result.append((scores.logsumexp(0), scores.softmax(0) @ rows_v[b, seen, h // group]))
            for t in range(tokens):
                begin = int(begins[b * tokens + t]) - b * tokens
                keys = slice(max(begin, t - cfg.window + 1), t + 1)
                scores = k[b, keys, h // group] @ q[b, t, h] / dim**0.5
                parts = [(scores.logsumexp(0), scores.softmax(0) @ v[b, keys, h // group])]
                for level in range(g.levels):
                    window = (t + 1) // g.window(level) - 1
                    if window >= 0 and window * g.window(level) >= begin:
                        row = place.get(g.offset(level) + window)
                        parts += [] if row is None else [result[row]]
                weights = torch.stack([lse for lse, _ in parts]).softmax(0)
                outs[b, t, h] = sum(w * out for w, (_, out) in zip(weights, parts, strict=True))
    return outs


@pytest.mark.parametrize("seed", range(3))
def test_a_pyramid_is_what_its_rule_says(seed):
    cfg = LighthouseConfig(pooling=2, levels=3, topk=8, tile_parents=4, window=5, scorer="random", backend="reference")
    documents = packing(seed + 30, 72, cfg.alignment, 2)
    *tensors, grad = inputs(2, 72, 4, 2, seed, dim=8)
    indices = select_indices(*tensors[:2], cfg, key=KEY)
    got = with_gradients(lambda *x: lighthouse_attention(*x, cfg, key=KEY, documents=documents), *tensors, grad)
    expected = with_gradients(lambda *x: by_hand(*x, indices.long(), documents, cfg), *tensors, grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_boundaries_of_entries_and_windows():
    g = Geometry(96, 2, 3, 8, 4)
    documents = Documents(torch.tensor([0, 8, 60, 96, 100, 192, 192], dtype=torch.int32), 92)
    cfg = LighthouseConfig(pooling=2, levels=3, topk=8, tile_parents=4, window=4, scorer="random")
    q, k, *_ = inputs(2, 96, 4, 2)
    indices = select_indices(q, k, cfg, key=KEY)
    found = of_entries(documents, indices, g)
    bounds, entries = found.starts.tolist(), indices.shape[2]
    # Of both KV heads, each with the rows of both sequences.
    assert len(bounds) == 6 * 2 + 1 and bounds == sorted(bounds) and bounds[-1] == 4 * entries
    first = torch.tensor(documents.starts.tolist())
    for row, last in enumerate(last_tokens(indices, g).transpose(0, 1).flatten().tolist()):
        head, sequence = row // (2 * entries), row // entries % 2
        token = sequence * 96 + min(last, 95)
        document = int(torch.searchsorted(first, token, right=True)) - 1
        assert bounds[head * 6 + document] <= row < bounds[head * 6 + document + 1]
    begins = of_windows(documents, 2, g)
    assert begins.dtype == torch.int32 and begins.shape == (2, g.windows(2))
    assert begins[0, :24].tolist() == [0, 0, *[8] * 13, *[60] * 9] and begins[1, :2].tolist() == [0, 4]


def test_what_the_kernels_are_told_of_the_longest_is_no_less():
    for seed in range(10):
        for name in ("random", "wide"):
            cfg = LighthouseConfig(**SETTINGS[name])
            tokens = 200 - 16 * (seed % 3)
            documents = packing(seed, tokens, cfg.alignment)
            q, k, *_ = inputs(1, tokens, 2, 1)
            for one in (
                of_entries(documents, select_indices(q, k, cfg, key=KEY), cfg.geometry(tokens)),
                cut(documents, 1, tokens, 30, q.device),
            ):
                assert one.starts.diff().max() <= one.longest <= 2 * tokens


@pytest.mark.parametrize(
    ("starts", "longest", "why"),
    [
        ([0, 8, 99], 100, "from 0 to"),
        ([4, 8, 100], 100, "from 0 to"),
        ([0, 16, 8, 100], 100, "from 0 to"),
        ([0, 8, 100], 91, "has 92 tokens"),
        ([0, 6, 100], 100, "no multiple of the 4 tokens that the attention method needs"),
    ],
)
def test_boundaries_that_cannot_be_are_refused(starts, longest, why):
    cfg = LighthouseConfig(**SETTINGS["random"])
    documents = Documents(torch.tensor(starts, dtype=torch.int32), longest)
    with pytest.raises(ValueError, match=why):
        lighthouse_attention(*inputs(1, 100, 2, 1)[:3], cfg, key=KEY, documents=documents)


def test_the_refusal_names_what_asks_for_the_alignment():
    from lighthouse_core.attention.documents import check_documents

    documents = Documents(torch.tensor([0, 16, 100], dtype=torch.int32), 100)
    check_documents(documents, 1, 100, 16, "of data.align")
    with pytest.raises(ValueError, match=r"begins at token 16 .* no multiple of the 32 tokens of data.align"):
        check_documents(documents, 1, 100, 32, "of data.align")


def test_more_documents_than_a_grid_has_blocks_are_refused():
    from lighthouse_core.attention.documents import check_count

    check_count("varlen", Documents(torch.zeros(65536, dtype=torch.int32), 1))
    with pytest.raises(ValueError, match="at most 65535 documents a call, not 65536"):
        check_count("varlen", Documents(torch.zeros(65537, dtype=torch.int32), 1))


def test_every_sequence_begins_a_document():
    documents = Documents(torch.tensor([0, 100, 200], dtype=torch.int32), 100)
    with pytest.raises(ValueError, match="begins at token 50"):
        dense_attention(*inputs(4, 50, 2, 1)[:3], documents=documents)
    with pytest.raises(ValueError, match="begins at token 50"):
        lighthouse_attention(
            *inputs(4, 50, 2, 1)[:3], LighthouseConfig(method="sliding", window=3), documents=documents
        )
    with pytest.raises(ValueError, match="int32"):
        lighthouse_attention(
            *inputs(1, 50, 2, 1)[:3],
            LighthouseConfig(method="sliding", window=3),
            documents=Documents(torch.tensor([0, 50]), 50),
        )


def test_a_method_that_cannot_says_so():
    documents = packing(1, 96, 4)
    cannot = []
    for name in METHODS:
        for window in (0, 16):
            try:
                cfg = LighthouseConfig(method=name, window=window, levels=2, topk=128, compression=2)
            except ValueError:
                continue
            if "documents" not in cfg.rule.can(cfg):
                cannot.append((name, window))
                with pytest.raises(ValueError, match="keeps no documents apart"):
                    lighthouse_attention(*inputs(1, 96, 2, 1)[:3], cfg, key=KEY, documents=documents)
    assert cannot == [("pyramid", 0), ("compressed", 16)]
    with pytest.raises(ValueError, match="cudnn"):
        dense_attention(*inputs(1, 96, 2, 1)[:3], backend="cudnn", documents=documents)


def decoder(settings: dict | None, tokens: int, head_dim: int = 8) -> Decoder:
    args = DecoderArgs(32, 2, 4, 2, head_dim, 64, 50, 10000.0, 1e-5, tokens)
    model = Decoder(args)
    with torch.no_grad():
        model.init_weights()
    if settings is not None:
        use_lighthouse(model, LighthouseConfig(backend="reference", **settings), ())
    return model


def positions(documents: Documents, shape: tuple[int, int]) -> torch.Tensor:
    return torch.cat([torch.arange(b - a, dtype=torch.int32) for a, b in spans(documents)]).view(shape)


@pytest.mark.parametrize("settings", [None, *(SETTINGS[name] for name in ("random", "sliding", "chunked"))], ids=str)
@pytest.mark.parametrize("rotate", ["before", "after"])
def test_the_loss_of_a_document_is_its_own(settings, rotate):
    if rotate == "after" and (settings or {}).get("levels") is None:
        pytest.skip("rotates pooled rows alone")
    settings = settings and settings | {"rotate": rotate}
    documents = packing(7, 200, 4)
    model = decoder(settings, 200)
    context = AttentionContext(
        key=selection_keys(0, 1, 0, 2), documents=documents, positions=positions(documents, (1, 200))
    )
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(50, (1, 200), generator=generator) for _ in range(2))
    start, end = spans(documents)[1]

    def losses(tokens):
        return cross_entropy(model(tokens, context=context).flatten(0, 1), labels.flatten(), reduction="none")

    other = tokens.clone()
    other[0, start:end] = torch.randint(50, (end - start,), generator=generator)
    before, after = losses(tokens), losses(other)
    assert torch.equal(before[:start], after[:start]) and torch.equal(before[end:], after[end:])
    assert not torch.equal(before[start:end], after[start:end])
    if settings is None or settings.get("method") == "sliding":
        alone = [model(tokens[:, a:b]).flatten(0, 1) for a, b in spans(documents)]
        alone = cross_entropy(torch.cat(alone), labels.flatten(), reduction="none")
        torch.testing.assert_close(before, alone, rtol=1e-5, atol=1e-5)


# tests/core/test_phases.py compiles a scorer that measures, with documents.
@pytest.mark.parametrize(
    "name", ["random", pytest.param("norm", marks=pytest.mark.slow), "sliding", "chunked", "dense"]
)
def test_compiled(name):
    """In one graph, and the same for other documents, windows and numbers of documents."""
    torch._dynamo.reset()
    tensors = inputs(1, 200, 4, 2)
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def call(q, k, v, cfg, documents):
        return lighthouse_attention(q, k, v, cfg, key=KEY, documents=documents)

    compiled = torch.compile(call, fullgraph=True, backend=count)
    for turn in range(4):
        settings = SETTINGS[name] | ({"window": 20 + 9 * turn} if name != "dense" else {})
        cfg = LighthouseConfig(backend="reference", dense_backend="math", **settings)
        documents = packing(turn, 200, 4)
        got = compiled(*tensors[:3], cfg, documents)
        torch.testing.assert_close(got, call(*tensors[:3], cfg, documents), rtol=1e-5, atol=1e-5)
    # One for the first, one for sizes that vary.
    assert graphs <= 3, graphs


def test_chunks_without_documents_compile_once_for_all_windows():
    torch._dynamo.reset()
    tensors = inputs(2, 200, 4, 2)
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(lighthouse_attention, fullgraph=True, backend=count)
    for window in (10, 20, 33, 50, 77, 120, 199):
        cfg = LighthouseConfig(method="chunked", window=window)
        torch.testing.assert_close(
            compiled(*tensors[:3], cfg), lighthouse_attention(*tensors[:3], cfg), rtol=1e-5, atol=1e-5
        )
    assert graphs <= 3, graphs


@pytest.mark.gpu
@pytest.mark.parametrize("dense_backend", GPU_KERNELS)
# tests/core/test_blocks.py has blocks, which other kernels attend to.
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "blocks"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_on_a_gpu(dense_backend, name, heads, monkeypatch):
    """In deterministic mode, 20 packings: not a bit depends on another document, and the output is plain PyTorch's."""
    kernel = KERNELS[dense_backend]
    if why_not := kernel.obstacle("cuda", torch.bfloat16, 64):
        pytest.skip(f"{kernel.label} {why_not}")
    try:
        cfg = LighthouseConfig(backend="triton", dense_backend=dense_backend, **SETTINGS[name])
    except ValueError as error:
        pytest.skip(str(error))
    # A selection of norms would depend on all tokens.
    torch.use_deterministic_algorithms(True)
    try:
        for seed in range(20):
            tokens = 4000 if seed % 2 else 4000 + 2 * 16
            documents = packing(seed, tokens, cfg.alignment, 1 + seed % 2)
            there = Documents(documents.starts.cuda(), documents.longest)
            tensors = [x.cuda().bfloat16() for x in inputs(1 + seed % 2, tokens, *heads, seed, dim=64)]
            key = KEY.cuda()
            given = {"indices": select_indices(*tensors[:2], cfg)} if name == "norm" else {}

            def call(q, k, v, there=there, key=key, given=given):
                return lighthouse_attention(q, k, v, cfg, key=key, documents=there, **given)

            last = len(spans(documents)) - 1
            check_isolated(call, tensors, documents, (last // 2, 0, last)[seed % 3])
            if seed > 5:
                continue
            plain = LighthouseConfig(backend="reference", dense_backend="math", **SETTINGS[name])

            def exactly(q, k, v, there=there, key=key, given=given, plain=plain):
                return lighthouse_attention(q, k, v, plain, key=key, documents=there, **given)

            wide = [x.float() for x in tensors]
            exact = with_gradients(exactly, *wide)
            usual = with_gradients(exactly, *tensors)
            for ours, lost, wanted in zip(with_gradients(call, *tensors), usual, exact, strict=True):
                error, allowed = ((x.float() - wanted).norm() / wanted.norm() for x in (ours, lost))
                assert error <= 4 * allowed + 1e-3, (seed, error, allowed)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "random", "sliding", "chunked"])
def test_the_loss_of_a_document_is_its_own_on_a_gpu(name):
    model = decoder(None, 2000, head_dim=64)
    angles = model.freqs_cis.cuda()
    model.cuda().bfloat16().freqs_cis = angles
    if name != "dense":
        use_lighthouse(model, LighthouseConfig(**SETTINGS[name]), ())
    generator = torch.Generator().manual_seed(0)
    torch.use_deterministic_algorithms(True)
    try:
        for seed in range(20):
            documents = packing(seed, 2000, 4)
            tokens, labels = (torch.randint(50, (1, 2000), generator=generator) for _ in range(2))
            found = spans(documents)
            start, end = found[len(found) // 2]
            other = tokens.clone()
            other[0, start:end] = torch.randint(50, (end - start,), generator=generator)
            context = AttentionContext(
                key=selection_keys(0, 1, 0, 2).cuda(),
                documents=documents.to("cuda"),
                positions=positions(documents, (1, 2000)).cuda(),
            )
            before, after = (
                cross_entropy(model(x.cuda(), context=context)[0].float(), labels[0].cuda(), reduction="none")
                for x in (tokens, other)
            )
            assert torch.equal(before[:start], after[:start]) and torch.equal(before[end:], after[end:]), seed
            assert not torch.equal(before[start:end], after[start:end])
    finally:
        torch.use_deterministic_algorithms(False)


def test_backends_know_what_they_are_given():
    assert {name for name, kernel in KERNELS.items() if kernel.packed is None} == {"cudnn", "flex"}
    assert kernels("reference", "cpu") is not None
