"""Starting the training processes of this machine: their argv and environment, signals to them, their exit code."""

import atexit
import contextlib
import ctypes
import importlib.util
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, Protocol

from lighthouse_core.cache import compile_caches
from lighthouse_core.config import Recipe
from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.job import network
from lighthouse_core.job.heartbeat import Listener
from lighthouse_core.job.stop import SAME_REQUEST_SECONDS, SIGNALS
from lighthouse_core.python import SAFE_PATH, run_module

# The folder in which the processes of a job tell their launcher of themselves.
JOB_FOLDER = "LIGHTHOUSE_JOB"
# Where the processes of a job meet: a file on one machine, HOST:PORT on several.
MEETING = "LIGHTHOUSE_MEETING"
QUIET = "LIGHTHOUSE_QUIET"
# Where a run leaves a trace of its last step; such a run saves nothing.
TRACE_FOLDER = "LIGHTHOUSE_TRACE"
_PARENT = "LIGHTHOUSE_PARENT"
_STDERR = 2  # as a file descriptor
_PR_SET_PDEATHSIG = 1
# Between two looks at a job.
_POLL_SECONDS = 0.2
# Between the first signal and SIGKILL: a checkpoint of a large model takes its time.
_SHUTDOWN_SECONDS = 300
# Between SIGKILL and the end of a process.
_KILL_SECONDS = 20
# Upon any of these the job is to save and end.
_STOPPING = (*SIGNALS, signal.SIGHUP)
# Whoever starts the launcher may have it ignore these: `nohup` the end of the terminal, a shell the Ctrl-C that is
# meant for the job in its foreground.
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Plan:
    """The processes of a job.

    Attributes:
        nproc: processes on this machine.
        nnodes: machines; each runs its own launcher.
        node_rank: of this machine; 0 makes the run and keeps its ledger.
        rdzv_endpoint: host:port of machine 0, where nnodes > 1.
    """

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str = ""

    @property
    def world_size(self) -> int:
        return self.nproc * self.nnodes


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


def plan(nproc: str = "auto", nnodes: int = 1, node_rank: int = 0, rdzv_endpoint: str = "") -> Plan:
    """Resolve the command line's numbers; "auto" is every local GPU, or one process where there is none.

    Raises:
        UserError: a number out of range, or no endpoint for several machines.
    """
    if nnodes < 1:
        raise UserError(f"--nnodes must be at least 1, not {nnodes}")
    if not 0 <= node_rank < nnodes:
        raise UserError(f"--node-rank must be between 0 and {nnodes - 1}, not {node_rank}")
    if nnodes > 1:
        host, port = network.endpoint(rdzv_endpoint)
        if node_rank == 0:
            network.own_address(host, port)
    if nproc == "auto":
        return Plan(local_gpus() or 1, nnodes, node_rank, rdzv_endpoint)
    if not re.fullmatch(r"[1-9]\d{0,3}", nproc):
        raise UserError(f'--nproc must be "auto" or a positive number, not {nproc!r}')
    gpus = local_gpus()
    if gpus and int(nproc) > gpus:
        raise UserError(f"--nproc {nproc}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}")
    return Plan(int(nproc), nnodes, node_rank, rdzv_endpoint)


def check_world(recipe: Recipe, world_size: int) -> None:
    """Raise UserError unless the recipe's batch and its [parallel] section fit this number of processes."""
    training, parallel = recipe.training, recipe.parallel
    if training.global_batch_size % (training.local_batch_size * world_size):
        raise UserError(
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
            f"training.local_batch_size ({training.local_batch_size}) x {world_size} processes",
            hint="use another --nproc or batch size",
        )
    groups = parallel.replicate * max(parallel.shard, 1)
    if world_size % groups or (parallel.shard > 0 and groups != world_size):
        raise UserError(
            f"parallel.shard ({parallel.shard}) x parallel.replicate ({parallel.replicate}) does not make "
            f"{world_size} processes"
        )


def check_loggers(recipe: Recipe) -> None:
    """Raise UserError if [metrics] asks for a package that is not installed."""
    # Its folder of runs, in the working directory, looks like a package to Python, but has no file to import.
    spec = importlib.util.find_spec("wandb") if recipe.metrics.wandb else None
    if recipe.metrics.wandb and (spec is None or spec.origin is None):
        raise UserError(
            "metrics.wandb needs the package wandb, which is not installed",
            hint="pip install 'lighthouse-pretrain[wandb]', or --set metrics.wandb=false",
        )


def local_gpus() -> int:
    """GPUs that the worker processes can see."""
    import torch

    return torch.cuda.device_count()


def command(run_dir: Path) -> list[str]:
    """argv of a training process."""
    return [*run_module("lighthouse_core.worker"), str(run_dir)]


def environment(plan: Plan, base: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What the environments of all workers share: `base`, and what it leaves open.

    Args:
        plan: the processes.
        base: the launcher's own environment.
        folder: of the job, which no other user of the machine can look into.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        # One thread would waste a CPU, and as many as there are cores in every process would wait for each other.
        "OMP_NUM_THREADS": str(max(1, cores // plan.nproc)),
        # Else MKL takes fewer threads when it sees fit, and sums in another order.
        "MKL_DYNAMIC": "FALSE",
        # glibc gives the threads of each save arenas of their own, of which it returns little.
        "MALLOC_ARENA_MAX": "1",
    }
    if "PYTORCH_CUDA_ALLOC_CONF" not in base:
        # The caching allocator's fixed segments leave gaps between a long sequence's large tensors.
        defaults["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    fixed = {
        JOB_FOLDER: str(folder),
        # Some of what libraries leave there has names that other users can guess.
        "TMPDIR": str(folder),
        _PARENT: str(os.getpid()),
        **SAFE_PATH,
        # Whoever calls us may have said already what is wrong with the usual place.
        **compile_caches(base)[0],
        "WORLD_SIZE": str(plan.world_size),
        "LOCAL_WORLD_SIZE": str(plan.nproc),
    }
    if plan.nnodes == 1:
        # Whatever the environment says for jobs of several machines: others have nothing to do with this one.
        fixed |= {MEETING: str(folder / "meeting"), **_sockets(network.loopback())}
    else:
        fixed[MEETING] = plan.rdzv_endpoint
        if interface := network.interface_towards(*network.endpoint(plan.rdzv_endpoint)):
            defaults |= _sockets(interface)
    return {**defaults, **base, **fixed}


def _sockets(interface: str) -> dict[str, str]:
    """Have torch's collectives listen on one network interface alone."""
    # NCCL takes any interface whose name begins so, unless there is an equals sign.
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


def ranks(plan: Plan) -> list[dict[str, str]]:
    """What the environment of each worker of this machine has for itself."""
    return [{"RANK": str(plan.node_rank * plan.nproc + local), "LOCAL_RANK": str(local)} for local in range(plan.nproc)]


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
        if os.environ.get(_PARENT, str(os.getppid())) != str(os.getppid()):
            os.kill(os.getpid(), signal.SIGTERM)


class _Processes:
    """The training processes of this machine.

    Attributes:
        failed: the process whose end is the job's: its number on this machine and its exit code, -N where signal N
            killed it. None while none has failed.
    """

    def __init__(self) -> None:
        self.failed: tuple[int, int] | None = None
        self._children: list[subprocess.Popen[bytes]] = []
        self._told = 0
        self._end = float("inf")

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

    def terminate(self) -> None:
        """Have every process save and end; those that have not after 300 seconds are killed."""
        for child in self._children[self._told :]:
            child.terminate()
        # A second signal would end them at once.
        self._told = len(self._children)
        self._end = min(self._end, time.monotonic() + _SHUTDOWN_SECONDS)

    def kill(self) -> None:
        """End every process at once, with what it has started, stopped ones too."""
        self._end = min(self._end, time.monotonic())
        for child in self._children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)

    def running(self) -> bool:
        """Whether any process still runs. Once one has failed the others are to end, too."""
        codes = [child.poll() for child in self._children]
        if self.failed is None and any(codes):
            # Of several that have ended since the last look, one that was killed is the cause of the others' faults,
            # and those that were asked to end are the consequence of either.
            self.failed = min(((n, code) for n, code in enumerate(codes) if code), key=lambda one: _blame(one[1]))
            self.terminate()
        if time.monotonic() > self._end:
            self.kill()
        # One that waits in the kernel, for a disk that does not answer, cannot be killed.
        return None in codes and time.monotonic() < self._end + _KILL_SECONDS


def _blame(code: int) -> int:
    killed = _killed_by(code)
    return 2 if killed in SIGNALS else 0 if killed else 1


def _killed_by(code: int) -> int:
    """The signal that an exit code stands for, as of a process or of a shell; 0 for none."""
    return -code if code < 0 else max(0, code - 128)


def launch(run_dir: Path, plan: Plan, watcher: Watcher | None = None) -> int:
    """Train the run's last stage in `plan`'s processes and wait for it, while `watcher` shows it.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 (of batch systems, before a time limit) all go on to the workers as SIGTERM,
    upon which they save a checkpoint and end (SIGINT would leave tracebacks wherever Python is still importing). A
    second signal ends all of them at once. Where this process was started with SIGINT or SIGHUP ignored, it goes on
    ignoring them; SIGTERM and SIGUSR1 always have the job save and end.

    Returns:
        0 done, 2 the user's mistake (the worker has printed it), 130 or 143 interrupted, 1 any other failure (the
        worker has printed its traceback).

    Raises:
        LighthouseError: a worker was killed and could not say why.
    """
    received: list[int] = []
    processes = _Processes()
    first = 0.0

    def forward(number: int, frame: object) -> None:
        nonlocal first
        first = first or time.monotonic()
        received.append(number)
        if len(received) == 1:
            processes.terminate()
        elif time.monotonic() - first > SAME_REQUEST_SECONDS:
            processes.kill()

    with tempfile.TemporaryDirectory(prefix="lighthouse-", ignore_cleanup_errors=True) as name, stop_signals(forward):
        folder = Path(name)
        surroundings = environment(plan, os.environ, folder)
        if watcher is not None and watcher.quiet:
            surroundings[QUIET] = "1"
        environments = [surroundings | own for own in ranks(plan)]
        with contextlib.ExitStack() as pipes:
            words = written = None
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
                _watch(processes, words, watcher, Listener(folder), received)
            except BaseException:
                # The job must not go on without its launcher.
                processes.terminate()
                _watch(processes, words, None, None, received)
                raise
        reported = _number(folder / "exit")
    number, code = processes.failed or (0, 0)
    return _exit_code(code, reported, received, plan.node_rank * plan.nproc + number)


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


def _number(file: Path) -> int | None:
    text = file.read_text(encoding="ascii").strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None


def _watch(
    processes: _Processes,
    words: IO[bytes] | None,
    watcher: Watcher | None,
    listener: Listener | None,
    received: list[int],
) -> None:
    """Wait for the job, and give the watcher its turns.

    Raises:
        LighthouseError: a process does not answer any more. The job has been ended.
    """
    pipe = words.fileno() if words else None
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
    # Its last words. A process that outlives the job may hold the pipe open, so do not wait for the end of it.
    while pipe is not None and select.select([pipe], [], [], 0)[0]:
        pipe = _pass_on(pipe, watcher, 0)


def _pass_on(pipe: int | None, watcher: Watcher | None, seconds: float) -> int | None:
    """Give the watcher what arrives within that time. Returns the pipe, None once it has ended."""
    if select.select([] if pipe is None else [pipe], [], [], seconds)[0] and pipe is not None:
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return None
        if watcher is not None:
            watcher.words(chunk)
    return pipe


def _exit_code(code: int, reported: int | None, received: list[int], rank: int) -> int:
    """What the job's end means.

    Args:
        code: exit code of the process whose end is the job's, -N where signal N killed it; 0 where none failed.
        reported: the code that the first of them gave as its own reason, if one did.
        received: the signals that were sent on.
        rank: of that process.
    """
    if code == 0:
        return 0
    if received:
        return reported if reported in (1, 2) else 130 if received[0] == signal.SIGINT else 143
    if reported == 2:
        return 2
    killed = _killed_by(code)
    if killed in SIGNALS:
        return 130 if killed == signal.SIGINT else 143
    if killed:
        name = signal.Signals(killed).name if killed in set(signal.Signals) else f"signal {killed}"
        hint = "the machine ran out of memory?" if name == "SIGKILL" else None
        raise LighthouseError(f"the training process of rank {rank} was killed by {name}", hint=hint)
    return 1
