"""A job on this machine from its start to its end: signals to its processes, what they print, its exit code."""

import contextlib
import os
import select
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.job.environment import QUIET, command, environment, ranks
from lighthouse_core.job.exits import conclude, reported_exit
from lighthouse_core.job.heartbeat import Listener
from lighthouse_core.job.plan import Asked, Plan
from lighthouse_core.job.processes import Processes
from lighthouse_core.job.stop import SAME_REQUEST_SECONDS, SIGNALS

if TYPE_CHECKING:
    from lighthouse_core.job.machines import Fault, Machines

# Between two looks at a job.
_POLL_SECONDS = 0.2
# Upon any of these the job is to save and end.
_STOPPING = (*SIGNALS, signal.SIGHUP)
# Whoever starts the launcher may have it ignore these: `nohup` the end of the terminal, a shell the Ctrl-C that is
# meant for the job in its foreground.
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)


class Watcher(Protocol):
    """Shows a job to its user while it trains.

    Attributes:
        takes_words: whether what the processes print comes to `words`, instead of going to stderr directly.
        quiet: whether the processes keep to errors.
    """

    takes_words: bool
    quiet: bool

    def tick(self, stopping: bool) -> None:
        """Called several times a second; `stopping` once the job has been asked to end."""

    def words(self, chunk: bytes) -> None:
        """Called with what the processes have printed since the last time; may end within a line."""


def launch(run_dir: Path, plan: Plan, watcher: Watcher | None = None, asked: Asked | None = None) -> int:
    """Train the run's last stage in `plan`'s processes and wait for it, while `watcher` shows it.

    Of several machines, all must have been `asked` for the same. One that has ended, or is silent, ends the others.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 (of batch systems, before a time limit) all go on to the workers as SIGTERM,
    upon which they save a checkpoint and end (SIGINT would leave tracebacks wherever Python is still importing). A
    second signal ends all of them at once. Where this process was started with SIGINT or SIGHUP ignored, it goes on
    ignoring them; SIGTERM and SIGUSR1 always have the job save and end.

    Returns:
        0 done, 2 the user's mistake (the worker has printed it), 130 or 143 interrupted, 1 any other failure (the
        worker has printed its traceback).

    Raises:
        LighthouseError: a worker was killed and could not say why, or does not answer, or has not ended; or another
            machine did not come, or has failed.
        UserError: another machine was asked for something else, or has ended with a user's mistake.
    """
    if plan.nnodes == 1:
        return _launch(run_dir, plan, watcher, None)
    from lighthouse_core.job.machines import Machines

    machines = Machines(plan, asked or Asked())
    code, words = LighthouseError.exit_code, ""
    try:
        code = _launch(run_dir, plan, watcher, machines)
    except LighthouseError as error:
        code, words = error.exit_code, str(error)
        raise
    finally:
        machines.leave(code, words)
    return code


def _launch(run_dir: Path, plan: Plan, watcher: Watcher | None, machines: "Machines | None") -> int:
    received: list[int] = []
    processes = Processes()
    first: float | None = None

    def forward(number: int, frame: object) -> None:
        nonlocal first
        now = processes.clock()
        first = now if first is None else first
        received.append(number)
        if len(received) == 1:
            processes.terminate()
        elif now - first > SAME_REQUEST_SECONDS:
            processes.kill()

    with tempfile.TemporaryDirectory(prefix="lighthouse-", ignore_cleanup_errors=True) as name, stop_signals(forward):
        if machines is not None and not machines.meet(run_dir, lambda: bool(received)):
            return 128 + (signal.SIGINT if received[0] == signal.SIGINT else signal.SIGTERM)
        folder = Path(name)
        surroundings = environment(plan, os.environ, folder)
        if watcher is not None and watcher.quiet:
            surroundings[QUIET] = "1"
        environments = [surroundings | own for own in ranks(plan)]
        with contextlib.ExitStack() as pipes:
            words = written = fault = None
            if watcher is not None and watcher.takes_words:
                words, written = (
                    pipes.enter_context(open(end, mode, buffering=0))
                    for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
                )
            try:
                processes.start(command(run_dir), environments, written)
                if received:
                    processes.terminate()
                if written is not None:
                    # Else there would be no end to read.
                    written.close()
                fault = _watch(processes, words, watcher, Listener(folder), received, machines)
            except BaseException:
                # The job must not go on without its launcher.
                processes.terminate()
                _watch(processes, words, None, None, received, None)
                raise
        reported = reported_exit(folder)
    first_rank = plan.node_rank * plan.nproc
    left = " and ".join(f"rank {first_rank + number} (process {pid})" for number, pid in processes.left)
    number, code = processes.failed or (0, 0)
    if fault is not None and not fault.saves and code and reported != UserError.exit_code:
        raise fault.error
    code = conclude(code, reported, received, first_rank + number, left)
    # What the processes here met may be no more than a consequence.
    if machines is not None and code not in (0, UserError.exit_code) and not received:
        fault = fault or machines.cause()
        if fault is not None and code == LighthouseError.exit_code:
            raise fault.error
        if fault is not None:
            text = f"stopped, because {fault.error}"
            if watcher is not None and watcher.takes_words:
                watcher.words(f"{text}\n".encode())
            else:
                machines.asked.say(text)
    return code


@contextlib.contextmanager
def stop_signals(forward: Callable[[int, object], None]) -> Iterator[None]:
    """Have `forward` called with each signal upon which a job is to save and end.

    SIGINT and SIGHUP that this process was started with ignored go on being so; SIGTERM and SIGUSR1 always count. What
    is started within begins with all of them at their default.
    """

    def ignore(number: int, frame: object) -> None:
        """As SIG_IGN does here, but not in the processes that are started: they begin with the default."""

    previous = {number: signal.getsignal(number) for number in _STOPPING}
    for number, handler in previous.items():
        ignored = handler is signal.SIG_IGN and number in _MAY_BE_IGNORED
        signal.signal(number, ignore if ignored else forward)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch(
    processes: Processes,
    words: IO[bytes] | None,
    watcher: Watcher | None,
    listener: Listener | None,
    received: list[int],
    machines: "Machines | None",
) -> "Fault | None":
    """Wait for the job, and give the watcher its turns.

    Returns:
        What had become of another machine before any process here failed, upon which these were ended.

    Raises:
        LighthouseError: a process does not answer any more. The job has been ended.
    """
    pipe = words.fileno() if words else None
    fault: Fault | None = None
    while processes.running():
        pipe = _pass_on(pipe, watcher, _POLL_SECONDS)
        if watcher is not None:
            watcher.tick(bool(received))
        if listener is not None and (silent := listener.silent()):
            processes.kill()
            raise LighthouseError(
                " and ".join(str(pulse) for pulse in silent) + f" did not answer for {silent[0].patience} s",
                hint="parallel.hang_seconds is how long it may take",
            )
        if machines is not None and fault is None and processes.failed is None and (fault := machines.fault()):
            if fault.grace == 0:
                processes.kill()
            else:
                processes.terminate(fault.grace)
    # Its last words. A process that outlives the job may hold the pipe open, so do not wait for the end of it.
    while pipe is not None and select.select([pipe], [], [], 0)[0]:
        pipe = _pass_on(pipe, watcher, 0)
    return fault


def _pass_on(pipe: int | None, watcher: Watcher | None, seconds: float) -> int | None:
    """Give the watcher what arrives within that time. Returns the pipe, None once it has ended."""
    if select.select([] if pipe is None else [pipe], [], [], seconds)[0] and pipe is not None:
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return None
        if watcher is not None:
            watcher.words(chunk)
    return pipe
