"""Stopping early: a signal asks for it, the trainer saves a checkpoint at the end of its step and ends."""

import os

_requested = False


class Interrupted(Exception):
    """Training ended on request, after a checkpoint."""


def request_stop(signal_number: int, frame: object) -> None:
    """Signal handler: end after the step in progress; asked again, end at once."""
    global _requested
    if _requested:
        os._exit(128 + signal_number)
    _requested = True


def stop_requested() -> bool:
    """Whether this process was asked to end."""
    return _requested
