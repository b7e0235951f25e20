"""How long a call takes, and how much memory it needs."""

import os
import resource
import statistics
import time
from collections.abc import Callable

import torch


def median_ms(call: Callable[[], object], device: torch.device, *, repeats: int, budget: float) -> float:
    """Median time of `call`, after one call that does not count.

    Args:
        call: does the work; its result is dropped.
        device: where the work happens; CUDA is timed with events.
        repeats: calls to time, at least 1.
        budget: seconds after which no further call is begun.

    Returns:
        Milliseconds.
    """
    call()
    times: list[float] = []
    began = time.perf_counter()
    while not times or (len(times) < repeats and time.perf_counter() - began < budget):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start_time = time.perf_counter()
            call()
            times.append((time.perf_counter() - start_time) * 1e3)
    return statistics.median(times)


def peak_gib(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak device memory during `call` in GiB; None on the CPU, where torch does not count it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def resident_gib() -> float:
    """Largest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def host_memory() -> int:
    """Physical memory of this machine, bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
