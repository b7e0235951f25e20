"""The exceptions a user can meet. Each carries the exit code of the process and, where one helps, a hint."""

import difflib
import errno
import os
import re
from collections.abc import Iterable

from lighthouse_core.shown import shortened


class LighthouseError(Exception):
    """A fault: something failed that the user did not cause.

    Args:
        message: one line that says what is wrong.
        hint: one line that says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


class UserError(LighthouseError):
    """The user's mistake; the process exits with 2 and no traceback."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot be read, or that asks for something impossible."""


class RunError(UserError):
    """A run that is missing, already there, or in the wrong stage for the command."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, or belongs to another model."""


class TrainingError(LighthouseError):
    """Training cannot go on: a loss or a gradient is not finite, or the memory is full."""


class StorageError(LighthouseError):
    """A checkpoint that could not be written: the disk is full, or fails."""


class PatchError(LighthouseError):
    """A library did not do what this package counts on; docs/patches.md lists what that is."""

    def __init__(self, message: str):
        super().__init__(message, hint="install the versions of torch and torchtitan that pyproject.toml names")


class DataError(UserError):
    """Training data that is missing or cannot be read.

    Attributes:
        file: (identity, bytes) of the file of the source "files" in which something cannot be read, else None. A run
            may go on with the file mended.
    """

    file: tuple[str, int] | None = None


class ExportError(LighthouseError):
    """An exported model that does not agree with its checkpoint."""


class SystemFault(LighthouseError):
    """The machine failed: a disk is full or broken, files or memory ran out, nobody reads the output."""


# What the machine lacks, or what broke. Any other refusal is about a path that the user named.
_FAULTS = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EPIPE,
        errno.ESTALE,
        errno.ENODEV,
        errno.ENOLCK,
        errno.EAGAIN,
        errno.ETIMEDOUT,
    )
)
_HINTS = {
    errno.ENOSPC: "make room on that disk, or choose another place",
    errno.EDQUOT: "make room in your quota, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that you may use, or change its permissions",
    errno.EPERM: "choose a place that you may use, or change its permissions",
    errno.ENAMETOOLONG: "a name has at most 255 bytes, and a path 4095",
    errno.ENOENT: "check the path",
    errno.EEXIST: "choose another place",
    errno.EINVAL: "check the path",
    errno.EFBIG: "check the path",
    errno.ENXIO: "check the path",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "give a file",
    errno.ELOOP: "a link of the path leads to itself",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
}


def nearest(name: object, names: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The one of `names` that somebody may have meant by an unknown name, whatever the case of its letters.

    Args:
        name: what was given; only a string is near to anything.
        names: that there are.
        cutoff: the least likeness, 0 to 1; with 0 the nearest name, however far.
    """
    by_lower = {one.lower(): one for one in reversed(list(names))}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff) if isinstance(name, str) else []
    return by_lower[found[0]] if found else None


def did_you_mean(name: object, names: Iterable[str], before: str = "; ") -> str:
    """The question that a refusal of an unknown name ends with, after `before`; empty where no name is near."""
    near = nearest(name, names)
    return f"{before}did you mean {near}?" if near else ""


def memory_fault(error: Exception) -> SystemFault | None:
    """What an exception says of an allocation that failed, of Python, NumPy or torch; None for any other exception.

    Torch has no class for a failed allocation in a CPU's memory, and says it in words.
    """
    text = str(error)
    accelerator = type(error).__name__ == "OutOfMemoryError"
    if not (accelerator or isinstance(error, MemoryError) or "DefaultCPUAllocator: " in text):
        return None
    asked = re.search(r"allocate (\d+) bytes", text)
    what = f": {int(asked[1]) / 2**30:.2f} GiB more were asked for" if asked else ""
    whose = "the accelerator's" if accelerator else "this machine's"
    return SystemFault(
        f"{whose} memory is full{what}", hint="use a smaller model, shorter sequences or fewer at a time"
    )


def refusal(
    error: OSError, doing: str = "", hint: str | None = None, kind: type[LighthouseError] = UserError
) -> LighthouseError:
    """What the system refused, as an error for the user: a fault of the machine (exit code 1), or `kind`.

    Args:
        error: the system's.
        doing: what failed, as in "cannot write out"; else the path that the system named.
        hint: what to do about it; else what the kind of refusal suggests.
        kind: of what is the user's mistake.
    """
    try:
        os.getcwd()
    except OSError:
        hint = "the working directory is gone: change to another one"
    reason = error.strerror or str(error) or type(error).__name__
    about = shortened(doing, 300) or (shortened(error.filename) if isinstance(error.filename, str | bytes) else "")
    # A buffered writer whose stream would block raises with whatever errno the call before left behind.
    number = errno.EAGAIN if isinstance(error, BlockingIOError) else error.errno or 0
    kind = SystemFault if number in _FAULTS else kind
    return kind(f"{about}: {reason}" if about else reason, hint=hint or _HINTS.get(number))
