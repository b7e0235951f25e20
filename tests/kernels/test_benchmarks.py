"""The benchmarks' arithmetic; their checks and their clock are those of `lighthouse profile`."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from lighthouse_core.attention.methods import METHODS

FOLDER = Path(__file__).parents[2] / "kernels/benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tokens", [8192, 16384, 65536, 98304])
def test_every_method_has_an_example_that_leaves_something_out(tokens):
    found = load("methods").examples(tokens, "fa4")
    assert {cfg.method for cfg in found.values()} == set(METHODS)
    assert all(cfg.keys(tokens) < tokens / 2 for cfg in found.values())


def test_the_floor_is_traffic_over_the_rate():
    module = load("attention_call")
    for tokens, (levels, topk) in module.SHAPES.items():
        cfg = replace(module.LighthouseConfig(), levels=levels, topk=topk)
        floor = module.floors(tokens, cfg, 4e12)
        assert floor == pytest.approx(2 * module.floors(tokens, cfg, 8e12))
        # At least reading q, k and v, writing the output, and the same backward.
        assert floor > 8 * tokens * 2 * 8 * 128 / 4e12 * 1e3
    row = {"N": 98304, "S": 18432, "topk": 1536, "outside_ms": 1.5, "floor_ms": 1.0}
    row["cudnn"] = {"forward_ms": 1.4, "both_ms": 5.0, "dense_call_ms": 3.0, "peak_gib": 1.6, "dense_both_ms": 120.0}
    line = module.table([row]).splitlines()[-1]
    assert line == "| 98304 | 18432 | 6.2% | cudnn | 1.40 | 5.00 | 3.00 | 120.0 | 24.0x | 1.60 | 1.50 | 1.00 |"
