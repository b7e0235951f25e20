"""A sweep under way: what is next of each run is told from its directory, so it goes on wherever it was stopped."""

from lighthouse_core.sweep.collect import collect
from lighthouse_core.sweep.plan import check, next_command, waits
from lighthouse_core.sweep.runner import Runner, lock, places
from lighthouse_core.sweep.state import branch, claim, clear, left_over

__all__ = [
    "Runner",
    "branch",
    "check",
    "claim",
    "clear",
    "collect",
    "left_over",
    "lock",
    "next_command",
    "places",
    "waits",
]
