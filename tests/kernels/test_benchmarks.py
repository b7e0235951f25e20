"""What the benchmark's clock does, on a GPU that is none."""

import gc
import importlib.util
import itertools
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import FakeGpu

FILE = Path(__file__).parents[2] / "kernels/benchmarks/attention_call.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("attention_call", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "torch", FakeGpu())
    return module


def host(benchmark, monkeypatch, seconds):
    """A host that takes so long to make the calls of one round after another."""
    readings = itertools.chain.from_iterable((0.0, took) for took in seconds)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(monotonic=lambda: next(readings)))


def test_the_call_alone_is_timed_with_the_host_ahead(benchmark, monkeypatch):
    gpu = benchmark.torch
    host(benchmark, monkeypatch, [3.0, 0.01, 0.2, 0.3])
    assert benchmark.milliseconds(gpu.run, lambda: (gpu.run(5.0), (2.0,))[1]) == 2.0
    # The first compiles; the host was late with twenty, and had twice the time it had taken for the next.
    assert [cycles / 3e9 for cycles in gpu.slept] == pytest.approx([0.05, 0.05, 0.05, 0.4])
    host(benchmark, monkeypatch, [0.01, 0.01, 0.2, 0.8, 2.0])
    with pytest.raises(SystemExit, match=r"the host took 2\.0 s"):
        benchmark.milliseconds(lambda: gpu.run(2.0))


def test_what_was_timed_is_let_go(benchmark, monkeypatch):
    host(benchmark, monkeypatch, [0.0, 0.0, 0.2, 0.1])
    held = torch.ones(1)
    gone = weakref.ref(held)
    # Else the memory measured next would hold it: a cycle waits for the collector.
    gc.disable()
    try:
        benchmark.milliseconds(lambda x: benchmark.torch.run(2.0), lambda held=held: (held,))
        del held
        assert gone() is None
    finally:
        gc.enable()
