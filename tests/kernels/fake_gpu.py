"""A GPU that is none, to test clocks with."""

from types import SimpleNamespace

import torch


class FakeGpu:
    """What clocks use of torch and its cuda: a kernel takes as long as it is told, one after the other."""

    int8 = torch.int8

    def __init__(self):
        self.now, self.allocated, self.peak, self.slept = 0.0, 0, 0, []
        self.cuda = self

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=50 * 2**20)

    def empty(self, size, dtype, device):
        assert size >= 200 * 2**20, "several times the L2 cache"
        return SimpleNamespace(zero_=lambda: self.run(7.0))

    def run(self, ms, takes=0):
        self.now += ms
        self.peak = max(self.peak, self.allocated + takes)

    def Event(self, enable_timing):
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def _sleep(self, cycles):
        self.slept.append(cycles)
        self.now += 50.0

    def synchronize(self, device=None):
        pass

    empty_cache = lambda self: None  # noqa: E731

    def reset_peak_memory_stats(self, device):
        self.peak = self.allocated

    def max_memory_allocated(self, device):
        return self.peak
