"""Where runs stand, read from files that may be half-written."""

import json
import os

import pytest

from lighthouse_core import shelf
from lighthouse_core.runs import listing

LEDGER = {"version": 1, "stages": [{"stage": "lighthouse", "start": 0, "end": 100}]}


@pytest.fixture
def make(tmp_path):
    def make(name: str, *, time: int, metrics: str | None = None, ledger: str = json.dumps(LEDGER)):
        run = tmp_path / name
        run.mkdir()
        (run / "recipe.toml").touch()
        (run / "ledger.json").write_text(ledger)
        if metrics is not None:
            (run / "metrics.jsonl").write_text(metrics)
            os.utime(run / "metrics.jsonl", (time, time))
        os.utime(run, (time, time))
        return run

    return make


def test_newest_first_and_only_runs(make, tmp_path):
    for name, time in (("b", 2000), ("a", 3000), ("c", 1000)):
        make(name, time=time)
    (tmp_path / "no-run").mkdir()
    assert [path.name for path in listing.run_dirs(tmp_path)] == ["a", "b", "c"]
    assert listing.run_dirs(tmp_path / "absent") == []


def test_a_summary_has_the_newest_rows(make):
    rows = [
        {"step": 10, "stage": "lighthouse", "leaky": True, "loss": 3.0},
        {"step": 10, "stage": "lighthouse", "leaky": True, "val_loss": 3.5},
        {"step": 20, "stage": "lighthouse", "leaky": True, "loss": 2.5},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    found = listing.summarize(make("a", time=86400, metrics=text))
    assert (found.name, found.stage, found.step, found.end) == ("a", "lighthouse", 20, 100)
    assert (found.loss, found.leaky, found.val_loss, found.val_leaky) == (2.5, True, 3.5, True)
    assert found.updated == "1970-01-02T00:00:00+00:00"


@pytest.mark.parametrize(
    ("metrics", "loss"),
    [
        (None, None),
        ("", None),
        ('{"step": 1, "lo', None),
        ('{"step": 1, "leaky": false, "loss": 2.0}\n{"step": 2, "loss": 1.', 2.0),
        ('["loss"]\n', None),
        ('{"step": 1, "loss": "low"}\n', None),
        ("\xff\xfe\n", None),
    ],
)
def test_half_written_metrics(make, metrics, loss):
    assert listing.summarize(make("a", time=1, metrics=metrics)).loss == loss


@pytest.mark.parametrize("ledger", ["", "{", "[]", "null", '{"stages": []}', '{"stages": [3]}', '{"stages": 3}'])
def test_half_written_ledger(make, ledger):
    found = listing.summarize(make("a", time=1, ledger=ledger))
    assert (found.stage, found.end, found.step, found.saved) == (None, None, None, None)


@pytest.mark.parametrize(("metrics", "step"), [(None, 40), ('{"step": 45, "loss": 2.0}\n', 45)])
def test_saved_is_the_newest_complete_checkpoint_and_the_step_without_rows(make, metrics, step):
    run = make("a", time=1, metrics=metrics)
    assert listing.summarize(run).saved is None
    for name in ("step-5", "step-40", ".step-50.saving", "step-60.damaged", "step-x"):
        (run / "checkpoints" / name).mkdir(parents=True)
    (run / "checkpoints/step-70").touch()
    assert (listing.summarize(run).step, listing.summarize(run).saved) == (step, 40)


def test_the_first_line_says_what_a_recipe_is(tmp_path):
    (tmp_path / "a.toml").write_text("# A small one.\n# More.\n")
    (tmp_path / "b.toml").write_text("[model]\n")
    assert shelf.recipe_title(tmp_path / "a.toml") == "A small one."
    assert shelf.recipe_title(tmp_path / "b.toml") == ""
