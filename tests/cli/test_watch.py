"""What a training shows: lines, JSON, nothing, and the live view on a pseudo-terminal."""

import fcntl
import json
import os
import pty
import re
import sys
import termios
import textwrap
import time

import pytest
from children import start

from lighthouse_cli import _output, _view, _watch
from lighthouse_core.config import load_recipe
from lighthouse_core.runs.create import create_run


def row(step: int, **values) -> dict:
    filled = {"grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 9000.0, "seconds": 1.0, "data_seconds": 0.0}
    return {"step": step, "stage": "lighthouse", "leaky": True, "loss": 2.0, "memory_gib": 1.0} | filled | values


VALIDATION = {"step": 100, "stage": "lighthouse", "leaky": True, "val_loss": 1.5}


@pytest.fixture
def rows(trainer):
    trainer.rows = [row(1), row(100), VALIDATION]
    return trainer.rows


def test_away_from_a_terminal_rows_are_plain_lines(lighthouse, trainer, rows):
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a")
    assert isinstance(trainer.watcher, _watch.Lines) and not trainer.watcher.takes_words
    lines = answer.err.splitlines()
    assert lines[1].startswith("step 1/100  lighthouse  loss 2.0000 (leaky)  grad 0.500  lr 1.00e-03  9,000 tok/s")
    assert lines[2].startswith("step 100/100  ") and lines[2].endswith("0:00 left")
    assert lines[3] == "step 100  lighthouse  validation loss 1.5000 (leaky)"
    assert lines[4].startswith("done; ") and answer.out == "runs/a\n"
    assert "\x1b" not in answer.err


def test_a_figure_that_is_not_finite_is_null_in_the_file_and_nan_in_words(lighthouse, trainer):
    trainer.rows = [row(1, loss=None, grad_norm=None), row(2, loss=None), VALIDATION | {"val_loss": None}]
    err = lighthouse("pretrain", "tiny.toml", "--name", "a").err
    assert "\nstep 1/100  lighthouse  loss nan (leaky)  grad nan  lr" in err
    assert "\nstep 100  lighthouse  validation loss nan (leaky)\n" in err
    shown = "\n".join(line.plain for line in _view.render(trainer.watcher.progress, time.monotonic(), 80))
    assert "loss       nan leaky  !!\n" in shown and "validation nan leaky at 100" in shown

    assert "nan (leaky)" in lighthouse("runs").out
    (found,) = json.loads(lighthouse("runs", "--json").out, parse_constant=pytest.fail)
    assert (found["loss"], found["val_loss"], found["step"]) == (None, None, 100)


def test_a_second_stage_shows_its_own_rows_alone(lighthouse, trainer, rows):
    lighthouse("pretrain", "tiny.toml", "--name", "a")
    trainer.rows = [*rows, row(101, stage="dense", leaky=False)]
    err = lighthouse("recover", "a").err
    assert "\nstep 101/120  dense  loss 2.0000  grad" in err and err.count("step 10") == 1
    assert "leaky" not in err and len(trainer.watcher.progress.points) == 3


def test_json_prints_the_rows_and_nothing_else_on_stdout(lighthouse, trainer, rows):
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a", "--json")
    assert [json.loads(line) for line in answer.out.splitlines()] == rows
    assert answer.err.startswith("run runs/a\n") and "step " not in answer.err
    trainer.rows = [*rows, row(101, stage="dense")]
    answer = lighthouse("recover", "a", "--json", "--quiet")
    assert [json.loads(line)["step"] for line in answer.out.splitlines()] == [101]
    assert answer.err == "done; go on with: lighthouse strip runs/a OUT\n"
    assert trainer.watcher.quiet


def test_quiet_leaves_errors_and_the_final_line(lighthouse, trainer, rows):
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a", "-q")
    assert (answer.err, answer.out) == ("done; go on with: lighthouse recover runs/a\n", "runs/a\n")
    assert trainer.watcher.quiet
    trainer.code, trainer.stop = 130, 110
    err = lighthouse("recover", "--quiet").err
    assert err == "interrupted; step 110 is saved. Continue with: lighthouse recover runs/a\n"
    assert lighthouse("recover", "none", "--quiet").err.startswith("error: no run none")
    trainer.code, trainer.stop = 0, None
    assert "recovering runs/a" in lighthouse("recover").err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_when_lines_are_drawn_over(monkeypatch, settings, expected):
    class Terminal:
        encoding = "UTF-8"

        def isatty(self):
            return True

    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert _output.can_redraw() is expected
    Terminal.encoding = "latin-1"
    assert not _output.can_redraw()


@pytest.fixture
def terminal(here):
    """Runs a small worker under the live view of a real launch; returns the exit code and what the terminal got."""

    def run(body: str, keys: bytes = b"") -> tuple[int, str]:
        made = create_run(load_recipe("tiny.toml"), "tiny", "a")
        (here / "worker.py").write_text("import json, os, signal, sys, time\n" + textwrap.dedent(body))
        (here / "main.py").write_text(
            textwrap.dedent(f"""
            import sys
            import typer
            from lighthouse_cli import _train, _watch
            from lighthouse_core.job import launch
            from lighthouse_core.job.plan import Asked
            from lighthouse_core.runs.run import Run
            launch.command = lambda run_dir: [sys.executable, "worker.py"]
            _watch._REDRAW_SECONDS = 0.5
            run = Run({str(made.path)!r})
            try:
                _train.train(run.path, run, launch.Plan(1), "again", Asked())
            except typer.Exit as end:
                sys.exit(end.exit_code)
            """)
        )
        ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment.pop("NO_COLOR", None)
        process = start(
            [sys.executable, "main.py"],
            stdin=theirs,
            stderr=theirs,
            stdout=theirs,
            env=environment | {"PYTHONUTF8": "1"},
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )
        os.close(theirs)
        seen, begin = b"", time.monotonic()
        while time.monotonic() - begin < 60:
            try:
                seen += os.read(ours, 65536)
            except OSError:
                break
            if keys and b"ready" in seen:
                os.write(ours, keys)
                keys = b""
        os.close(ours)
        return process.wait(timeout=60), seen.decode()

    return run


ROW = f"""
def rows(*steps):
    with open("runs/a/metrics.jsonl", "a") as file:
        for step in steps:
            file.write(json.dumps({row(1)!r} | {{"step": step}}) + "\\n")
"""


def test_words_stay_above_the_view(terminal):
    code, seen = terminal(
        ROW + "print('words of the job', file=sys.stderr, flush=True); rows(1); time.sleep(1.4)\n"
        "os.write(2, b'cut'); time.sleep(1); print(' short', flush=True); rows(100)"
    )
    assert code == 0
    assert seen.index("words of the job\r\n") < seen.index("cut short\r\n") < seen.rindex("step 100/100")
    assert " leaky" in seen
    assert seen.rindex("step 1/100") < seen.index("done after 0:0") and seen.endswith("\r\n\x1b[J")


def test_a_traceback_is_whole_and_comes_last(terminal):
    code, seen = terminal(ROW + "rows(1); time.sleep(1)\nraise ZeroDivisionError('here')")
    assert code == 1
    trace = seen[seen.index("Traceback") :]
    assert "ZeroDivisionError: here\r\n" in trace
    last = r"\x1b\[Jstep 1/100  lighthouse  loss 2.0000 \(leaky\)  grad 0.500  lr 1.00e-03  9,000 tok/s  1:3\d left"
    assert re.search(last + "$", trace.splitlines()[-1])


def test_ctrl_c_is_passed_on_and_the_last_view_stays(terminal):
    code, seen = terminal(
        """
        def save(number, frame):
            time.sleep(1)
            os.makedirs("runs/a/checkpoints/step-7")
            open("runs/a/checkpoints/step-7/manifest.json", "w").close()
            open(os.path.join(os.environ["LIGHTHOUSE_JOB"], "exit"), "w").write("143")
            os._exit(143)
        signal.signal(signal.SIGTERM, save)
        print("ready", flush=True)
        time.sleep(60)
        """,
        keys=b"\x03",
    )
    assert code == 130
    assert "stopping: saves after this step" in seen
    assert "stopped after 0:0" in seen and seen.index("stopped after") < seen.index("interrupted; step 7 is saved")
