"""lighthouse runs and lighthouse recipes."""

import errno
import json
import os
from pathlib import Path

import pytest

from lighthouse_core import shelf
from lighthouse_core.config import load_recipe


def test_runs_newest_first(lighthouse, trainer, here):
    trainer.stop = 80
    lighthouse("pretrain", "tiny.toml", "--name", "old")
    trainer.stop = None
    lighthouse("pretrain", "tiny.toml", "--name", "new")
    rows = [
        {"step": 90, "stage": "lighthouse", "leaky": True, "loss": 2.25},
        {"step": 100, "stage": "lighthouse", "leaky": True, "val_loss": 3.125},
    ]
    (here / "runs/old/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1')
    os.utime("runs/old", (1000, 1000))
    answer = lighthouse("runs")
    assert answer.code == 0 and "\x1b" not in answer.out
    lines = [line.split() for line in answer.out.splitlines() if line.strip()]
    assert lines[0] == ["name", "attention", "step", "saved", "loss", "validation", "updated"]
    assert lines[2][:6] == ["new", "lighthouse", "100/100", "100", "-", "-"]
    assert lines[3][:8] == ["old", "lighthouse", "90/100", "80", "2.2500", "(leaky)", "3.1250", "(leaky)"]

    found = json.loads(lighthouse("runs", "--json").out)
    assert [run["name"] for run in found] == ["new", "old"]
    assert (found[1]["path"], found[1]["loss"], found[1]["leaky"]) == ("runs/old", 2.25, True)
    assert (found[0]["loss"], found[0]["end"]) == (None, 100)
    assert [(run["step"], run["saved"]) for run in found] == [(100, 100), (90, 80)]


def test_runs_where_there_is_none(lighthouse, here):
    answer = lighthouse("runs")
    assert (answer.code, answer.out) == (0, "") and "no run under runs" in answer.err
    assert "there is no directory elsewhere" in lighthouse("runs", "elsewhere").error
    Path("elsewhere").mkdir()
    assert json.loads(lighthouse("runs", "elsewhere", "--json").out) == []
    assert "is not a directory" in lighthouse("runs", "tiny.toml").error


def test_a_folder_that_may_not_be_searched(lighthouse, here, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    # Root may search any.
    monkeypatch.setattr(Path, "stat", refuse)
    assert lighthouse("runs", "closed/runs").error == "error: closed/runs: Permission denied"


def test_recipes_are_listed_with_what_they_are(lighthouse):
    out = lighthouse("recipes", "list").out
    for name, path in shelf.shipped_recipes().items():
        assert name in out and shelf.recipe_title(path)[:40] in out


def test_a_recipe_is_shown_as_it_is(lighthouse):
    text = shelf.shipped_recipes()["quickstart"].read_text()
    assert lighthouse("recipes", "show", "quickstart").out == text
    assert lighthouse("recipes", "show", "quickstart.toml").out == text
    answer = lighthouse("recipes", "show", "quickstar")
    assert answer.error and "did you mean quickstart?" in answer.err
    for command in (["pretrain"], ["profile", "step"], ["data", "inspect"]):
        assert "no recipe Quickstrt.toml; did you mean quickstart?" in lighthouse(*command, "Quickstrt.toml").error


@pytest.mark.parametrize("dest", [None, "mine.toml", "folder", "folder/mine.toml"])
def test_a_recipe_is_copied_and_nothing_overwritten(lighthouse, here, dest):
    (here / "folder").mkdir()
    where = {None: "quickstart.toml", "folder": "folder/quickstart.toml"}.get(dest, dest)
    arguments = ["recipes", "copy", "quickstart", *([dest] if dest else [])]
    assert lighthouse(*arguments).out == f"{where}\n"
    assert load_recipe(here / where) == load_recipe(shelf.shipped_recipes()["quickstart"])
    (here / where).write_text("mine")
    assert f"{where} exists" in lighthouse(*arguments).error
    assert (here / where).read_text() == "mine"
    assert "cannot write none/a.toml" in lighthouse("recipes", "copy", "quickstart", "none/a.toml").error


def test_wandb_is_checked_before_a_run_is_made(lighthouse, trainer, here, monkeypatch):
    (here / "wandb").mkdir()  # as it makes itself
    monkeypatch.syspath_prepend(str(here))
    answer = lighthouse("pretrain", "tiny.toml", "--set", "metrics.wandb=true", "--name", "a")
    assert "wandb, which is not installed" in answer.error and "lighthouse-pretrain[wandb]" in answer.err
    assert not trainer.launches and not (here / "runs/a").exists()
    (here / "wandb/__init__.py").touch()
    assert lighthouse("pretrain", "tiny.toml", "--set", "metrics.wandb=true", "--name", "a").code == 0
    (here / "wandb/__init__.py").unlink()
    assert "wandb" in lighthouse("recover", "a").error and len(trainer.launches) == 1
