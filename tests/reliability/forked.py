"""Training processes that are forked from one that has imported what they need.

The imports of a training process take several seconds, more than all the steps of a tiny job. `lighthouse` calls the
command line in this process, and has its training processes forked from a server. They run the program of
lighthouse_core.worker as any other does, in a session, an environment and a folder of their own. What a new interpreter
does before is tested with the real command: see `interrupt` in tests/integration/test_pipeline.py.

`start` and `spawn` call any function of a test in processes that are forked from the same server.
"""

import contextlib
import functools
import gc
import json
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple, NoReturn
from unittest import mock

import children
import torch

from lighthouse_cli import _output
from lighthouse_cli.app import main
from lighthouse_core.job import processes
from lighthouse_core.job.environment import PARENT
from lighthouse_core.job.exits import end_with

# What libraries read while they are loaded, before a job can say it. MKL_CBWR is that of deterministic runs.
LOADED = {"OMP_NUM_THREADS": "1", "MKL_DYNAMIC": "FALSE", "MKL_CBWR": "AVX2"}
# After so long a process that `start` has started ends, whatever it waits for.
_LIMIT_SECONDS = 1800


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def lighthouse(*arguments: str, cwd: Path) -> Done:
    """The command line in this process, which has imported torch; what trains are processes of their own."""
    with (
        contextlib.chdir(cwd),
        _workers(),
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as words,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(words),
        mock.patch.object(sys, "argv", ["lighthouse", *arguments]),
        mock.patch.object(_output, "_quiet", False),
        # What it puts into its environment is for its own children.
        mock.patch.dict(os.environ),
    ):
        code, stderr = 0, os.dup(2)
        os.dup2(words.fileno(), 2)  # of the training processes
        try:
            with children.default_signals():
                main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        for file in (out, words):
            file.seek(0)
        return Done(code, out.read(), words.read())


class Forked:
    """As subprocess.Popen, of a process that is a child of the server.

    Args:
        request: what the process is to do: {"arguments"} of the program of training, or {"call", "rank"} of `start`.
        environment: of the process.
        stdout, stderr: files to write to; None for those of this process.
    """

    def __init__(
        self,
        request: dict[str, Any],
        environment: Mapping[str, str],
        stdout: int | IO[Any] | None,
        stderr: int | IO[Any] | None,
    ):
        self._server, self.returncode = _server()[0], None
        request = request | {"environment": dict(environment), "folder": os.getcwd()}
        fds = [2 if file is None else file if isinstance(file, int) else file.fileno() for file in (stdout, stderr)]
        socket.send_fds(self._server, [json.dumps(request).encode()], fds)
        self.pid = json.loads(self._server.recv(1 << 10))

    def poll(self) -> int | None:
        if self.returncode is None:
            self._server.send(json.dumps(self.pid).encode())
            self.returncode = json.loads(self._server.recv(1 << 10))
        return self.returncode

    def wait(self, seconds: float = 240) -> int:
        """Its exit code.

        Raises:
            TimeoutError: it did not end in time.
        """
        children.wait_until(lambda: self.poll() is not None, seconds=seconds)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Worker(Forked):
    """Takes what lighthouse_core.job.processes gives to subprocess.Popen."""

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        stdin: int,
        stdout: int | IO[bytes],
        stderr: IO[bytes] | None,
        start_new_session: bool,
    ):
        assert argv[1:4] == ["-P", "-m", "lighthouse_core.worker"] and start_new_session
        super().__init__({"arguments": argv[4:]}, env, stdout, stderr)


def start(function: Callable, *arguments: Any, rank: int = 0, folder: Path, stderr: IO[Any] | None = None) -> Forked:
    """Call `function(rank, *arguments)` in a process of its own.

    Args:
        function: one of a module, as for multiprocessing. SystemExit gives the process its exit code, a number; any
            other exception ends it with 1.
        arguments: what can be pickled.
        rank: a number of this process.
        folder: where what is called, and what is returned, is left under names with the rank.
        stderr: where its words go; those of this process without.
    """
    (folder / f"call-{rank}").write_bytes(pickle.dumps((function, arguments)))
    request = {"call": str(folder), "rank": rank, "path": sys.path}
    return Forked(request, os.environ, stderr, stderr)


def spawn(function: Callable, *arguments: Any, count: int) -> list[Any]:
    """What `function(rank, *arguments)` returns in each of so many processes that run at the same time.

    Raises:
        RuntimeError: one of them failed, upon which the others are killed.
    """
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile("w+") as words:
        folder = Path(name)
        if torch.cuda.is_available():
            # No forked process may use a GPU.
            for rank in range(count):
                (folder / f"call-{rank}").write_bytes(pickle.dumps((function, arguments)))
            torch.multiprocessing.spawn(_call, (folder,), nprocs=count)
        else:
            started = [start(function, *arguments, rank=rank, folder=folder, stderr=words) for rank in range(count)]
            try:
                # Until one has failed or all have ended.
                codes = children.wait_until(lambda: _ended(started), seconds=_LIMIT_SECONDS)
            finally:
                for one in started:
                    one.kill()
            if any(codes):
                words.seek(0)
                raise RuntimeError(f"a process of {function} ended with {codes}\n{words.read()}")
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(count)]


def _ended(started: list[Forked]) -> list[int | None] | None:
    """The exit codes, once all are there or one is of a failure."""
    codes = [one.poll() for one in started]
    return codes if any(codes) or None not in codes else None


def _call(rank: int, folder: Path) -> int:
    function, arguments = pickle.loads((folder / f"call-{rank}").read_bytes())
    try:
        (folder / f"result-{rank}").write_bytes(pickle.dumps(function(rank, *arguments)))
    except SystemExit as end:
        return end.code
    return 0


@functools.cache
def _server() -> tuple[socket.socket, subprocess.Popen]:
    """Our end of its socket, and the server. It ends when this is closed, at the latest with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = children.start(
            [sys.executable, __file__, theirs.fileno()],
            seconds=24 * 3600,
            env=os.environ | LOADED,
            pass_fds=[theirs.fileno()],
        )
    return ours, process


@contextlib.contextmanager
def _workers() -> Iterator[None]:
    """Have training processes forked; on a GPU, which no forked process may use, they are started as ever."""
    if torch.cuda.is_available():
        yield
        return
    _server()  # before a command changes the environment
    stand_in = mock.Mock(wraps=processes.subprocess, Popen=_Worker)
    with mock.patch.object(processes, "subprocess", stand_in):
        yield


def end() -> None:
    """End the server, if there is one."""
    if _server.cache_info().currsize:
        connection, process = _server()
        connection.close()
        process.wait(60)
        _server.cache_clear()


def _become(request: dict, fds: list[int]) -> NoReturn:
    """Go on as the process that is asked for."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"], **{PARENT: str(os.getppid())})
    tempfile.tempdir = None  # it was that of the server
    with open(os.devnull, "rb") as nothing:
        for fd, place in zip((nothing.fileno(), *fds), (0, 1, 2), strict=True):
            os.dup2(fd, place)
    for fd in fds:
        os.close(fd)
    if "call" in request:
        sys.path[:] = request["path"]
        signal.alarm(_LIMIT_SECONDS)
        end_with(functools.partial(_call, request["rank"], Path(request["call"])))
    sys.argv = ["lighthouse_core.worker", *request["arguments"]]
    runpy.run_module("lighthouse_core.worker", run_name="__main__", alter_sys=True)


def _serve(place: int) -> None:
    from lighthouse_core.titan.trainer import titan_train

    # At the end of a training the first process sleeps for two seconds; ours meet at a file, which stays.
    titan_train.time = SimpleNamespace(sleep=lambda seconds: None, perf_counter=time.perf_counter)
    # A collection in a process would look at all that these imports made, and so have every page of it copied.
    gc.freeze()
    with socket.socket(fileno=place) as connection:
        while True:
            message, fds, _, _ = socket.recv_fds(connection, 1 << 20, 2)
            if not message:
                os._exit(0)  # at once: there is nothing to tidy
            request = json.loads(message)
            if isinstance(request, int):
                pid, status = os.waitpid(request, os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            else:
                answer = os.fork()
                if answer == 0:
                    connection.close()
                    _become(request, fds)
                for fd in fds:
                    os.close(fd)
            connection.send(json.dumps(answer).encode())


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
