"""`lighthouse sweep`, whose commands a small script stands in for: it leaves the files that they would."""

import functools
import json
import os
import shlex
import signal
import sys
import threading
import time

import pytest
from children import wait_until

from lighthouse_core import sweep as sweep_module
from lighthouse_core.job import plan
from lighthouse_core.sweep import lock

SWEEP = """
recipe = "tiny.toml"
set = ["checkpoint.keep=0"]

[evaluate]
tokens = 512

[runs.one]
recover = 5

[runs.two]
stage_1 = "one"
recover = 6
"""
CHILD = """
import json, os, pathlib, signal, sys, time
from lighthouse_core.config import load_recipe
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.recovery import plan_recovery
from lighthouse_core.runs.run import Run
from lighthouse_core.seal import seal

what, target, *rest = sys.argv[1:]
options = list(zip(rest[::2], rest[1::2]))
given, settings = dict(options), [value for name, value in options if name == "--set"]
mode, here = pathlib.Path("mode").read_text(), pathlib.Path(".")
if mode == "slow":
    def end(*_):
        (here / "ended").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if (here / "stubborn").exists() else end)
    (here / "begun").touch()
    time.sleep(60)
if mode == what:
    sys.exit("it went wrong")
if what == "eval":
    out = pathlib.Path(given["--out"])
    out.mkdir(parents=True)
    (out / "results.json").write_text(json.dumps({"tokens": int(given["--tokens"]), "sequences": 16}))
    sys.exit()
if what == "pretrain":
    run = create_run(load_recipe(target, settings), "tiny", given["--name"])
else:
    run = Run(target)
    run.write_recovery(plan_recovery(run, int(given["--steps"]), overrides=settings))
run.checkpoint_dir(run.end).mkdir(parents=True)
seal(run.checkpoint_dir(run.end))
"""


@pytest.fixture
def mode(here, monkeypatch):
    """Sets what the commands do: "" all they should, "slow" nothing for long, or the one that fails."""
    (here / "trial.toml").write_text(SWEEP)
    (here / "child.py").write_text(CHILD)
    runner = functools.partial(sweep_module.Runner, command=(sys.executable, str(here / "child.py")))
    monkeypatch.setattr(sweep_module, "Runner", runner)
    monkeypatch.setattr(sweep_module.runner, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(plan, "local_gpus", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def to(name):
        (here / "mode").write_text(name)

    to("")
    return to


def collected(here):
    return json.loads((here / "runs/trial.json").read_text())["runs"]


def test_a_sweep_from_a_failure_to_its_end(here, lighthouse, mode):
    mode("recover")
    result = lighthouse("sweep", "trial.toml")
    assert result.code == 1 and result.out == "runs/trial.json\n"
    assert "error: failed: one, two; left: one, two" in result.err and list(collected(here)) == ["one", "two"]
    mode("")
    result = lighthouse("sweep", "trial.toml")
    assert result.code == 0 and result.err.endswith("done: one, two\n")
    assert [len(run["ledger"]["stages"]) for run in collected(here).values()] == [2, 2]
    assert not (here / "runs/.trial.json").exists()
    # Again there is nothing to do.
    assert lighthouse("sweep", "trial.toml", "--dry-run").out == "one: done\ntwo: done\n"
    before = (here / "runs/trial.json").read_bytes()
    (here / "trial.toml").write_text(SWEEP.replace("recover = 5", "recover = 7"))
    result = lighthouse("sweep", "trial.toml")
    assert result.error == "error: run runs/one has recover.steps = 5, and the sweep asks for 7"
    assert (here / "runs/trial.json").read_bytes() == before


def test_a_failure_before_anything_was_measured(here, lighthouse, mode):
    mode("pretrain")
    result = lighthouse("sweep", "trial.toml")
    assert result.code == 1 and result.out == "" and not (here / "runs/trial.json").exists()
    words = "error: failed: one; two waits for the first stage of one; left: one, two"
    assert result.err.splitlines()[-1] == words


def test_a_dry_run_writes_nothing(here, lighthouse, mode):
    result = lighthouse("sweep", "trial.toml", "--dry-run")
    assert result.code == 0 and result.out.startswith("one: lighthouse pretrain tiny.toml --name one")
    assert result.out.splitlines()[1] == "two: waits for one" and not (here / "runs").exists()
    mode("recover")
    lighthouse("sweep", "trial.toml")
    (here / "runs/two").rename(here / "two")
    before = sorted((here / "runs").rglob("*"))
    result = lighthouse("sweep", "trial.toml", "--dry-run")
    assert result.out == ("one: lighthouse recover runs/one --steps 5\ntwo: lighthouse recover runs/two --steps 6\n")
    assert sorted((here / "runs").rglob("*")) == before


def test_the_commands_it_prints_are_a_shells(here, lighthouse, mode):
    settings = ['lighthouse.scorer="block"', "model.dense_layers=[0, 1]"]
    (here / "trial.toml").write_text(SWEEP.replace("[runs.one]", f"[runs.one]\nset = {json.dumps(settings)}"))
    mode("pretrain")
    printed = lighthouse("sweep", "trial.toml", "--dry-run").out.splitlines()[0]
    said = next(line for line in lighthouse("sweep", "trial.toml").err.splitlines() if "pretrain" in line)
    for line in (printed, said):
        words = shlex.split(line.partition("one: ")[2])
        assert words[:3] == ["lighthouse", "pretrain", "tiny.toml"] and set(settings) < set(words)


def test_what_is_refused(here, lighthouse, mode):
    with lock(here / "runs", "trial"):
        assert "another process runs the sweep trial" in lighthouse("sweep", "trial.toml").error
    for minutes in ("0", "-1", "nan"):
        assert "--minutes must be above 0" in lighthouse("sweep", "trial.toml", "--minutes", minutes).error
    assert "cannot read" in lighthouse("sweep", "nothing.toml").error


def test_time_that_is_up(here, lighthouse, mode, monkeypatch):
    monkeypatch.setattr(sweep_module.runner, "_LEAST_SECONDS", 0)
    mode("slow")
    result = lighthouse("sweep", "trial.toml", "--minutes", "0.02")
    assert result.code == 143 and result.err.splitlines()[-1] == "time is up; left: one, two"


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGHUP], 143),
        ([signal.SIGTERM, signal.SIGINT], 143),
    ],
)
def test_signals(here, lighthouse, mode, monkeypatch, numbers, code):
    monkeypatch.setattr(sweep_module.runner, "SAME_REQUEST_SECONDS", 0.1)
    mode("slow")
    if len(numbers) > 1:
        (here / "stubborn").touch()

    def send():
        wait_until((here / "begun").exists)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    # So that the default does not end the tests where the sweep handles nothing.
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGHUP)}
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    begin = time.monotonic()
    try:
        result = lighthouse("sweep", "trial.toml")
        sender.join()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert result.code == code and result.err.splitlines()[-1] == "stopped; left: one, two"
    assert time.monotonic() - begin < 30 and (here / "ended").exists() == (len(numbers) == 1)
