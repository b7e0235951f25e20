"""Following a run: which rows of the metrics file are read, what they add up to, and the plain lines."""

import json

import pytest

from lighthouse_core.runs.rows import Progress, Tail, clock, progress_line, validation_line


def row(step: int, **values) -> dict:
    filled = {"loss": 2.0, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 9118.4, "seconds": 4.0}
    return {"step": step, "stage": "lighthouse", "leaky": False} | filled | values


def text(*rows: dict) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


def progress(begin: int = 0, end: int = 100) -> Progress:
    return Progress("a", "lighthouse", 0, end, begin=begin, processes=1, started=0.0)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (-3, "0:00")]
)
def test_clock(seconds, expected):
    assert clock(seconds) == expected


def test_plain_lines():
    line = progress_line(3, 60, "dense", row(3, loss=2.30741), 75.0, False)
    assert line == "step 3/60  dense  loss 2.3074  grad 0.500  lr 1.00e-03  9,118 tok/s  1:15 left"
    assert "loss 2.0000 (leaky)  " in progress_line(3, 60, "lighthouse", row(3), 0.0, True)
    validation = {"step": 3, "stage": "lighthouse", "leaky": True, "val_loss": 1.5}
    assert validation_line(validation) == "step 3  lighthouse  validation loss 1.5000 (leaky)"


def test_a_row_is_read_once_and_when_it_is_complete(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    whole = text(row(1), row(2))
    path.write_text(whole[:-10])
    assert [values["step"] for _, values in tail.read()] == [1]
    assert tail.read() == []
    path.write_text(whole)
    assert tail.read() == [(json.dumps(row(2)), row(2))]


def test_rows_that_training_is_about_to_repeat_are_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text(row(1), row(2), row(3)))
    tail = Tail(path)
    assert tail.read() == []
    new = tmp_path / "new"
    new.write_text(text(row(1)))
    new.replace(path)
    with path.open("a") as file:
        file.write(text(row(2, loss=1.0)))
    assert [values["loss"] for _, values in tail.read()] == [2.0, 1.0]


def test_earlier_rows_are_history_and_later_ones_progress():
    seen = progress(begin=10)
    assert not seen.add(row(10, loss=3.0), 0.0)
    assert not seen.add({"step": 10, "stage": "lighthouse", "leaky": False, "val_loss": 2.9}, 0.0)
    assert (seen.step, seen.row, seen.seconds_left(0.0)) == (10, None, None)
    assert seen.validation["val_loss"] == 2.9
    assert seen.add(row(11), 5.0)
    assert seen.step == 11 and [point.loss for point in seen.points] == [3.0, 2.0]


def test_time_left_leaves_out_the_slow_first_step_and_goes_down_between_rows():
    seen = progress(end=100)
    seen.add(row(1, seconds=30.0), 30.0)
    assert seen.seconds_left(30.0) == 99 * 30
    seen.add(row(11), 50.0)
    assert seen.seconds_left(50.0) == pytest.approx(89 * 2)
    assert seen.seconds_left(53.0) == pytest.approx(89 * 2 - 3)
    assert seen.seconds_left(1e6) == 0


def test_rows_that_arrive_together_still_give_a_time():
    seen = progress(end=100)
    for step in (10, 20):
        seen.add(row(step, seconds=0.1), 7.0)
    assert seen.seconds_left(7.0) == pytest.approx(8.0)
