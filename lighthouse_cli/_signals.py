"""Signals to a command, which may have something to clear away."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

# What ends a process at once unless it asks for something else. Ctrl-C is an exception already.
_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def as_exits() -> Iterator[None]:
    """Within, a signal that asks this process to end is a SystemExit, of exit code 128 and its number: what is half
    written is then cleared away. One that the process was started with ignored, as by nohup, stays ignored."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    ours = threading.current_thread() is threading.main_thread()
    handled = [number for number in _ENDING if ours and signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
