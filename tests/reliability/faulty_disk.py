"""A disk that fails when it is told to: an operation that changes something below a folder raises an OSError.

In this process, `failing` does it within a block. In a process that is started with `environment`, it does so from the
start, and so in every process of a job.
"""

import builtins
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
_VARIABLE = "LIGHTHOUSE_TEST_FAULTS"


@dataclass
class Faults:
    """Which operations fail.

    Attributes:
        root: the folder.
        at: number of the first operation that fails, from 0.
        error: what it fails with; less than 0: this process is sent that signal instead, and it succeeds.
        lasting: whether all after it fail, too, as on a full disk; what gives room back never does.
        only: part of the path, or of the kind of operation and the path, of those that count.
        seen: the operations so far, each its kind and path.
        paused: nothing counts, and nothing fails.
    """

    root: str
    at: int
    error: int
    lasting: bool = False
    only: str = ""
    seen: list[str] = field(default_factory=list)
    paused: bool = False

    def strike(self, kind: str, path: object) -> bool:
        """Whether this operation fails."""
        if self.paused:
            return False
        if isinstance(path, int):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/self/fd/{path}")
        if not isinstance(path, str | os.PathLike):
            return False
        path = os.fspath(path)
        if path.startswith(("pipe:", "socket:", "anon_inode:")):
            return False
        path = os.path.abspath(path)
        if path != self.root and not path.startswith(self.root + "/"):
            return False
        operation = f"{kind} {path}"
        if self.only not in operation:
            return False
        self.seen.append(operation)
        number = len(self.seen) - 1
        if self.error < 0:
            if number == self.at:
                os.kill(os.getpid(), -self.error)
            return False
        return number >= self.at if self.lasting else number == self.at

    @property
    def struck(self) -> bool:
        """Whether an operation has failed."""
        return len(self.seen) > self.at

    def check(self, kind: str, path: object) -> None:
        if self.strike(kind, path):
            # Of a write the system names no file.
            named = None if isinstance(path, int) else os.fspath(path)
            raise OSError(self.error, os.strerror(self.error), named)


@contextlib.contextmanager
def failing(faults: Faults) -> Iterator[Faults]:
    """Within, operations fail as `faults` says."""
    undo = _install(faults)
    try:
        yield faults
    finally:
        undo()


def environment(folder: Path, faults: Faults) -> Mapping[str, str]:
    """For processes whose operations are to fail, each counting its own.

    Args:
        folder: a new one, for what has them do so.
        faults: as in `failing`.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import faulty_disk\n")
    given = "\n".join(map(str, (faults.root, faults.at, faults.error, int(faults.lasting), faults.only)))
    paths = [str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {_VARIABLE: given, "PYTHONPATH": os.pathsep.join(paths)}


def _install(faults: Faults):
    class Failing(io.FileIO):
        def write(self, content):
            if faults.strike("write", self.fileno()):
                view = memoryview(content).cast("B")
                # A disk that fills takes the first part.
                super().write(view[: len(view) // 2])
                raise OSError(faults.error, os.strerror(faults.error))
            return super().write(content)

        def truncate(self, size=None):
            faults.check("truncate", self.fileno())
            return super().truncate(size)

    originals = {
        name: getattr(os, name)
        for name in ("open", "mkdir", "rename", "replace", "link", "fsync", "write", "sendfile", "chmod", "utime")
    }
    real = io.open
    # As they are when nothing is patched.
    text_encoding = io.text_encoding

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        if not set(mode) & set("wax+"):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            faults.check("open", os.fsdecode(file))
        raw = Failing(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if "b" in mode and buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(
            raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        )
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, text_encoding(encoding), errors, newline, line_buffering=buffering == 1)
        text.mode = mode
        return text

    def open_descriptor(path, flags, mode=0o777, *, dir_fd=None):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            faults.check("open", path)
        return originals["open"](path, flags, mode, dir_fd=dir_fd)

    def wrapped(name: str, place: int):
        def call(*arguments, **named):
            faults.check(name, arguments[place])
            # No test pulls the plug, and waiting for a disk takes time.
            return None if name == "fsync" else originals[name](*arguments, **named)

        return call

    builtins.open = io.open = opened
    os.open = open_descriptor
    for name in originals.keys() - {"open"}:
        setattr(os, name, wrapped(name, 1 if name in ("rename", "replace", "link") else 0))

    def undo() -> None:
        builtins.open = io.open = real
        for name, original in originals.items():
            setattr(os, name, original)

    return undo


if _VARIABLE in os.environ and "sitecustomize" in sys.modules:
    _root, _at, _error, _lasting, _only = os.environ[_VARIABLE].split("\n")
    _install(Faults(_root, int(_at), int(_error), bool(int(_lasting)), _only))
