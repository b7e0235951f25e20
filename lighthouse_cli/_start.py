"""The entry point: from here on Ctrl-C ends the command, with exit code 130 and no traceback, whatever it is doing."""

import contextlib
import os
import signal
import sys
from types import FrameType

# Between two looks at whether an import has ended.
_RETRY_SECONDS = 0.05
# Whether an interrupt waits for the end of an import.
_waits = False


def main() -> None:
    """Run the command line, whose own imports take a while, too."""
    # Where whoever started this process ignores SIGCHLD, the system forgets the exit codes of what this process starts,
    # and Python takes them for 0.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        # Whoever started this process may have it ignore Ctrl-C, as a script's shell does for its background.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGALRM, _again)
            signal.signal(signal.SIGINT, _interrupt)
        from lighthouse_cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            # The interpreter's end has handlers of libraries, which would print an exception.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not within an import: it aborts the process from native code that is being loaded,
    and some libraries take it for a module that is missing. A second interrupt within an import ends the process."""
    global _waits
    if not _importing(frame):
        _waits = False
        # Of an earlier one, which is not to come once more.
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt
    if _waits:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    _waits = True
    # Not by sys.stderr, which may be in the middle of another line; where it is closed, its number may be a file's.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted: ending\n")
    signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)


def _again(number: int, frame: FrameType | None) -> None:
    """The interrupt that was put off, for whatever handles one by now."""
    global _waits
    if _importing(frame):
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
    else:
        _waits = False
        signal.raise_signal(signal.SIGINT)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
