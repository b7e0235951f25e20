"""What a run's ledger says it has cost."""

import json

import pytest

from lighthouse_core.config import load_recipe
from lighthouse_core.estimate import flops_per_token
from lighthouse_core.runs import Recovery, create_run

# Tokens a step of the quickstart.
STEP = 4 * 2048


@pytest.fixture
def run(tmp_path):
    def make(*settings: str):
        recipe = load_recipe("recipes/quickstart.toml", [f'output.dir="{tmp_path}"', "training.steps=20", *settings])
        return create_run(recipe, "quickstart", "a")

    return make


def log(run, *rows):
    """Rows of (stage, step, steps, seconds a step)."""
    with (run.path / "metrics.jsonl").open("a") as file:
        for stage, step, steps, seconds in rows:
            row = {"step": step, "stage": stage, "loss": None, "steps": steps, "seconds": seconds}
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"step": rows[-1][1], "stage": rows[-1][0], "val_loss": 1.0}) + "\n")
    run.settle()
    assert json.loads((run.path / "ledger.json").read_text()) == run.ledger
    return run.ledger


def flops(run, stage):
    return STEP * flops_per_token(run.recipe, stage)


def begin_recovery(run, steps=10):
    run.write_recovery(Recovery(run.recipe, 20, 20 + steps, 20, stopped_early=False))


def test_stage_1_beside_an_estimated_dense_run(run):
    run = run()
    ledger = log(run, ("lighthouse", 1, 1, 6.0), ("lighthouse", 10, 9, 2.0), ("lighthouse", 20, 10, 2.0))
    (stage,) = ledger["stages"]
    assert (stage["steps"], stage["tokens"], stage["seconds"]) == (20, 20 * STEP, 44.0)
    assert stage["flops"] == 20 * flops(run, "lighthouse")
    # At the same FLOPs a second, but for the first step, which compiles.
    seconds = 2.0 * flops(run, "dense") / flops(run, "lighthouse")
    assert ledger["dense_step"] == {"seconds": pytest.approx(seconds), "how": "estimated"}
    assert ledger["dense"] == {"seconds": pytest.approx(20 * seconds), "flops": 20 * flops(run, "dense")}


def test_a_measured_dense_step_counts_for_more_than_an_estimate(run):
    run = run()
    run.note(measured_dense_seconds=7.0)
    ledger = log(run, ("lighthouse", 10, 10, 2.0))
    assert ledger["dense_step"] == {"seconds": 7.0, "how": "measured"}
    assert ledger["dense"]["seconds"] == 70.0


def test_the_steps_of_a_recovery_count_for_most(run):
    run = run()
    run.note(measured_dense_seconds=7.0)
    log(run, ("lighthouse", 20, 20, 2.0))
    begin_recovery(run)
    # The first step compiles.
    ledger = log(run, ("dense", 21, 1, 50.0), ("dense", 25, 4, 8.0), ("dense", 29, 4, 9.0), ("dense", 30, 1, 30.0))
    assert [stage["seconds"] for stage in ledger["stages"]] == [40.0, 50.0 + 32.0 + 36.0 + 30.0]
    assert ledger["dense_step"] == {"seconds": 9.0, "how": "recovery"}
    assert ledger["dense"] == {"seconds": 30 * 9.0, "flops": 30 * flops(run, "dense")}
    assert ledger["measured_dense_seconds"] == 7.0


def test_a_recovery_of_one_step_tells_nothing_of_its_speed(run):
    run = run()
    log(run, ("lighthouse", 20, 20, 2.0))
    begin_recovery(run)
    assert log(run, ("dense", 21, 1, 50.0))["dense_step"]["how"] == "estimated"


def test_a_dense_run_has_costs_and_no_comparison(run):
    run = run("lighthouse.enabled=false")
    ledger = log(run, ("dense", 1, 1, 5.0), ("dense", 20, 19, 1.0))
    assert ledger["stages"][0]["seconds"] == 24.0
    assert ledger["stages"][0]["flops"] == 20 * flops(run, "dense")
    assert "dense" not in ledger


def test_before_the_first_row_the_ledger_stays(run):
    run = run()
    before = run.ledger
    run.settle()
    assert run.ledger == before


def test_a_row_that_a_crash_cut_short_is_left_out(run):
    run = run()
    log(run, ("lighthouse", 10, 10, 2.0))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "stage": "lighth')
    run.settle()
    assert run.ledger["stages"][0]["steps"] == 10


def test_a_stage_begun_again_is_counted_anew(run):
    """The rows decide: settling twice, or after rows were dropped, adds nothing up."""
    run = run()
    rows = [("lighthouse", 10, 10, 2.0)]
    first = log(run, *rows)
    run.settle()
    assert run.ledger == first
    (run.path / "metrics.jsonl").unlink()
    assert log(run, *rows) == first
