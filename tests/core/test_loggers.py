"""TensorBoard and Weights & Biases: each step once, and one run for all launches and stages."""

import json
import os
import sys
import types
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_recipe import RECIPE

from lighthouse_core.config import loads_recipe
from lighthouse_core.errors import UserError
from lighthouse_core.files import open_to_append
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.recovery import plan_recovery
from lighthouse_core.runs.run import Run
from lighthouse_core.seal import seal
from lighthouse_core.titan import loggers
from lighthouse_core.titan.loggers import TensorBoard, WeightsAndBiases

WANDB = ["training.steps=10", "metrics.wandb=true"]


def launch(folder, begin, end, value):
    """Logs the steps after `begin`, up to `end`."""
    board = TensorBoard(folder, begin)
    for step in range(begin + 1, end + 1):
        board.log({"loss": value + step, "lr": float("nan"), "first_of_launch": True}, step)
    return board


def read(folder, tag="loss"):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return [(one.step, one.value) for one in found.Scalars(tag)]


@pytest.mark.parametrize("clock", ["stands still", "runs", "goes back"])
def test_each_step_is_there_once_after_any_resumption(tmp_path, monkeypatch, clock):
    times = {"stands still": [5e8] * 4, "runs": [5e8, 6e8, 7e8, 8e8], "goes back": [5e8, 3e8, 4e8, 1e8]}[clock]
    known = {}
    # As killed after step 7 and after step 9, each time with a checkpoint of step 5, and gone on with to the end.
    for now, (begin, end, value) in zip(times, [(0, 7, 0), (5, 9, 100), (5, 7, 200), (7, 10, 300)], strict=True):
        monkeypatch.setattr(loggers.time, "time", lambda now=now: now)
        launch(tmp_path, begin, end, value)  # never closed: every row is there all the same
        known = {step: seen for step, seen in known.items() if step <= begin}
        known |= {step: value + step for step in range(begin + 1, end + 1)}
        assert read(tmp_path) == list(known.items())
    assert len(read(tmp_path, "first_of_launch")) == 10


def test_a_run_that_begins_anew_forgets_all(tmp_path):
    launch(tmp_path, 0, 4, 0)
    launch(tmp_path, 0, 2, 50)
    assert read(tmp_path) == [(1, 51), (2, 52)]


def test_a_row_that_a_crash_cut_off_hides_no_other(tmp_path):
    board = launch(tmp_path, 0, 4, 0)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-7])
    board.close()
    launch(tmp_path, 3, 5, 100)
    assert read(tmp_path) == [(1, 1), (2, 2), (3, 3), (4, 104), (5, 105)]


def test_other_files_there_do_not_matter(tmp_path):
    for name in ("events.out.tfevents.notes", "20250101-1200", "notes.txt"):
        (tmp_path / name).mkdir()
    launch(tmp_path / "tb", 0, 2, 0)
    launch(tmp_path, 0, 2, 0)
    assert len(read(tmp_path / "tb")) == 2


class Wandb(types.ModuleType):
    """Records what is asked of it; of a run that is known it forgets nothing."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.rows, self.run, self.fault = [], [], None, None

    def init(self, **settings):
        if self.fault:
            raise self.fault
        self.inits.append(settings)
        self.run = object()

    def log(self, row, step):
        self.rows.append((self.inits[-1]["id"], step, row))

    def finish(self):
        self.run = None


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("PROJECT", "RUN_NAME", "NAME", "RUN_ID", "TEAM", "RUN_TAGS"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    return module


@pytest.fixture
def run(tmp_path):
    return create_run(loads_recipe(RECIPE, [f"output.dir='{tmp_path}/runs'", *WANDB]), "tiny", "a")


def test_all_launches_and_stages_are_one_run_with_the_recipe(wandb, run):
    def once(step):
        here = Run(run.path)
        logger = WeightsAndBiases(here, here.recipe)
        logger.log({"loss": 1.0}, step)
        logger.close()
        assert wandb.run is None

    once(1)
    once(2)
    run.checkpoint_dir(10).mkdir(parents=True)
    seal(run.checkpoint_dir(10))
    run.write_recovery(plan_recovery(run, 5, overrides=['recover.decay="linear"']))
    once(11)
    assert len({one["id"] for one in wandb.inits}) == 1 and wandb.inits[0]["id"].isalnum()
    assert [(step, *row) for _, step, row in wandb.rows] == [(1, "loss"), (2, "loss"), (11, "loss")]
    assert all(one["resume"] == "allow" and one["allow_val_change"] for one in wandb.inits)
    first, _, last = wandb.inits
    assert (first["project"], first["name"], first["dir"]) == ("lighthouse", "a", str(run.path))
    for init, file in ((first, "recipe.toml"), (last, "recover.toml")):
        assert init["config"] == loads_recipe((run.path / file).read_text()).model_dump(mode="json")
    assert wandb.inits[-1]["config"]["recover"] == {"steps": 5, "decay": "linear"}
    assert set(wandb.inits[0]["config"]) >= {"model", "lighthouse", "training", "optimizer", "recover"}


def test_another_run_has_another_identity(wandb, run, tmp_path):
    other = create_run(loads_recipe(RECIPE, [f"output.dir='{tmp_path}/runs'", *WANDB]), "tiny", "b")
    for one in (run, other):
        WeightsAndBiases(one, one.recipe)
    assert wandb.inits[0]["id"] != wandb.inits[1]["id"]
    # A file that was emptied by a full disk is no identity.
    (run.path / "wandb-id").write_text("")
    WeightsAndBiases(run, run.recipe)
    assert len({one["id"] for one in wandb.inits}) == 3


def test_what_the_environment_says_counts(wandb, run, monkeypatch):
    given = {"RUN_ID": "mine", "PROJECT": "p", "RUN_NAME": "n", "TEAM": "t", "RUN_TAGS": "x"}
    for name, value in given.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    WeightsAndBiases(run, run.recipe)
    (one,) = wandb.inits
    assert [one[key] for key in ("id", "project", "name", "entity", "tags")] == ["mine", "p", "n", "t", "x"]
    assert one["group"] == "runs"
    monkeypatch.setenv("WANDB_RUN_GROUP", "g")
    WeightsAndBiases(run, run.recipe)
    assert wandb.inits[-1]["group"] == "g"


def test_an_account_that_does_not_answer_is_one_line(wandb, run):
    wandb.fault = RuntimeError("api_key not configured\nmore")
    with pytest.raises(UserError, match=r"^Weights & Biases cannot be set up: api_key not configured$") as caught:
        WeightsAndBiases(run, run.recipe)
    assert "WANDB_MODE=offline" in caught.value.hint


@pytest.fixture
def rows(tmp_path):
    """The rows of a run in tmp_path, and how one is written."""
    from lighthouse_core.titan.metrics import BaseLogger, Metrics

    metrics = Metrics.__new__(Metrics)
    metrics.stage = SimpleNamespace(run=SimpleNamespace(path=tmp_path), name="dense", phase=lambda step: None)
    metrics.logger, metrics.leaky, metrics.unwritten, metrics.taken = BaseLogger(), False, b"", False
    metrics.last_step, metrics.validation_loss = 0, None
    metrics.file = open_to_append(tmp_path / "metrics.jsonl")
    metrics.log_validation(1.0, 1)
    yield metrics
    metrics.close()


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("change", ["deleted", "replaced", "emptied"])
def test_rows_go_on_where_somebody_has_taken_their_file(tmp_path, rows, change):
    path = tmp_path / "metrics.jsonl"
    if change == "replaced":
        (tmp_path / "new").touch()
        (tmp_path / "new").replace(path)
    else:
        path.unlink() if change == "deleted" else os.truncate(path, 0)
    rows.log_validation(1.0, 2)
    assert steps(path) == [2]


@pytest.mark.parametrize("last", ["a row", "the end"])
@pytest.mark.parametrize("kind", ["a link", "a link to nothing", "a folder", "a pipe"])
def test_rows_wait_while_something_else_has_their_name(tmp_path, rows, caplog, kind, last):
    path, elsewhere = tmp_path / "metrics.jsonl", tmp_path / "elsewhere"
    path.unlink()
    if kind == "a link":
        elsewhere.write_text("mine")
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere)
    for step in (2, 3):
        rows.log_validation(1.0, step)
    assert len([record for record in caplog.records if "rows wait until the name is free" in record.message]) == 1
    assert not elsewhere.exists() or elsewhere.read_text() == "mine"
    path.rmdir() if kind == "a folder" else path.unlink()
    if last == "a row":
        rows.log_validation(1.0, 4)
        assert steps(path) == [2, 3, 4]
    rows.close()
    assert steps(path)[:2] == [2, 3] and not [record for record in caplog.records if "lost" in record.message]


def test_rows_that_wait_to_the_end_are_said_to_be_lost(tmp_path, rows, caplog):
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    rows.log_validation(1.0, 2)
    rows.close()
    assert "as they could not be written: 1" in caplog.text


def test_a_file_that_was_moved_and_linked_takes_its_rows(tmp_path, rows):
    path = tmp_path / "metrics.jsonl"
    path.rename(tmp_path / "moved")
    path.symlink_to("moved")
    rows.log_validation(1.0, 2)
    assert steps(tmp_path / "moved") == [1, 2]
