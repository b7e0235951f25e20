"""Loss spikes: losses that stand out of those just before them."""

import math
import statistics
from collections import deque

WINDOW = 64
# Below this many losses there is no telling.
_ENOUGH = 16
THRESHOLD = 6.0
# Of a normal distribution, in medians of the absolute deviation.
_DEVIATION = 1.4826


class Spikes:
    """Compares each loss with the finite ones among the last 64 by their robust z-score.

    That is the distance to their median in robust standard deviations (1.4826 medians of the absolute distance to the
    median), which spikes among them hardly change.
    """

    def __init__(self):
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def score(self, loss: float) -> float | None:
        """The z-score of the next loss if it is a spike, above 6; None if it is none, or not finite."""
        if not math.isfinite(loss):
            return None
        score = None
        if len(self.losses) >= _ENOUGH:
            median = statistics.median(self.losses)
            spread = _DEVIATION * statistics.median(abs(x - median) for x in self.losses)
            # Losses that are all but equal differ by rounding only.
            score = (loss - median) / max(spread, 1e-3 * abs(median), 1e-9)
        self.losses.append(loss)
        return score if score is not None and score > THRESHOLD else None
