"""The clock of the limits on other processes."""

import time

from lighthouse_core.job.clock import RunningClock


def test_a_pause_counts_for_little(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = RunningClock()
    seen = []
    for now in (100.2, 100.4, 5000.0, 5000.2):  # noqa: B007  (the clock reads it)
        seen.append(round(clock(), 6))
    assert seen == [0.2, 0.4, 0.9, 1.1]
