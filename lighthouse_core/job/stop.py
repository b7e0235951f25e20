"""Stopping early: a signal asks for it, the trainer saves a checkpoint at the end of its step and ends."""

import os
import select
import signal
import threading

from lighthouse_core.job.clock import RunningClock

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A batch system signals every process of a job, and the launcher sends its own on: that is one request.
SAME_REQUEST_SECONDS = 1.0
# Between two looks at the clock, once a request has come.
_LOOK_SECONDS = 0.2
# Not events: their lock could be held by the very thread that a signal interrupts.
_requested = _training = False


class Interrupted(Exception):
    """Training ended on request, after a checkpoint."""


def listen_for_stop() -> None:
    """Take signals from now on as requests to end: after the step in progress, or at once before training begins.

    A later signal ends this process at once. Called once, on the main thread.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    for number in SIGNALS:
        signal.signal(number, _request)
    # A handler in Python would wait while the main thread is in native code, in a collective for example.
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(heard,), name="signals", daemon=True).start()


def _request(number: int, frame: object) -> None:
    global _requested
    _requested = True


def _listen(heard: int) -> None:
    clock, first = RunningClock(), None
    while True:
        # If the whole job is held after a first signal, the launcher's own may come long afterwards.
        ready = select.select([heard], [], [], None if first is None else _LOOK_SECONDS)[0]
        now = clock()
        for number in os.read(heard, 64) if ready else b"":
            if number not in SIGNALS:
                continue
            first = now if first is None else first
            _request(number, None)
            if now - first > SAME_REQUEST_SECONDS or not _training:
                os._exit(128 + number)


def training_begins() -> None:
    """From now on there is something to save."""
    global _training
    _training = True


def is_training() -> bool:
    """Whether there is something to save."""
    return _training


def stop_requested() -> bool:
    """Whether this process was asked to end."""
    return _requested
