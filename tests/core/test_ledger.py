"""What a run's ledger says it has cost."""

import json

import pytest

from lighthouse_core.config import load_recipe
from lighthouse_core.estimate import flops_per_token
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.recovery import Recovery

# Tokens a step of the quickstart.
STEP = 4 * 2048
FIRST = True


@pytest.fixture
def run(tmp_path):
    def make(*settings: str):
        recipe = load_recipe("recipes/quickstart.toml", [f'output.dir="{tmp_path}"', "training.steps=20", *settings])
        return create_run(recipe, "quickstart", "a")

    return make


def log(run, *rows):
    """Rows of (stage, step, steps, seconds a step, and FIRST for a launch's first)."""
    with (run.path / "metrics.jsonl").open("a") as file:
        for stage, step, steps, seconds, *first in rows:
            row = {"step": step, "stage": stage, "loss": None, "steps": steps, "seconds": seconds}
            row |= {"first_of_launch": True} if first else {}
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"step": rows[-1][1], "stage": rows[-1][0], "val_loss": 1.0}) + "\n")
    run.settle()
    assert json.loads((run.path / "ledger.json").read_text()) == run.ledger
    return run.ledger


HERE, THERE = {"device": "a", "devices": 1}, {"device": "a", "devices": 2}


def flops(run, stage):
    return STEP * flops_per_token(run.recipe, stage)


def begin_recovery(run, steps=10):
    run.write_recovery(Recovery(run.recipe, 20, 20 + steps, 20, stopped_early=False))


def test_stage_1_beside_an_estimated_dense_run(run):
    run = run()
    ledger = log(run, ("lighthouse", 1, 1, 6.0, FIRST), ("lighthouse", 10, 9, 2.0), ("lighthouse", 20, 10, 2.0))
    (stage,) = ledger["stages"]
    assert (stage["steps"], stage["tokens"], stage["seconds"]) == (20, 20 * STEP, 44.0)
    assert stage["flops"] == 20 * flops(run, "lighthouse")
    # At the same FLOPs a second, but for the first step, which compiles.
    seconds = 2.0 * flops(run, "dense") / flops(run, "lighthouse")
    assert ledger["dense_step"] == {"seconds": pytest.approx(seconds), "how": "estimated"}
    assert ledger["dense"] == {"seconds": pytest.approx(20 * seconds), "flops": 20 * flops(run, "dense")}


def measured(seconds=7.0, conditions=HERE):
    return {"seconds": seconds, "conditions": conditions}


def test_a_measured_dense_step_counts_for_more_than_an_estimate(run):
    run = run()
    run.note(measured_dense=measured(), conditions=HERE)
    ledger = log(run, ("lighthouse", 10, 10, 2.0))
    assert ledger["dense_step"] == {"seconds": 7.0, "how": "measured"}
    assert ledger["dense"]["seconds"] == 70.0


def test_the_steps_of_a_recovery_count_for_most(run):
    run = run()
    run.note(measured_dense=measured(), conditions=HERE)
    log(run, ("lighthouse", 20, 20, 2.0))
    begin_recovery(run)
    run.note(conditions=HERE)
    ledger = log(
        run, ("dense", 21, 1, 50.0, FIRST), ("dense", 25, 4, 8.0), ("dense", 29, 4, 9.0), ("dense", 30, 1, 30.0)
    )
    assert [stage["seconds"] for stage in ledger["stages"]] == [40.0, 50.0 + 32.0 + 36.0 + 30.0]
    assert ledger["dense_step"] == {"seconds": 9.0, "how": "recovery"}
    assert ledger["dense"] == {"seconds": 30 * 9.0, "flops": 30 * flops(run, "dense")}


def test_only_what_ran_alike_is_compared(run):
    """On another number of devices, say, dense steps tell nothing of what these would have been here."""
    run = run()
    run.note(measured_dense=measured(conditions=THERE), conditions=HERE)
    assert log(run, ("lighthouse", 20, 20, 2.0))["dense_step"]["how"] == "estimated"
    begin_recovery(run)
    run.note(conditions=THERE)
    rows = [("dense", 21, 1, 50.0, FIRST), ("dense", 30, 9, 1.0)]
    assert log(run, *rows)["dense_step"]["how"] == "estimated"


def test_first_steps_alone_tell_nothing_of_a_recovery(run):
    run = run()
    run.note(conditions=HERE)
    log(run, ("lighthouse", 20, 20, 2.0))
    begin_recovery(run)
    run.note(conditions=HERE)
    rows = [("dense", 21, 1, 50.0, FIRST), ("dense", 22, 1, 60.0, FIRST)]
    ledger = log(run, *rows)
    assert ledger["dense_step"]["how"] == "estimated"
    assert ledger["stages"][1]["seconds"] == 110.0


def test_steps_before_an_interruption_count_without_a_row_of_theirs(run):
    """Saved at step 14; a new launch writes its first row at 15. And one that ended at 18, saved."""
    run = run()
    rows = [("lighthouse", 1, 1, 9.0, FIRST), ("lighthouse", 10, 9, 2.0), ("lighthouse", 15, 1, 9.0, FIRST)]
    run.checkpoint_dir(18).mkdir(parents=True)
    (stage,) = log(run, *rows)["stages"]
    assert (stage["steps"], stage["seconds"]) == (18, 9.0 + 18.0 + 9.0 + 7 * 2.0)


def test_checkpoints_of_a_recovery_are_no_steps_of_an_early_stopped_stage_1(run):
    run = run()
    log(run, ("lighthouse", 10, 10, 2.0))
    run.write_recovery(Recovery(run.recipe, 10, 18, 10, stopped_early=True))
    run.checkpoint_dir(14).mkdir(parents=True)
    ledger = log(run, ("dense", 11, 1, 3.0, FIRST))
    assert [stage["steps"] for stage in ledger["stages"]] == [10, 4]


def test_a_dense_run_has_costs_and_no_comparison(run):
    run = run("lighthouse.enabled=false")
    ledger = log(run, ("dense", 1, 1, 5.0), ("dense", 20, 19, 1.0))
    assert ledger["stages"][0]["seconds"] == 24.0
    assert ledger["stages"][0]["flops"] == 20 * flops(run, "dense")
    assert "dense" not in ledger


def test_a_dense_run_that_goes_on_has_the_costs_of_each_stage(run):
    run = run("lighthouse.enabled=false")
    run.note(data="00ff")
    log(run, ("dense", 10, 10, 1.0), ("dense", 20, 10, 1.0))
    begin_recovery(run)
    ledger = log(run, ("dense", 21, 1, 9.0, FIRST), ("dense", 30, 9, 2.0))
    assert [stage["steps"] for stage in ledger["stages"]] == [20, 10]
    assert [stage["seconds"] for stage in ledger["stages"]] == [20.0, 27.0]
    assert ledger["stages"][0]["data"] == "00ff" and "dense" not in ledger


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


def test_costs_follow_the_rows_alone(run):
    """Settling twice adds nothing up, and rows that were dropped cost nothing."""
    run = run()
    log(run, ("lighthouse", 20, 20, 2.0))
    stage_1 = run.ledger
    begin_recovery(run)
    kept = (run.path / "metrics.jsonl").read_text()
    ledger = log(run, ("dense", 21, 1, 50.0, FIRST), ("dense", 25, 4, 8.0))
    run.settle()
    assert run.ledger == ledger and ledger["stages"][1]["steps"] == 5
    (run.path / "metrics.jsonl").write_text(kept)
    run.settle()
    assert run.ledger["stages"][1] == {"stage": "dense", "start": 20, "end": 30}
    assert run.ledger["dense"] == stage_1["dense"]


def test_rows_that_do_not_say_how_many_steps_they_are_of_give_no_costs(run):
    run = run()
    (run.path / "metrics.jsonl").write_text('{"step": 10, "stage": "lighthouse", "loss": 1.0, "seconds": 2.0}\n3\n')
    log(run, ("lighthouse", 20, 10, 2.0))
    assert "steps" not in run.ledger["stages"][0] and "dense" not in run.ledger
