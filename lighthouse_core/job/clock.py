"""The clock of every limit on other processes: seconds in which this process ran itself.

A batch system may suspend a whole job, and a virtual machine pause. Nobody could do anything in that time, so it counts
against nobody.
"""

import time

# The most that counts between two looks at the clock. Well below every limit, and above the time between two looks.
_LONGEST = 0.5


class RunningClock:
    """Seconds since this clock was made, of which a pause between two looks counts as half a second at most.

    To be looked at several times a second. A signal's handler may look at it, too.
    """

    def __init__(self) -> None:
        # The seconds that count, and the time of the last look. One tuple, as a signal may interrupt a look.
        self._last = 0.0, time.monotonic()

    def __call__(self) -> float:
        seconds, looked = self._last
        now = time.monotonic()
        self._last = seconds + min(now - looked, _LONGEST), now
        return self._last[0]
