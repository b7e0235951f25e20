"""Sequences that processes share: attention calls, gradients and whole runs, against one process."""

import itertools
import logging
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import forked
import jobs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import succeed
from torch.utils._python_dispatch import TorchDispatchMode

from lighthouse_core import LighthouseConfig
from lighthouse_core.attention import backends
from lighthouse_core.attention.call import attend, log_choices
from lighthouse_core.attention.context import AttentionContext, Documents
from lighthouse_core.attention.heads import nearest_shares, shares_heads
from lighthouse_core.attention.module import DenseAttention, LighthouseAttention
from lighthouse_core.attention.sharing import by_heads
from lighthouse_core.config import load_recipe
from lighthouse_core.errors import RecipeError
from lighthouse_core.estimate import exchanged_bytes
from lighthouse_core.runs.run import Run
from lighthouse_kernels import reference

BATCH, TOKENS, DIM = 2, 128, 8
# Relative to the largest number of a tensor.
TOLERANCE = 1e-6


def _process(rank, world, store, function):
    torch.set_num_threads(1)
    on_gpus = torch.cuda.device_count() >= world
    if on_gpus:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    found = function()
    torch.distributed.destroy_process_group()
    return found


def on_processes(world, function, folder):
    """What `function` returns on each of so many processes, which form torch's default group."""
    store = folder / "store"
    found = forked.spawn(_process, world, store, function, count=world)
    store.unlink(missing_ok=True)
    return found


def pyramid(**settings):
    return LighthouseConfig(
        **{"pooling": 2, "levels": 3, "topk": 16, "tile_parents": 4, "dense_backend": "math", "backend": "reference"}
        | settings
    )


METHODS = {
    "dense": None,
    **{
        f"{scorer}-{window}-{'cover' if cover else 'parity'}": pyramid(
            scorer=scorer, window=window, cover_prefix=cover, score_block=8
        )
        for scorer, window, cover in itertools.product(("norm", "random", "block"), (0, 32), (True, False))
    },
    "dilated": pyramid(scorer="dilated"),
    "gla": pyramid(scorer="gla"),
    "rotated-after": pyramid(rotate="after", window=32),
    # Which no number of processes can have shards of: a window longer than a shard, and tiles that have padding.
    "long-window": pyramid(window=100),
    "padded": pyramid(topk=12),
    "chunked": pyramid(method="chunked", window=20),
    "chunked-shards": pyramid(method="chunked", window=8),
    "sliding": pyramid(method="sliding", window=20),
    **{
        f"blocks-{score}": pyramid(method="blocks", window=10, tile=4, block_size=4, blocks=3, block_score=score)
        for score in ("mean", "bound", "random")
    },
    "compressed": pyramid(method="compressed", window=16, compression=4),
    "compressed-norm": pyramid(method="compressed", window=16, compression=4, keep=2, score_block=8, scorer="norm"),
    "compressed-random": pyramid(method="compressed", window=16, compression=4, keep=2, score_block=8, scorer="random"),
}
DOCUMENTS = (
    "dense",
    "norm-32-cover",
    "block-32-parity",
    "rotated-after",
    "long-window",
    "chunked",
    "chunked-shards",
    "sliding",
    "blocks-mean",
    "blocks-random",
)
CASES = [*((name, False, False) for name in METHODS), *((name, True, False) for name in DOCUMENTS)]
CASES += [("norm-32-cover", False, True), ("norm-0-parity", False, True)]


def inputs(heads, kv_heads, tokens=TOKENS, dim=DIM):
    draw = torch.Generator().manual_seed(heads * 100 + kv_heads)
    q, out = (torch.randn(BATCH, tokens, heads, dim, generator=draw) for _ in range(2))
    k, v = (torch.randn(BATCH, tokens, kv_heads, dim, generator=draw) for _ in range(2))
    # Before a QK-norm they had other lengths.
    lengths = torch.rand(BATCH, tokens, heads, generator=draw), torch.rand(BATCH, tokens, kv_heads, generator=draw)
    return q, k, v, out, lengths


def packed(tokens=TOKENS):
    starts = [
        sequence * tokens + start for sequence in range(BATCH) for start in (0, 12, 40, 44, 100) if start < tokens
    ]
    return Documents(torch.tensor([*starts, BATCH * tokens], dtype=torch.int32), tokens)


class Selections:
    """What the selections of the reference are, while it is watched."""

    def __enter__(self):
        self.seen, self.original = [], reference.given
        reference.given = lambda indices, g: (self.seen.append(indices), self.original(indices, g))[1]
        return self.seen

    def __exit__(self, *unused):
        reference.given = self.original


def shards(cfg, tokens, count):
    """Whether processes select from their own tokens alone."""
    return count > 1 and cfg is not None and cfg.rule.whole(cfg, tokens, count) is None


def of_whole(indices, g):
    """Indices of a shard as those of the whole sequence."""
    whole = replace(g, tokens=g.whole, first=0, whole=0)
    found = torch.zeros_like(indices)
    for level in range(g.levels):
        place = indices - g.offset(level)
        inside = (place >= 0) & (place < g.windows(level))
        found = torch.where(inside, whole.offset(level) + g.first // g.window(level) + place, found)
    return found


def attended(cfg, heads, kv_heads, documents, scored, tokens=TOKENS, group=None, forced=False):
    """Of a process's tokens the output and the gradients; and the indices of its heads, [B, heads, S], or of its shard,
    [B, Hkv, S / R], or None.

    `forced` has the processes exchange all tokens where gathered rows would do.
    """
    q, k, v, grad, lengths = inputs(heads, kv_heads, tokens)
    count, rank = (1, 0) if group is None else (group.size(), group.rank())
    first, last = rank * tokens // count, (rank + 1) * tokens // count
    leaves = [x[:, first:last].clone().requires_grad_() for x in (q, k, v)]
    layer = DenseAttention("math") if cfg is None else LighthouseAttention(cfg)
    context = AttentionContext(
        key=torch.tensor([3, 5, 7, 11]),
        documents=packed(tokens) if documents else None,
        group=group,
        first_position=first,
    )
    more = {"scores": tuple(x[:, first:last] for x in lengths)} if scored else {}
    if layer.rotates(context):
        angles = torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.125])
        more["rotary"] = torch.stack((angles.cos(), angles.sin()), -1)
    with Selections() as seen:
        if forced:

            def call(q, k, v, context, scores):
                return attend(
                    q, k, v, cfg, context, scores=scores, **{name: more[name] for name in more if name == "rotary"}
                )

            out = by_heads(call, *leaves, context, more.get("scores"))
        else:
            out = layer(*leaves, context, **more)
    out.backward(grad[:, first:last])
    indices = seen[0] if seen else None
    if indices is not None and shards(cfg, tokens, count) and not forced:
        indices = of_whole(indices, cfg.geometry(tokens).shard(rank, count))
    return [out.detach(), *(x.grad for x in leaves)], indices


def all_cases(cases):
    group = torch.distributed.group.WORLD
    return [attended(**case, group=group) for case in cases]


def check(cases, found):
    """Indices are those of one process, and outputs and gradients nearly so; `found` is of each process."""
    for case, parts in zip(cases, zip(*found, strict=True), strict=True):
        whole, indices = attended(**case | {"forced": False})
        for ours, theirs in zip(zip(*(part[0] for part in parts), strict=True), whole, strict=True):
            error = (torch.cat(ours, 1) - theirs).abs().max() / theirs.abs().max()
            assert error <= TOLERANCE, (case, float(error))
        if indices is not None:
            # Of all heads in each shard, or of all entries for some heads.
            own = shards(case["cfg"], case.get("tokens", TOKENS), len(found)) and not case.get("forced")
            got = torch.cat([part[1] for part in parts], 2 if own else 1)
            copies = 1 if own else max(1, len(found) // case["kv_heads"])
            assert torch.equal(got, indices.repeat_interleave(copies, 1)), case


def matrix(shapes):
    """Every method, with and without documents and scores from before a QK-norm where it can, with so many heads; where
    rows are exchanged, all tokens, too."""
    return [
        {"cfg": METHODS[name], "heads": heads, "kv_heads": kv_heads, "documents": documents, "scored": scored, **more}
        for (name, documents, scored), (heads, kv_heads) in itertools.product(CASES, shapes)
        for more in ({}, {"forced": True})[: 1 + (shards(METHODS[name], TOKENS, 2) and kv_heads == shapes[-1][1])]
    ]


# KV heads are more than, as many as, and fewer than the processes.
TWO, FOUR = ([(4, 4), (4, 2), (4, 1)], [(8, 8), (4, 4), (8, 2), (4, 1)])
SENT = [
    {
        "cfg": METHODS[name],
        "heads": heads,
        "kv_heads": kv_heads,
        "documents": documents,
        "scored": False,
        "forced": forced,
    }
    for name, heads, kv_heads, documents, forced in (
        ("dense", 8, 4, False, False),
        ("chunked", 4, 1, False, False),
        ("block-32-cover", 8, 2, False, True),
        ("block-32-cover", 8, 2, False, False),
        ("block-32-parity", 8, 2, True, False),
        ("norm-0-cover", 4, 4, False, False),
        ("sliding", 4, 2, True, False),
        ("chunked-shards", 4, 2, True, False),
    )
]


class Sent(TorchDispatchMode):
    """Bytes that this process sends to others by all-to-all, and names of other collectives."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.bytes, self.others = rank, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name.startswith("all_to_all_single"):
            parts = args[2]
            self.bytes += args[0].nbytes * (sum(parts) - parts[self.rank]) // sum(parts)
        elif "c10d" in function.namespace and "wait" not in name and "wrap" not in name:
            self.others.add(name)
        return function(*args, **(kwargs or {}))


def growing(group):
    """By method: the windows with which a layer is compiled anew whose window changes in every call, and how far its
    outputs and gradients are from those of eager calls, relative to the largest."""
    found = {}
    for method in ("sliding", "chunked"):
        graphs, anew, errors = [], [], []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        layer = LighthouseAttention(pyramid(method=method, window=8))
        layer.compile(backend=backend, fullgraph=True)
        *rows, grad, _ = inputs(4, 2, TOKENS)
        own = slice(first := group.rank() * TOKENS // group.size(), first + TOKENS // group.size())
        # Not all of them fill the shares.
        for window in (8, 16, 20, 24, 28, 32):
            context = AttentionContext(
                settings=pyramid(method=method, window=window), group=group, first_position=first
            )
            both, before = [], len(graphs)
            for call in (layer, layer.forward):
                leaves = [x[:, own].clone().requires_grad_() for x in rows]
                out = call(*leaves, context)
                out.backward(grad[:, own])
                both.append([out.detach(), *(x.grad for x in leaves)])
            anew += [window] * (len(graphs) - before)
            errors += [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*both, strict=True)]
        found[method] = (anew, max(errors))
    return found


def everything(cases):
    """On one process of those that are compared with one alone: calls, the bytes of some, and what is refused."""
    group = torch.distributed.group.WORLD
    sent = []
    for case in SENT:
        with Sent(group.rank()) as found:
            attended(**case, group=group)
        sent.append((found.bytes, found.others))
    x = torch.zeros(1, 4, group.size() + 1, DIM)
    with pytest.raises(ValueError) as refused:
        DenseAttention("math")(x, x, x, AttentionContext(group=group))
    return [attended(**case, group=group) for case in cases], sent, str(refused.value), growing(group)


@pytest.mark.parametrize(("world", "shapes"), [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.slow)])
def test_processes_select_and_attend_as_one(tmp_path, world, shapes):
    """A layer sends, forward and backward, what is estimated."""
    calls, sent, refused, grown = zip(*on_processes(world, partial(everything, matrix(shapes)), tmp_path), strict=True)
    check(matrix(shapes), calls)
    for case, counts in zip(SENT, zip(*sent, strict=True), strict=True):
        sizes = [f"model.{name}={case[name]}" for name in ("heads", "kv_heads")] + [f"model.head_dim={DIM}"]
        batch = [f"training.seq_len={TOKENS}", f"training.local_batch_size={BATCH}", 'training.dtype="float32"']
        more = [f"parallel.context={world}", f"model.dim={DIM * case['heads']}"]
        cfg = case["cfg"]
        rows = shards(cfg, TOKENS, world) and not case["forced"]
        if rows:
            names = ("pooling", "levels", "topk", "tile_parents", "window")
            more += [f"lighthouse.{name}={getattr(cfg, name)}" for name in names]
            more += [f'lighthouse.{name}="{getattr(cfg, name)}"' for name in ("scorer", "method")]
        else:
            more += ["lighthouse.enabled=false"]
        bytes_sent = 2 * exchanged_bytes(load_recipe(jobs.RECIPE, [*sizes, *batch, *more]), dense=not rows)
        if rows and cfg.pools:
            # Integers, forward alone: which entries of the shard before serve this one, and where each entry ends.
            g = cfg.geometry(TOKENS)
            bytes_sent += 4 * BATCH * case["kv_heads"] * (g.levels - 1)
            heads = max(case["kv_heads"], world) // world
            bytes_sent += 4 * (world - 1) * BATCH * g.gathered_length // world * heads * case["documents"]
        assert list(counts) == [(bytes_sent, set())] * world
        assert (bytes_sent > 0) == (cfg is not METHODS["chunked-shards"])
    for found in grown:
        # As a constant, then as a number that may vary; chunks that do not fill the shares; a window as long as one.
        whole = [TOKENS // world] if world == 4 else []
        assert (found["sliding"][0], found["chunked"][0]) == ([8, 16, *whole], [8, 16, 20, *whole])
        assert max(error for anew, error in found.values()) <= TOLERANCE
    heads = world + 1
    assert set(refused) == {f"{world} processes cannot share out {heads} query heads and {heads} key/value heads"}


def test_four_processes_select_and_attend_as_one(tmp_path):
    """A handful of the slow cases, all on the same processes: one KV head and several, shards of a window, documents,
    and heads alone."""
    cases = [
        {"cfg": METHODS[name], "heads": heads, "kv_heads": kv_heads, "documents": documents, "scored": False}
        for name, heads, kv_heads, documents in (
            ("dense", 4, 1, True),
            ("norm-0-cover", 4, 1, False),
            ("norm-32-cover", 4, 1, True),
            ("block-32-parity", 8, 2, True),
            ("rotated-after", 4, 4, True),
            ("long-window", 4, 1, False),
            ("chunked", 4, 1, True),
        )
    ]
    assert sum(shards(case["cfg"], TOKENS, 4) for case in cases) == 4
    check(cases, on_processes(4, partial(all_cases, cases), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_any_shape_is_attended_to_as_by_one_process(tmp_path, world):
    """Of drawn shapes, all on the same processes, which take longer to start than to attend."""
    cases = []

    @settings(max_examples=100)
    @given(st.data())
    def draw(data):
        kv_heads = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
        heads = kv_heads * data.draw(st.integers(1, 4))
        name, documents, scored = data.draw(st.sampled_from(CASES))
        tokens = world * data.draw(st.integers(23, 80))
        if documents or data.draw(st.booleans()):
            # Documents begin at multiples of the coarsest window. Shards may be whole tiles.
            unit = data.draw(st.sampled_from([4, 16])) * world
            tokens = -(-tokens // unit) * unit
        if shares_heads(heads, kv_heads, world):
            cases.append(
                {
                    "cfg": METHODS[name],
                    "heads": heads,
                    "kv_heads": kv_heads,
                    "documents": documents,
                    "scored": scored,
                    "tokens": tokens,
                }
            )

    draw()
    assert len(cases) > 20 and sum(shards(case["cfg"], case["tokens"], world) for case in cases) > 10
    check(cases, on_processes(world, partial(all_cases, cases), tmp_path))


@pytest.mark.parametrize(
    ("settings", "tokens", "processes", "why"),
    [
        ({}, 128, 4, None),
        ({"window": 32}, 128, 4, None),
        ({"window": 33}, 128, 4, "the window is longer than a share of 32 tokens"),
        ({}, 128, 8, "8 processes cannot share out 4 tiles (topk / tile_parents)"),
        ({}, 120, 2, "the tiles end at 128 tokens"),
        ({"scorer": "gla"}, 128, 2, "the scorer gla scores a token by others"),
        ({"topk": 32}, 128, 2, "the call is dense"),
        ({"method": "chunked", "window": 8}, 128, 2, None),
        ({"method": "chunked", "window": 20}, 128, 2, "chunks do not fill a share of 64 tokens"),
        ({"method": "sliding", "window": 64}, 128, 2, None),
        ({"method": "sliding", "window": 65}, 128, 2, "the window is longer than a share of 64 tokens"),
        (
            {"method": "compressed", "window": 8, "compression": 4},
            128,
            2,
            "the method compressed attends to all tokens",
        ),
    ],
)
def test_when_processes_exchange_rows(settings, tokens, processes, why, caplog, monkeypatch):
    """By what is the same on all of them; the log says why they do not, once."""
    cfg = pyramid(**settings)
    assert cfg.rule.whole(cfg, tokens, processes) == why
    monkeypatch.setattr(backends, "_logged", set())
    caplog.set_level(logging.INFO)
    log_choices(cfg, "cpu", torch.float32, 8, pooled=True, shared=(tokens, processes))
    said = [text for text in caplog.messages if "exchanged" in text]
    assert said == ([] if why is None else [f"shared sequences: all {tokens} tokens are exchanged: {why}"])


def test_a_recipe_names_the_nearest_number_of_processes():
    shapes = ["model.dim=48", "model.heads=6", "model.kv_heads=2", "model.head_dim=8"]
    load_recipe(jobs.RECIPE, [*shapes, "parallel.context=2"])
    with pytest.raises(RecipeError, match=r"context \(4\) must divide model.heads \(6\), .*kv_heads \(2\); .* 2 or 6"):
        load_recipe(jobs.RECIPE, [*shapes, "parallel.context=4"])
    with pytest.raises(RecipeError, match=r"parallel.context \(3\) must divide training.seq_len \(512\)"):
        load_recipe(jobs.RECIPE, [*shapes, "parallel.context=3", "training.seq_len=512"])
    assert nearest_shares(8, 2, 3) == [2, 4] and nearest_shares(6, 2, 4) == [2, 6] and nearest_shares(4, 4, 9) == [4]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    jobs.write_texts(folder / "texts.jsonl")
    return folder


TINY = [
    *(setting for setting in jobs.TINY if not setting.startswith(("model.heads", "model.kv_heads"))),
    *(
        "model.heads=4",
        "model.kv_heads=2",
        "model.head_dim=16",
        'data.packing="documents"',
        'data.source="files"',
        'data.paths=["texts.jsonl"]',
    ),
    *(
        "data.validation=0.2",
        "lighthouse.window=32",
        "training.steps=4",
        "lighthouse.phases=[{share=3}, {enabled=false}]",
    ),
    # Four tiles, and so shards of whole ones.
    "lighthouse.tile_parents=4",
    *("training.deterministic=true", "checkpoint.interval=2", "checkpoint.keep=0", "metrics.tensorboard=false"),
]
FIGURES = ("loss", "grad_norm", "val_loss", "flops_per_token", "dense_flops_per_token")


def pretrain(workspace: Path, name: str, processes: int, *settings: str, more: tuple[str, ...] = ()) -> Path:
    options = [*jobs.options(*TINY, *settings), "--nproc", str(processes), *more]
    # Inductor takes minutes on a CPU, and starts processes of its own: it has the real command.
    command = partial(jobs.succeed, seconds=900) if name == "inductor" else succeed
    command("pretrain", str(jobs.RECIPE), "--name", name, *options, cwd=workspace)
    return workspace / "runs" / name


def check_rows(found: Path, expected: Path, figures=FIGURES):
    for key in figures:
        ours, theirs = jobs.rows(found, key), jobs.rows(expected, key)
        assert ours.keys() == theirs.keys() and ours
        for step, row in ours.items():
            assert row[key] == pytest.approx(theirs[step][key], rel=1e-5), (key, step)


@pytest.fixture(scope="module")
def one(workspace):
    return pretrain(workspace, "one", 1)


COMPILED = [
    "training.compile=true",
    'training.activation_checkpointing="selective"',
    'titan.compile.backend="aot_eager"',
]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([], id="eager"),
        pytest.param(COMPILED, id="compiled", marks=pytest.mark.slow),
        # Inductor orders the exchanges of a graph, on each process by itself.
        pytest.param(COMPILED[:-1], id="inductor", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_on_shared_sequences_as_one_does(workspace, one, settings, request):
    """Documents, dense layers, a dense step and a validation are among it."""
    name = request.node.callspec.id
    two = pretrain(workspace, name, 2, "parallel.context=2", *settings, more=("--measure-dense",))
    check_rows(two, one)
    stage = Run(two).ledger["stages"][0]
    assert stage["conditions"]["context"] == 2 and stage["measured_dense"]["seconds"] > 0
    ours, theirs = (jobs.load(run / "checkpoints/step-4") for run in (two, one))
    weights = [place for place in ours if place.startswith(("layers", "output", "tok_embeddings"))]
    assert len(weights) > 10
    for place in weights:
        torch.testing.assert_close(ours[place], theirs[place], rtol=0, atol=2e-6)


BLOCKS = [
    *("model.kv_heads=1", 'lighthouse.method="blocks"', "lighthouse.window=20"),
    *("lighthouse.tile=16", "lighthouse.block_size=8", "lighthouse.blocks=3"),
]


@pytest.fixture(scope="module")
def blocks(workspace):
    return pretrain(workspace, "blocks", 1, *BLOCKS)


def test_a_training_with_blocks(blocks):
    rows = jobs.rows(blocks)
    assert [rows[step]["stage"] for step in (1, 2, 4)] == ["lighthouse"] * 3
    # The last step is of a dense phase.
    assert rows[4]["loss"] < rows[1]["loss"] and rows[2]["flops_per_token"] < rows[4]["flops_per_token"]
    assert rows[4]["flops_per_token"] == rows[4]["dense_flops_per_token"]


@pytest.mark.slow
def test_blocks_train_on_two_processes_as_on_one(workspace, blocks):
    """They share the query heads of a KV head, and so the choice; compiled and recomputed."""
    check_rows(pretrain(workspace, "two-blocks", 2, *BLOCKS, "parallel.context=2", *COMPILED), blocks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kv_heads", "steps"),
    [
        # Of windows with nearly equal scores the last bit of the weights decides. Small steps keep the weights alike.
        (['lighthouse.scorer="norm"', "optimizer.lr=1e-4"], 1, 20),
        (['lighthouse.scorer="random"'], 1, 20),
        (['lighthouse.scorer="block"', "lighthouse.window=0", 'data.packing="concat"'], 2, 20),
        (['lighthouse.method="chunked"', "lighthouse.phases=[{window=32}, {window=128}]"], 4, 20),
        (["lighthouse.enabled=false"], 2, 20),
        (['lighthouse.method="sliding"', "lighthouse.window=64"], 2, 20),
        (
            ['lighthouse.method="compressed"', "lighthouse.window=64", "lighthouse.keep=2", 'data.packing="concat"'],
            1,
            20,
        ),
        (
            [
                'lighthouse.scorer="random"',
                "lighthouse.cover_prefix=false",
                "lighthouse.window=0",
                'data.packing="concat"',
            ],
            4,
            20,
        ),
    ],
    ids=["norm", "random", "block", "growing", "dense", "sliding", "compressed", "uncovered"],
)
def test_losses_of_many_steps(workspace, method, kv_heads, steps, request):
    """Of 1, 2 and 4 processes, which share sequences by two and by four, beside replicas and shards."""
    common = [*method, f"model.kv_heads={kv_heads}", f"training.steps={steps}", f"checkpoint.interval={steps}"]
    name = request.node.callspec.id
    one = pretrain(workspace, f"{name}-1", 1, *common)
    for place, (processes, more) in {
        "2": (2, ["parallel.context=2", 'training.activation_checkpointing="full"']),
        "4": (4, ["parallel.context=4", "training.local_batch_size=2"]),
        "2x2": (4, ["parallel.context=2", "training.local_batch_size=1"]),
        "2x2r": (4, ["parallel.context=2", "parallel.replicate=2", "training.local_batch_size=1"]),
    }.items():
        found = pretrain(workspace, f"{name}-{place}", processes, *common, *more)
        check_rows(found, one, ("loss", "grad_norm", "val_loss"))


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes(workspace, one):
    """Two steps on one process, two on four that share sequences, then a recovery on two."""
    expected, moved = (workspace / "runs" / name for name in ("whole", "moved"))
    for run in (expected, moved):
        shutil.copytree(one, run)
    shutil.rmtree(moved / "checkpoints/step-4")
    succeed("pretrain", "--resume", "moved", "--nproc", "4", "--set", "parallel.context=4", cwd=workspace)
    check_rows(moved, one)
    recovery = jobs.options("recover.steps=2")
    succeed("recover", "whole", "--nproc", "1", *recovery, cwd=workspace)
    succeed("recover", "moved", "--nproc", "2", *recovery, "--set", "parallel.context=2", cwd=workspace)
    check_rows(moved, expected)
    assert jobs.rows(moved)[6]["stage"] == "dense"


def on_gpus(cases):
    """Outputs and gradients [whole, shared] of calls in bfloat16 by the kernels of a GPU, compiled."""
    group, found = torch.distributed.group.WORLD, []
    for cfg, heads, kv_heads in cases:
        q, k, v, grad, _ = (
            x.cuda().bfloat16() if isinstance(x, torch.Tensor) else x for x in inputs(heads, kv_heads, 2048, 64)
        )
        layer = DenseAttention() if cfg is None else LighthouseAttention(cfg)
        context = AttentionContext(key=torch.tensor([3, 5, 7, 11], device="cuda"))
        results = []
        for shared in (False, True):
            own = slice(None)
            if shared:
                own = slice(group.rank() * 2048 // group.size(), (group.rank() + 1) * 2048 // group.size())
                context = AttentionContext(key=context.key, group=group, first_position=own.start)
            leaves = [x[:, own].clone().requires_grad_() for x in (q, k, v)]
            out = torch.compile(layer, fullgraph=True)(*leaves, context)
            out.backward(grad[:, own])
            results.append([out.detach(), *(x.grad for x in leaves)])
        first = group.rank() * 2048 // group.size()
        last = first + 2048 // group.size()
        found.append([(theirs[:, first:last].cpu(), ours.cpu()) for theirs, ours in zip(*results, strict=True)])
    return found


@pytest.mark.gpu
def test_gpus_attend_as_one(tmp_path):
    world = torch.cuda.device_count()
    if world < 2:
        pytest.skip("needs several GPUs")
    large = {"pooling": 4, "topk": 128, "tile_parents": 128, "backend": "auto", "dense_backend": "auto"}
    cases = [
        (cfg, heads, kv_heads)
        for cfg in (
            None,
            pyramid(**large),
            pyramid(**large, scorer="block", score_block=64, window=64),
            # Eight tiles, and so shards of whole ones.
            pyramid(**large | {"tile_parents": 16}),
            pyramid(**large | {"tile_parents": 16}, scorer="block", score_block=64, window=64),
            pyramid(method="chunked", window=512, dense_backend="auto"),
        )
        for heads, kv_heads in ((2 * world, 2 * world), (2 * world, 1))
    ]
    for parts in on_processes(world, partial(on_gpus, cases), tmp_path):
        for case, tensors in zip(cases, parts, strict=True):
            for number, (theirs, ours) in enumerate(tensors):
                # An output is the same call of the same kernel, but for a window beside shards. Gradients add up
                # in bfloat16 of a KV head's copies, and of the rows at the edge of a shard.
                exact = number < 2 or case[2] > 1
                if shards(case[0], 2048, world):
                    exact = number == 0 and not case[0].window
                limit = 0 if exact else 2**-7 * theirs.abs().max()
                assert (ours.float() - theirs.float()).abs().max() <= limit, (case, number)
