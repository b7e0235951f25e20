"""The runs of a sweep under way, one on each GPU."""

import contextlib
import fcntl
import math
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lighthouse_core.config.sweep import Sweep
from lighthouse_core.errors import LighthouseError, RunError, refusal
from lighthouse_core.files import check_writable, open_to_append, remove_empty
from lighthouse_core.job.clock import RunningClock
from lighthouse_core.job.exits import follow_parent
from lighthouse_core.job.stop import SAME_REQUEST_SECONDS
from lighthouse_core.python import run_module
from lighthouse_core.runs.run import Run
from lighthouse_core.sweep.plan import next_command, waits
from lighthouse_core.sweep.state import begun, branch, claim, clear, settle

# Too little for a process to start and to be worth it.
_LEAST_SECONDS = 30
# Exit codes of commands that were asked to end, and can go on.
_SAVED = (130, 143, -signal.SIGINT, -signal.SIGTERM)
_POLL_SECONDS = 0.2


@contextlib.contextmanager
def lock(output: Path, name: str) -> Iterator[None]:
    """Hold a sweep for this process.

    Raises:
        RunError: another process has it.
    """
    check_writable(output, "choose another --output")
    made = [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        opened = open_to_append(output / f".{name}.lock")
    except OSError as error:
        remove_empty(made)
        raise refusal(error, f"cannot write to {output}", "choose another --output", RunError) from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process runs the sweep {name} under {output}", hint="wait until it ends, or interrupt it"
            ) from None
        yield


class Runner:
    """Brings the runs of a sweep forward, as many at a time as there are places, each a command of ours.

    Args:
        sweep: the sweep.
        base: the recipe file.
        output: where the runs live; what a command prints goes to NAME.log there.
        places: environment variables of each place: which GPU its commands see.
        say: told what begins and what fails.
        command: what a command of ours begins with.
        ended: called after each command that ends.

    Attributes:
        left: runs that are not complete.
        failed: those of them that failed.
        stuck: those that wait for the first stage of another one, which does not come.
        asked: the signal upon which `run` ended, or 0.
    """

    def __init__(
        self,
        sweep: Sweep,
        base: Path,
        output: Path,
        places: Sequence[Mapping[str, str]],
        say: Callable[[str], None],
        command: Sequence[str] = tuple(run_module("lighthouse_cli")),
        ended: Callable[[], None] = lambda: None,
    ):
        self.sweep, self.base, self.output, self.say, self.command = sweep, base, output, say, command
        self.ended = ended
        self.left = list(sweep.runs)
        self.failed: list[str] = []
        self.stuck: list[str] = []
        self.asked = 0
        self._clock = RunningClock()
        self._since = math.inf
        self._at_once = False
        self._last: dict[str, list[str]] = {}
        self._free = list(places)
        self._busy: dict[str, tuple[subprocess.Popen[bytes], Mapping[str, str]]] = {}

    def run(self, seconds: float | None = None) -> bool:
        """Go on until all is done, for at most about so long; then what trains is asked to save.

        Returns:
            Whether all is done. A run that fails is left, and the others go on.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        try:
            while not self.asked and time.monotonic() < end:
                early = end - time.monotonic() > _LEAST_SECONDS
                if early:
                    self._fill()
                if not self._busy:
                    self.stuck = [name for name in self.left if early and name not in self.failed]
                    break
                time.sleep(_POLL_SECONDS)
                self._reap()
        finally:
            self._stop()
        return not self.left

    def interrupt(self, number: int, frame: object = None) -> None:
        """A handler of signals. Upon the first one `run` has all commands save, upon a second one it kills them."""
        now = self._clock()
        self._at_once = now - self._since > SAME_REQUEST_SECONDS
        self._since = min(self._since, now)
        self.asked = self.asked or number

    def _stop(self) -> None:
        try:
            for child, _ in self._busy.values():
                # Not SIGINT, which a background job's commands ignore.
                child.terminate()
            while self._busy and not self._at_once:
                time.sleep(_POLL_SECONDS)
                self._reap()
        finally:
            for child, _ in self._busy.values():
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def _fill(self) -> None:
        for name in list(self.left):
            if not self._free:
                return
            if name not in self._busy and name not in self.failed:
                try:
                    self._begin(name)
                except OSError as error:
                    self._fail(name, str(refusal(error)))
                except (LighthouseError, ValueError) as error:
                    self._fail(name, str(error))

    def _begin(self, name: str) -> None:
        if waits(self.sweep, name, self.output):
            return
        path = self.output / name
        if clear(path):
            self.say(f"{name}: {path} held no checkpoint and is removed; it begins anew")
        wanted = self.sweep.runs[name]
        if wanted.stage_1 and not begun(path):
            branch(Run(self.output / wanted.stage_1), path, wanted.at, wanted.set)
        arguments = next_command(self.sweep, self.base, name, self.output)
        if arguments is None:
            self.left.remove(name)
            self.say(f"{name}: done")
            return
        words = shlex.join(["lighthouse", *arguments])
        if arguments == self._last.get(name):
            raise LighthouseError(f"{words} ended, and would be next again; see {self._log(name)}")
        self._last[name] = arguments
        self.say(f"{name}: {words}")
        self.output.mkdir(parents=True, exist_ok=True)
        if arguments[0] == "pretrain" and "--resume" not in arguments:
            claim(path)
        try:
            child = self._start(name, arguments)
        except BaseException:
            # What is made there later is not of this sweep.
            settle(path)
            raise
        self._busy[name] = child, self._free.pop(0)

    def _start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        with open_to_append(self._log(name)) as log:
            # A session of its own: Ctrl-C reaches it once, from us.
            return subprocess.Popen(
                [*self.command, *arguments],
                env={**os.environ, **self._free[0]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=follow_parent,
            )

    def _log(self, name: str) -> Path:
        return self.output / f"{name}.log"

    def _fail(self, name: str, why: str) -> None:
        self.failed.append(name)
        self.say(f"{name}: failed: {why}")

    def _reap(self) -> None:
        # To be looked at several times a second.
        self._clock()
        for name, (child, place) in list(self._busy.items()):
            code = child.poll()
            if code is None:
                continue
            del self._busy[name]
            self._free.append(place)
            settle(self.output / name)
            if code and code not in _SAVED:
                self._fail(name, f"exit code {code}; {self._log(name)} has its last words")
            self.ended()


def places(per_gpu: int = 1) -> list[dict[str, str]]:
    """So many for each GPU that this process sees; without any, as for one."""
    from lighthouse_core.job.plan import local_gpus

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(local_gpus())]
    each: list[dict[str, str]] = [{"CUDA_VISIBLE_DEVICES": name} for name in names] or [{}]
    return each * per_gpu
