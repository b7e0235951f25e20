"""The live view as text, at several widths."""

import math

import pytest

from lighthouse_cli._view import render, sparkline
from lighthouse_core.runs.rows import Point, Progress


def row(step: int, **values) -> dict:
    filled = {
        "step": step,
        "stage": "lighthouse",
        "leaky": False,
        "loss": 2.0,
        "grad_norm": 0.764,
        "lr": 3e-3,
        "tokens_per_second": 1234567.8,
        "seconds": 2.0,
        "data_seconds": 0.1,
        "memory_gib": 61.25,
    }
    return filled | values


@pytest.fixture
def progress() -> Progress:
    seen = Progress("run-1", "lighthouse", 0, 100, begin=0, processes=2, started=0.0)
    seen.add(row(10, loss=4.0), 20.0)
    seen.add(row(50, loss=2.5), 100.0)
    seen.add({"step": 50, "stage": "lighthouse", "leaky": False, "val_loss": 2.6}, 100.0)
    seen.checkpoint = 50
    return seen


def text(progress, columns=80, **options) -> list[str]:
    return [line.plain for line in render(progress, options.pop("now", 101.0), columns, **options)]


def test_everything_is_there(progress):
    assert text(progress) == [
        "run-1  stage 1, lighthouse                              1:41 elapsed  1:39 left",
        "━" * 30 + "─" * 30 + "  step 50/100   50%",
        "loss       2.5000  █▁",
        "lr         3.00e-03           grad norm  0.764",
        "tokens/s   1,234,568          data wait  5.0%",
        "memory     61.25 GiB          validation 2.6000 at 50",
        "checkpoint step 50",
    ]


def test_a_gpu_has_an_mfu(progress):
    progress.add(row(60, mfu=0.4128), 120.0)
    assert "MFU        41.3%" in "\n".join(text(progress))


def test_a_leaky_loss_is_marked(progress):
    progress.add(row(60, leaky=True), 120.0)
    progress.add({"step": 60, "stage": "lighthouse", "leaky": True, "val_loss": 2.2}, 120.0)
    lines = text(progress)
    assert "2.0000 leaky  " in lines[2] and "2.2000 leaky at 60" in "\n".join(lines)
    assert [str(span.style) for span in sparkline(progress.points, 9).spans] == ["cyan", "cyan", "yellow"]


@pytest.mark.parametrize("columns", [1, 2, 5, 12, 20, 40, 60, 80, 140, 500])
@pytest.mark.parametrize("name", ["a", "a-run-with-quite-a-long-name-20261122-015550"])
def test_no_line_reaches_the_edge(progress, columns, name):
    progress.name = name
    for step in range(51, 100):
        progress.add(row(step, loss=200 / step, leaky=True), 2.0 * step)
    for line in render(progress, 200.0, columns):
        assert line.cell_len <= max(columns - 1, 1)


def test_a_low_terminal_gets_the_first_lines(progress):
    assert len(text(progress, lines=3)) == 2
    assert len(text(progress, lines=1)) == 1


def test_before_the_first_row(progress):
    fresh = Progress("a", "dense", 100, 120, begin=100, processes=2, started=0.0, recovery=True)
    lines = text(fresh, now=65.0)
    assert lines[0].startswith("a  stage 2, dense  ") and lines[0].endswith("starting 2 processes  1:05")
    assert lines[1].endswith("step 100/120    0%") and "━" not in lines[1]
    assert len(lines) == 2


def test_the_bar_is_that_of_the_stage():
    seen = Progress("a", "dense", 100, 120, begin=110, processes=1, started=0.0, recovery=True)
    assert text(seen)[1].endswith("step 110/120   50%")


def test_the_end_and_an_interruption(progress):
    assert text(progress, note="stopping: saves after this step")[0].endswith("stopping: saves after this step")
    progress.add(row(100), 200.0)
    assert text(progress, now=203.0)[0].endswith("finishing  3:23")


def points(*losses: float, stage: str = "lighthouse") -> list[Point]:
    return [Point(step, stage, loss, False) for step, loss in enumerate(losses)]


def test_sparkline():
    assert sparkline(points(8, 7, 6, 5, 4, 3, 2, 1), 8).plain == "█▇▆▅▄▃▂▁"
    assert sparkline(points(8, 8, 4.5, 4.5, 1, 1), 3).plain == "█▅▁"
    assert sparkline(points(2, 2, 2), 80).plain == "▁▁▁"
    assert sparkline(points(2, math.nan, 1, math.inf), 80).plain == "█!▁!"
    assert sparkline(points(math.nan), 80).plain == "!"
    assert sparkline([], 80).plain == sparkline(points(1, 2), 0).plain == ""


def test_a_stage_that_ended_is_set_apart_and_leaves_room():
    before, after = points(*[4.0] * 100), points(*[1.0] * 100, stage="dense")
    assert sparkline(before + after, 31).plain == "█" * 10 + "│" + "▁" * 20
    assert sparkline(before + after[:2], 31).plain == "█" * 28 + "│" + "▁" * 2
