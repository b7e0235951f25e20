"""Whole jobs of small workers: what becomes of signals, failures and exit codes."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import children
import pytest
from children import ends, wait_for, wait_until


@pytest.fixture
def job(tmp_path):
    """Run a small worker through the real launcher; the result has code and stderr."""

    def run(body: str, nproc: int = 1, after=None, ignoring=(), patience: float = 300, patch: str = "", at=tmp_path):
        (at / "worker.py").write_text(
            "import os, signal, sys, time\nfrom lighthouse_core.job.exits import report_exit\n" + textwrap.dedent(body)
        )
        script = f"""
            import sys
            from pathlib import Path
            from lighthouse_core.job import launch, processes
            processes._SHUTDOWN_SECONDS, processes._KILL_SECONDS = {patience}, {min(patience, 20)}
            {patch}
            launch.command = lambda run_dir: [sys.executable, str(run_dir / "worker.py")]
            sys.exit(launch.launch(Path({str(at)!r}), launch.Plan({nproc})))
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        process = children.start(command, ignoring=ignoring, stderr=subprocess.PIPE, text=True)
        if after:
            threading.Thread(target=after, args=(process, at), daemon=True).start()
        _, stderr = process.communicate(timeout=120)
        return process.returncode, stderr

    return run


def at_once(case: Callable[..., None], tmp_path: Path, *cases: tuple[Any, ...]) -> None:
    """Call `case` with a folder of its own and each of these, all at the same time: most of it is waiting."""
    with ThreadPoolExecutor(len(cases)) as pool:
        begun = []
        for number, given in enumerate(cases):
            (tmp_path / str(number)).mkdir()
            begun.append(pool.submit(case, tmp_path / str(number), *given))
        for each in begun:
            each.result()


def test_a_users_mistake_is_the_workers_words_alone(job):
    code, stderr = job(
        """
        # As in the real one, a signal does not end the process that is about to print.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if report_exit(2):
            print("error: no such thing", file=sys.stderr)
        sys.exit(2)
        """,
        nproc=2,
    )
    assert (code, stderr) == (2, "error: no such thing\n")


def test_a_fault_shows_its_own_traceback_only(job):
    code, stderr = job("raise ZeroDivisionError('here')")
    assert code == 1
    assert stderr.count("Traceback") == 1 and "ZeroDivisionError: here" in stderr


WORKER = """
    from pathlib import Path
    from lighthouse_core.job.exits import follow_parent
    from lighthouse_core.job.heartbeat import beat, note_step
    from lighthouse_core.job.stop import listen_for_stop, stop_requested, training_begins
    here = Path(__file__).parent

    listen_for_stop()
    follow_parent()
    beat(Path(os.environ["LIGHTHOUSE_JOB"]), int(os.environ["RANK"]), 2)
    note_step(7)
    training_begins()
    (here / ("ready" if os.environ["RANK"] == "0" else "ready1")).write_text(str(os.getpid()))
    while not stop_requested():
        time.sleep(0.05)
    (here / "saving").touch()
    # In parts, as work is: one sleep would end within a hold.
    for _ in range(20):
        time.sleep({saving} / 20)
    (here / "saved").touch()
    report_exit(143)
    os._exit(143)
"""


def test_a_signal_has_the_worker_save_first(job, tmp_path):
    def interrupt(process, folder):
        wait_for(folder / "ready")
        process.send_signal(signal.SIGINT)

    # Others are told apart by the launcher alone, as below.
    assert job(WORKER.format(saving=1), after=interrupt) == (130, "")
    assert (tmp_path / "saved").exists()


def test_a_signal_that_whoever_started_it_had_it_ignore_stays_ignored(job, tmp_path):
    """As nohup does with SIGHUP, and a script with SIGINT for what it starts in the background."""

    def case(at, number):
        def interrupt(process, folder):
            worker = int(wait_for(folder / "ready", process))
            process.send_signal(number)
            time.sleep(0.5)
            ignored.append(process.poll() is None and not (folder / "saving").exists())
            # The worker begins with the default all the same.
            status = Path(f"/proc/{worker}/status").read_text()
            masks.append(int(status.split("SigIgn:")[1].split()[0], 16))
            process.send_signal(signal.SIGTERM)

        ignored, masks = [], []
        assert job(WORKER.format(saving=0), after=interrupt, ignoring=(number,), at=at) == (143, "")
        assert ignored == [True] and not masks[0] & 1 << (number - 1)
        assert (at / "saved").exists()

    at_once(case, tmp_path, (signal.SIGINT,), (signal.SIGHUP,))


def test_what_asks_a_job_to_save_counts_whoever_started_it(job, tmp_path):
    def case(at, number):
        def interrupt(process, folder):
            wait_for(folder / "ready", process)
            process.send_signal(number)

        everything = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
        assert job(WORKER.format(saving=0), after=interrupt, ignoring=everything, at=at) == (143, "")
        assert (at / "saved").exists()

    at_once(case, tmp_path, (signal.SIGTERM,), (signal.SIGUSR1,))


def test_a_second_signal_ends_everything_at_once(job, tmp_path):
    def interrupt(process, folder):
        wait_for(folder / "ready")
        process.send_signal(signal.SIGINT)
        wait_until((folder / "saving").exists)
        time.sleep(1.2)
        process.send_signal(signal.SIGINT)

    begin = time.monotonic()
    assert job(WORKER.format(saving=100), after=interrupt) == (130, "")
    assert time.monotonic() - begin < 60 and not (tmp_path / "saved").exists()
    assert ends(int((tmp_path / "ready").read_text()))


def test_a_signal_to_every_process_at_once_is_one_request(job, tmp_path):
    """So does a batch system; the launcher sends its own on to processes that have theirs already."""

    def case(at, number, code):
        def interrupt(process, folder):
            wait_for(folder / "ready1")
            wait_for(folder / "ready")
            for pid in children.tree(process.pid):
                os.kill(pid, number)

        assert job(WORKER.format(saving=3), nproc=2, after=interrupt, at=at) == (code, "")
        assert (at / "saved").exists()

    at_once(case, tmp_path, (signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130))


def test_a_process_that_does_not_answer_is_named_and_ends_the_job(job, tmp_path):
    def stop(process, folder):
        pids.append(int(wait_for(folder / "ready")))
        pids.append(int(wait_for(folder / "ready1")))
        os.kill(pids[1], signal.SIGSTOP)

    pids: list[int] = []
    code, stderr = job(WORKER.format(saving=0), nproc=2, after=stop)
    assert code == 1
    assert f"LighthouseError: rank 1 (process {pids[1]}), in step 7, did not answer for 2 s" in stderr
    assert all(ends(pid) for pid in pids)


STUBBORN = """
    import subprocess
    from pathlib import Path
    here = Path(__file__).parent
    if os.environ["RANK"] == "1":
        while not (here / "ready").exists():
            time.sleep(0.05)
        {end}
    # It does not end when it is asked to, and has started something itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleeper = subprocess.Popen(["sleep", "300"])
    (here / "ready").write_text(f"{{os.getpid()}} {{sleeper.pid}}")
    time.sleep(300)
"""


def test_the_others_of_a_process_that_fails_have_their_time_and_no_more(job, tmp_path):
    def case(at, end, words):
        begin = time.monotonic()
        code, stderr = job(STUBBORN.format(end=end), nproc=2, patience=2, at=at)
        assert code == 1 and words in stderr
        assert 2 < time.monotonic() - begin < 30
        assert all(ends(int(pid)) for pid in (at / "ready").read_text().split())

    at_once(case, tmp_path, ("os.kill(os.getpid(), 9)", "rank 1 was killed by SIGKILL"), ("sys.exit(7)", ""))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_workers_save_and_end_with_a_launcher_that_was_killed(job, tmp_path):
    def kill(process, folder):
        wait_for(folder / "ready")
        process.kill()

    code, _ = job(WORKER.format(saving=0), after=kill)
    assert code == -signal.SIGKILL
    assert ends(int((tmp_path / "ready").read_text()))
    assert (tmp_path / "saved").exists()


def _send(number, *pids):
    for pid in pids:
        os.kill(pid, number)


@pytest.mark.parametrize(
    "order",
    [
        "asked, then held",
        *(pytest.param(o, marks=pytest.mark.slow) for o in ("held, then asked", "all asked, then held")),
    ],
)
def test_a_job_that_is_held_as_a_whole_saves_once_it_goes_on(job, tmp_path, order):
    """As by a batch system that suspends it, or in a virtual machine that is paused."""

    def hold(process, folder):
        worker = int(wait_for(folder / "ready", process))
        if order == "asked, then held":
            process.send_signal(signal.SIGTERM)
            wait_until((folder / "saving").exists)
            _send(signal.SIGSTOP, process.pid, worker)
        elif order == "held, then asked":
            _send(signal.SIGSTOP, process.pid, worker)
            _send(signal.SIGTERM, process.pid, worker)
        else:
            # The launcher sends its own on only after the hold.
            _send(signal.SIGSTOP, process.pid)
            _send(signal.SIGTERM, process.pid, worker)
            wait_until((folder / "saving").exists)
            _send(signal.SIGSTOP, worker)
        time.sleep(4)
        _send(signal.SIGCONT, worker, process.pid)

    assert job(WORKER.format(saving=1), after=hold, patience=1.8) == (143, "")
    assert (tmp_path / "saved").exists()


def test_a_process_that_cannot_be_killed_is_named_and_is_no_success(job, tmp_path):
    """As one that waits in the kernel for a disk that does not answer: here SIGKILL is not sent."""

    def interrupt(process, folder):
        pids.append(int(wait_for(folder / "ready", process).split()[0]))
        process.send_signal(signal.SIGTERM)

    pids: list[int] = []
    body = """
        from pathlib import Path
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(__file__).with_name("ready").write_text(str(os.getpid()))
        # Not to hold the test's end of the pipe open.
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        time.sleep(60)
    """
    code, stderr = job(body, after=interrupt, patience=1, patch="processes.os.killpg = lambda pid, number: None")
    os.kill(pids[0], signal.SIGKILL)
    assert code == 1 and f"LighthouseError: rank 0 (process {pids[0]}) was killed and has not ended" in stderr
    assert ends(pids[0])


def test_a_job_that_ends_well(job):
    assert job("pass") == (0, "")
