"""How a training process ends and says why, and what the ends of all of them mean for the job."""

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lighthouse_core.errors import LighthouseError
from lighthouse_core.job.environment import JOB_FOLDER, PARENT
from lighthouse_core.job.stop import SIGNALS

_PR_SET_PDEATHSIG = 1


def report_exit(code: int) -> bool:
    """In a worker: tell the launcher why this process ends. The first report stands, for it is the cause.

    Returns:
        Whether this was the first one on this machine.
    """
    folder = os.environ.get(JOB_FOLDER)
    if not folder:
        return True
    try:
        with open(Path(folder, "exit"), "x", encoding="ascii") as file:
            file.write(str(code))
    except FileExistsError:
        return False
    return True


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a process's main function, and end the process with its code after the exit handlers.

    The interpreter's own teardown is left out: torch has threads that never end, and one that it finds in native code
    aborts the process ("terminate called without an active exception"), though its work is done.
    """
    code = 1  # of an exception, whose traceback Python prints before the exit handlers run

    # Registered before all others, and so called after them.
    @atexit.register
    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    code = main()
    sys.exit(code)


def follow_parent() -> None:
    """Have this process sent SIGTERM when the one that started it ends, however that ends. For Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # It may have ended before that.
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
            os.kill(os.getpid(), signal.SIGTERM)


def reported_exit(folder: Path) -> int | None:
    """In the launcher: the code of the first report in the job's folder; None without one."""
    file = folder / "exit"
    text = file.read_text(encoding="ascii").strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None


def killed_by(code: int) -> int:
    """The signal that an exit code stands for, as of a process or of a shell; 0 for none."""
    return -code if code < 0 else max(0, code - 128)


def conclude(code: int, reported: int | None, received: list[int], rank: int, left: str) -> int:
    """The exit code of the job: 0 only where every process has ended with 0.

    Args:
        code: exit code of the process whose end is the job's, -N where signal N killed it; 0 where none failed.
        reported: the code that the first of them gave as its own reason, if one did.
        received: the signals that were sent on.
        rank: of that process.
        left: the processes that SIGKILL did not end, in words; "" for none.

    Raises:
        LighthouseError: the process was killed and could not say why, or a process has not ended.
    """
    killed = killed_by(code)
    faults = [f"{left} was killed and has not ended"] if left else []
    hint = None
    if killed and killed not in SIGNALS and not received and reported != 2:
        name = signal.Signals(killed).name if killed in set(signal.Signals) else f"signal {killed}"
        faults.insert(0, f"the training process of rank {rank} was killed by {name}")
        hint = "the machine ran out of memory?" if name == "SIGKILL" else None
    if faults:
        raise LighthouseError("; ".join(faults), hint=hint)
    if code == 0:
        return 0
    if received:
        return reported if reported in (1, 2) else 130 if received[0] == signal.SIGINT else 143
    if reported == 2:
        return 2
    if killed in SIGNALS:
        return 130 if killed == signal.SIGINT else 143
    return 1
