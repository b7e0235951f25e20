"""Streams that take nothing, and signals: every command says so with its exit code, and leaves no traceback."""

import contextlib
import errno
import io
import itertools
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from faulty_disk import Faults, failing
from test_disks import LEFT, READS, WRITES, asked, commands, difference, names, restore, template, tree, world  # noqa: F401
from test_disks import QUICK as QUICK_DISKS

from lighthouse_cli.app import main

# ruff: noqa: F811 (fixtures of another module)

READING = {
    "runs": ("runs",),
    "data inspect": ("data", "inspect", "tiny.toml", "--seconds", "0.1"),
    "recipes list": ("recipes", "list"),
    "recipes show": ("recipes", "show", "quickstart"),
}
JSON = {
    "runs --json": ("runs", "--json"),
    "data inspect --json": ("data", "inspect", "tiny.toml", "--seconds", "0.1", "--json"),
    "compare --json": (*WRITES["compare"], "--json"),
    "eval --json": (*WRITES["eval"], "--json"),
    "profile selection --json": (*WRITES["profile selection"], "--json"),
    "pretrain --json": (*WRITES["pretrain"], "--json"),
    "recover --json": (*WRITES["recover"], "--json"),
}
OTHERS = {
    "pretrain --dry-run": ("pretrain", "tiny.toml", "--dry-run"),
    "recover --dry-run": ("recover", "runs/cut", "--dry-run"),
    "sweep --dry-run": ("sweep", "sweep.toml", "--dry-run"),
    "--help": ("--help",),
    "--version": ("--version",),
    "a mistake": ("runs", "--nonsense"),
    "an error": ("compare", "nowhere"),
}
ALL = {**WRITES, **READING, **JSON, **OTHERS}


def test_every_command_is_tried():
    assert set(READING) == READS and {case.partition(" --")[0].partition(",")[0] for case in ALL} >= commands()


class Failing(io.RawIOBase):
    """A stream that takes so many bytes, and then fails; what it took goes to a file."""

    def __init__(self, number: int, room: int, taken: int):
        self.number, self.room, self.taken = number, room, taken

    def writable(self) -> bool:
        return True

    def write(self, content) -> int | None:
        some = bytes(content[: self.room])
        if content and not some:
            if self.number == errno.EAGAIN:
                # Of a stream that does not block, and is full.
                return None
            raise OSError(self.number, os.strerror(self.number))
        self.room -= len(some)
        return os.write(self.taken, some)

    def fileno(self) -> int:
        return self.taken


def forked(
    arguments: tuple[str, ...], streams: dict[int, tuple[int, int] | None], folder: Path
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in a fork of this process.

    Args:
        arguments: of the command.
        streams: of 1 and 2, what is wrong: the number of an error and the bytes before it, or None: it is closed.
        folder: for the streams' files.
    """
    files = {number: os.open(folder / f"stream{number}", os.O_RDWR | os.O_CREAT | os.O_TRUNC) for number in (1, 2)}
    child = os.fork()
    if not child:
        code = 99
        with contextlib.suppress(BaseException):
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(files[number], number)
                raw = Failing(*(streams.get(number) or (0, 1 << 40)), number)
                stream = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", errors="backslashreplace")
                if number in streams and streams[number] is None:
                    os.close(number)
                    stream = None
                setattr(sys, name, stream)
            sys.argv = ["lighthouse", *arguments]
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                os.write(files[2], traceback.format_exc().encode())
        os._exit(code)
    _, status = os.waitpid(child, 0)
    found = []
    for file in files.values():
        os.lseek(file, 0, os.SEEK_SET)
        found.append(os.read(file, 1 << 20).decode())
        os.close(file)
    return os.waitstatus_to_exitcode(status), *found


BROKEN = {
    "closed": None,
    "full": (errno.ENOSPC, 0),
    "no reader": (errno.EPIPE, 0),
    "no reader after a byte": (errno.EPIPE, 1),
    "no reader after 100 bytes": (errno.EPIPE, 100),
    "not blocking": (errno.EAGAIN, 0),
    "hung up": (errno.EIO, 20),
}


FEW = [("closed", (1, 2)), ("full", (1,)), ("not blocking", (1,)), ("no reader after a byte", (1,)), ("hung up", (2,))]
EVERY = [(name, which) for name in BROKEN for which in ((1,), (2,), (1, 2))]
# Those of them that take no second.
QUICK = {*READING, *OTHERS, "runs --json", "compare --json", "recipes copy", "eval --json"}
CASES = [pytest.param(case, FEW, id=f"{case}, some") for case in ALL if case in QUICK]
CASES += [pytest.param(case, EVERY, id=case, marks=pytest.mark.slow) for case in ALL]


@pytest.mark.parametrize(("case", "ways"), CASES)
def test_streams_that_fail(world, trainer, tmp_path_factory, case, ways):
    trainer.faults = Faults(str(world), 10**9, 0)
    arguments = asked(case, world) if case in WRITES else ALL[case]
    folder = tmp_path_factory.mktemp("streams")
    good, out, err = forked(arguments, {}, folder)
    assert good == (2 if case in ("a mistake", "an error") else 0), err
    left = difference({}, tree(world))
    for name, which in ways:
        fault = BROKEN[name]
        code, out_now, err_now = forked(arguments, dict.fromkeys(which, fault), folder)
        words = f"{name}, {which}: {code} {out_now!r} {err_now!r}"
        assert "Traceback" not in err_now and "Exception ignored" not in err_now, words
        # What is done already is not done again: some commands then refuse, which is said on the stream that works.
        assert code in (0, 1, 2), words
        if case not in WRITES and case not in JSON:
            assert code == good or (code == 1 and 1 in which and fault is not None), words
        if 1 in which and fault and fault[1] < len(out.encode()) and case in {**READING, **JSON} and code != 2:
            assert code == 1, words
        if 2 in which and 1 not in which:
            assert code in (good, 2), words
    assert {name for name in left if name not in tree(world)} == set()


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Training and sweeps have signals of their own: they save, and end.
INTERRUPTED = [case for case in WRITES if not case.startswith(("pretrain", "recover", "sweep"))]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK_DISKS else pytest.mark.slow) for case in INTERRUPTED]
)
def test_a_signal_at_any_operation_leaves_nothing(world, template, lighthouse, case):
    arguments, clean = asked(case, world), tree(world)
    for at in itertools.count():
        number = SIGNALS[at % len(SIGNALS)]
        with failing(Faults(str(world), at, -number)) as faults:
            answer = lighthouse(*arguments)
        after = tree(world)
        words = f"{number} at {faults.seen[-1]}: {answer}"
        if not faults.struck:
            assert answer.code == 0, words
            break
        assert answer.code in (128 + number, 0) and "Traceback" not in answer.err, words
        if answer.code:
            changed, left = difference(clean, after), LEFT.get(case, set())
            assert not [name for name in changed if Path(name).name.startswith(".")], words
            kept = [name for name in changed if not any(name == one or name.startswith(f"{one}/") for one in left)]
            # What was whole before the signal came stays whole.
            assert not kept or names(after) == names({**clean, **dict.fromkeys(kept)}), words
        restore(world, template, clean)
    assert at > 1


def child(*arguments: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "lighthouse_cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, timeout=60, text=True, **options)


@pytest.mark.parametrize("closed", ["(1,)", "(2,)", "(1, 2)", "(0, 1, 2)"])
def test_streams_that_are_closed(here, closed):
    # Closed before the interpreter begins, as a shell's >&- does it.
    redirected = " ".join({"0": "<&-", "1": ">&-", "2": "2>&-"}[number] for number in "012" if number in closed)
    command = f"exec {sys.executable} -m lighthouse_cli recipes copy quickstart {redirected}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    answer = subprocess.run(["sh", "-c", command], cwd=here, capture_output=True, env=environment, timeout=60)
    assert (answer.returncode, answer.stdout, answer.stderr) in ((0, b"", b""), (0, b"quickstart.toml\n", b""))
    # No stream's number was given to the file.
    assert (here / "quickstart.toml").read_bytes().startswith(b"#")


@pytest.mark.parametrize("arguments", [("recipes", "list"), ("recipes", "show", "quickstart"), ("--help",)])
def test_a_full_device_takes_no_output(here, arguments):
    with open("/dev/full", "w") as full:
        answer = child(*arguments, cwd=here, stdout=full, stderr=subprocess.PIPE)
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: No space left on device\n") and answer.stderr.count("\n") == 2


def test_a_reader_that_goes_away(here):
    begin = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    begin.wait()
    answer = child("recipes", "list", cwd=here, stdout=begin.stdin, stderr=subprocess.PIPE)
    begin.stdin.close()
    assert (answer.returncode, answer.stderr) == (1, "")
