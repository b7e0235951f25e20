"""How long a call takes, and how much memory it needs."""

import itertools
import logging
import resource
import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

# At least so much is written between two calls, to leave nothing of their inputs in a GPU's cache.
_FLUSHED_BYTES = 2**28
# Seconds that a GPU sleeps while the host prepares the calls to be timed; and at most, where that was not enough.
_HEAD_START, _LONGEST_START = 0.05, 1.0
# Its clock's cycles in a second, at most.
_CLOCK = 3 * 10**9

logger = logging.getLogger(__name__)

Name = TypeVar("Name", bound=Hashable)


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

    def whole() -> Iterator[None]:
        call()
        yield None

    return measure_parts(whole, device, repeats=repeats, seconds=seconds)[None]


def measure_parts(
    call: Callable[[], Iterator[Name]], device: torch.device, *, repeats: int = 20, seconds: float = 5.0
) -> dict[Name, Sample]:
    """Like `measure`, of the parts of a call, which follow each other as they do in it.

    Args:
        call: makes an iterator that does one part a step, and gives its name.
        device, repeats, seconds: as in `measure`, of all parts together.
    """
    clock = _cuda_times if device.type == "cuda" else _host_times
    clock(call, device, 1)
    found = clock(call, device, 1)
    took = sum(found[0].values())
    if took <= seconds * 1e3:
        found = clock(call, device, min(repeats, max(3, int(seconds * 1e3 / max(took, 1e-6)))))
    return {name: Sample.of([times[name] for times in found]) for name in found[0]}


def _cuda_times(call: Callable[[], Iterator[Name]], device: torch.device, repeats: int) -> list[dict[Name, float]]:
    found, took = _times_after(_HEAD_START, call, device, repeats)
    if took > _HEAD_START and repeats > 1:
        # The GPU may have waited for the host.
        found, took = _times_after(min(2 * took, _LONGEST_START), call, device, repeats)
        if took > _LONGEST_START:
            logger.warning("the host took %.1f s to make %d calls: their times may hold its own", took, repeats)
    return found


def _times_after(
    head_start: float, call: Callable[[], Iterator[Name]], device: torch.device, repeats: int
) -> tuple[list[dict[Name, float]], float]:
    """The times, and the seconds in which the host made the calls."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flushed = torch.empty(max(4 * cache, _FLUSHED_BYTES), dtype=torch.int8, device=device)
    # The first of each call has no name.
    marks: list[list[tuple[Any, torch.cuda.Event]]] = []
    torch.cuda._sleep(int(head_start * _CLOCK))
    began = time.monotonic()
    for _ in range(repeats):
        flushed.zero_()
        marks.append([(None, _mark())])
        for name in call():
            marks[-1].append((name, _mark()))
    took = time.monotonic() - began
    torch.cuda.synchronize(device)
    return [
        {name: before.elapsed_time(after) for (_, before), (name, after) in itertools.pairwise(one)} for one in marks
    ], took


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _host_times(call: Callable[[], Iterator[Name]], device: torch.device, repeats: int) -> list[dict[Name, float]]:
    found = []
    for _ in range(repeats):
        times, before = {}, time.perf_counter()
        for name in call():
            after = time.perf_counter()
            times[name], before = (after - before) * 1e3, after
        found.append(times)
    return found


def peak_gib(call: Callable[[], object], device: torch.device, besides: int = 0) -> float | None:
    """Peak device memory during `call`, inputs included, in GiB; None on the CPU, where torch does not count it.

    Args:
        call: does the work.
        device: where.
        besides: bytes that are there and are none of the call's, such as workspaces of libraries.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - besides) / 2**30


def resident_gib() -> float:
    """Largest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
