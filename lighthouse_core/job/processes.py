"""The training processes of this machine: starting them, and ending those that do not end themselves."""

import contextlib
import math
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

from lighthouse_core.job.clock import RunningClock
from lighthouse_core.job.exits import killed_by
from lighthouse_core.job.stop import SIGNALS

_STDERR = 2  # as a file descriptor
# Between the first signal and SIGKILL: a checkpoint of a large model takes its time.
_SHUTDOWN_SECONDS = 300
# Between SIGKILL and the end of a process.
_KILL_SECONDS = 20


class Processes:
    """The training processes of this machine.

    Attributes:
        clock: of the limits.
        failed: the process whose end is the job's: its number on this machine and its exit code, -N where signal N
            killed it. None while none has failed.
        left: number and process id of those that SIGKILL did not end in time.
    """

    def __init__(self) -> None:
        self.clock = RunningClock()
        self.failed: tuple[int, int] | None = None
        self.left: list[tuple[int, int]] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._told = 0
        # On the clock: when they are to be killed, and when they were.
        self._end = self._killed = math.inf

    def start(self, argv: Sequence[str], environments: Sequence[Mapping[str, str]], words: IO[bytes] | None) -> None:
        """Start one process for each environment. What they print goes to `words`, or else to our stderr."""
        for surroundings in environments:
            child = subprocess.Popen(
                argv,
                env=surroundings,
                stdin=subprocess.DEVNULL,
                # stdout is for data, of which the processes have none.
                stdout=_STDERR if words is None else words,
                stderr=words,
                # A session for each: a terminal's Ctrl-C is ours to send on, and what a process has started itself
                # can be ended with it.
                start_new_session=True,
            )
            self._children.append(child)

    def terminate(self, seconds: float | None = None) -> None:
        """Have every process save and end; those that have not after so many seconds, by default 300, are killed."""
        for child in self._children[self._told :]:
            child.terminate()
        # A second signal would end them at once.
        self._told = len(self._children)
        self._end = min(self._end, self.clock() + (_SHUTDOWN_SECONDS if seconds is None else seconds))

    def kill(self) -> None:
        """End every process at once, with what it has started, stopped ones too."""
        self._killed = min(self._killed, self.clock())
        for child in self._children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)

    def running(self) -> bool:
        """Whether any process still runs that is not given up. Once one has failed the others are to end, too."""
        now = self.clock()
        codes = [child.poll() for child in self._children]
        if self.failed is None and any(codes):
            # Of several that have ended since the last look, one that was killed is the cause of the others' faults,
            # and those that were asked to end are the consequence of either.
            self.failed = min(((n, code) for n, code in enumerate(codes) if code), key=lambda one: _blame(one[1]))
            self.terminate()
        if now > self._end:
            self.kill()
        if now > self._killed + _KILL_SECONDS:
            # One that waits in the kernel, for a disk that does not answer, cannot be killed.
            self.left = [(n, child.pid) for n, child in enumerate(self._children) if codes[n] is None]
            return False
        return None in codes


def _blame(code: int) -> int:
    killed = killed_by(code)
    return 2 if killed in SIGNALS else 0 if killed else 1
