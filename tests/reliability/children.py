"""Child processes of tests: with the signals that a terminal's shell would give them, and with limits on every wait."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# An interpreter that imports nothing from the folder that it is started in.
PYTHON = [sys.executable, "-P"]
LIGHTHOUSE = [*PYTHON, "-m", "lighthouse_cli"]
_POLL_SECONDS = 0.02


def start(command: list[Any], *, ignoring: tuple[int, ...] = (), seconds: float = 240, **options: Any):
    """subprocess.Popen of a process whose signals do not depend on ours, some of which `nohup` has us ignore.

    Args:
        command: argv.
        ignoring: the signals that it begins with ignored; all others are at their default.
        seconds: after so long the process is killed, whatever waits for it.
        options: for subprocess.Popen.
    """

    before = options.pop("preexec_fn", None)

    def set_signals() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if number in ignoring else signal.SIG_DFL)
        if before is not None:
            before()

    process = subprocess.Popen(list(map(str, command)), preexec_fn=set_signals, **options)
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.daemon = True
    watchdog.start()
    return process


@contextlib.contextmanager
def default_signals() -> Iterator[None]:
    """No signal is ignored within, for commands that run in this process."""
    previous = {number: signal.SIG_IGN for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
    for number in previous:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_until(reached: Callable[[], Any], process: subprocess.Popen | None = None, seconds: float = 60) -> Any:
    """What `reached` returns once that is true.

    Raises:
        TimeoutError: it did not come in time, or the process ended before.
    """
    end = time.monotonic() + seconds
    while not (answer := reached()):
        if process is not None and process.poll() is not None and not reached():
            raise TimeoutError(f"the process ended with {process.returncode} before that")
        if time.monotonic() > end:
            raise TimeoutError(f"it did not come in {seconds} seconds")
        time.sleep(_POLL_SECONDS)
    return answer


def wait_for(path: Path, process: subprocess.Popen | None = None, seconds: float = 60) -> str:
    """The text of a file, once there is some."""
    return wait_until(lambda: path.exists() and path.read_text(), process, seconds)


def tree(pid: int) -> list[int]:
    """A process and all that come from it, parents before children."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{each}/task/{each}/children").read_text().split())
    return found


def ends(pid: int, seconds: float = 10) -> bool:
    """Whether a process, which need not be a child of ours, ends in that time."""
    with contextlib.suppress(TimeoutError):
        return wait_until(lambda: state(pid) in "ZX", seconds=seconds)
    return False


def state(pid: int) -> str:
    """Of a process, as ps shows it; X for one that is not there."""
    try:
        # The name before it, in parentheses, may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def listening(pids: list[int]) -> list[tuple[str, int]]:
    """The addresses and ports at which processes wait for connections of TCP."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets.add(os.readlink(link))
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, status, *_ = fields = line.split()
            if status == "0A" and f"socket:[{fields[9]}]" in sockets:
                digits, port = local.split(":")
                # Words of 32 bits, each in the order of this machine.
                words = (bytes.fromhex(digits[n : n + 8])[::-1] for n in range(0, len(digits), 8))
                found.append((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


def environment(pid: int) -> dict[str, str]:
    """What a process was started with."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
