"""The command line in this process, with the training itself replaced by the files it would leave."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from children import default_signals
from tiny_recipe import RECIPE

from lighthouse_cli import _output
from lighthouse_cli.app import main
from lighthouse_core.attention import backends
from lighthouse_core.job import launch, plan
from lighthouse_core.job.plan import Asked
from lighthouse_core.runs.run import Run
from lighthouse_core.seal import seal


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of a user error; fails unless that is all there is."""
        lines = self.err.splitlines()
        found = [line for line in lines if line.startswith("error: ")]
        assert self.code == 2 and self.out == "" and len(found) == 1, self
        assert lines[lines.index(found[0]) + 1 :] == [line for line in lines if line.startswith("hint: ")], self
        assert "Traceback" not in self.err
        return found[0]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory with a small recipe, tiny.toml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def lighthouse(here, monkeypatch, capsys):
    """Calls the command line as a shell would, one in which Triton's interpreter is not asked for."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_INTERPRETED", False)

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["lighthouse", *arguments])
        monkeypatch.setattr(_output, "_quiet", False)
        code = 0
        try:
            # What it puts into its environment is for its own children.
            with default_signals(), mock.patch.dict(os.environ):
                main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


class Trainer:
    """Stands in for the training processes: leaves `rows`, and a checkpoint at `stop` or at the stage's end."""

    def __init__(self):
        self.launches: list[tuple[str, launch.Plan]] = []
        self.stop: int | None = None
        self.code = 0
        self.rows: list[dict] = []
        self.fault: Exception | None = None
        # Of a job of several machines.
        self.asked: Asked | None = None
        self.watcher: launch.Watcher | None = None

    def __call__(self, run_dir: Path, plan: launch.Plan, watcher: launch.Watcher, asked: Asked | None = None) -> int:
        self.launches.append((str(run_dir), plan))
        self.asked = asked
        self.watcher = watcher
        if self.rows:
            # Training replaces the file.
            (run_dir / "new").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            (run_dir / "new").replace(run_dir / "metrics.jsonl")
            watcher.tick(False)
        if self.fault:
            raise self.fault
        if self.code in (0, 130, 143):
            step = Run(run_dir).end if self.stop is None else self.stop
            folder = Run(run_dir).checkpoint_dir(step)
            folder.mkdir(parents=True)
            seal(folder)
        return self.code


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
    trainer = Trainer()
    monkeypatch.setattr(launch, "launch", trainer)
    monkeypatch.setattr(plan, "local_gpus", lambda: 0)
    return trainer
