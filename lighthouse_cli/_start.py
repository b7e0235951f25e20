"""The entry point: from here on Ctrl-C ends the command, with exit code 130 and no traceback, whatever it is doing."""

import signal
import sys
from types import FrameType

# Between two looks at whether an import has ended.
_RETRY_SECONDS = 0.05


def main() -> None:
    """Run the command line, whose own imports take a while, too."""
    try:
        # Whoever started this process may have it ignore Ctrl-C, as `nohup` does.
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
    and some libraries take it for a module that is missing."""
    if _importing(frame):
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
    else:
        raise KeyboardInterrupt


def _again(number: int, frame: FrameType | None) -> None:
    """The interrupt that was put off, for whatever handles one by now."""
    if _importing(frame):
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
    else:
        signal.raise_signal(signal.SIGINT)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
