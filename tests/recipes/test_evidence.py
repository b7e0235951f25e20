"""The experiments of recipes/evidence, and the report of what they found."""

import copy
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from lighthouse_core.config import load_recipe
from lighthouse_core.config.sweep import load_sweep

EVIDENCE = Path(__file__).parents[2] / "recipes/evidence"
SWEEPS = sorted(file for file in EVIDENCE.glob("*.toml") if file.stem not in ("base", "held-out"))


def report():
    spec = importlib.util.spec_from_file_location("report", EVIDENCE / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_a_sweep_says_what_it_expects_and_compares_runs_of_as_many_tokens(file):
    sweep = load_sweep(file)
    assert "Expected" in sweep.about
    recipes = {name: load_recipe(EVIDENCE / sweep.recipe, sweep.settings(name)) for name in sweep.runs}
    steps = {
        name: (0 if run.other_phases else run.at) or recipes[name].training.steps for name, run in sweep.runs.items()
    }
    steps = {name: steps[name] + run.recover for name, run in sweep.runs.items()}
    # Dense runs of other lengths are for equal wall-clock, other recoveries of a stage 1 for equal loss; without a
    # recovery a stage 1 is for others.
    sparse = [name for name, run in sweep.runs.items() if run.recover and recipes[name].lighthouse.enabled]
    whole = {steps[name] for name in sparse if sweep.runs[name].at or not sweep.runs[name].stage_1}
    dense = {steps[name] for name, recipe in recipes.items() if not recipe.lighthouse.enabled}
    # A method of a second length has a dense run beside it, too.
    assert whole <= dense if dense else len(whole) <= 1


def test_readme_tells_what_the_report_does():
    """Of each row of its table the loss, the seconds, those of dense training, and the saving."""

    def rows(page, heading):
        told = (EVIDENCE / page).read_text(encoding="utf-8").partition(heading)[2].partition("\n## ")[0]
        return [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("| ")][1:]

    known = {
        (f"{float(loss):.3f}", seconds, dense, re.sub(r" \(.*\)", "", saving))
        for *_, seconds, loss, dense, saving in (row for row in rows("REPORT.md", "## At equal loss") if len(row) == 8)
    }
    told = [row for row in rows("../../README.md", "### What to use") if not row[1].startswith("dense")]
    assert len(told) == 5
    for _, _, *figures, _ in told:
        assert tuple(figures) in known


def test_readme_tells_what_a_step_of_the_recommended_recipe_takes():
    report = (EVIDENCE / "REPORT.md").read_text(encoding="utf-8")
    table = report.partition("\n## schedule-98k\n")[2].partition("### Seconds a step")[2].partition("\n#")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    # A run has its seconds in one of two columns.
    seconds = {name: float(" ".join(cells).split()[0]) for name, *cells in rows}
    recipe = load_recipe(EVIDENCE.parent / "530m_98k_growing.toml")
    stage_1, recovery = recipe.training.steps, recipe.recover.steps
    sparse, dense = seconds["geometric"], seconds["dense"]
    total = (stage_1 + recovery) * dense / (stage_1 * sparse + recovery * dense)
    readme = " ".join((EVIDENCE / "../../README.md").read_text(encoding="utf-8").split())
    assert f"such a growth took {sparse:.3f} s a step on average, and a dense step {dense:.3f} s" in readme
    assert f"is {dense / sparse:.2f} times as fast as dense training" in readme
    assert f"{total:.2f} times ({stage_1} + {recovery} steps)" in readme
    assert f"{stage_1 + recovery} dense steps take {total:.2f} times as long" in readme


def run(loss, per_sequence, enabled=False, seed=1, recover=0, seconds=10.0, switch=None):
    stages = [{"stage": "dense", "start": 0, "end": 2, "steps": 2, "seconds": seconds, "flops": 4e9}]
    row = {"stage": "dense", "leaky": False, "steps": 1, "seconds": seconds / 2}
    end = {
        "sequences": 2,
        "tokens": 512,
        "leaky": False,
        "data": {"sha256": "0"},
        "loss": {
            "nats_per_token": {"mean": loss, "standard_error": 0.1, "sequences": 2},
            "per_sequence": per_sequence,
        },
        "context": {
            "context": 128,
            "full": {"mean": 1.5, "standard_error": None, "sequences": 1},
            "gain": {"mean": 0.25, "standard_error": 0.01, "sequences": 2},
        },
        "by_position": [
            {"first": first, "last": 2 * first - 1, "loss": {"mean": loss + 1 / first}}
            for first in (1, 2, 4, 8, 16, 32, 64, 128)
        ],
        "needles": {
            "cells": [
                {"tokens": 256, "depth": 0.0, "right": 1, "trials": 10},
                {"tokens": 256, "depth": 1.0, "right": 2, "trials": 10},
            ]
        },
    }
    return {
        "settings": {"recover": recover},
        "recipe": {
            "lighthouse": {"enabled": enabled},
            "training": {"seed": seed, "seq_len": 64},
            "schedule": {"decay_steps": 0},
            "recover": {"decay": "none"},
            "output": {"name": f"{seed}"},
        },
        "ledger": {"stages": stages},
        "rows": [
            {**row, "step": i, "tokens": 512 * i} | part
            for i in (1, 2)
            for part in ({"loss": 3.0 - i}, {"val_loss": 3.0 - i / 2})
        ],
        "evaluations": {"end": end} | ({"switch": switch} if switch else {}),
        "versions": {"torch": "2", "triton": "3", "flash-attn-4": None},
        "git_commit": "0123456789ab",
    }


@pytest.fixture
def sweep():
    switch = {
        "leaky": True,
        "loss": {"nats_per_token": {"mean": 1.2, "standard_error": 0.1, "sequences": 2}},
        "leak": [{"distance": 0, "mean": 0.6, "standard_error": 0.05, "pairs": 2, "largest": 1.0}],
        "switch": {
            "dense": {"mean": 2.5, "standard_error": 0.1, "sequences": 2},
            "jump": {"mean": 1.3, "standard_error": 0.1, "sequences": 2},
            "attention_errors": [{"layer": 1, "relative_error": 0.5}, {"layer": 2, "relative_error": 0.7}],
        },
    }
    return {
        "version": 1,
        "sweep": "trial",
        "about": "Is it?",
        "recipe": "base.toml",
        "set": ["training.seed=1"],
        "runs": {
            "dense": run(1.0, [0.9, 1.1]),
            "dense-2": run(1.2, [1.1, 1.3], seed=2),
            "norm": run(1.4, [1.2, 1.6], enabled=True, recover=1, seconds=8.0, switch=switch),
        },
    }


def test_a_report_holds_what_was_measured(sweep, tmp_path):
    module = report()
    norm = sweep["runs"]["norm"]
    for part in (*norm["rows"], *norm["ledger"]["stages"]):
        part["stage"] = "lighthouse"
    (tmp_path / "trial.json").write_text(json.dumps(sweep))
    (tmp_path / "conclusions.md").write_text("## So\n\nIt is.\n")
    module.write([tmp_path / "trial.json"], tmp_path)
    lines = (tmp_path / "REPORT.md").read_text().splitlines()
    # Beside the dense run of its own seed: 0.3 and 0.5.
    above = "+0.4000 ± 0.1000"
    assert (
        f"| norm | 2 | 1.4000 ± 0.1000 | {above} | {above} | 2.0000 | 1.5000 | 0.2500 ± 0.0100 | 0.15 | 8 |" in lines
        and "| dense-2 | 2 | 1.2000 ± 0.1000 |  |  | 2.0000 | 1.5000 | 0.2500 ± 0.0100 | 0.15 | 10 |" in lines
    )
    assert "| run | 16 to 31 | 64 to 127 |" in lines and "| norm | 1.462 | 1.416 |" in lines
    switch = "| norm | 1.2000 ± 0.1000 (leaky) | 2.5000 ± 0.1000 | +1.3000 | +0.6000 ± 0.0500 | 0.60 (0.50 to 0.70) |"
    assert switch in lines
    assert "| dense, dense-2 | 1, 2 | 1.0000, 1.2000 | 0.1414 |  | 0123456 |" in lines
    # After its 8 s the dense run was three fifths of the way from 2.5, at 5 s, to 2.0.
    assert "| norm | 8 | 2.0000 | 2.20 | -0.20 |" in lines
    assert "It is." in lines and "Is it?" in lines
    pytest.importorskip("matplotlib")
    assert (tmp_path / "figures/trial/compare.svg").stat().st_size > 1000


def dense_of(module, sweep, name):
    runs = module.trials(sweep)
    found = module.dense_of(next(trial for trial in runs if trial.name == name), runs)
    return found.name if found else None


def test_runs_that_decay_are_held_against_one_that_does(sweep):
    module = report()
    norm = sweep["runs"]["norm"]
    assert dense_of(module, sweep, "norm") == "dense"
    norm["recipe"]["recover"]["decay"] = "linear"
    assert dense_of(module, sweep, "norm") is None
    sweep["runs"]["dense-2"]["recipe"] |= {"schedule": {"decay_steps": 1}, "training": {"seed": 1, "seq_len": 64}}
    assert dense_of(module, sweep, "norm") == "dense-2"
    # Another shape is another decay.
    norm["recipe"]["recover"]["decay"] = "cosine"
    assert dense_of(module, sweep, "norm") is None
    sweep["runs"]["dense-2"]["recipe"]["schedule"] |= {"decay": "cosine", "min_lr_factor": 0.0}
    assert dense_of(module, sweep, "norm") == "dense-2"
    sweep["runs"]["dense-2"]["recipe"]["schedule"]["min_lr_factor"] = 0.1
    assert dense_of(module, sweep, "norm") is None


def test_runs_with_decays_of_another_shape_are_no_repetitions(sweep):
    module, norm = report(), sweep["runs"]["norm"]
    norm["recipe"]["recover"]["decay"] = "linear"
    again = copy.deepcopy(norm)
    again["recipe"]["training"]["seed"] = 7
    alike = [module.but_for_the_seed(one) for one in module.trials({"runs": {"a": norm, "b": again}})]
    assert alike[0] == alike[1]
    again["recipe"]["recover"]["decay"] = "1-sqrt"
    alike = [module.but_for_the_seed(one) for one in module.trials({"runs": {"a": norm, "b": again}})]
    assert alike[0] != alike[1]


def test_runs_are_held_against_one_of_as_many_steps(sweep):
    module = report()
    sweep["runs"]["dense"]["ledger"]["stages"] = [{"stage": "dense", "start": 0, "end": 1}]
    assert dense_of(module, sweep, "norm") is None
    sweep["runs"]["dense"]["ledger"]["stages"].append({"stage": "dense", "start": 1, "end": 2})
    assert dense_of(module, sweep, "norm") == "dense"


def test_the_best_dense_run_of_the_same_steps_is_named_too(sweep):
    module = report()
    runs = sweep["runs"]
    # Another decay, and lower; of another seed it is no matter.
    runs["decayed"] = json.loads(json.dumps(run(0.9, [0.8, 1.0])))
    runs["decayed"]["recipe"]["schedule"]["decay_steps"] = 1
    trials = {trial.name: trial for trial in module.trials(sweep)}
    found = {name: module.best_dense_of(trial, list(trials.values())) for name, trial in trials.items()}
    assert {name: best.name for name, best in found.items()} == {
        "dense": "decayed",
        "dense-2": "dense-2",
        "norm": "decayed",
        "decayed": "decayed",
    }
    assert module.beside(trials["norm"], found["norm"]) == "+0.5000 ± 0.1000"
    runs["decayed"]["ledger"]["stages"][0]["end"] = 3
    assert module.best_dense_of(trials["norm"], module.trials(sweep)).name == "dense"


def test_a_dense_run_of_other_settings_is_no_baseline(sweep):
    module = report()
    runs = sweep["runs"]
    ablation = json.loads(json.dumps(runs["dense"]))
    ablation["recipe"]["data"] = {"shuffle": "documents"}
    sweep["runs"] = {"ablation": ablation, **runs}
    assert dense_of(module, sweep, "norm") == "dense"
    assert dense_of(module, sweep, "ablation") == "ablation"
    del sweep["runs"]["dense"]
    assert dense_of(module, sweep, "norm") is None


def test_other_settings_are_no_repetition(sweep):
    module = report()
    assert "dense, dense-2" in module.repetitions([module.trials(sweep)])
    # Keys that came later, as by default.
    norm, other = sweep["runs"]["norm"], json.loads(json.dumps(sweep["runs"]["norm"]))
    other["recipe"] = {
        **other["recipe"],
        "lighthouse": {"enabled": True, "phases": [], "budget": {"every": 0, "threshold": 0.02, "queries": 256}},
        "optimizer": {"weight_decay": 0.1, "beta1": 0.9},
        "data": {"paths": ["stdlib"]},
    }
    sweep["runs"] = {"norm": norm, "other": other}
    assert "norm, other" in module.repetitions([module.trials(sweep)])
    # 0 is not the default of this one.
    for change in ({"lr": 1.0}, {"weight_decay": 0.0}):
        other["recipe"]["optimizer"] = change
        assert module.repetitions([module.trials(sweep)]) == ""


def test_repetitions_are_each_held_against_dense_of_their_own_sweep(sweep):
    module = report()
    again = json.loads(json.dumps(sweep))
    again["runs"]["norm"]["evaluations"]["end"]["loss"]["per_sequence"] = [1.1, 1.7]
    lines = module.repetitions([module.trials(sweep), module.trials(again)]).splitlines()
    # 0.3 and 0.5 from it, and 0.2 and 0.6; then 0.3 and 0.5 from a dense run that is 0.1 lower.
    assert "| norm | 1, 1 | 1.4000, 1.4000 | 0.0000 | +0.4000, +0.4000 | 0123456 |" in lines
    again["runs"]["dense"]["evaluations"]["end"]["loss"]["per_sequence"] = [0.8, 1.0]
    lines = module.repetitions([module.trials(sweep), module.trials(again)]).splitlines()
    assert "| norm | 1, 1 | 1.4000, 1.4000 | 0.0000 | +0.4000, +0.5000 | 0123456 |" in lines


def test_other_text_is_not_compared(sweep):
    sweep["runs"]["norm"]["evaluations"]["end"]["data"] = {"sha256": "1"}
    module = report()
    with pytest.raises(SystemExit, match="different text"):
        module.results(module.trials(sweep), [])
    sweep["runs"]["norm"]["evaluations"]["end"]["data"] = {"sha256": "0"}
    sweep["runs"]["norm"]["ledger"]["stages"][0]["data"] = "a"
    assert dense_of(module, sweep, "norm") is None
    sweep["runs"]["dense"]["ledger"]["stages"][0]["data"] = "a"
    assert dense_of(module, sweep, "norm") == "dense"
    assert "dense-2" not in module.repetitions([module.trials(sweep)])


def test_compilation_is_not_counted(sweep):
    sweep["runs"]["dense"]["rows"][0] |= {"seconds": 100.0, "first_of_launch": True}
    assert [point.seconds for point in report().trials(sweep)[0].curve.points] == [5.0, 10.0]


def test_steps_of_each_window_have_a_time_of_their_own(sweep):
    norm = sweep["runs"]["norm"]
    first = {**norm["rows"][0], "stage": "lighthouse", "seconds": 1.0, "window": 8}
    # The first step of the second window compiles.
    seconds = (1.0, 1.0, 1.0, 1.0, 100.0, 3.0, 3.0, 3.0)
    rows = [first | {"step": step, "seconds": each} for step, each in enumerate(seconds, start=1)]
    for row in rows[4:]:
        row["window"] = 16
    norm["rows"] = rows
    norm["ledger"]["stages"] = [{"stage": "lighthouse", "start": 0, "end": 8, "steps": 8, "flops": 1e9}]
    trial = next(trial for trial in report().trials(sweep) if trial.name == "norm")
    assert trial.seconds == 4 * 1.0 + 4 * 3.0
    assert (
        report().steps([trial]).splitlines()[-1]
        == "| norm | 1.000 (1.000 to 1.000), then 3.000 (3.000 to 100.000) |  | 0.0 |"
    )


def test_no_equal_time_without_validations_on_both_sides(sweep):
    module = report()
    whole = json.dumps(sweep)
    assert "| norm | 8 |" in module.same_time(module.trials(sweep))
    for name, kept in (("dense", 1), ("dense", 0), ("norm", 0)):
        sweep = json.loads(whole)
        rows = sweep["runs"][name]["rows"]
        validations = [row for row in rows if "val_loss" in row]
        sweep["runs"][name]["rows"] = [row for row in rows if "loss" in row] + validations[:kept]
        assert module.same_time(module.trials(sweep)) == ""


def test_no_equal_time_of_runs_that_decay(sweep):
    module = report()
    for name, key in (("norm", {"recover": {"decay": "linear"}}), ("dense", {"schedule": {"decay_steps": 1}})):
        sweep["runs"][name]["recipe"] |= key
    assert dense_of(module, sweep, "norm") == "dense"
    assert module.same_time(module.trials(sweep)) == ""


def decay(run, steps, recover, seconds=5.0):
    """The same with so many steps, over the last of which its rate goes to zero."""
    run = json.loads(json.dumps(run))
    run["settings"]["recover"] = recover
    run["recipe"]["recover"]["decay"] = "linear"
    run["ledger"]["stages"] = [{"stage": "dense", "start": 0, "end": steps, "steps": steps, "flops": 1e9}]
    run["rows"] = [{**run["rows"][0], "step": step, "seconds": seconds} for step in range(1, steps + 1)]
    return run


def test_runs_that_decay_are_held_against_dense_ones_of_several_lengths(sweep, tmp_path):
    module = report()
    runs = sweep["runs"]
    sweep["runs"] = {
        "dense": decay(runs["dense"], 8, 2),
        "short": decay(run(1.6, [1.5, 1.7]), 4, 1),
        # Not over the last quarter, and of another seed.
        "late": decay(run(0.1, [0.1, 0.1]), 6, 1),
        "other": decay(run(0.1, [0.1, 0.1], seed=2), 6, 1),
        "norm": decay(runs["norm"], 8, 2, seconds=4.0),
        "quick": decay(runs["norm"], 8, 2, seconds=1.0),
    }
    # Three fifths of the way from 1.6, at 20 s, to 1.0, at 40 s.
    lines = module.same_time_decayed(module.beside_lines(module.trials(sweep), [])).splitlines()
    assert lines[2:] == ["| norm (25%) | 32 | 1.4000 | 1.24 | +0.16 |", "| quick (25%) | 8 | 1.4000 | outside |  |"]
    (tmp_path / "trial.json").write_text(json.dumps(sweep))
    module.write([tmp_path / "trial.json"], tmp_path)
    assert "figures/trial/time.svg" in (tmp_path / "REPORT.md").read_text() or not module.figures.pyplot()
    del sweep["runs"]["short"]
    assert module.same_time_decayed(module.beside_lines(module.trials(sweep), [])) == ""


def lines_beside(module, trial, *others):
    """Each line of the dense runs beside one run: share of the decay, and losses."""
    runs = module.trials({"runs": {"trial": trial}})
    others = module.trials({"runs": {str(number): other for number, other in enumerate(others)}})
    found = module.beside_lines(runs, others)
    return [(line.share, [loss for _, loss in line.outcomes]) for _, line in found]


def test_a_line_is_of_dense_runs_of_the_same_share_of_the_same_machine_and_text(sweep):
    module = report()
    norm = decay(sweep["runs"]["norm"], 10, 2, seconds=2.0)
    fifths = [decay(run(loss, [loss, loss]), steps, steps // 5) for steps, loss in ((5, 1.9), (10, 1.1))]
    quarters = [decay(run(loss, [loss, loss]), steps, steps // 4) for steps, loss in ((4, 1.6), (8, 1.2))]
    assert lines_beside(module, norm, *quarters) == [(0.25, [1.6, 1.2])]
    # 20 s are too early for its own share, which begins at 25.
    assert lines_beside(module, norm, *fifths, *quarters) == [(0.25, [1.6, 1.2])]
    slow = decay(sweep["runs"]["norm"], 10, 2, seconds=3.0)
    assert lines_beside(module, slow, *fifths, *quarters) == [(0.2, [1.9, 1.1])]
    # Another run of the same length does not make a line.
    assert lines_beside(module, slow, fifths[1], json.loads(json.dumps(fifths[1]))) == []
    for change in (
        lambda other: other["ledger"]["stages"][0].update(conditions={"device": "another"}),
        lambda other: other["versions"].update(torch="3"),
        lambda other: other["evaluations"]["end"]["data"].update(sha256="1"),
        lambda other: other["recipe"]["training"].update(seed=2),
    ):
        other = json.loads(json.dumps(fifths[0]))
        change(other)
        assert lines_beside(module, slow, other, fifths[1]) == []


def test_a_sweep_without_ends_shows_its_validations(sweep, tmp_path):
    module = report()
    runs = {name: decay(sweep["runs"]["norm"], 8, 2) for name in ("early", "late")}
    for name, each in runs.items():
        each["evaluations"] = {}
        each["rows"] += [{"step": step, "val_loss": 1 / step} for step in ((2, 4, 6) if name == "late" else (2, 4))]
    sweep["runs"] = runs
    # This one is still in stage 1: its recovery, and the decay with it, are to come.
    early = runs["early"]
    early["recipe"]["recover"]["decay"], early["recipe"]["schedule"]["decay_steps"] = "none", 0
    assert module.under_way(module.trials(sweep)).splitlines()[2:] == [
        "| early | 0.5000 | 0.2500 |  | 0.2500 at 4 |",
        "| late | 0.5000 | 0.2500 | 0.1667 | 0.1667 at 6 |",
    ]
    for each in runs.values():
        each["rows"] = [row for row in each["rows"] if "val_loss" not in row or each is runs["late"]]
    runs["late"]["rows"] += [{"step": step, "val_loss": 1 / step} for step in range(8, 26, 2)]
    assert module.under_way(module.trials(sweep)).splitlines()[2:] == [
        "| late | 0.1000 | 0.0833 | 0.0714 | 0.0625 | 0.0556 | 0.0500 | 0.0455 | 0.0417 | 0.0417 at 24 |"
    ]
    for each in runs.values():
        for row in each["rows"]:
            row["stage"] = "dense"
            row.setdefault("leaky", False)
    (tmp_path / "trial.json").write_text(json.dumps(sweep))
    module.write([tmp_path / "trial.json"], tmp_path)
    assert "### Under way" in (tmp_path / "REPORT.md").read_text()


def test_curves_are_drawn_against_seconds_of_one_clock_or_none(sweep, tmp_path, monkeypatch):
    module = report()
    drawn = []
    monkeypatch.setattr(module.compare, "plot", lambda curves, folder, axes: drawn.append("seconds" in axes))

    def write():
        (tmp_path / "trial.json").write_text(json.dumps(sweep))
        module.write([tmp_path / "trial.json"], tmp_path)

    write()
    sweep["per_gpu"] = 2
    write()
    sweep["per_gpu"] = 1
    sweep["runs"]["norm"]["ledger"]["stages"][0]["conditions"] = {"device": "another"}
    write()
    assert drawn == [True, False, False]


def test_runs_that_shared_a_gpu_have_no_times(sweep, tmp_path):
    module = report()
    sweep["per_gpu"] = 2
    sweep["runs"] |= {"whole": decay(run(1.6, [1.5, 1.7]), 8, 2), "half": decay(run(1.6, [1.5, 1.7]), 4, 1)}
    sweep["runs"]["decayed"] = decay(sweep["runs"]["norm"], 8, 2)
    runs = module.trials(sweep)
    assert module.same_time(runs) == module.same_time_decayed(module.beside_lines(runs, [])) == ""
    assert "| norm | 2 |" in module.results(runs, []) and "| 0.15 | - |" in module.results(runs, [])
    (tmp_path / "trial.json").write_text(json.dumps(sweep))
    module.write([tmp_path / "trial.json"], tmp_path)
    assert "shared a GPU" in (tmp_path / "REPORT.md").read_text()


def test_seconds_of_runs_that_shared_a_gpu_are_those_of_runs_that_had_one(sweep, tmp_path):
    module = report()
    norm = sweep["runs"]["norm"]
    for part in (*norm["rows"], *norm["ledger"]["stages"]):
        part["stage"] = "lighthouse"
    alone = json.loads(json.dumps(sweep)) | {"sweep": "alone"}
    for name, run in alone["runs"].items():
        del run["evaluations"]["end"]
        run["rows"] = [row | {"seconds": 2.0 if name == "norm" else 3.0, "memory_gib": 7.0} for row in run["rows"]]
        # What is no matter to a step.
        run["recipe"] |= {"training": {"seed": 5, "steps": 40, "seq_len": 64}, "schedule": {"decay_steps": 9}}
    sweep["per_gpu"] = 2
    for file, content in (("trial", sweep), ("alone", alone)):
        (tmp_path / f"{file}.json").write_text(json.dumps(content))
    module.write([tmp_path / "trial.json", tmp_path / "alone.json"], tmp_path)
    lines = (tmp_path / "REPORT.md").read_text().splitlines()
    assert "| norm | 2.000 (2.000 to 2.000) |  | 7.0 |" in lines
    assert "| dense |  | 3.000 (3.000 to 3.000) | 7.0 |" in lines
    assert any(
        "shared a GPU" in line and line.endswith("of such steps in `alone` (commit 0123456789, ?).") for line in lines
    )
    assert any(line.startswith("| norm | 2 | 1.4000") and line.endswith("| 4 |") for line in lines)
    dense, _, norm = module.trials(sweep, module.paces({"alone": alone}))
    assert (dense.seconds, norm.seconds) == (6.0, 4.0)
    norm.run["recipe"]["lighthouse"]["window"] = 8
    dense, _, norm = module.trials(sweep, module.paces({"alone": alone}))
    assert dense.timed and not norm.timed
    dense.run["ledger"]["stages"][0]["conditions"] = {"device": "another"}
    assert not dense.timed


def test_seconds_are_of_another_machine_where_they_are_not_known_of_its_own(sweep):
    module = report()
    dense = decay(sweep["runs"]["dense"], 8, 2)
    norm, short = decay(sweep["runs"]["norm"], 8, 2, seconds=3.5), decay(run(1.6, [1.5, 1.7]), 4, 1, seconds=50.0)
    paces = module.paces({"alone": {"runs": {"dense": dense}}})
    shared = json.loads(json.dumps(dense))
    for each in (shared, short):
        each["ledger"]["stages"][0]["conditions"] = {"device": "another"}
    here, there = module.trials({"runs": {"here": dense, "there": shared}}, paces)
    (trial,) = module.trials({"runs": {"shared": shared}, "per_gpu": 2}, paces)
    assert not trial.timed and here.machine != there.machine
    assert module.timed(trial, [there.machine, ("unknown", {})]) is trial
    found = module.timed(trial, [there.machine, here.machine])
    assert (found.seconds, found.machine, found.loss) == (40.0, here.machine, trial.loss)
    assert module.borrowed([found, trial]).endswith("(commit 0123456789, ?), on ?")
    assert module.borrowed([found, there]).endswith("(commit 0123456789, ?), on ? for shared; on another for there")
    assert module.borrowed([trial]) == ""
    # Its own goes before others, and both parts have to be known.
    both = module.paces({"alone": {"runs": {"dense": dense, "there": shared | {"rows": short["rows"]}}}})
    (trial,) = module.trials({"runs": {"shared": shared}, "per_gpu": 2}, both)
    assert module.timed(trial, [here.machine, there.machine]).seconds == 400.0
    shared["rows"].append({**dense["rows"][0], "step": 9, "stage": "another"})
    (trial,) = module.trials({"runs": {"shared": shared}, "per_gpu": 2}, both)
    assert not module.timed(trial, [here.machine, there.machine]).timed
    # A line goes through the dense runs of every machine, at the seconds of the run's own.
    others = module.trials({"runs": {"dense": dense, "short": short}}, paces)
    ((_, line),) = module.beside_lines(module.trials({"runs": {"norm": norm}}, paces), others)
    assert line.outcomes == [(20.0, 1.6), (40.0, 1.0)]


def test_a_dense_step_takes_as_long_whatever_the_first_stage_was(sweep):
    module = report()
    runs = [decay(sweep["runs"]["dense"], 8, 2, seconds) for seconds in (1.0, 2.0, 9.0)]
    runs[0]["recipe"] |= {"lighthouse": {"enabled": True, "scorer": "block"}, "model": {"dense_layers": [0]}}
    runs[1]["recipe"]["model"] = {"rope_theta": 5e5}
    runs[2]["recipe"]["model"] = {"dense_layers": [0, 1]}
    paces = module.paces({"alone": {"runs": dict(zip("abc", runs, strict=True))}})
    # The median of all three, also where a run had a GPU to itself.
    assert [seconds for seconds, _ in paces.values()] == [2.0]
    assert [trial.seconds for trial in module.trials({"runs": {"a": runs[0]}}, paces)] == [16.0]


def test_what_a_repetition_is(sweep):
    module = report()
    norm = decay(sweep["runs"]["norm"], 8, 2)
    again = json.loads(json.dumps(norm))
    again["recipe"]["training"]["seed"] = 2
    assert module.repetitions([module.trials({"runs": {"norm": norm, "again": again}})])

    def decays(run):
        run["settings"]["recover"] = 3

    def goes_on(run):
        run["ledger"]["stages"][0]["end"] = 9

    for change in (
        lambda run: run["ledger"]["stages"][0].update(data="other text"),
        lambda run: run["evaluations"]["end"]["data"].update(sha256="1"),
        lambda run: run["recipe"]["lighthouse"].update(window=8),
        lambda run: run["recipe"]["recover"].update(decay="cosine"),
        decays,
        goes_on,
    ):
        other = json.loads(json.dumps(again))
        change(other)
        assert module.repetitions([module.trials({"runs": {"norm": norm, "other": other}})]) == ""


def test_a_decay_by_the_schedule_is_one_to_zero(sweep):
    module, dense = report(), sweep["runs"]["dense"]
    for schedule, steps, shape in (
        ({"decay_steps": 3}, 3, ("linear", 0.0)),
        ({"decay_steps": 3, "decay": "cosine", "min_lr_factor": 0.0}, 3, ("cosine", 0.0)),
        ({"decay_steps": 3, "decay": "linear", "min_lr_factor": 0.1}, 0, ("linear", 0.1)),
    ):
        (trial,) = module.trials({"runs": {"dense": {**dense, "recipe": {**dense["recipe"], "schedule": schedule}}}})
        assert (trial.decay, trial.shape) == (steps, shape)


def test_dense_runs_repeat_each_other_whatever_stage_1_they_were_held_against(sweep):
    module, again = report(), json.loads(json.dumps(sweep["runs"]["dense"]))
    again["recipe"] |= {"lighthouse": {"enabled": False, "window": 8}, "model": {"dense_layers": [0]}}
    runs = module.trials({"runs": {"dense": sweep["runs"]["dense"], "again": again}})
    assert "dense, again" in module.repetitions([runs]) and module.spread([runs]) == {64: (0, 1)}
    again["recipe"]["model"]["rope_theta"] = 5e5
    assert module.repetitions([runs]) == "" and module.spread([runs]) == {}


def test_the_spread_of_repetitions_is_that_of_as_long_sequences():
    module, runs = report(), {}
    losses = {64: [(1.0, 1.2), (2.0, 2.0, 2.0, 2.0)], 256: [(1.0, 2.0, 3.0)]}
    for seq_len, repeated in losses.items():
        for place, group in enumerate(repeated):
            for seed, loss in enumerate(group):
                one = decay(run(loss, [loss], seed=seed), 8 * (place + 1), 1)
                one["recipe"]["training"]["seq_len"] = seq_len
                runs[f"{seq_len}-{place}-{seed}"] = one
    # Variances of 0.02 with one degree of freedom and of 0 with three; and of 1 with two.
    found = module.spread([module.trials({"runs": runs})])
    assert {seq_len: one.deviation for seq_len, one in found.items()} == pytest.approx({64: 0.005**0.5, 256: 1.0})
    assert {seq_len: one.free for seq_len, one in found.items()} == {64: 4, 256: 2}


def test_what_a_one_sided_test_of_5_percent_asks():
    """By the density of Student's t, summed from 0 to the quantile."""
    module, parts = report(), 10000
    for free in range(1, 11):
        quantile = module.Spread(1.0, free).shown
        scale = math.gamma((free + 1) / 2) / math.gamma(free / 2) / math.sqrt(free * math.pi)
        middles = (quantile * (part + 0.5) / parts for part in range(parts))
        area = sum(scale * (1 + x * x / free) ** (-(free + 1) / 2) for x in middles) * quantile / parts
        # Half of a quantile's last digit, times a density of at most 0.1.
        assert area == pytest.approx(0.45, abs=5e-5)
    assert module.Spread(1.0, 1000).shown == module.Spread(1.0, 10).shown


def test_a_line_takes_dense_runs_of_its_own_sweep_and_none_without_seconds(sweep):
    module = report()
    norm = decay(sweep["runs"]["norm"], 8, 2, seconds=3.5)
    dense, short, other = (decay(run(loss, [1, 1]), steps, steps // 4) for loss, steps in ((1, 8), (2, 4), (3, 8)))
    others = module.trials({"runs": {"other": other}})
    ((_, line),) = module.beside_lines(module.trials({"runs": {"norm": norm, "dense": dense, "short": short}}), others)
    assert [loss for _, loss in line.outcomes] == [2, 1]
    known = module.trials({"runs": {"dense": dense, "short": short}})
    for change in ("per_gpu", "device"):
        untimed = json.loads(json.dumps(norm))
        if change == "device":
            untimed["ledger"]["stages"][0]["conditions"] = {"device": "another"}
        runs = module.trials({"runs": {"norm": untimed}, "per_gpu": 2 if change == "per_gpu" else 1})
        assert module.beside_lines(runs, known) == []


def test_a_stage_without_costs_yet_is_left_out(sweep, tmp_path):
    module = report()
    norm = sweep["runs"]["norm"]
    norm["ledger"]["stages"].append({"stage": "later", "start": 2, "end": 4})
    norm["rows"].append({**norm["rows"][0], "step": 3, "stage": "later"})
    del norm["evaluations"]["end"]
    (tmp_path / "trial.json").write_text(json.dumps(sweep))
    module.write([tmp_path / "trial.json"], tmp_path)


@pytest.mark.slow
def test_the_report_is_of_the_results_that_are_here(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "conclusions.md").write_text((EVIDENCE / "conclusions.md").read_text())
    report().write(sorted((EVIDENCE / "results").glob("*.json")), tmp_path)
    assert (tmp_path / "REPORT.md").read_text() == (EVIDENCE / "REPORT.md").read_text()


def test_what_is_not_there_yet_is_left_out(sweep, tmp_path):
    module = report()
    del sweep["runs"]["norm"]["evaluations"]["end"]
    (tmp_path / "trial.json").write_text(json.dumps(sweep))
    module.write([tmp_path / "trial.json"], tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert "| norm | 1.4" not in text and "| norm | 1.2000" in text


def test_steps_of_a_phase_take_equally_long():
    phases = [{"share": 1.0, "enabled": True, "window": 64}, {"share": 1.0, "enabled": True, "window": 64, "topk": 4}]
    phases += [{"share": 1.0, "enabled": True, "window": 64, "window_end": 99}, {"share": 1.0, "enabled": False}]
    trial = report().Trial("grown", {"recipe": {"lighthouse": {"phases": phases}}})
    rows = [
        {"phase": 1, "window": 64},
        {"phase": 2, "window": 64},
        {"phase": 3, "window": 64},
        {"phase": 3, "window": 99},
    ]
    parts = [trial.part({"stage": "lighthouse"} | row) for row in [*rows, {"phase": 4}]]
    assert parts[2] == parts[3] and len(set(parts)) == 4 and parts[4] == trial.part({"stage": "dense"}) == "dense"
    # As rows of before there were phases, and as a run without them.
    assert parts[0] == trial.part({"stage": "lighthouse", "window": 64})
    plain = report().Trial("plain", {"recipe": {"lighthouse": {"window": 64, "compression": 9}}})
    # The method does not read the compression.
    assert parts[0] == plain.part({"stage": "lighthouse"})
    # Lists of blocks are wider with budgets, which other methods do not read.
    for method, same in (("blocks", False), ("chunked", True)):
        found = {
            report().Trial("b", {"recipe": {"lighthouse": more | {"method": method}}}).part({"stage": "lighthouse"})
            for more in ({}, {"budget": {"every": 0}}, {"budget": {"every": 20}})
        }
        assert len(found) == (1 if same else 2)


def test_while_a_window_grows_steps_count_with_their_mean(sweep):
    module = report()
    norm = sweep["runs"]["norm"]
    norm["recipe"]["lighthouse"] = {
        "enabled": True,
        "phases": [{"share": 1.0, "enabled": True, "window": 64, "window_end": 256}],
    }
    row = norm["rows"][0] | {"stage": "lighthouse", "phase": 1}
    # The first two rows compiled, and a later one.
    seconds = [91.0, 47.0, 3.0, 4.0, 5.0, 96.0, 7.0, 8.0, 9.0, 10.0]
    norm["rows"] = [row | {"step": step, "seconds": each} for step, each in enumerate(seconds, 1)]
    (pace,) = module.Trial("norm", norm).own_paces.values()
    # They count as the second smallest of the five nearest rows, all others as they are.
    assert pace == pytest.approx((4.0 + 4.0 + 3.0 + 4.0 + 5.0 + 5.0 + 7.0 + 8.0 + 9.0 + 10.0) / 10)
    # Three of five rows may compile.
    assert module.without_compiling([5.0, 1.0, 7.0, 1.1, 9.0, 1.2, 1.3]) == [1.1, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3]
    # What takes longer as the window grows is no compilation.
    assert module.without_compiling([1.0, 1.1, 1.2, 1.3, 1.4, 1.7]) == [1.0, 1.1, 1.2, 1.3, 1.4, 1.7]
    assert module.without_compiling([1.0]) == [1.0]


def test_how_much_longer_dense_training_takes_to_a_loss(sweep):
    module = report()
    dense = [decay(run(loss, [loss]), steps, steps // 4, seconds=1.0) for loss, steps in ((2.0, 4), (1.0, 16))]
    other = decay(run(1.2, [1.2], seed=2), 16, 4, seconds=1.0)
    ends = [decay(run(loss, [loss], enabled=True, recover=1), 4, 1, seconds=0.5) for loss in (1.55, 2.5, 1.0)]
    for each, seed in zip(ends, (1, 3, 4), strict=True):
        each["recipe"]["training"]["seed"] = seed
        each["recipe"]["lighthouse"]["window"] = seed
    runs = {"short": dense[0], "long": dense[1], "again": other, "growing": ends[0], "norm": ends[1]}
    runs["best"] = ends[2]
    trials = {"trial": module.trials({"runs": runs})}
    rows = module.equal_loss(trials, {64: module.Spread(0.1, 9), 256: module.Spread(0.9, 9)}).splitlines()[2:]
    # The dense runs end at 2.0 and, on average, at 1.1; half-way in loss is half-way in the logarithm of time.
    needed, error = 8.0, 0.1 * (1 + 0.25 + 0.125) ** 0.5
    ratio = needed / 2.0
    assert rows[0].split(" | ")[-2:] == [
        f"{needed:.0f} (line)",
        f"{ratio:.2f} ± {ratio * error * math.log(4) / 0.9:.2f} |",
    ]
    assert "outside" in rows[1] and len(rows) == 3
    # It ends below all dense runs, of which the longest takes 16 s, 8 times as long.
    assert rows[2].split(" | ")[-2:] == ["> 16", f"> 8.00 (0.100 ± {0.1 * 1.5**0.5:.3f} below), not shown |"]
    # 2.04 standard errors are enough with six degrees of freedom, and not with four.
    for free, end in ((6, ") |"), (4, "), not shown |")):
        rows = module.equal_loss(trials, {64: module.Spread(0.04, free)}).splitlines()[2:]
        assert rows[2].split(" | ")[-1] == f"> 8.00 (0.100 ± {0.04 * 1.5**0.5:.3f} below{end}"
    # Repetitions of sequences of another length tell nothing of the error of these.
    rows = module.equal_loss(trials, {256: module.Spread(0.9, 9)}).splitlines()[2:]
    assert [row.split(" | ")[-1] for row in (rows[0], rows[2])] == [f"{ratio:.2f} |", "> 8.00 (0.100 below) |"]


@pytest.mark.parametrize(("offset", "power"), [(0.5, 0.7), (0.0, 2.0), (3.0, -0.3)])
def test_a_power_law_goes_through_three_lengths(offset, power):
    module = report()
    sign = 1 if power > 0 else -1

    def loss(seconds):
        return offset + sign * 2 * seconds**-power

    lengths = [module.Length(t, loss(t), 1) for t in (1.0, 3.0, 10.0, 40.0)]
    for seconds in (1.0, 1.7, 3.0, 8.0, 39.0):
        found = module.seconds_to(loss(seconds), lengths)
        assert found.seconds == pytest.approx(seconds) and not found.straight
        assert found.above.seconds <= seconds <= found.below.seconds
        # The curve's own slope, which the straight line between two lengths does not have: -dL/d(log t) = 2 |c| t^-c.
        assert found.slope == pytest.approx(seconds**power / (2 * abs(power)))
    assert module.seconds_to(loss(0.9), lengths) is None is module.seconds_to(loss(41.0), lengths)


def test_a_straight_line_over_the_logarithm_is_a_power_law_too():
    module = report()
    lengths = [module.Length(math.exp(t), 5.0 - t, 1) for t in (0, 1, 3)]
    found = module.seconds_to(5.0 - 2, lengths)
    assert (found.seconds, found.slope) == pytest.approx((math.exp(2), 1.0))
    # Losses that do not fall from one length to the next are on no such curve.
    odd = [module.Length(1.0, 3.0, 1), module.Length(2.0, 1.0, 1), module.Length(4.0, 1.5, 1)]
    found = module.seconds_to(2.0, odd)
    assert found.seconds == pytest.approx(2**0.5) and found.straight


def test_needles_by_how_far_back_they_are(sweep):
    module = report()

    def cells(*right):
        places = [(256, 0.0), (256, 1.0), (1024, 0.0), (1024, 0.5), (1024, 0.75)]
        return {"cells": [dict(tokens=n, depth=d, right=r, trials=10) for (n, d), r in zip(places, right, strict=True)]}

    dense = decay(run(1.0, [1.0]), 3, 1)
    grown = decay(run(1.0, [1.0], enabled=True, recover=1), 3, 1)
    for each, right in ((dense, (9, 10, 2, 8, 7)), (grown, (8, 10, 5, 6, 7))):
        each["recipe"]["lighthouse"]["window"] = 4096
        each["evaluations"]["end"]["needles"] = cells(*right)
    grown["recipe"]["lighthouse"]["phases"] = [{"window": 64, "window_end": 256}, {"window": 512}]
    runs = module.trials({"runs": {"dense": dense, "grown": grown}})
    lines = module.needles_by_distance(runs, []).splitlines()
    assert lines[0] == "| run | to 4 | to 256 | to 512 | to 1024 | widest window | beyond it, beside dense |"
    assert lines[2] == "| dense | 10 of 10 | 16 of 20 | 8 of 10 | 2 of 10 | - | - |"
    # 5 and 2 of 10 lie further back than 512 tokens.
    assert lines[3] == f"| grown | 10 of 10 | 15 of 20 | 6 of 10 | 5 of 10 | 512 | {module.apart((5, 10), (2, 10))} |"
    # A dense run that ended lower and was asked something else is passed over.
    other = decay(run(0.5, [0.5]), 3, 1)
    assert module.needles_by_distance(runs, module.trials({"runs": {"other": other}})).splitlines() == lines
    # Everything is in reach of a dense layer, of a phase without a window and of a dense phase.
    for section, changed in (
        ("model", {"dense_layers": [0]}),
        ("lighthouse", {"phases": [{"window": 64}, {"window": 0}]}),
        ("lighthouse", {"phases": [{"window": 64}, {"enabled": False}]}),
    ):
        far = copy.deepcopy(grown)
        far["recipe"][section] = far["recipe"].get(section, {}) | changed
        assert module.widest(module.Trial("far", far)) is None
    assert module.widest(module.Trial("grown", grown)) == 512


def test_the_interval_of_a_difference_of_shares_is_newcombes():
    # Newcombe 1998, Statistics in Medicine 17, table II: 56 of 70 and 48 of 80, method 10: 0.0524 to 0.3339.
    assert report().apart((56, 70), (48, 80)) == "+0.20 (+0.05 to +0.33)"
    assert report().apart((0, 10), (0, 20)) == "+0.00 (-0.16 to +0.28)"
