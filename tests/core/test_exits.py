"""How training processes end, and what that means for the job."""

import signal
import subprocess
import sys

import pytest

from lighthouse_core.errors import LighthouseError
from lighthouse_core.job.exits import conclude, report_exit, reported_exit


def test_the_first_report_of_an_exit_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTHOUSE_JOB", str(tmp_path))
    report_exit(2)
    report_exit(143)
    assert reported_exit(tmp_path) == 2
    monkeypatch.delenv("LIGHTHOUSE_JOB")
    report_exit(1)


@pytest.mark.parametrize(
    ("status", "reported", "received", "code"),
    [
        (0, None, [], 0),
        (0, None, [signal.SIGINT], 0),
        (2, 2, [], 2),
        (1, 2, [], 2),
        (1, None, [], 1),
        (1, 143, [], 1),  # a rank crashed, and the others were told to stop
        (-signal.SIGUSR1, None, [], 143),  # a worker that did not take signals yet
        (-signal.SIGINT, None, [], 130),
        (143, 143, [], 143),  # a scheduler stopped everything itself
        (143, None, [signal.SIGINT], 130),
        (143, 143, [signal.SIGINT], 130),
        (143, 130, [signal.SIGTERM], 143),
        (143, 143, [signal.SIGHUP], 143),
        (1, 1, [signal.SIGINT], 1),  # the checkpoint could not be written
        (-signal.SIGTERM, None, [signal.SIGTERM], 143),
        (-signal.SIGKILL, None, [signal.SIGINT], 130),  # by a second signal
    ],
)
def test_what_the_end_of_a_job_means(status, reported, received, code):
    assert conclude(status, reported, received, 0, "") == code


def test_a_killed_worker_is_a_fault_with_a_reason():
    with pytest.raises(LighthouseError, match="process of rank 3 was killed by SIGKILL") as caught:
        conclude(-signal.SIGKILL, 143, [], 3, "")
    assert caught.value.exit_code == 1 and "memory" in caught.value.hint


@pytest.mark.parametrize(
    ("status", "reported", "received"), [(0, None, []), (0, None, [15]), (143, 143, [15]), (2, 2, []), (-9, None, [2])]
)
def test_a_process_that_has_not_ended_is_a_fault_whatever_the_others_did(status, reported, received):
    with pytest.raises(LighthouseError, match=r"^rank 1 \(process 7\) was killed and has not ended$"):
        conclude(status, reported, received, 0, "rank 1 (process 7)")


def test_the_cause_is_named_before_what_has_not_ended():
    with pytest.raises(LighthouseError, match=r"of rank 0 was killed by SIGKILL; rank 1 .* has not ended$"):
        conclude(-signal.SIGKILL, None, [], 0, "rank 1 (process 7)")


# A thread that returns from native code while the interpreter goes down.
LATE_THREAD = """
import os, sys, threading, time
from datetime import timedelta
from torch.distributed import TCPStore
from lighthouse_core.job.exits import end_with

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(3)

def main(last):
    global slow, store
    slow = Slow()
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=1))
    threading.Thread(target=store.get, args=["never"], daemon=True).start()
    time.sleep(0.2)
    print("done")
    if isinstance(last, Exception):
        raise last
    return last

# Each in a process of its own; torch is imported once.
for last in (7, 0, OSError("no")):
    if not os.fork():
        end_with(lambda: main(last))
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_a_process_ends_with_its_own_code_whatever_threads_there_are():
    """With `sys.exit(main())` the process is aborted by the late thread (Python 3.11)."""
    ended = subprocess.run([sys.executable, "-c", LATE_THREAD], capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout) == (0, "done\n7\ndone\n0\ndone\n1\n")
    assert ended.stderr.count("Traceback") == ended.stderr.count("OSError: no") == 1
