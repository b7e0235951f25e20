"""Following a run in training: the new rows of its metrics.jsonl, what they add up to, and each as a plain line."""

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lighthouse_core.reading import is_count, is_number, open_regular, parse_json, read_regular

# Keys of a row whose values are numbers.
_TIMES = ("seconds", "data_seconds", "tokens_per_second")
_FIGURES = (
    *(*_TIMES, "loss", "val_loss", "grad_norm", "lr", "tokens", "steps", "memory_gib", "mfu", "window", "spike"),
    *("loss_scale", "skipped_steps", "budget_share", "budget_heads", "budget_blocks"),
)
# What a row must have to be shown.
_SHOWN = (*_TIMES, "stage", "leaky", "grad_norm", "lr", "memory_gib")


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def finite(value: Any) -> Any:
    """A row or report with None for what JSON has no number for: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_row(text: str | bytes) -> dict[str, Any] | None:
    """The row that a line of a metrics file holds; NaN for a figure that was not finite.

    Returns:
        The row, in which every key of ours has a value of its kind; None for a line that is no row of ours: cut short
        by a crash, or written by something else.
    """
    with contextlib.suppress(ValueError):
        row = parse_json(text)
        if isinstance(row, dict):
            row = {key: math.nan if value is None else value for key, value in row.items()}
            sound = is_count(row.get("step")) and all(is_number(row[key]) for key in _FIGURES if key in row)
            named = row.get("stage", "dense") in ("lighthouse", "dense") and type(row.get("leaky", False)) is bool
            return row if sound and named else None
    return None


def read_rows(path: Path, needed: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a metrics file, without lines that are none; none where there is no file.

    Args:
        path: of the file.
        needed: keys without which a row is left out.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.exists():
        return []
    rows = map(parse_row, read_regular(path).splitlines())
    return [row for row in rows if row is not None and row.keys() >= set(needed)]


def progress_line(step: int, end: int, stage: str, row: dict[str, Any], seconds_left: float, leaky: bool) -> str:
    """One plain line: step, stage, loss, gradient norm, learning rate, tokens per second, time left.

    Args:
        step, end: the step just finished and the last of the stage.
        stage: "lighthouse" or "dense".
        row: `loss` in nats per token, `grad_norm`, `lr`, `tokens_per_second`.
        seconds_left: estimate for the rest of the stage.
        leaky: marks a loss that later tokens took part in.
    """
    loss = f"loss {row['loss']:.4f}" + (" (leaky)" if leaky else "")
    return (
        f"step {step}/{end}  {stage}  {loss}  grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
        f"{row['tokens_per_second']:,.0f} tok/s  {clock(seconds_left)} left"
    )


def validation_line(row: dict[str, Any]) -> str:
    """One plain line of a validation row."""
    note = " (leaky)" if row["leaky"] else ""
    return f"step {row['step']}  {row['stage']}  validation loss {row['val_loss']:.4f}{note}"


def can_be_shown(row: dict[str, Any]) -> bool:
    """Whether a row has every key that a line or a view of it shows."""
    return row.keys() >= set(_SHOWN if "loss" in row else ("stage", "leaky", "val_loss"))


class Tail:
    """Reads the rows that training adds to a metrics file.

    Training replaces the file when it begins, without the rows of steps that it is about to repeat; whatever lay there
    before that is not read. Make the Tail before training starts.
    """

    def __init__(self, path: Path):
        self.path = path
        self._stale = self._inode()
        self._offset = 0

    def read(self) -> list[tuple[str, dict[str, Any]]]:
        """The complete rows since the last call: each one's text and its values."""
        if self._stale is not None:
            if self._inode() in (None, self._stale):
                return []
            self._stale = None
        try:
            with open_regular(self.path) as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    # Somebody emptied it meanwhile: what is written from now on counts.
                    self._offset = 0
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []
        # A row that is still being written has no line break yet.
        text = text[: text.rfind(b"\n") + 1]
        self._offset += len(text)
        lines = text.decode("utf-8", errors="replace").splitlines()
        rows = ((line, parse_row(line)) for line in lines)
        return [(line, row) for line, row in rows if row is not None]

    def _inode(self) -> int | None:
        try:
            return self.path.stat().st_ino
        except OSError:
            return None


class Point(NamedTuple):
    """One loss of a run, in nats per token."""

    step: int
    stage: str
    loss: float
    leaky: bool


@dataclass
class Progress:
    """What is known of one stage in training. Times are seconds of one monotonic clock.

    Attributes:
        name: of the run.
        stage: "lighthouse" or "dense".
        start, end: steps between which the stage lies.
        begin: the finished step that this launch goes on from.
        processes: in all.
        started: when this launch began.
        recovery: whether a Lighthouse stage came before.
        checkpoint: step of the newest complete checkpoint.
        points: every loss of the run so far, of earlier launches too.
        row: the newest training row of this launch.
        validation: the newest validation row of the run.
    """

    name: str
    stage: str
    start: int
    end: int
    begin: int
    processes: int
    started: float
    recovery: bool = False
    checkpoint: int | None = None
    points: list[Point] = field(default_factory=list)
    row: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    _first: tuple[int, float] | None = None
    _last: tuple[int, float] | None = None

    @property
    def step(self) -> int:
        """The newest step that is known to be finished."""
        return self.row["step"] if self.row else self.begin

    def add(self, row: dict[str, Any], now: float) -> bool:
        """Take in a row seen at `now`. Returns whether it is of this launch rather than of an earlier one."""
        fresh = row["step"] > self.begin
        if "val_loss" in row:
            self.validation = row
        if "loss" in row:
            self.points.append(Point(row["step"], row["stage"], row["loss"], row["leaky"]))
            if fresh:
                self.row = row
                self._last = (row["step"], now)
                self._first = self._first or self._last
        return fresh

    def seconds_left(self, now: float) -> float | None:
        """Estimate for the rest of the stage, checkpoints and validation included; None before the first row."""
        if self.row is None or self._first is None or self._last is None:
            return None
        (step_0, time_0), (step_1, time_1) = self._first, self._last
        # The first step is slower than the others: it says something only as long as it is alone.
        per_step = (time_1 - time_0) / (step_1 - step_0) if time_1 > time_0 else self.row["seconds"]
        return max(0.0, (self.end - step_1) * per_step - (now - time_1))
