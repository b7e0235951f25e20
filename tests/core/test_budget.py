"""[lighthouse.budget]: measured shares against loops, the sharing rule, runs, and what reads their checkpoints."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from forked import spawn
from hypothesis import given
from hypothesis import strategies as st
from test_float16 import continued, rows, train
from test_phases import built, small, stage
from torch._dynamo.testing import CompileCounterWithBackend

from lighthouse_core.attention.beyond import measured_rows, shares_beyond
from lighthouse_core.attention.budgets import WIDEST, share_out
from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.checkpoint import read_contents
from lighthouse_core.config import dump_recipe, load_recipe
from lighthouse_core.config.budget import BudgetSection, Measurement
from lighthouse_core.config.load import loads_recipe
from lighthouse_core.errors import CheckpointError, PatchError, RecipeError
from lighthouse_core.estimate import process_bytes
from lighthouse_core.evaluate import evaluate
from lighthouse_core.evaluate.load import load_checkpoint
from lighthouse_core.export import strip
from lighthouse_core.measures import MEASURES
from lighthouse_core.models.decoder import Decoder
from lighthouse_core.profile.report import heads_parts
from lighthouse_core.profile.selection import selection_view
from lighthouse_core.profile.selection_figure import draw
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.recovery import plan_recovery
from lighthouse_core.runs.run import Run
from lighthouse_core.titan.budget import Budgets
from lighthouse_core.weights.checkpoint import find_source, load_measurement

# What is measured


def slow_shares(q, k, window, positions, starts):
    """By loops over heads, queries and keys."""
    heads, kv_heads = q.shape[1], k.shape[1]
    group, found = heads // kv_heads, []
    for kv in range(kv_heads):
        shares = []
        for head in range(kv * group, (kv + 1) * group):
            for position, start in zip(positions, starts, strict=True):
                weights = {}
                for key in range(start, position + 1):
                    product = sum(a * b for a, b in zip(q[position, head].tolist(), k[key, kv].tolist(), strict=True))
                    weights[key] = math.exp(product / math.sqrt(q.shape[2]))
                beyond = sum(weight for key, weight in weights.items() if key <= position - window)
                shares.append(beyond / sum(weights.values()))
        found.append(sum(shares) / len(shares))
    return found


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [1, 7, 40, 90])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1)])
def test_shares_are_those_of_loops(heads, kv_heads, window, documents):
    generator = torch.Generator().manual_seed(heads + window)
    q, k = (torch.randn(80, h, 8, dtype=torch.float64, generator=generator) for h in (heads, kv_heads))
    positions = measured_rows(80, 9)
    starts = [position // 48 * 48 if documents else 0 for position in positions]
    at = torch.tensor(positions)
    given = {"starts": torch.tensor(starts, dtype=torch.int32)} if documents else {}
    found = shares_beyond(q[at], k, at, window, **given)
    assert found.tolist() == pytest.approx(slow_shares(q, k, window, positions, starts), abs=1e-12)
    assert (found > 0).all() == (window < 80)
    # In 16 bits the scores are float32.
    half = shares_beyond(q[at].bfloat16(), k.bfloat16(), at, window, **given)
    exact = shares_beyond(q[at].bfloat16().double(), k.bfloat16().double(), at, window, **given)
    assert half.dtype == torch.float32 and half.tolist() == pytest.approx(exact.tolist(), abs=1e-6)


@given(st.integers(1, 5000), st.integers(1, 300))
def test_rows_are_evenly_spaced_in_the_second_half(tokens, queries):
    found = measured_rows(tokens, queries)
    assert len(found) == min(queries, tokens - tokens // 2)
    assert found[0] >= tokens // 2 and found[-1] == tokens - 1
    gaps = [after - before for before, after in pairwise(found)]
    assert min(gaps, default=1) >= 1 and max(gaps, default=0) - min(gaps, default=0) <= 1


def test_many_rows_are_those_of_single_ones():
    """More than exist at once."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(400, h, 8, dtype=torch.float64, generator=generator) for h in (4, 2))
    at = torch.tensor(measured_rows(400, 150))
    singles = torch.stack([shares_beyond(q[row][None], k, row[None], 30) for row in at])
    torch.testing.assert_close(shares_beyond(q[at], k, at, 30), singles.mean(0), rtol=1e-12, atol=1e-12)


# The sharing rule

SHARES = st.lists(st.sampled_from([0.0, 0.01, 0.02, 0.3, 0.5, 1.0]) | st.floats(0, 1), min_size=1, max_size=16)


@given(SHARES, st.floats(0, 1), st.integers(1, 40))
def test_blocks_are_shared_out(shares, threshold, blocks):
    found = share_out(shares, threshold, blocks)
    assert len(found) == len(shares) and found == share_out(list(shares), threshold, blocks)
    choosing = [head for head, share in enumerate(shares) if share >= threshold]
    assert all(found[head] == 0 for head in range(len(shares)) if head not in choosing)
    if not choosing:
        return
    numbers = [found[head] for head in choosing]
    assert max(numbers) <= WIDEST * blocks and max(numbers) - min(numbers) <= 1
    if len(choosing) * WIDEST >= len(shares):
        assert sum(numbers) == blocks * len(shares)
    else:
        assert set(numbers) == {WIDEST * blocks}
    # The more of its attention lies beyond, the more blocks; of equal heads the earlier one has no fewer.
    ranked = sorted(choosing, key=lambda head: (-shares[head], head))
    assert [found[head] for head in ranked] == sorted(numbers, reverse=True)


def test_examples_of_sharing():
    assert share_out([0.3, 0.01, 0.3, 0.4], 0.02, 5) == [7, 0, 6, 7]
    assert share_out([0.3, 0.01, 0.0, 0.0], 0.02, 5) == [20, 0, 0, 0]
    assert share_out([0.3] + [0.0] * 7, 0.02, 5) == [20] + [0] * 7
    assert share_out([0.01, 0.0], 0.02, 5) == [0, 0]
    assert share_out([0.5, 0.0], 0, 5) == [5, 5] and share_out([0.02], 0.02, 5) == [5]


# Recipes

BLOCKS = ['lighthouse.method="blocks"', "lighthouse.window=64"]
EVERY = "lighthouse.budget.every=10"


def recipe(*settings):
    return load_recipe("recipes/quickstart.toml", settings)


def test_it_is_off_by_default_and_a_recipe_keeps_it():
    assert recipe().lighthouse.budget == BudgetSection(every=0, threshold=0.02, queries=256)
    given = recipe(*BLOCKS, EVERY, "lighthouse.budget.threshold=0.5", "lighthouse.phases=[{window=32}, {window=64}]")
    assert given.lighthouse.budget.threshold == 0.5
    assert loads_recipe(dump_recipe(given), (), "dumped") == given


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            [*BLOCKS, "lighthouse.phases=[{budget={every=5}}]"],
            "lighthouse.budget is for all phases together: set it in [lighthouse], not in [[lighthouse.phases]]",
        ),
        ([*BLOCKS, EVERY, "parallel.context=2"], "not for shared sequences: write lighthouse.budget.every = 0, or"),
        ([*BLOCKS, "lighthouse.budget.threshold=1.5"], "threshold"),
        ([*BLOCKS, "lighthouse.budget.queries=0"], "queries"),
        ([*BLOCKS, "lighthouse.budget.evry=5"], "unknown key lighthouse.budget.evry; did you mean every?"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises(RecipeError) as found:
        recipe(*settings)
    assert words in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("settings", "without"),
    [
        ([EVERY], True),
        ([EVERY, 'lighthouse.method="sliding"', "lighthouse.window=64", "parallel.context=2"], True),
        ([*BLOCKS, EVERY, 'lighthouse.phases=[{method="chunked"}, {enabled=false}]'], True),
        ([*BLOCKS, 'lighthouse.phases=[{method="chunked"}, {enabled=false}]'], False),
        ([*BLOCKS, EVERY, 'lighthouse.phases=[{method="chunked"}, {share=2}]'], False),
        ([EVERY, "lighthouse.enabled=false"], False),
    ],
)
def test_where_no_head_chooses_blocks_it_has_no_effect_and_that_is_said(settings, without):
    """So that phases may be changed, or replaced by those of another run, and the budget left as it is."""
    given = recipe(*settings).lighthouse
    told = {"lighthouse.budget.every": "no phase has the method blocks, whose heads choose blocks"}
    assert given.without_effect == (told if without else {})


def test_a_value_that_is_no_number_is_refused_with_what_the_key_takes():
    with pytest.raises(RecipeError) as found:
        recipe(*BLOCKS, "lighthouse.budget.every=often")
    assert found.value.hint == "lighthouse.budget.every takes an integer"


def test_it_stands_beside_other_phases_and_a_dense_baseline():
    phases = 'lighthouse.phases=[{method="sliding"}, {window=32}, {window=64, blocks=8}, {enabled=false}]'
    mixed = recipe(*BLOCKS, EVERY, phases)
    budget, ends = mixed.lighthouse.budget, [25, 50, 75, 100]
    assert [phase.end for phase in mixed.phases] == ends
    assert [budget.acts_in(phase) for phase in (*mixed.phases, None)] == [False, True, True, False, False]
    due = [step for step in range(1, 101) if budget.due(stage(mixed).phase(step), step)]
    assert due == [30, 40, 50, 60, 70]
    last = Measurement(50, [[0.5, 0.0]])
    assert budget.blocks(mixed.phases, 30, Measurement.none(1, 2)) == [[16, 16]]
    assert budget.blocks(mixed.phases, 50, last) == [[32, 0]]
    # The other phase has another window, and begins anew.
    assert budget.blocks(mixed.phases, 51, last) == [[8, 8]]
    assert budget.blocks(mixed.phases, 61, last._replace(step=60)) == [[16, 0]]
    assert recipe(EVERY, "lighthouse.enabled=false").lighthouse.budget.every == 10


def test_the_memory_of_wider_lists_is_counted():
    wide, equal, narrow = (
        process_bytes(recipe(*BLOCKS, *more), 1)["lighthouse"]
        for more in ([EVERY], [f"lighthouse.blocks={16 * WIDEST}"], [])
    )
    assert wide == equal > narrow


# Runs

SETTINGS = [
    *("model.layers=3", "model.heads=4", "model.kv_heads=2", "model.head_dim=16", "model.dense_layers=[1]"),
    *("model.dim=32", "model.ffn_dim=32", "training.seq_len=64", "training.global_batch_size=4"),
    *("schedule.warmup_steps=5", "data.validation=0.1", "metrics.validation_batches=1", "metrics.tensorboard=false"),
    *('lighthouse.method="blocks"', "lighthouse.window=8", "lighthouse.blocks=2", "lighthouse.block_size=4"),
    *("lighthouse.tile=8", "metrics.every=1", "optimizer.lr=1e-2"),
]
KEYS = ("loss", "grad_norm", "budget_share", "budget_heads", "budget_blocks")


def new_run(folder, name, steps, *settings):
    settings = (*SETTINGS, f"training.steps={steps}", *settings, f'output.dir="{folder}"')
    return create_run(load_recipe("recipes/quickstart.toml", settings), name)


def budget(every, threshold=0.0, queries=16):
    return [f"lighthouse.budget.{key}={value}" for key, value in locals().items()]


def trained(folder, name, steps, *settings):
    run = new_run(folder, name, steps, *settings)
    train(run, folder / "meeting")
    return run


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder, a run without budgets, one with a threshold of 0, and a threshold between the heads of a layer."""
    folder = tmp_path_factory.mktemp("budget")
    plain, zero = trained(folder, "plain", 9), trained(folder, "zero", 9, *budget(4))
    early = trained(folder, "early", 4, *budget(4))
    low, high = sorted(load_measurement(find_source(early.path)).shares[0])
    assert low < high
    return folder, plain, zero, (low + high) / 2


@pytest.fixture(scope="module")
def whole(shared):
    """A run whose heads have unequal budgets."""
    folder, *_, threshold = shared
    return trained(folder, "whole", 9, *budget(4, threshold))


def test_with_a_threshold_of_0_the_losses_are_those_without(shared):
    _, plain, zero, _ = shared
    assert rows(zero, "loss") == rows(plain, "loss") and rows(zero, "grad_norm") == rows(plain, "grad_norm")
    assert rows(zero, "val_loss") == rows(plain, "val_loss") and not rows(plain, "budget_share")
    assert len(rows(zero, "budget_share")) == 2
    assert rows(zero, "budget_heads") == [4, 4] and rows(zero, "budget_blocks") == [2, 2]


def test_heads_below_the_threshold_lose_their_blocks_from_the_next_step_on(shared, whole):
    _, plain, _, threshold = shared
    lines = [json.loads(line) for line in (whole.path / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "budget_share" in line]
    assert [line["step"] for line in measured] == [4, 8]
    assert all(set(line) == {"step", "stage", "leaky", *KEYS[2:]} for line in measured)
    assert 0 < measured[0]["budget_heads"] < 4 and 2 < measured[0]["budget_blocks"] <= 4
    assert rows(whole, "loss")[:4] == rows(plain, "loss")[:4]
    assert all(a != b for a, b in zip(rows(whole, "loss")[4:], rows(plain, "loss")[4:], strict=True))
    last = load_measurement(find_source(whole.path))
    # Layer 1 is dense.
    assert last.step == 8 and last.shares[1] == [0.0, 0.0]
    measured_heads = [share for layer in (0, 2) for share in last.shares[layer]]
    assert measured[1]["budget_share"] == pytest.approx(sum(measured_heads) / 4)
    assert measured[1]["budget_heads"] == sum(share >= threshold for share in measured_heads)


@pytest.mark.parametrize("end", [4, 6])
def test_a_resume_is_the_unbroken_run(shared, whole, end):
    """From the checkpoint of a measurement, and from one between two."""
    folder, *_, threshold = shared
    part = continued(trained(folder, f"part-{end}", end, *budget(4, threshold)), 9)
    train(part, folder / "meeting")
    for key in KEYS:
        assert rows(part, key) == rows(whole, key), key
    assert rows(part, "val_loss")[-1] == rows(whole, "val_loss")[-1]


def test_a_validation_that_was_cut_off_has_the_budgets_and_the_rotation_of_its_step(shared):
    folder, *_, threshold = shared
    phases = "lighthouse.phases=[{share=3, rope_theta=100}, {share=1}]"
    every = ("metrics.validation_every=3", "checkpoint.interval=3")
    run = trained(folder, "cut", 4, *budget(2, threshold), phases, *every)
    cut = Run(shutil.copytree(run.path, run.path.with_name("cut-off")))
    shutil.rmtree(cut.checkpoint_dir(4))
    lines = (cut.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] < 4 and "val_loss" not in json.loads(line)]
    (cut.path / "metrics.jsonl").write_text("".join(kept))
    train(cut, folder / "meeting")
    assert rows(cut, "val_loss") == rows(run, "val_loss") and len(rows(run, "val_loss")) == 2
    # After a switch at step 3 positions are rotated by the model's base.
    check_evaluation(run, step=3)
    # An export has the model's rotation.
    never, rotation = strip(run.checkpoint_dir(3), folder / "early", allow_unrecovered=True).warnings
    assert "never trained with every layer dense" in never
    assert rotation == "it was trained with rope_theta 100, and the export has 10000"
    assert len(strip(run.checkpoint_dir(4), folder / "late", allow_unrecovered=True).warnings) == 1


def test_a_checkpoint_without_a_measurement_is_measured_at_the_next_step_due(shared):
    folder, plain, *_ = shared
    run = trained(folder, "older", 6)
    text = run.recipe_path.read_text()
    run.recipe_path.write_text(text.replace("[lighthouse.budget]\nevery = 0", "[lighthouse.budget]\nevery = 4"))
    run = continued(Run(run.path), 9)
    train(run, folder / "meeting")
    lines = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "budget_share" in line] == [8]
    assert rows(run, "loss")[:8] == rows(plain, "loss")[:8]


@pytest.mark.parametrize("state", [{"step": -1}, {"shares": [[0.5, math.nan]]}, {"shares": [[1.5, 0.0]]}])
def test_a_measurement_that_no_training_leaves_is_refused(state):
    budgets = Budgets(BudgetSection(every=1), (), (1, 2), torch.device("cpu"))
    with pytest.raises(CheckpointError, match="not all from 0 to 1"):
        budgets.load_state_dict(budgets.state_dict() | state)


def process(rank: int, paths: list[Path], meet: Path) -> list[list]:
    """Of each run, the steps and their budgets."""
    seen, within = [[] for _ in paths], Budgets.within

    def noting(self, context, step):
        context = within(self, context, step)
        seen[number].append([step, context.budgets.tolist()])
        return context

    Budgets.within = noting  # type: ignore[method-assign]
    for number, path in enumerate(paths):
        train(Run(path), meet.with_name(f"meeting-{number}"), rank, 2)
    return seen


def test_all_processes_have_the_same_budgets(shared):
    """With FSDP and with DDP, which begin with the same losses."""
    folder, *_, threshold = shared
    runs = [
        new_run(folder, f"replicate-{count}", 6, *budget(2, threshold), f"parallel.replicate={count}")
        for count in (1, 2)
    ]
    seen = spawn(process, [run.path for run in runs], folder / "meeting", count=2)
    for run, first, second in zip(runs, *seen, strict=True):
        assert first == second and len({str(budgets) for _, budgets in first}) > 1
        assert len(rows(run, "budget_share")) == 3
    assert rows(runs[0], "budget_share") == pytest.approx(rows(runs[1], "budget_share"), rel=1e-4)


def test_documents_and_checkpointing(shared):
    """The hooks are outside of what checkpointing calls again, and queries see their own document alone."""
    folder, *_, threshold = shared
    settings = ('data.packing="documents"', *budget(2, threshold))
    ours, theirs = (
        trained(folder, f"documents-{mode}", 5, *settings, f'training.activation_checkpointing="{mode}"')
        for mode in ("none", "full")
    )
    for key in KEYS:
        assert rows(ours, key) == rows(theirs, key), key
    assert len(rows(ours, "budget_share")) == 2
    check_evaluation(ours)


def check_evaluation(run, step=None):
    """All measures of a run with budgets; dense attention, which has none, is what the run's dense model does."""
    reports = {}
    for attention in ("trained", "dense"):
        subject, recipe = load_checkpoint(run.path, attention=attention, device=torch.device("cpu"), step=step)
        left = () if attention == "trained" else ("leak", "switch", "needles")
        measures = [measure for measure in MEASURES if measure not in left]
        options = {"tokens": 64, "sequences": 2, "context": 16, "trials": 2, "align": recipe.alignment}
        reports[attention] = evaluate(subject, recipe.data, measures=measures, **options)
    switch, losses = reports["trained"]["switch"], reports["dense"]["loss"]["nats_per_token"]
    assert switch["dense"]["mean"] == pytest.approx(losses["mean"], rel=1e-6)
    # Layer 1 is dense.
    assert [error["layer"] for error in switch["attention_errors"]] == [0, 2]
    assert all(0 < error["relative_error"] < 1 for error in switch["attention_errors"])


def test_an_evaluation_has_all_measures(whole):
    check_evaluation(whole)


def test_what_reads_a_checkpoint(shared, whole, tmp_path, monkeypatch):
    _, plain, *_ = shared
    seen, hidden = [], Decoder.hidden

    def noting(self, tokens, context):
        seen.append(context.budgets)
        return hidden(self, tokens, context)

    monkeypatch.setattr(Decoder, "hidden", noting)
    # An evaluation attends as the run does from there on.
    last = load_measurement(find_source(whole.path))
    expected = whole.recipe.lighthouse.budget.blocks(whole.recipe.phases, 9, last)
    for attention, budgets in (("trained", expected), ("dense", None)):
        subject, _ = load_checkpoint(whole.path, attention=attention)
        subject.hidden(torch.arange(64)[None] % 256)
        assert (seen[-1] if seen[-1] is None else seen[-1].tolist()) == budgets
    view = selection_view(whole.path, sequences=2)
    assert (view.step, view.measured_step, view.layers, view.kv_heads) == (9, 8, [0, 2], 2)
    assert (view.queries, view.window, view.tokens, view.sequences) == (16, 8, 64, 2)
    assert view.blocks == [expected[0], expected[2]] and len({str(heads) for heads in view.beyond}) == 2
    table, _, rule = heads_parts(view)
    assert table.columns == ("layer", "head 0", "head 1")
    assert table.rows[1] == ("2", *(f"{view.beyond[1][head]:.1%}, {expected[2][head]}" for head in range(2)))
    assert "measured in step 8" in rule and json.loads(json.dumps(view.as_json()))["blocks"] == view.blocks
    assert [path.suffix for path in draw(view, tmp_path / "selection")] == [".png", ".svg"]
    view = selection_view(plain.path, sequences=2)
    assert view.blocks == [[2, 2]] * 2 and view.threshold is view.measured_step is None
    assert "0, the default" in heads_parts(view)[2]


def test_a_recovery_and_an_export_know_nothing_of_it(shared, whole):
    folder, *_ = shared
    run = continued(whole, 9)
    run.write_recovery(plan_recovery(run, steps=2))
    train(run, folder / "meeting")
    assert len(rows(run, "loss")) == 11 and len(rows(run, "budget_share")) == 2
    contents = [read_contents(run.checkpoint_dir(step)).values for step in (9, 11)]
    assert [any(name.startswith("budget") for name in names) for names in contents] == [True, False]
    strip(run.path, folder / "export")
    assert selection_view(run.path, sequences=1).step == 9


def test_a_run_is_compiled_once(monkeypatch):
    """As torchtitan compiles blocks; the hooks stay outside, and other budgets compile nothing anew."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    torch._dynamo.reset()
    sizes = ["lighthouse.blocks=2", "lighthouse.block_size=4", "lighthouse.tile=8", 'lighthouse.scorer="norm"']
    more = [*BLOCKS, *sizes, "model.kv_heads=2", "training.steps=9", *budget(2)]
    first = stage(small("{window=16}", *more))
    model, counter = built(first), CompileCounterWithBackend("aot_eager")
    for name, block in model.layers.named_children():
        model.layers.register_module(name, torch.compile(block, backend=counter, fullgraph=True))
    tokens = torch.randint(256, (2, 160), generator=torch.Generator().manual_seed(1))
    budgets = Budgets(first.recipe.lighthouse.budget, first.phases, (2, 2), torch.device("cpu"))
    budgets.watch(model)
    counted, found = [], []
    for step in range(1, 10):
        budgets.begin(step)
        context = budgets.within(first.context(step, step, 0, torch.device("cpu")), step)
        found.append(context.budgets[1].tolist())
        model(tokens, labels=tokens, context=context).backward()
        row = budgets.end(step)
        assert (row is not None) == (step % 2 == 0)
        if step == 4:
            # Between the heads of the layer.
            budgets.section = budgets.section.model_copy(update={"threshold": sum(budgets.last.shares[1]) / 2})
        counted.append(counter.frame_count)
    assert sorted(found[-1]) == [0, 4] and found[0] == [2, 2]
    assert counted == counted[:1] * 9


def test_a_measurement_leaves_random_numbers_and_gradients_alone():
    first = stage(small("{window=16}", *BLOCKS, "model.kv_heads=2", *budget(1), "lighthouse.tile=128"))
    model = built(first)
    budgets = Budgets(first.recipe.lighthouse.budget, first.phases, (2, 2), torch.device("cpu"))
    budgets.watch(model)
    tokens = torch.randint(256, (2, 160), generator=torch.Generator().manual_seed(1))
    results = []
    for measures in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        if measures:
            budgets.begin(1)
        loss = model(tokens, labels=tokens, context=budgets.within(first.context(1, 1, 0, torch.device("cpu")), 1))
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append([loss.detach(), torch.random.get_rng_state(), *gradients])
    assert set(budgets._found) == {1}
    # A layer that nothing looked at is no measurement.
    budgets.begin(1)
    with pytest.raises(PatchError, match=r"KV heads of layers \[1\], and measured \[\]"):
        budgets.end(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_budgets_are_refused_where_no_head_chooses():
    from lighthouse_core import LighthouseConfig
    from lighthouse_core.attention.call import attend

    q = torch.randn(1, 32, 2, 8)
    for cfg in (LighthouseConfig(method="sliding", window=8), LighthouseConfig(method="chunked", window=8)):
        with pytest.raises(ValueError, match="chooses no blocks for each KV head"):
            attend(q, q, q, cfg, AttentionContext(budgets=torch.ones(2, dtype=torch.int32)))
