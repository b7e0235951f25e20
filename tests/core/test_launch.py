"""Starting training processes: numbers, argv, environment, and what becomes of signals and exit codes."""

import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import children
import pytest
from children import ends, wait_for, wait_until

from lighthouse_core.config import loads_recipe
from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.job import heartbeat, launch
from lighthouse_core.job.heartbeat import Listener
from lighthouse_core.job.launch import Plan, check_world, command, environment, plan

RECIPE = """
[model]
dim = 64
layers = 2
heads = 2
ffn_dim = 96
vocab_size = 320
[lighthouse]
topk = 16
tile_parents = 8
[training]
seq_len = 1024
local_batch_size = 2
global_batch_size = 12
steps = 10
[optimizer]
lr = 1e-3
"""


@pytest.fixture
def gpus(monkeypatch):
    return lambda number: monkeypatch.setattr(launch, "local_gpus", lambda: number)


def test_auto_is_every_gpu_or_one_process(gpus):
    gpus(0)
    assert plan() == Plan(1)
    gpus(8)
    assert plan() == Plan(8)
    assert plan("2", 3, 1, "host:29500") == Plan(2, 3, 1, "host:29500")
    assert plan("2", 3, 1, "host:29500").world_size == 6


def test_any_number_of_processes_without_gpus(gpus):
    gpus(0)
    assert plan("5").nproc == 5


@pytest.mark.parametrize(
    "arguments",
    [
        ("0",),
        ("-1",),
        ("two",),
        ("1.5",),
        ("",),
        ("4",),
        ("1", 0),
        ("1", 2, 2, "host:1"),
        ("1", 2, -1, "host:1"),
        ("1", 2, 0, ""),
        ("1", 2, 0, "host"),
    ],
)
def test_numbers_out_of_range(gpus, arguments):
    gpus(2)
    with pytest.raises(UserError, match="--"):
        plan(*arguments)


@pytest.mark.parametrize(
    ("world", "settings", "fits"),
    [
        (1, [], True),
        (2, [], True),
        (3, [], True),
        (4, [], False),
        (6, [], True),
        (2, ["parallel.shard=2"], True),
        (2, ["parallel.shard=1"], False),
        (6, ["parallel.shard=3", "parallel.replicate=2"], True),
        (6, ["parallel.replicate=2"], True),
        (3, ["parallel.replicate=2"], False),
    ],
)
def test_batch_and_processes_must_fit(world, settings, fits):
    recipe = loads_recipe(RECIPE, settings)
    if fits:
        check_world(recipe, world)
    else:
        with pytest.raises(UserError, match=r"multiple of|does not make"):
            check_world(recipe, world)


def test_argv():
    assert command(Path("runs/a")) == [sys.executable, "-P", "-m", "lighthouse_core.worker", "runs/a"]


def test_every_process_has_its_ranks():
    assert launch.ranks(Plan(2)) == [{"RANK": "0", "LOCAL_RANK": "0"}, {"RANK": "1", "LOCAL_RANK": "1"}]
    many = Plan(2, 3, 2, "host:29500")
    assert [own["RANK"] for own in launch.ranks(many)] == ["4", "5"]
    shared = environment(many, {"RANK": "9"}, Path("/e"))
    assert (shared["WORLD_SIZE"], shared["LOCAL_WORLD_SIZE"], shared[launch.MEETING]) == ("6", "2", "host:29500")


def test_environment(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    found = environment(Plan(3), {"PYTHONPATH": "a:b", "X": "1"}, Path("/e"))
    assert found["OMP_NUM_THREADS"] == "2" and found["MKL_DYNAMIC"] == "FALSE"
    assert (found["PYTHONPATH"], found["X"], found["LIGHTHOUSE_JOB"], found["TMPDIR"]) == ("a:b", "1", "/e", "/e")
    assert environment(Plan(30), {}, Path("/e"))["OMP_NUM_THREADS"] == "1"
    assert environment(Plan(3), {"OMP_NUM_THREADS": "7"}, Path("/e"))["OMP_NUM_THREADS"] == "7"


def test_the_first_report_of_an_exit_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTHOUSE_JOB", str(tmp_path))
    launch.report_exit(2)
    launch.report_exit(143)
    assert (tmp_path / "exit").read_text() == "2"
    monkeypatch.delenv("LIGHTHOUSE_JOB")
    launch.report_exit(1)


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
    assert launch._exit_code(status, reported, received, 0) == code


def test_a_killed_worker_is_a_fault_with_a_reason():
    with pytest.raises(LighthouseError, match="process of rank 3 was killed by SIGKILL") as caught:
        launch._exit_code(-signal.SIGKILL, 143, [], 3)
    assert caught.value.exit_code == 1 and "memory" in caught.value.hint


@pytest.fixture
def job(tmp_path):
    """Run a small worker through the real launcher; the result has code and stderr."""

    def run(body: str, nproc: int = 1, after=None, ignoring=(), patience: float = 300):
        (tmp_path / "worker.py").write_text(
            "import os, signal, sys, time\nfrom lighthouse_core.job.launch import report_exit\n" + textwrap.dedent(body)
        )
        script = f"""
            import sys
            from pathlib import Path
            from lighthouse_core.job import launch
            launch._SHUTDOWN_SECONDS = {patience}
            launch.command = lambda run_dir: [sys.executable, str(run_dir / "worker.py")]
            sys.exit(launch.launch(Path({str(tmp_path)!r}), launch.Plan({nproc})))
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        process = children.start(command, ignoring=ignoring, stderr=subprocess.PIPE, text=True)
        if after:
            threading.Thread(target=after, args=(process, tmp_path), daemon=True).start()
        _, stderr = process.communicate(timeout=120)
        return process.returncode, stderr

    return run


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
    from lighthouse_core.job.launch import follow_parent
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
    time.sleep({saving})
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_whoever_started_it_had_it_ignore_stays_ignored(job, tmp_path, number):
    """As nohup does with SIGHUP, and a script with SIGINT for what it starts in the background."""

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
    assert job(WORKER.format(saving=0), after=interrupt, ignoring=(number,)) == (143, "")
    assert ignored == [True] and not masks[0] & 1 << (number - 1)
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_asks_a_job_to_save_counts_whoever_started_it(job, tmp_path, number):
    def interrupt(process, folder):
        wait_for(folder / "ready", process)
        process.send_signal(number)

    everything = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
    assert job(WORKER.format(saving=0), after=interrupt, ignoring=everything) == (143, "")
    assert (tmp_path / "saved").exists()


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


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_to_every_process_at_once_is_one_request(job, tmp_path, number, code):
    """So does a batch system; the launcher sends its own on to processes that have theirs already."""

    def interrupt(process, folder):
        wait_for(folder / "ready1")
        wait_for(folder / "ready")
        for pid in children.tree(process.pid):
            os.kill(pid, number)

    assert job(WORKER.format(saving=3), nproc=2, after=interrupt) == (code, "")
    assert (tmp_path / "saved").exists()


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


def test_a_job_that_is_held_up_as_a_whole_goes_on(tmp_path, monkeypatch):
    """As by a batch system that suspends it: then the launcher, too, has seen no time pass."""
    record = struct.Struct("<qqqq")
    (tmp_path / "rank3").write_bytes(record.pack(os.getpid(), 5, 0, 10))
    now = 0.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
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


def test_a_second_signal_ends_a_process_that_never_returns_to_python(tmp_path):
    script = """
        import ctypes, sys
        from lighthouse_core.job.stop import listen_for_stop, training_begins
        listen_for_stop()
        training_begins()
        print("ready", flush=True)
        # The second call never returns, whatever signals come.
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex), libc.pthread_mutex_lock(mutex)
    """
    process = children.start([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 143


def test_a_signal_before_training_ends_a_process_at_once(tmp_path):
    script = """
        import time
        from lighthouse_core.job.stop import listen_for_stop
        listen_for_stop()
        print("ready", flush=True)
        time.sleep(60)
    """
    process = children.start([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


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


@pytest.mark.parametrize(
    ("end", "words"), [("os.kill(os.getpid(), 9)", "rank 1 was killed by SIGKILL"), ("sys.exit(7)", "")]
)
def test_the_others_of_a_process_that_fails_have_their_time_and_no_more(job, tmp_path, end, words):
    begin = time.monotonic()
    code, stderr = job(STUBBORN.format(end=end), nproc=2, patience=2)
    assert code == 1 and words in stderr
    assert 2 < time.monotonic() - begin < 30
    assert all(ends(int(pid)) for pid in (tmp_path / "ready").read_text().split())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_workers_save_and_end_with_a_launcher_that_was_killed(job, tmp_path):
    def kill(process, folder):
        wait_for(folder / "ready")
        process.kill()

    code, _ = job(WORKER.format(saving=0), after=kill)
    assert code == -signal.SIGKILL
    assert ends(int((tmp_path / "ready").read_text()))
    assert (tmp_path / "saved").exists()


def test_a_job_that_ends_well(job):
    assert job("pass") == (0, "")


# A thread that returns from native code while the interpreter goes down.
LATE_THREAD = """
import os, sys, threading, time
from datetime import timedelta
from torch.distributed import TCPStore
from lighthouse_core.job.launch import end_with

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
