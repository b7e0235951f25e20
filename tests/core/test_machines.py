"""Launchers of several machines: what they compare before a job, and what each hears of the others during it."""

import json
import os
import re
import signal
import socket
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import children
import forked
import pytest

from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.job import launch
from lighthouse_core.job import machines as job_machines
from lighthouse_core.job.machines import Machines
from lighthouse_core.job.plan import Asked, Plan


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def meet(tmp_path, monkeypatch):
    """Has launchers meet, each in a thread; returns them, and for each True, False or the error that it met."""
    monkeypatch.setattr(job_machines, "_SHARED_SECONDS", 1.0)
    made: list[Machines] = []

    def call(*plans: Plan, facts=None, seconds=20, patience=60, folders=None, stop=(), late=0.0):
        port = free_port()
        launchers = []
        for number, (nproc, nnodes, rank) in enumerate(plans):
            asked = Asked((facts or {}).get(number, {"training.steps": 5}), patience, seconds)
            launchers.append(Machines(Plan(nproc, nnodes, rank, f"127.0.0.1:{port}"), asked))
        made.extend(launchers)
        answers: list = [None] * len(launchers)
        gone = [threading.Event() for _ in launchers]

        def run(number: int) -> None:
            try:
                folder = (folders or {}).get(number, tmp_path)
                answers[number] = launchers[number].meet(folder, gone[number].is_set)
            except LighthouseError as error:
                answers[number] = error
                launchers[number].leave(error.exit_code, str(error))

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(launchers))]
        for thread in threads:
            thread.start()
            time.sleep(late)
        for number in stop:
            time.sleep(0.5)
            gone[number].set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        return launchers, answers

    yield call
    # Machine 0 would wait for the others.
    for launcher in sorted(made, key=lambda one: -one.plan.node_rank):
        launcher.leave(0)


def wait_for_fault(launcher: Machines, seconds: float = 20):
    return children.wait_until(launcher.fault, seconds=seconds)


def test_machines_meet_whoever_comes_first(meet):
    for plans in (((1, 3, 0), (1, 3, 1), (1, 3, 2)), ((1, 2, 1), (1, 2, 0))):
        launchers, answers = meet(*plans, late=0.3, patience=7)
        assert answers == [True] * len(plans)
        assert {launcher.patience for launcher in launchers} == {7}
        assert all(launcher.name(1) == f"machine 1 ({socket.gethostname()})" for launcher in launchers)


@pytest.mark.parametrize(
    ("plans", "facts", "words"),
    [
        (((1, 2, 0), (1, 3, 1)), None, "--nnodes is 3 on machine 1 (HOST) and 2 on machine 0 (HOST)"),
        (((1, 2, 0), (2, 2, 1)), None, "--nproc is 2 on machine 1 (HOST) and 1 on machine 0 (HOST)"),
        (((1, 3, 0), (1, 3, 2), (1, 3, 2)), None, "two machines have --node-rank 2: HOST and HOST"),
        (
            ((1, 2, 0), (1, 2, 1)),
            {1: {"training.steps": 6, "optimizer.lr": 0.1}},
            "training.steps is 6 on machine 1 (HOST) and 5 on machine 0 (HOST) (and 1 more)",
        ),
        (((1, 2, 0), (1, 2, 1)), {1: {}}, "training.steps is not given on machine 1 (HOST) and 5 on machine 0 (HOST)"),
    ],
)
def test_what_machines_must_have_alike(meet, plans, facts, words):
    _, answers = meet(*plans, facts=facts)
    wanted = words.replace("HOST", socket.gethostname())
    assert [str(answer) for answer in answers] == [wanted] * len(plans)
    assert all(isinstance(answer, UserError) and answer.hint for answer in answers)


def test_a_machine_that_does_not_come_is_named(meet):
    begun = time.monotonic()
    launchers, answers = meet((1, 3, 0), (1, 3, 2), seconds=1)
    assert {str(answer) for answer in answers} == {f"machine 1 did not come to {launchers[0]} within 1 s"}
    assert all(answer.exit_code == 1 for answer in answers)
    [launcher], [answer] = meet((1, 2, 1), seconds=1)
    assert str(answer) == f"machine 0 did not answer at {launcher} within 1 s"
    assert time.monotonic() - begun < 15


def test_a_machine_may_give_up_and_come_again(meet):
    launchers, answers = meet((1, 3, 0), (1, 3, 1), stop=(1, 0))
    # Machine 0 waited on, and then was stopped, too.
    assert answers == [False, False]
    assert launchers[0]._here == [1]
    launchers[1].leave(143)
    children.wait_until(lambda: launchers[0]._here == [])
    launchers[0].leave(143)


def wait_and_meet(rank: int, count: int, where: str, folder: Path) -> None:
    """Leaves the words "here" and "met" in files of the folder."""
    launcher = machine(rank, count, where)
    (folder / "here").write_text("here")
    launcher.meet(folder, lambda: False)
    (folder / "met").write_text("met")
    threading.Event().wait(60)


@pytest.fixture
def waiting(tmp_path):
    """Starts a launcher in a process of its own, which can be killed."""
    # What is forked first waits for the imports of the server: here, rather than while the others count seconds.
    forked.spawn(abs, count=1)
    started = []

    def start(rank: int, count: int, where: str):
        process = forked.start(wait_and_meet, count, where, tmp_path, rank=rank, folder=tmp_path)
        started.append(process)
        children.wait_for(tmp_path / "here", process)
        return process

    yield start
    for process in started:
        process.kill()


def join(launcher: Machines, folder, answers: dict) -> threading.Thread:
    """Has a launcher meet the others in a thread; what it answers, or its error, goes to `answers`."""

    def run() -> None:
        try:
            answers[launcher] = launcher.meet(folder, lambda: False)
        except LighthouseError as error:
            answers[launcher] = error
            launcher.leave(error.exit_code, str(error))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def machine(rank: int, count: int, where: str, seconds: int = 60) -> Machines:
    return Machines(Plan(1, count, rank, where), Asked({"training.steps": 5}, seconds=seconds))


def check_that_all_met(threads, answers, launchers):
    """Wait for launchers that join by threads, until they have met; machine 0, the last of the list, leaves last."""
    for thread in threads:
        thread.join(40)
    assert answers == dict.fromkeys(launchers, True)
    for launcher in launchers:
        launcher.leave(0)


def test_a_machine_that_dies_while_it_waits_may_come_again(waiting, tmp_path):
    where, answers = f"127.0.0.1:{free_port()}", {}
    first = machine(0, 3, where)
    threads = [join(first, tmp_path, answers)]
    dead = waiting(1, 3, where)
    children.wait_until(lambda: first._here == [1])
    dead.kill()
    # At once, and so before its silence is noticed; and the last one, so that all numbers are here.
    others = [machine(1, 3, where), machine(2, 3, where)]
    threads += [join(other, tmp_path, answers) for other in others]
    check_that_all_met(threads, answers, [*others, first])


def test_no_job_begins_without_a_machine_that_died_while_it_waited(waiting, tmp_path):
    where, answers = f"127.0.0.1:{free_port()}", {}
    first = machine(0, 3, where, seconds=8)
    threads = [join(first, tmp_path, answers)]
    dead = waiting(1, 3, where)
    children.wait_until(lambda: first._here == [1])
    dead.kill()
    last = machine(2, 3, where)
    threads.append(join(last, tmp_path, answers))
    for thread in threads:
        thread.join(40)
    assert str(answers[first]) == str(answers[last]) == f"machine 1 did not come to {where} within 8 s"
    assert "--set titan.comm.init_timeout_seconds" in answers[first].hint


def test_a_machine_that_dies_as_it_announces_itself_holds_up_nobody(meet, monkeypatch):
    def announced_twice(self, store):
        store.add("arrivals", 1)
        return arrive(self, store)

    # As if one had died after its number, and before it said what it was asked for.
    arrive = Machines._arrive
    monkeypatch.setattr(Machines, "_arrive", announced_twice)
    _, answers = meet((1, 2, 0), (1, 2, 1))
    assert answers == [True, True]


def test_machine_0_may_die_while_the_others_wait_and_come_again(waiting, tmp_path):
    where, answers = f"127.0.0.1:{free_port()}", {}
    dead = waiting(0, 3, where)
    others = [machine(1, 3, where), machine(2, 3, where)]
    threads = [join(others[0], tmp_path, answers)]
    children.wait_until(lambda: others[0]._arrival)
    dead.kill()
    dead.wait()
    first = machine(0, 3, where)
    threads += [join(launcher, tmp_path, answers) for launcher in (first, others[1])]
    check_that_all_met(threads, answers, [*others, first])


def test_a_machine_that_comes_again_once_the_job_has_begun_without_it(waiting, tmp_path):
    where, answers = f"127.0.0.1:{free_port()}", {}
    first = machine(0, 2, where)
    thread = join(first, tmp_path, answers)
    dead = waiting(1, 2, where)
    children.wait_for(tmp_path / "met", dead)
    thread.join(20)
    dead.kill()
    dead.wait()
    time.sleep(1.5)  # its last beat is passed on
    # No user's mistake: a batch system that starts it again, once the job has ended, is right.
    again = machine(1, 2, where)
    with pytest.raises(LighthouseError, match=r"has begun, and its machine 1 \(.*\) has gone") as caught:
        again.meet(tmp_path, lambda: False)
    assert caught.value.exit_code == 1 and "start this machine again" in caught.value.hint
    again.leave(1)
    first.leave(0)


def test_machine_0_says_at_which_address_it_waits(tmp_path, monkeypatch):
    known = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *given, **named: known(host.replace("localhost", "127.0.0.1"), *given, **named),
    )
    said: list[str] = []
    where = f"localhost:{free_port()}"
    launcher = Machines(Plan(1, 2, 0, where), Asked(seconds=1, say=said.append))
    with pytest.raises(LighthouseError):
        launcher.meet(tmp_path, lambda: False)
    launcher.leave(1)
    assert said == [f"waiting for machine 1 at {where} (127.0.0.1)"]


def test_a_number_that_is_taken_once_the_job_has_begun(meet, tmp_path):
    launchers, answers = meet((1, 2, 0), (1, 2, 1))
    assert answers == [True, True]
    late = Machines(launchers[1].plan, launchers[1].asked)
    with pytest.raises(UserError, match=r"has begun: --node-rank 1 is "):
        late.meet(tmp_path, lambda: False)
    late.leave(2)
    assert launchers[0].fault() is None


def test_something_else_that_listens_there(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        answering = threading.Thread(target=lambda: [other.accept()[0].sendall(b"SSH-2.0\r\n" * 9) for _ in range(2)])
        answering.start()
        where = f"127.0.0.1:{other.getsockname()[1]}"
        launcher = Machines(Plan(1, 2, 1, where), Asked(seconds=1))
        with pytest.raises(LighthouseError, match=f"machine 0 (does|did) not answer at {where}"):
            launcher.meet(tmp_path, lambda: False)
        launcher.leave(1)
        answering.join(20)


def test_a_run_that_is_not_shared(meet, tmp_path):
    (tmp_path / "ledger.json").write_text("{}")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/ledger.json").write_text("{}")
    launchers, answers = meet((1, 2, 0), (1, 2, 1), folders={1: tmp_path / "copy"})
    assert "does not share the run" in str(answers[1]) and isinstance(answers[1], UserError)
    fault = wait_for_fault(launchers[0])
    assert isinstance(fault.error, UserError) and "machine 1" in str(fault.error) and "share" in str(fault.error)
    # The mark of an earlier job is no mark of this one.
    mark = json.loads((tmp_path / "logs/machines.json").read_text())
    assert mark["meeting"] == launchers[0]._token


def test_the_words_of_a_machine_that_has_ended(meet):
    launchers, _ = meet((1, 3, 0), (1, 3, 1), (1, 3, 2), patience=30)
    launchers[2].leave(1, "the training process of rank 2 was killed by SIGKILL")
    for launcher in launchers[:2]:
        fault = wait_for_fault(launcher)
        host = socket.gethostname()
        assert str(fault.error) == f"machine 2 ({host}) has ended: the training process of rank 2 was killed by SIGKILL"
        assert fault.grace == 30 and not fault.saves
    # What fails because of that is not the cause.
    launchers[1].leave(1)
    assert "machine 2" in str(launchers[0].cause().error)


@pytest.mark.parametrize(("code", "saves", "words"), [(143, True, "was stopped"), (2, False, "exit code 2; its own")])
def test_the_end_of_a_machine(meet, code, saves, words):
    launchers, _ = meet((1, 2, 0), (1, 2, 1))
    launchers[1].leave(code)
    fault = wait_for_fault(launchers[0])
    assert (fault.saves, fault.error.exit_code) == (saves, 2 if code == 2 else 1) and words in str(fault.error)


def test_a_machine_that_has_gone_is_the_cause_of_a_failure_here(meet):
    launchers, _ = meet((1, 3, 0), (1, 3, 1), (1, 3, 2))
    # While all of them beat none is.
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(Machines.cause, launchers[:2])) == [None, None]
        launchers[2]._exchange = lambda store: time.sleep(0.5)
        for fault in pool.map(Machines.cause, launchers[:2]):
            assert re.fullmatch(r"machine 2 \(.*\) did not answer for 3 s", str(fault.error))


def test_a_machine_that_is_done_is_no_fault(meet):
    launchers, _ = meet((1, 2, 0), (1, 2, 1), patience=1)
    # Of two that end at the same time, machine 0 waits for the other.
    ends = [threading.Thread(target=launcher.leave, args=(0,)) for launcher in launchers]
    for end in ends:
        end.start()
    for end in ends:
        end.join(10)
    time.sleep(1.2)
    assert [launcher.fault() for launcher in launchers] == [None, None]


WORKER = """
    import os, signal, sys, time
    from pathlib import Path
    (Path(__file__).parent / f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(60)
"""


def launched(rank: int, folder: Path, where: str) -> None:
    """A launcher whose process sleeps."""
    launch.command = lambda run_dir: [sys.executable, str(run_dir / "worker.py")]
    try:
        asked = Asked(patience=2, say=lambda text: print(text, file=sys.stderr))
        code = launch.launch(folder, Plan(1, 2, rank, where), None, asked)
    except LighthouseError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)


@pytest.fixture
def launchers(tmp_path):
    """Two launchers, each with one process that sleeps; and the ids of these."""
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    where = f"127.0.0.1:{free_port()}"
    started = []
    for n in (0, 1):
        with (tmp_path / f"words{n}").open("w") as words:
            started.append(forked.start(launched, tmp_path, where, rank=n, folder=tmp_path, stderr=words))
    workers = [int(children.wait_for(tmp_path / f"rank{n}", started[n])) for n in (0, 1)]
    yield started, workers, lambda n: (tmp_path / f"words{n}").read_text()
    for pid in (*workers, *(process.pid for process in started)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_a_process_that_is_killed_on_one_machine_ends_the_other(launchers):
    (first, second), workers, words = launchers
    os.kill(workers[1], signal.SIGKILL)
    assert (second.wait(30), first.wait(30)) == (1, 1)
    assert "error: the training process of rank 1 was killed by SIGKILL" in words(1)
    named = f"machine 1 ({socket.gethostname()}) has ended: the training process of rank 1 was killed by SIGKILL"
    assert f"error: {named}\n" in words(0) and "Traceback" not in words(0) + words(1)
    assert children.ends(workers[0])


def test_a_machine_that_is_silent_ends_the_other(launchers):
    (first, second), workers, words = launchers
    os.kill(second.pid, signal.SIGSTOP)
    begun = time.monotonic()
    assert first.wait(30) == 1 and time.monotonic() - begun < 20
    assert f"error: machine 1 ({socket.gethostname()}) did not answer for 2 s" in words(0)
    assert children.ends(workers[0])
    # Once it goes on it finds that machine 0 has ended, and has its process save and end.
    os.kill(second.pid, signal.SIGCONT)
    assert second.wait(30) == 143 and "stopped, because machine 0 (" in words(1).splitlines()[-1]


def test_a_signal_to_one_machine_ends_both_in_order(launchers):
    (first, second), workers, words = launchers
    second.terminate()
    assert (second.wait(30), first.wait(30)) == (143, 143)
    assert words(0).endswith(f"machine 1 ({socket.gethostname()}) was stopped\n")
    assert all(children.ends(pid) for pid in workers)
