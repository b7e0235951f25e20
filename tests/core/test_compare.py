"""Runs side by side, with curves whose features are known."""

import json
import sys
from contextlib import suppress

import pytest

from lighthouse_cli.app import main
from lighthouse_core.config import load_recipe
from lighthouse_core.estimate import flops_per_token
from lighthouse_core.evaluate.compare import AXES, _smooth, plot, read, summarize
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.recovery import Recovery

STEP = 4 * 2048


@pytest.fixture
def make(tmp_path):
    def build(name, stages, losses, validation=(), settings=()):
        """A run with one row a step: (stage, loss), of 2 s in stage 1 and 3 s dense."""
        recipe = load_recipe("recipes/quickstart.toml", [f'output.dir="{tmp_path}"', *settings])
        run = create_run(recipe, "quickstart", name)
        if len(stages) > 1:
            switch = stages[0]
            run.write_recovery(Recovery(recipe, switch, sum(stages), switch, stopped_early=True))
        rows = []
        for step, (stage, loss) in enumerate(losses, start=1):
            seconds = 2.0 if stage == "lighthouse" else 3.0
            row = {"step": step, "stage": stage, "leaky": stage == "lighthouse", "loss": loss, "tokens": step * STEP}
            rows.append(row | {"steps": 1, "seconds": seconds})
        rows += [{"step": s, "stage": "dense", "leaky": False, "val_loss": loss} for s, loss in validation]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run

    return build


def switched(make, after, name="a", **others):
    return make(name, (10, len(after)), [("lighthouse", 2.0)] * 10 + [("dense", x) for x in after], **others)


def dense(make, losses):
    return make("dense", (len(losses),), [("dense", x) for x in losses], settings=["lighthouse.enabled=false"])


def test_a_curve_adds_up_time_and_flops(make):
    run = switched(make, [3.0] * 5, validation=[(15, 2.5)])
    curve = read(run)
    assert (curve.switch, curve.dense, curve.validation) == (10, False, ((15, 2.5, False),))
    last = curve.points[-1]
    assert (last.step, last.tokens, last.seconds) == (15, 15 * STEP, 10 * 2.0 + 5 * 3.0)
    costs = [flops_per_token(run.recipe, stage) for stage in ("lighthouse", "dense")]
    assert last.flops == pytest.approx(STEP * (10 * costs[0] + 5 * costs[1]))
    assert [p.leaky for p in curve.points] == [True] * 10 + [False] * 5


def test_a_row_of_the_same_step_costs_nothing_more(make):
    run = switched(make, [3.0] * 5)
    flops = read(run).points[-1].flops
    file = run.path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:4], lines[3], *lines[4:]]))
    assert read(run).points[-1].flops == pytest.approx(flops)


def test_where_a_launch_began_changes_no_mean(make):
    """A launch logs its first step beside every fifth one."""
    losses = [10.0 - 0.1 * step for step in range(60)]
    points = read(make("a", (60,), [("lighthouse", x) for x in losses])).points
    fifth = [p for p in points if p.step % 5 == 0]
    launches = [p for p in points if p.step % 5 == 0 or p.step in (1, 33)]
    plain = {p.step: loss for p, loss in _smooth(fifth)}
    assert plain[25] == pytest.approx(sum(losses[step - 1] for step in (5, 10, 15, 20, 25)) / 5)
    assert list(plain) == list(range(25, 61, 5))
    other = {p.step: loss for p, loss in _smooth(launches)}
    # A row more in a window of 25 steps moves its mean a little, and no more than that.
    assert all(other[step] == pytest.approx(plain[step], abs=0.3) for step in plain)
    assert other[60] == plain[60] and other[30] == plain[30]


def test_a_dense_run_that_goes_on_does_not_switch(make):
    losses = [("dense", 2.0)] * 10 + [("dense", 1.0)] * 5
    curve = read(make("dense", (10, 5), losses, settings=["lighthouse.enabled=false"]))
    found = summarize(curve)
    assert curve.dense and curve.switch is None and found.jump is None and found.loss == 1.0


def test_jump_spike_and_the_way_back(make):
    # Means of five: 2.9, 2.5, 2.1, 1.7; below the 2.0 before the switch with the eighth step.
    found = summarize(read(switched(make, [3.5, 4.0, 3.0, 2.0, 2.0, 1.5, 2.0, 1.0], validation=[(18, 1.9)])))
    assert (found.jump, found.spike, found.back) == (1.5, 2.0, 8)
    assert (found.val_loss, found.leaky, found.step, found.below_dense) == (1.9, False, 18, None)
    assert found.loss == pytest.approx(1.7)


def test_a_short_run_is_not_held_against_its_beginning(make):
    losses = [("lighthouse", x) for x in (6.5, 4.0, 3.0, 2.5)] + [("dense", x) for x in (2.75, 2.25)]
    found = summarize(read(make("short", (4, 2), losses)))
    assert (found.jump, found.spike, found.loss) == (0.25, 0.25, 2.5)


def test_against_dense_at_the_same_tokens(make):
    other = read(dense(make, [1.8] * 30))
    found = summarize(read(switched(make, [3.0, 3.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0])), other)
    # 2.4, 2.0, 1.6: the seventh.
    assert found.below_dense == 7
    assert summarize(read(switched(make, [3.0] * 8, name="b")), other).below_dense is None


def test_a_run_that_has_not_switched_has_neither(make):
    run = make("c", (10,), [("lighthouse", 2.0)] * 3)
    found = summarize(read(run), read(dense(make, [1.0] * 9)))
    assert (found.jump, found.spike, found.back, found.below_dense, found.val_loss) == (None,) * 5


def test_a_loss_that_is_not_finite_is_left_out_and_its_time_is_not(make):
    curve = read(make("d", (3,), [("lighthouse", 2.0), ("lighthouse", None), ("lighthouse", 1.0)]))
    assert [p.step for p in curve.points] == [1, 3]
    assert curve.points[-1].seconds == 6.0


def test_the_page_is_drawn(make, tmp_path):
    pytest.importorskip("matplotlib")
    files = plot([read(switched(make, [3.0] * 8)), read(dense(make, [1.0] * 9))], tmp_path)
    assert [file.name for file in files] == ["compare.png", "compare.svg"]
    assert all(file.stat().st_size > 5000 for file in files)
    text = files[1].read_text()
    assert len(AXES) == 4 and text.count('id="axes_') == 4


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a" * 16, "a" * 16], None),
        ([None], None),
        (["a" * 16, "b" * 16], "the losses of run0 and run1 are of other data"),
        (["a" * 16, None], "not known: the ledger of run1"),
        (["a" * 16, 7], "not known: the ledger of run1"),
        (["a" * 16, "a" * 16, "b" * 16], "the losses of run0 and run2 are of other data"),
    ],
)
def test_losses_of_other_text_are_named(make, tmp_path, monkeypatch, capsys, texts, words):
    for number, data in enumerate(texts):
        run = switched(make, [2.0, 1.9], name=f"run{number}")
        run.note(data=data)
        ledger = json.loads((run.path / "ledger.json").read_text())
        ledger["stages"][0]["data"] = data
        (run.path / "ledger.json").write_text(json.dumps(ledger))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lighthouse_core.evaluate.compare.plot", lambda curves, folder: [])
    runs = [str(tmp_path / f"run{number}") for number in range(len(texts))]
    monkeypatch.setattr(sys, "argv", ["lighthouse", "compare", *runs, "--json"])
    with suppress(SystemExit):
        main()
    said = capsys.readouterr().err
    assert words in said if words else "losses" not in said and "not known" not in said
