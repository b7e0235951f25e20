"""How long a call takes, and how much memory it needs."""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# At least so much is written between two calls, to leave nothing of their inputs in a GPU's cache.
_FLUSHED_BYTES = 2**28
# Clock cycles that a GPU sleeps, some 50 ms, while the host prepares the calls that it is to make after that.
_HEAD_START = 10**8


@dataclass(frozen=True)
class Sample:
    """Times of one call.

    Attributes:
        median, p10, p90: milliseconds.
        calls: how many were timed.
    """

    median: float
    p10: float
    p90: float
    calls: int

    @classmethod
    def of(cls, times: list[float]) -> "Sample":
        """Of times in milliseconds, at least one; percentiles between two calls are interpolated."""
        if len(times) == 1:
            return cls(times[0], times[0], times[0], 1)
        tenths = statistics.quantiles(times, n=10, method="inclusive")
        return cls(statistics.median(times), tenths[0], tenths[-1], len(times))


def measure(call: Callable[[], object], device: torch.device, *, repeats: int = 20, seconds: float = 5.0) -> Sample:
    """Time `call` after two calls that do not count, the first of which may compile.

    On a GPU it is the time of its own work, between events: the calls follow each other without waiting for the host,
    which has a head start. Before each the L2 cache is overwritten.

    Args:
        call: does the work; its result is dropped.
        device: where the work happens.
        repeats: calls to time; fewer, but 3, if they would take longer than `seconds`. Where one takes that long alone
            the second one that would not count is all there is.
    """
    clock = _cuda_times if device.type == "cuda" else _host_times
    clock(call, device, 1)
    second = clock(call, device, 1)
    if second[0] > seconds * 1e3:
        return Sample.of(second)
    return Sample.of(clock(call, device, min(repeats, max(3, int(seconds * 1e3 / max(second[0], 1e-6))))))


def _cuda_times(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flushed = torch.empty(max(4 * cache, _FLUSHED_BYTES), dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda._sleep(_HEAD_START)
    for start, end in events:
        flushed.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def _host_times(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def peak_gib(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak device memory during `call`, inputs included, in GiB; None on the CPU, where torch does not count it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def resident_gib() -> float:
    """Largest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
