"""The memory estimate beside what was measured, and the page that lists both."""

import importlib.util
import json
from pathlib import Path

import pytest

from lighthouse_core.config import load_recipe
from lighthouse_core.estimate import ERROR, process_bytes, verdict

RECIPES = Path(__file__).parents[2] / "recipes"
GIB = 2**30


@pytest.fixture(scope="module")
def memory():
    spec = importlib.util.spec_from_file_location("memory", RECIPES / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(memory):
    return list(memory.rows())


def test_every_peak_is_within_the_error_that_a_verdict_allows_for(rows):
    for row in rows:
        assert abs(row.error) < ERROR, row
        # A GPU of just what was measured would be full.
        assert verdict(row.estimate, row.measured) == "close"
        assert verdict(row.estimate, row.measured * 0.999) != "fits"
        # What CUDA and NCCL hold besides needs its room. A window beside a pyramid kept more in older code.
        assert row.error > -ERROR / 2 or (row.recipe.lighthouse.method == "pyramid" and row.recipe.lighthouse.window)


def test_no_peak_in_the_files_is_left_out(rows):
    """Of a run the largest one of each stage counts, of anything else every one."""

    def peaks(found):
        if isinstance(found, list):
            yield from (peak for item in found for peak in peaks(item))
        elif isinstance(found, dict):
            if "memory_gib" in found and "packages" not in found:
                yield found["memory_gib"]
            yield from (peak for item in found.values() for peak in peaks(item))

    files = [*RECIPES.glob("results/**/*.json"), *RECIPES.glob("evidence/results/*.json")]
    for file in files:
        found = set(peaks(json.loads(file.read_text(encoding="utf-8"))))
        listed = {row.measured for row in rows if RECIPES / row.source == file}
        assert listed <= found and bool(listed) == bool(found), file
        assert not found or max(listed) == max(found), file


def test_there_are_rows_of_every_kind(rows):
    methods = {row.recipe.lighthouse.method for row in rows if row.stage == "lighthouse"}
    assert methods == {"pyramid", "compressed", "chunked", "sliding"}
    assert {row.recipe.training.activation_checkpointing for row in rows} >= {"none", "selective", "full"}
    assert {row.recipe.parallel.context for row in rows} >= {1} and {row.processes for row in rows} >= {1, 2}
    assert max(row.recipe.training.seq_len for row in rows) == 2**20


def test_the_page_is_what_the_command_prints(memory):
    text = memory.PAGE.read_text(encoding="utf-8")
    assert memory.page(text) == text
    assert text.count("](../recipes/") > 20


def test_a_dense_phase_takes_what_dense_training_takes():
    phases = "lighthouse.phases=[{share=9}, {enabled=false}]"
    sizes = process_bytes(load_recipe(RECIPES / "530m_98k.toml", [phases]), 1)
    assert sizes["lighthouse"] == sizes["dense"]


def test_processes_share_weights_and_sequences():
    def needed(processes, *settings):
        return process_bytes(load_recipe(RECIPES / "530m_98k.toml", settings), processes)["lighthouse"]

    one, weights = needed(1), 530_117_632
    assert needed(8) == one - 16 * weights * 7 // 8
    assert needed(8, "parallel.replicate=2") == one - 16 * weights * 3 // 4
    # DDP: nothing is shared, and gradients are there twice.
    assert needed(8, "parallel={shard=1, replicate=8}") == one + 4 * weights
    shared = needed(8, "parallel.context=8")
    assert shared < needed(8) / 4
    # Whatever shares the weights, as many processes share the sequences.
    assert needed(16, "parallel={context=8, replicate=2}") == shared
    assert needed(16, "parallel.context=8") == shared - 16 * weights // 16


@pytest.mark.parametrize(
    ("needed", "expected"), [(71, "fits"), (72.1, "close"), (80, "close"), (87.9, "close"), (88.1, "does not fit")]
)
def test_the_verdict(needed, expected):
    assert verdict(needed * GIB, 80 * GIB) == expected
