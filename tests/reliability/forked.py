"""Training processes that are forked from one that has imported what they need.

The imports of a training process take several seconds, more than all the steps of a tiny job. `lighthouse` calls the
command line in this process, and has its training processes forked from a server. They run the program of
lighthouse_core.worker as any other does, in a session, an environment and a folder of their own. What a new interpreter
does before is tested with the real command: see `interrupt` in tests/integration/test_pipeline.py.
"""

import contextlib
import functools
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple
from unittest import mock

import children
import torch

from lighthouse_cli import _output
from lighthouse_cli.app import main
from lighthouse_core.job import processes
from lighthouse_core.job.environment import PARENT

# What libraries read while they are loaded, before a job can say it. MKL_CBWR is that of deterministic runs.
LOADED = {"OMP_NUM_THREADS": "1", "MKL_DYNAMIC": "FALSE", "MKL_CBWR": "AVX2"}


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


class _Forked:
    """As subprocess.Popen, of a process that is a child of the server."""

    def __init__(
        self,
        server: socket.socket,
        argv: Sequence[str],
        env: Mapping[str, str],
        stdin: int,
        stdout: int | IO[bytes],
        stderr: IO[bytes] | None,
        start_new_session: bool,
    ):
        assert argv[1:4] == ["-P", "-m", "lighthouse_core.worker"] and start_new_session
        self._server, self._code = server, None
        request = {"arguments": argv[4:], "environment": dict(env), "folder": os.getcwd()}
        fds = [2 if file is None else file if isinstance(file, int) else file.fileno() for file in (stdout, stderr)]
        socket.send_fds(server, [json.dumps(request).encode()], fds)
        self.pid = json.loads(server.recv(1 << 10))

    def poll(self) -> int | None:
        if self._code is None:
            self._server.send(json.dumps(self.pid).encode())
            self._code = json.loads(self._server.recv(1 << 10))
        return self._code

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, processes.signal.SIGTERM)


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
    stand_in = mock.Mock(wraps=processes.subprocess, Popen=functools.partial(_Forked, _server()[0]))
    with mock.patch.object(processes, "subprocess", stand_in):
        yield


def end() -> None:
    """End the server, if there is one."""
    if _server.cache_info().currsize:
        connection, process = _server()
        connection.close()
        process.wait(60)
        _server.cache_clear()


def _become(request: dict, fds: list[int]) -> None:
    """Go on as the training process that is asked for."""
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
    sys.argv = ["lighthouse_core.worker", *request["arguments"]]
    runpy.run_module("lighthouse_core.worker", run_name="__main__", alter_sys=True)


def _serve(place: int) -> None:
    import lighthouse_core.titan  # noqa: F401

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
                    return _become(request, fds)
                for fd in fds:
                    os.close(fd)
            connection.send(json.dumps(answer).encode())


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
