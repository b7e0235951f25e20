"""Saving: published as a whole, kept and deleted with care, its failures met at once."""

import contextlib
import errno
import io
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import kill_saves
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from lighthouse_core.errors import StorageError
from lighthouse_core.runs.listing import checkpoint_steps
from lighthouse_core.seal import damage
from lighthouse_core.titan import checkpointer


@pytest.fixture(autouse=True)
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def start(tmp_path):
    """Builds a job that saves under tmp_path/run; closes it afterwards."""
    jobs = []

    def build(keep=2, asynchronous=False):
        jobs.append(kill_saves.job(tmp_path / "run", keep, asynchronous))
        return jobs[-1]

    yield build
    for saver, *_ in jobs:
        saver.close()


def save(saver, step, *numbers):
    for number in numbers:
        step.step = number
        saver.save(number)


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_saved_steps_are_sealed_and_the_oldest_go(start, tmp_path):
    saver, step, _ = start()
    save(saver, step, 1, 2, 3)
    saver.close()
    run = tmp_path / "run"
    assert names(run) == {"step-2", "step-3"}
    assert [damage(run / "checkpoints" / name) for name in ("step-2", "step-3")] == [None, None]


def test_saves_are_told_of_and_other_steps_are_not(start):
    saver, step, _ = start()
    saver.interval, saver.also, seen = 2, (3, 7), []

    @contextlib.contextmanager
    def during():
        seen.append(step.step)
        yield

    saver.during_save = during
    save(saver, step, 1, 2, 3, 4, 5)
    assert seen == [2, 3, 4]


def test_the_last_one_does_not_come_on_top(start, tmp_path):
    saver, step, _ = start()
    save(saver, step, 1, 2)
    step.step = 3
    saver.save(3, last_step=True)
    saver.close()
    assert names(tmp_path / "run") == {"step-2", "step-3"}


def test_what_cannot_be_proven_ours_and_whole_is_not_deleted(start, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints/step-0").mkdir(parents=True)
    (run / "checkpoints/step-0/manifest.json").write_text("mine")
    (run / "checkpoints/step-9-notes").mkdir()
    saver, step, _ = start()
    save(saver, step, 1, 2, 3, 4)
    saver.close()
    assert names(run) == {"step-0", "step-9-notes", "step-3", "step-4"}


HOLDER = """
import fcntl, os, sys, time
held = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(held, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(2)
os.rename(sys.argv[1] + "/.step-7.saving", sys.argv[1] + "/step-7")
"""


def test_a_job_waits_for_what_an_earlier_one_still_saves(start, tmp_path):
    """Its launcher may have been killed, and with it the run's lock."""
    folder = tmp_path / "run/checkpoints"
    (folder / ".step-7.saving").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        start()
    assert names(tmp_path / "run") == {"step-7"}


def test_a_job_does_not_wait_for_ever(start, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointer, "_PATIENCE_SECONDS", 0.3)
    folder = tmp_path / "run/checkpoints"
    (folder / ".step-7.saving").mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="still holds"):
            start()
    assert names(tmp_path / "run") == {"step-7"}


def fails(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


class Full(io.BytesIO):
    """A file on a disk with room for so many bytes."""

    room = 0

    def write(self, content):
        if self.tell() + len(content) > self.room:
            fails()
        return super().write(content)


def test_a_disk_that_fills_within_a_tensor_is_told_from_other_failures():
    raised = set()
    for room in range(0, 4000, 100):
        file = Full()
        file.room = room
        with pytest.raises((OSError, RuntimeError)) as caught:
            torch.save(torch.ones(1000), file)
        raised.add(caught.type)
        error = checkpointer._storage_error(Path("step-3"), CheckpointException("save", {0: (caught.value, None)}))
        assert str(error) == "checkpoint step-3 could not be written: no space left on the device"
    # torch cannot end its archive then, and mostly says so instead.
    assert raised == {OSError, RuntimeError}


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the device"),
        (RuntimeError("first\nlast"), "last"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_failed_save_says_why(cause, words):
    error = checkpointer._storage_error(Path("step-3"), CheckpointException("save", {0: (cause, None)}))
    assert str(error) == f"checkpoint step-3 could not be written: {words}"


def test_leftovers_of_a_killed_process_go(start, tmp_path):
    for name in (".step-7.saving", ".step-3.deleting"):
        (tmp_path / "run/checkpoints" / name).mkdir(parents=True)
    start()
    assert names(tmp_path / "run") == set()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_met_before_the_save_and_costs_nothing(start, tmp_path, monkeypatch, asynchronous):
    saver, step, _ = start(asynchronous=asynchronous)
    save(saver, step, 1)
    saver._async_wait()
    monkeypatch.setattr(checkpointer.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(StorageError, match=r"needs 0\.007\d+ GB, but .* has 0\.001 GB free"):
        save(saver, step, 2)
    assert checkpoint_steps(tmp_path / "run") == [1] and damage(tmp_path / "run/checkpoints/step-1") is None


def test_a_failure_to_publish_ends_the_run(start, tmp_path, monkeypatch):
    saver, step, _ = start()
    save(saver, step, 1)
    monkeypatch.setattr(checkpointer, "seal", fails)
    with pytest.raises(StorageError, match="step-2 could not be written: No space left"):
        save(saver, step, 2)
    assert names(tmp_path / "run") == {"step-1"}


def test_a_failure_behind_the_scenes_is_met_at_the_next_step(start, monkeypatch):
    saver, step, _ = start(asynchronous=True)
    monkeypatch.setattr(checkpointer, "seal", fails)
    save(saver, step, 1)
    with pytest.raises(StorageError, match="step-1 could not be written"):
        for _ in range(200):
            # What torchtitan calls before every update.
            saver.maybe_wait_for_staging()
            time.sleep(0.05)


def test_closing_waits_for_the_last_save(start, tmp_path):
    saver, step, _ = start(asynchronous=True)
    save(saver, step, 1)
    saver.close()
    assert checkpoint_steps(tmp_path / "run") == [1] and damage(tmp_path / "run/checkpoints/step-1") is None


def test_kills_lose_nothing():
    script = Path(kill_saves.__file__)
    done = subprocess.run(
        [sys.executable, script, "--kills", "3"], capture_output=True, text=True, timeout=100, check=True
    )
    assert "3 restarts" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--asynchronous"]])
def test_200_kills_lose_nothing(options):
    script = Path(kill_saves.__file__)
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=900, check=True)
    print(done.stdout)
    assert "200 restarts" in done.stdout
