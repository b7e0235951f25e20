"""What a launcher hears of its processes, and when it gives one up."""

import os
import struct
import subprocess
import sys
import time

import children

from lighthouse_core.job import heartbeat
from lighthouse_core.job.heartbeat import Listener


def test_a_job_that_is_held_up_as_a_whole_goes_on(tmp_path, monkeypatch):
    """As by a batch system that suspends it: then the launcher, too, has seen no time pass."""
    record = struct.Struct("<qqqq")
    (tmp_path / "rank3").write_bytes(record.pack(os.getpid(), 5, 0, 10))
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    listener = Listener(tmp_path)
    for now in (0.2, 0.4, 3600.0, 3600.2):  # noqa: B007  (the clock reads it)
        assert listener.silent() == []
    for i in range(60):
        now = 3600.2 + 0.2 * i
        silent = listener.silent()
    assert [str(pulse) for pulse in silent] == [f"rank 3 (process {os.getpid()}), before its first step,"]
    (tmp_path / "rank3").write_bytes(record.pack(os.getpid(), 6, 0, 10))
    assert listener.silent() == []


def test_a_process_that_has_ended_is_not_silent(tmp_path):
    """Not even while its parent has yet to hear of it."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        children.wait_until(lambda: children.state(process.pid) == "Z")
        (tmp_path / "rank0").write_bytes(struct.pack("<qqqq", process.pid, 5, 3, 10))
        assert Listener(tmp_path).pulses() == []
    beat = heartbeat.Heartbeat(tmp_path, 1, 10)
    assert [pulse.rank for pulse in Listener(tmp_path).pulses()] == [1]
    beat.ended = True
    beat.write()
    assert Listener(tmp_path).pulses() == []
