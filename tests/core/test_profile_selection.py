"""What is said of a selection, where the selection is known."""

import json
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lighthouse_core import LighthouseConfig, select_indices
from lighthouse_core.attention.backends import window_scores
from lighthouse_core.config import loads_recipe
from lighthouse_core.errors import UserError
from lighthouse_core.evaluate import Text
from lighthouse_core.profile import selection
from lighthouse_core.profile.selection import finest_levels, kept_by_both, parent_overlap, selection_view
from lighthouse_core.profile.selection_figure import draw
from lighthouse_core.runs.create import create_run
from lighthouse_core.seal import seal

EXAMPLE = LighthouseConfig(pooling=4, levels=3, topk=2, tile_parents=2, cover_prefix=False, backend="reference")
RECIPE = """
[model]
dim = 8
layers = 3
heads = 4
kv_heads = 2
head_dim = 4
ffn_dim = 8
vocab_size = 258
dense_layers = [1]
[lighthouse]
pooling = 4
levels = 3
topk = 2
tile_parents = 2
cover_prefix = false
[data]
source = "files"
validation = 0.5
packing = "concat"
[training]
seq_len = 64
global_batch_size = 1
steps = 30
[optimizer]
lr = 1e-3
"""
LETTERS = "QKZ"


def one_hot(tokens, length=64):
    """Token scores [1, N, 1]."""
    return torch.zeros(1, length, 1).index_fill_(1, torch.tensor(tokens), 1.0)


def drawn(cfg, tokens, seed, heads=2):
    """A selection by independent scores of the tokens, and these by window."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.rand(2, 1, tokens, heads, generator=generator)
    g = cfg.geometry(tokens)
    scores = window_scores((q, k), (1, tokens, heads), heads, g)
    return select_indices(q[..., None], k[..., None], cfg, scores=(q, k)), scores, g


def test_the_worked_example():
    """Parents (2,0) and (2,1), then (1,1) and (1,5)."""
    q = torch.zeros(1, 64, 1, 2)
    scores = one_hot([5]), one_hot([21])
    indices = select_indices(q, q, EXAMPLE, scores=scores)
    finest = finest_levels(indices, EXAMPLE.geometry(64))
    expected = [1] * 4 + [0] * 4 + [1] * 12 + [0] * 4 + [1] * 8 + [2] * 32
    assert finest.tolist() == [[expected]]


@pytest.mark.parametrize("tokens", [150, 192, 201, 320])
@pytest.mark.parametrize(("pooling", "levels"), [(2, 2), (2, 4), (4, 3)])
def test_a_kept_window_covers_its_tokens(tokens, pooling, levels):
    cfg = LighthouseConfig(pooling=pooling, levels=levels, topk=8, tile_parents=4, backend="reference")
    indices, _, g = drawn(cfg, tokens, seed=tokens)
    level_of = [(level, i) for level in range(levels) for i in range(g.windows(level))]
    for head in range(2):
        expected = [levels] * tokens
        for level, i in (level_of[x] for x in indices[0, head].tolist()):
            for token in range(i * g.window(level), min(tokens, (i + 1) * g.window(level))):
                expected[token] = min(expected[token], level)
        assert finest_levels(indices, g)[0, head].tolist() == expected and max(expected) < levels
    if tokens % (g.window(levels - 1) * g.tiles) == 0 and g.padded == tokens:
        assert (finest_levels(indices, g) == 0).sum(-1).tolist() == [[pooling * 8] * 2]


@pytest.mark.parametrize("tokens", [192, 201])
def test_overlap_of_scores_that_coincide_and_of_opposite_ones(tokens):
    cfg = LighthouseConfig(pooling=2, levels=3, topk=16, tile_parents=8, backend="reference")
    indices, (s, _), g = drawn(cfg, tokens, seed=0)
    share, chance = parent_overlap(indices, (s, s), g)
    assert share.tolist() == [[[1.0, 1.0]] * 2]
    assert ((chance > 0.15) & (chance < 0.3)).all()
    # Tiles have so many more candidates than they choose that the largest are never the smallest.
    opposite = torch.where(s >= 0, 1 - s, s)
    assert parent_overlap(indices, (s, opposite), g)[0].tolist() == [[[0.0, 0.0]] * 2]


def test_overlap_counts_what_both_would_choose():
    cfg = LighthouseConfig(pooling=2, levels=2, topk=8, tile_parents=8, backend="reference")
    q = torch.zeros(1, 64, 1, 2)
    # Windows of two tokens: 4 of 32 by each.
    scores = one_hot([0, 10, 20, 30]), one_hot([1, 10, 21, 40])
    indices = select_indices(q, q, cfg, scores=scores)
    share, chance = parent_overlap(indices, window_scores(scores, (1, 64, 1), 1, cfg.geometry(64)), cfg.geometry(64))
    assert (share.item(), chance.item()) == (0.75, 4 / 32)


def test_padding_is_no_choice():
    """Tiles of 8 windows: 14 whole ones, one with a window and padding, and one of padding alone."""
    cfg = LighthouseConfig(pooling=4, levels=2, topk=64, tile_parents=4, backend="reference")
    indices, (s, _), g = drawn(cfg, 451, seed=3)
    assert parent_overlap(indices, (s, s), g)[0].tolist() == [[[1.0]] * 2]
    share, chance = parent_overlap(indices, (s, torch.where(s >= 0, 1 - s, s)), g)
    # The one window there is is everyone's choice.
    torch.testing.assert_close(share, torch.full((1, 2, 1), 1 / 15))
    torch.testing.assert_close(chance, torch.full((1, 2, 1), (14 * 2 / 8 + 1) / 15))


def test_overlap_of_independent_scores_is_that_of_chance():
    cfg = LighthouseConfig(pooling=2, levels=3, topk=128, tile_parents=16, backend="reference")
    indices, (_, s_key), g = drawn(cfg, 4096, seed=1, heads=8)
    _, (_, other), _ = drawn(cfg, 4096, seed=2, heads=8)
    share, chance = parent_overlap(indices, (s_key, other), g)
    # A tile has 128 windows of 4 tokens, then 32 of 2; two independent choices of 8 among them.
    assert chance.tolist() == [[[0.25, 0.0625]] * 8]
    assert (share.mean((0, 1)) - chance.mean((0, 1))).abs().max() < 0.05


@pytest.mark.parametrize("tokens", [512, 509])
def test_drift(tokens):
    cfg = LighthouseConfig(pooling=2, levels=3, topk=32, tile_parents=4, cover_prefix=False, backend="reference")
    (before, _, g), (after, _, _) = (drawn(cfg, tokens, seed, heads=32) for seed in (1, 2))
    assert kept_by_both(before, before, g).tolist() == [[1.0] * 32]
    assert kept_by_both(before, after, g).mean().item() == pytest.approx(64 / tokens, abs=0.02)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a run with these settings, and a checkpoint for each of these queries' and keys' letters by step."""
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / f"text/{number}.txt").write_text(f"{number:02}. " + "abcdefgh" * 100)
    monkeypatch.chdir(tmp_path)

    def make(checkpoints, *settings):
        overrides = (f'data.paths=["{tmp_path}/text/*.txt"]', *settings)
        run = create_run(loads_recipe(RECIPE, overrides), "tiny", "tiny")
        for step, (query, key) in checkpoints.items():
            state = weights(run.recipe.model, query, key)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.save(state, checkpoint_id=run.checkpoint_dir(step), no_dist=True)
            seal(run.checkpoint_dir(step))
        return run

    return make


def weights(model, query, key):
    """Every layer passes on what it gets; queries are long at the one letter, and keys at the other."""
    state = {
        entry.source: torch.ones(entry.shape) if "norm" in entry.source else torch.zeros(entry.shape)
        for entry in model.kind.entries(model)
    }
    state["tok_embeddings.weight"][:, 7] = 1.0
    # Short ones, which a norm of each head would make as long as the others.
    state["tok_embeddings.weight"][:, :2] = 0.1
    for column, letter in enumerate((query, key)):
        state["tok_embeddings.weight"][ord(letter), column] = 1.0
    for layer in range(model.layers):
        # Of two query heads, one.
        state[f"layers.{layer}.attention.wq.weight"][:: 2 * model.head_dim, 0] = 1.0
        state[f"layers.{layer}.attention.wk.weight"][:: model.head_dim, 1] = 1.0
    return state


@pytest.fixture
def lettered(monkeypatch):
    """Text with Q at 5, K at 21 and Z at 45."""
    asked = []

    def text(data, subject, tokens, sequences, align):
        asked.append((tokens, sequences))
        row = torch.full((tokens,), ord("a"))
        row[torch.tensor([5, 21, 45])] = torch.tensor([ord(letter) for letter in LETTERS])
        return Text(row.repeat(sequences, 1))

    monkeypatch.setattr(selection, "held_out", text)
    return asked


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_run_of_which_all_is_known(make, lettered, family):
    """The worked example; then keys are long at 45, so that (2,2) and (1,11) take the place of (2,1) and (1,5)."""
    run = make({10: "QK", 20: "QZ", 30: "QZ"}, f'model.family="{family}"')
    view = selection_view(run.checkpoint_dir(10), sequences=1, bins=4)
    assert lettered == [(64, 2)]
    assert (view.run, view.step, view.tokens, view.gathered_length, view.sequences) == ("tiny", 10, 64, 20, 1)
    assert (view.layers, view.kv_heads, view.levels, view.topk) == ([0, 2], 2, 3, 2)
    assert view.coverage == [[[8 / 64, 24 / 64, 32 / 64]] * 2] * 2 and view.level_0 == [[0.125] * 2] * 2
    assert view.density == [[[0.25, 0.25, 0, 0]] * 2] * 2
    nothing = [[0.0] * 2] * 2
    assert view.overlap == [
        {"level": 1, "share": nothing, "chance": 1 / 8},
        {"level": 2, "share": nothing, "chance": 1 / 4},
    ]
    assert view.drift is None and list(view.notes) == ["text", "drift"]

    view = selection_view(run.path, sequences=3, bins=5)
    assert view.step == 30 and list(view.notes) == ["text"]
    assert view.drift == [
        {"first": 10, "last": 20, "share": [[0.5] * 2] * 2, "chance": 8 / 64},
        {"first": 20, "last": 30, "share": [[1.0] * 2] * 2, "chance": 8 / 64},
    ]
    # Parts of 13 tokens but for the last: 4 to 7 and 44 to 47 are kept.
    assert view.density[0][0] == pytest.approx([4 / 13, 0, 0, 4 / 13, 0], abs=1e-7)


def test_queries_and_keys_that_are_long_together(make, lettered):
    view = selection_view(make({10: "QQ"}).path)
    assert [level["share"] for level in view.overlap] == [[[1.0] * 2] * 2] * 2


@pytest.mark.parametrize("scorer", ["random", "block"])
def test_scores_by_chance(make, scorer):
    settings = ["training.seq_len=512", "lighthouse.pooling=2", "lighthouse.topk=32", "lighthouse.score_block=4"]
    view = selection_view(make({10: "QK", 20: "QK"}, f'lighthouse.scorer="{scorer}"', *settings).path, sequences=8)
    assert view.overlap is None and "same scores" in view.notes["overlap"] and "by construction" in view.notes["drift"]
    shares = torch.tensor(view.level_0)
    assert torch.equal(shares, torch.full((2, 2), 2 * 32 / 512))
    (pair,) = view.drift
    assert pair["chance"] == 0.125
    # No two heads, layers, sequences or steps have the same: 32 pairs.
    assert torch.tensor(pair["share"]).mean().item() == pytest.approx(0.125, abs=0.05)
    assert len({tuple(head) for layer in view.density for head in layer}) == 4
    assert len(view.density[0][0]) == 64


def test_the_text_is_that_of_eval(make, monkeypatch):
    from lighthouse_core.evaluate import evaluate
    from lighthouse_core.evaluate.load import load_checkpoint

    run = make({10: "QK"})
    subject, recipe = load_checkpoint(run.path, attention="trained")
    seen = []
    monkeypatch.setattr(subject.model.__class__, "hidden", remember(seen, subject.model.__class__.hidden))
    selection_view(run.path, sequences=3)
    looked_at, seen[:] = list(seen), []
    evaluate(load_checkpoint(run.path, attention="trained")[0], recipe.data, tokens=64, sequences=3, measures=["loss"])
    assert len(seen) == 3 and all(torch.equal(a, b) for a, b in zip(looked_at, seen, strict=True))


def test_documents_that_are_kept_apart(make, monkeypatch):
    from lighthouse_core.models.decoder import Decoder

    seen = []

    def hidden(self, tokens, context):
        seen.append(context)
        return before(self, tokens, context)

    before = Decoder.hidden
    monkeypatch.setattr(Decoder, "hidden", hidden)
    run = make({10: "QK"}, 'data.packing="documents"', "lighthouse.window=4")
    view = selection_view(run.path, sequences=3)
    assert view.coverage and view.sequences == 3 and len(seen) == 3
    for context in seen:
        starts = context.documents.starts
        assert starts[-1] == 64 and not (starts % 16).any()
        assert context.positions.max() < 64 and context.key is not None


def test_a_run_whose_backend_is_not_here_is_refused_in_words(make):
    from lighthouse_core.evaluate.load import load_checkpoint

    run, cpu = make({10: "QK"}, 'lighthouse.dense_backend="varlen"'), torch.device("cpu")
    for read in (
        lambda: selection_view(run.path, device=cpu),
        lambda: load_checkpoint(run.path, attention="trained", device=cpu),
        lambda: load_checkpoint(run.path, attention="dense", device=cpu),
    ):
        with pytest.raises(UserError, match="names a backend that cannot run here: dense backend 'varlen'") as found:
            read()
        assert "lighthouse strip" in found.value.hint


def remember(seen, hidden):
    def remembering(self, tokens, context):
        seen.append(tokens)
        return hidden(self, tokens, context)

    return remembering


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["lighthouse.enabled=false"], "dense from the start"),
        (['lighthouse.method="sliding"', "lighthouse.window=8"], "'sliding' of run tiny selects nothing"),
        (["model.dense_layers=[0,1,2]"], "every layer"),
        (["data.validation=0"], "held no text out"),
        ([], "no checkpoint of stage 1"),
    ],
)
def test_runs_that_select_nothing(make, settings, words):
    with pytest.raises(UserError, match=words):
        selection_view(make({}, *settings).path)


def test_what_cannot_be_looked_at(make, tmp_path):
    run = make({10: "QK", 20: "QK", 40: "QK"})
    for options in ({"sequences": 0}, {"bins": 0}):
        with pytest.raises(UserError, match="too few"):
            selection_view(run.path, **options)
    with pytest.raises(UserError, match="not a run"):
        selection_view(tmp_path)
    with pytest.raises(UserError, match="step-30 is missing"):
        selection_view(run.checkpoint_dir(30))
    with pytest.raises(UserError, match="shorter than 1000 sequences of 64 tokens"):
        selection_view(run.path, sequences=1000)
    ledger = json.loads((run.path / "ledger.json").read_text())
    ledger["stages"].append({"stage": "dense", "start": 30, "end": 40})
    (run.path / "ledger.json").write_text(json.dumps(ledger))
    (run.path / "recover.toml").write_bytes((run.path / "recipe.toml").read_bytes())
    with pytest.raises(UserError, match="step-40 is of the recovery"):
        selection_view(run.checkpoint_dir(40))
    # Of the run, what there is of stage 1.
    view = selection_view(run.path, sequences=1)
    assert view.step == 20 and [pair["first"] for pair in view.drift] == [10]
    file = run.path / "recover.toml"
    file.write_text(file.read_text().replace("seq_len = 64", "seq_len = 18"))
    with pytest.raises(UserError, match="not shorter than"):
        selection_view(run.path)


def test_a_table_and_a_figure(make, lettered, tmp_path):
    run = make({10: "QK", 20: "QZ"})
    view = selection_view(run.path)
    assert json.loads(json.dumps(view.as_json())) == view.as_json()
    assert view.as_json()["level_0"] == [[0.125] * 2] * 2
    columns = ("layer", "level 0", "level 1", "level 2", "overlap 1 (chance 12.5%)", "overlap 2 (chance 25.0%)")
    assert view.columns() == (*columns, "kept 10 to 20 (chance 12.5%)")
    assert view.rows()[1] == ("2", "12.5%", "37.5%", "50.0%", "0.0%", "0.0%", "50.0%")
    assert selection._mean_and_range([0.1, 0.2, 0.6]) == "30.0% (10.0% to 60.0%)"

    pytest.importorskip("matplotlib")
    from matplotlib import colormaps
    from matplotlib.image import imread

    for name, one in (("both", view), ("map", selection_view(run.checkpoint_dir(10)))):
        files = draw(one, tmp_path / name)
        assert [file.name for file in files] == [f"{name}.png", f"{name}.svg"]
        svg = files[1].read_text()
        labels = ("position (tokens)", "layer.KV head", "tokens at level 0 (%)", "tiny step")
        assert all(label in svg for label in labels) and ("tokens at level 0 that stay (%)" in svg) == (name == "both")
        # The two ends of the map's scale: where nothing is kept, and where the most is.
        colors = (255 * imread(files[0])[..., :3]).round().astype(int)
        for end in (0.0, 1.0):
            assert (colors == colormaps["viridis"](end, bytes=True)[:3]).all(-1).any()
