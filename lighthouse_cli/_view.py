"""The live view of a training, as lines of text: no terminal here, so that a test can read it."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lighthouse_core.shown import shown

if TYPE_CHECKING:
    from rich.text import Text

    from lighthouse_core.runs.rows import Point, Progress

_BARS = "▁▂▃▄▅▆▇█"
_LABEL = 11
_COLUMN = 30


def render(progress: "Progress", now: float, columns: int, lines: int = 24, *, note: str = "") -> list["Text"]:
    """What a terminal of that size shows, each line narrower than it.

    Args:
        progress: of the stage in training.
        now: on the clock of `progress`.
        columns, lines: of the terminal; a low one gets the first lines, which matter most.
        note: stands in place of the time left.
    """
    width = max(columns - 1, 1)
    shown = [_title(progress, now, width, note), _bar(progress, width)]
    if progress.points:
        shown.append(_loss(progress, width))
    shown += _grid(_facts(progress), width)
    for line in shown:
        line.truncate(width)
    return shown[: max(lines - 1, 1)]


def sparkline(points: Sequence["Point"], width: int) -> "Text":
    """The newest losses, one character each or the mean of several, in at most `width` characters.

    A bar divides stages; losses that later tokens took part in are yellow. A loss that is not finite is an exclamation
    mark.
    """
    from rich.text import Text

    text = Text()
    if width < 1:
        return text
    # A stage that ended may keep a third of the line.
    split = next((n for n in range(len(points) - 1, 0, -1) if points[n - 1].stage != points[n].stage), 0)
    parts = [points[:split], points[split:]] if split and width >= 9 else [points]
    rooms = [width]
    if len(parts) == 2:
        second = min(len(parts[1]), width - 1 - min(len(parts[0]), width // 3))
        rooms = [width - 1 - second, second]
    bars = [_means(part, room) for part, room in zip(parts, rooms, strict=True)]
    finite = [value for part in bars for value, _ in part if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    for number, part in enumerate(bars):
        if number:
            text.append("│", "dim")
        for value, leaky in part:
            if not math.isfinite(value):
                text.append("!", "bold red")
                continue
            height = (value - low) / (high - low) if high > low else 0.0
            text.append(_BARS[round(height * (len(_BARS) - 1))], "yellow" if leaky else "cyan")
    return text


def _means(points: Sequence["Point"], room: int) -> list[tuple[float, bool]]:
    """At most `room` values, each the mean of equally many points (of one more or less) and whether one is leaky."""
    count = min(len(points), room)
    edges = [len(points) * n // count for n in range(count + 1)] if count else [0]
    groups = [points[begin:end] for begin, end in itertools.pairwise(edges)]
    return [(sum(p.loss for p in group) / len(group), any(p.leaky for p in group)) for group in groups]


def _title(progress: "Progress", now: float, width: int, note: str) -> "Text":
    from rich.text import Text

    from lighthouse_core.runs.rows import clock

    left = progress.seconds_left(now)
    elapsed = clock(now - progress.started)
    if note:
        state = note
    elif left is None:
        several = progress.processes > 1
        state = f"starting {progress.processes} processes  {elapsed}" if several else f"starting  {elapsed}"
    elif progress.step >= progress.end:
        state = f"finishing  {elapsed}"
    else:
        state = f"{elapsed} elapsed  {clock(left)} left"
    number = "stage 2, " if progress.recovery else "stage 1, " if progress.stage == "lighthouse" else ""
    stage = f"{number}{progress.stage}"
    room = width - len(stage) - len(state) - 4
    name = shown(progress.name)
    name = name if len(name) <= room else name[: max(room - 1, 0)] + "…"
    title = Text(name if room > 3 else "", "bold")
    title.append(("  " if title else "") + stage, "not bold magenta")
    title.append(" " * max(width - title.cell_len - len(state), 2))
    title.append(state, "not bold yellow" if note else "not bold")
    return title


def _bar(progress: "Progress", width: int) -> "Text":
    from rich.text import Text

    label = f"  step {progress.step}/{progress.end}"
    length = max(progress.end - progress.start, 1)
    share = min(max((progress.step - progress.start) / length, 0.0), 1.0)
    label += f"  {share:4.0%}"
    room = max(width - len(label), 0)
    done = int(room * share)
    return Text("━" * done, "green").append("─" * (room - done), "bright_black").append(label, "default")


def _loss(progress: "Progress", width: int) -> "Text":
    from rich.text import Text

    point = progress.points[-1]
    text = Text("loss".ljust(_LABEL), "dim")
    text.append(f"{point.loss:.4f}", "not dim bold")
    if point.leaky:
        text.append(" leaky", "not dim yellow")
    text.append("  ")
    return text.append_text(sparkline(progress.points, width - text.cell_len))


def _facts(progress: "Progress") -> list[tuple[str, str]]:
    row = progress.row
    facts = []
    if row is not None:
        wait = row["data_seconds"] / row["seconds"] if row["seconds"] else 0.0
        facts += [
            ("lr", f"{row['lr']:.2e}"),
            ("grad norm", f"{row['grad_norm']:.3f}"),
            ("tokens/s", f"{row['tokens_per_second']:,.0f}"),
            ("data wait", f"{wait:.1%}"),
            ("memory", f"{row['memory_gib']:.2f} GiB"),
        ]
        if "mfu" in row:
            facts.append(("MFU", f"{row['mfu']:.1%}"))
    if progress.validation is not None:
        note = " leaky" if progress.validation["leaky"] else ""
        facts.append(("validation", f"{progress.validation['val_loss']:.4f}{note} at {progress.validation['step']}"))
    if progress.checkpoint is not None:
        facts.append(("checkpoint", f"step {progress.checkpoint}"))
    return facts


def _grid(facts: Sequence[tuple[str, str]], width: int) -> list["Text"]:
    from rich.text import Text

    across = max(1, width // _COLUMN)
    lines = []
    for begin in range(0, len(facts), across):
        line = Text()
        for number, (label, value) in enumerate(facts[begin : begin + across]):
            line.append(" " * max(number * _COLUMN - line.cell_len, 2 if number else 0))
            line.append(label.ljust(_LABEL), "dim").append(value)
        lines.append(line)
    return lines
