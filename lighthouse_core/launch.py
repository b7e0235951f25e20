"""Starting the training processes: argv and environment for torchrun, signals to it, its exit code back.

Run as a module this is torchrun itself, less its own report of a failed worker: the worker has said what is wrong.
"""

import atexit
import ctypes
import importlib.util
import logging
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from lighthouse_core.config import Recipe
from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.train.heartbeat import Listener
from lighthouse_core.train.stop import SAME_REQUEST_SECONDS, SIGNALS

# The folder in which the processes of a job tell their launcher of themselves.
JOB_FOLDER = "LIGHTHOUSE_JOB"
QUIET = "LIGHTHOUSE_QUIET"
# Where a run leaves a trace of its last step; such a run saves nothing.
TRACE_FOLDER = "LIGHTHOUSE_TRACE"
_PARENT = "LIGHTHOUSE_PARENT"
# The file in that folder with the rank of a process that a signal killed.
_KILLED = "killed"
_STDERR = 2  # as a file descriptor
_PR_SET_PDEATHSIG = 1
# Between two looks at a job.
_POLL_SECONDS = 0.2
# A checkpoint of a large model takes longer than torchrun's 30 seconds between a signal and SIGKILL.
_SHUTDOWN_SECONDS = 300
# Upon any of these the job is to save and end.
_STOPPING = (*SIGNALS, signal.SIGHUP)


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
    if nnodes > 1 and not re.fullmatch(r"\S+:\d+", rdzv_endpoint):
        raise UserError("several machines need --rdzv-endpoint HOST:PORT", hint="HOST is the machine of --node-rank 0")
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


def command(run_dir: Path, plan: Plan) -> list[str]:
    """argv of the process that starts and watches the workers of this machine."""
    if plan.nnodes == 1:
        # Without an address torchrun asks for the host's full name, which not every machine can resolve.
        where = ["--standalone", "--local-addr=localhost"]
    else:
        # Static ranks: machine 0 holds global rank 0, which writes the metrics.
        where = [f"--nnodes={plan.nnodes}", f"--node-rank={plan.node_rank}", f"--rdzv-endpoint={plan.rdzv_endpoint}"]
    worker = ["-m", "lighthouse_core.train.worker", str(run_dir)]
    return [sys.executable, "-m", "lighthouse_core.launch", *where, f"--nproc-per-node={plan.nproc}", *worker]


def environment(plan: Plan, base: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The workers' environment: `base`, and what it leaves open."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        # torchrun's own default of one thread wastes a CPU.
        "OMP_NUM_THREADS": str(max(1, cores // plan.nproc)),
        # Else MKL takes fewer threads when it sees fit, and sums in another order.
        "MKL_DYNAMIC": "FALSE",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SECONDS),
        # glibc gives the threads of each save arenas of their own, of which it returns little.
        "MALLOC_ARENA_MAX": "1",
    }
    if "PYTORCH_CUDA_ALLOC_CONF" not in base:
        # The caching allocator's fixed segments leave gaps between a long sequence's large tensors.
        defaults["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return {**defaults, **base, JOB_FOLDER: str(folder), "PET_LOG_DIR": str(folder), _PARENT: str(os.getpid())}


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


def launch(run_dir: Path, plan: Plan, watcher: Watcher | None = None) -> int:
    """Train the run's last stage in `plan`'s processes and wait for it, while `watcher` shows it.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 (of batch systems, before a time limit) all go on to the workers as SIGTERM,
    upon which they save a checkpoint and end (SIGINT would leave tracebacks wherever Python is still importing). A
    second signal ends all of them at once.

    Returns:
        0 done, 2 the user's mistake (the worker has printed it), 130 or 143 interrupted, 1 any other failure (the
        worker has printed its traceback).

    Raises:
        LighthouseError: a worker was killed and could not say why.
    """
    received: list[int] = []
    with tempfile.TemporaryDirectory(prefix="lighthouse-") as name:
        folder = Path(name)
        listener = Listener(folder)
        child: subprocess.Popen | None = None
        first = 0.0

        def forward(number: int, frame: object) -> None:
            nonlocal first
            first = first or time.monotonic()
            received.append(number)
            if child is not None:
                if len(received) == 1:
                    child.terminate()
                elif time.monotonic() - first > SAME_REQUEST_SECONDS:
                    child.kill()
                    listener.kill()

        # nohup has the job outlive its terminal.
        handled = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, forward) for number in handled}
        try:
            # A session of its own: a terminal's Ctrl-C would otherwise reach torchrun twice.
            surroundings = environment(plan, os.environ, folder)
            if watcher is not None and watcher.quiet:
                surroundings[QUIET] = "1"
            # stdout is for data, of which the processes have none.
            takes_words = watcher is not None and watcher.takes_words
            child = subprocess.Popen(
                command(run_dir, plan),
                env=surroundings,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if takes_words else _STDERR,
                stderr=subprocess.STDOUT if takes_words else None,
                start_new_session=True,
            )
            if received:
                child.terminate()
            status = _watch(child, watcher, listener, received)
        except BaseException:
            # The job must not go on without its launcher.
            if child is not None:
                child.terminate()
                child.communicate()
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        reported, killed_rank = (_number(folder / name) for name in ("exit", _KILLED))
    return _exit_code(status, reported, received, killed_rank)


def _number(file: Path) -> int | None:
    text = file.read_text(encoding="ascii").strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None


def _watch(child: subprocess.Popen, watcher: Watcher | None, listener: Listener, received: list[int]) -> int:
    """Wait for the job, and give the watcher its turns. Returns the job's status.

    Raises:
        LighthouseError: a process does not answer any more. The job has been ended.
    """
    pipe = child.stdout.fileno() if child.stdout else None
    while child.poll() is None:
        pipe = _pass_on(pipe, watcher, _POLL_SECONDS)
        if watcher is not None:
            watcher.tick(bool(received))
        if silent := listener.silent():
            child.kill()
            listener.kill()
            raise LighthouseError(
                " and ".join(str(pulse) for pulse in silent) + f" did not answer for {silent[0].patience} s",
                hint="parallel.hang_seconds is how long it may take",
            )
    # Its last words. A process that outlives the job may hold the pipe open, so do not wait for the end of it.
    while pipe is not None and select.select([pipe], [], [], 0)[0]:
        pipe = _pass_on(pipe, watcher, 0)
    if child.stdout:
        child.stdout.close()
    return child.returncode


def _pass_on(pipe: int | None, watcher: Watcher | None, seconds: float) -> int | None:
    """Give the watcher what arrives within that time. Returns the pipe, None once it has ended."""
    if select.select([] if pipe is None else [pipe], [], [], seconds)[0]:
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return None
        watcher.words(chunk)
    return pipe


def _exit_code(status: int, reported: int | None, received: list[int], killed_rank: int | None) -> int:
    """What the job's end means: torchrun's status, the worker's word, the signals sent on, and who was killed."""
    if status == 0:
        return 0
    if received:
        return reported if reported in (1, 2) else 130 if received[0] == signal.SIGINT else 143
    if reported == 2:
        return 2
    killed = -status if status < 0 else status - 128
    if killed in SIGNALS:
        return 130 if killed == signal.SIGINT else 143
    if killed > 0:
        name = signal.Signals(killed).name if killed in set(signal.Signals) else f"signal {killed}"
        if status < 0:
            raise LighthouseError(f"torchrun was killed by {name}; its training processes save a checkpoint and end")
        who = "a training process" if killed_rank is None else f"the training process of rank {killed_rank}"
        hint = "the machine ran out of memory?" if name == "SIGKILL" else None
        raise LighthouseError(f"{who} was killed by {name}", hint=hint)
    return 1


def _torchrun(arguments: list[str]) -> int:
    """torchrun in this process. Returns the first failed worker's exit code, 128 + N for signal N."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException, api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def once(number: int, frame: object) -> NoReturn:
        # A batch system may signal this process, too, and the launcher again: the workers are to have their time.
        for each in _STOPPING:
            # Not SIG_IGN: Python would print a traceback of one that has come in already.
            signal.signal(each, lambda number, frame: None)
        raise SignalException("", signal.Signals(number))

    close = api.PContext.close

    def patient(
        context: api.PContext, death_sig: signal.Signals | None = None, timeout: int = _SHUTDOWN_SECONDS
    ) -> None:
        # Where a worker fails, torchrun would give the others 30 seconds, whatever its setting says.
        close(context, death_sig, timeout)

    api.PContext.close = patient
    api._terminate_process_handler = once
    signal.signal(signal.SIGUSR1, once)
    follow_parent()
    os.environ[_PARENT] = str(os.getpid())
    # Its log would repeat, at length and in its own words, what the worker printed.
    logging.disable(logging.ERROR)
    try:
        run.main(arguments)
    except SignalException as interruption:
        return 128 + int(interruption.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 and JOB_FOLDER in os.environ:
            Path(os.environ[JOB_FOLDER], _KILLED).write_text(str(rank), encoding="ascii")
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    end_with(lambda: _torchrun(sys.argv[1:]))
