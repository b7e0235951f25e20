"""Runs side by side: loss against steps, tokens, time and FLOPs, the switch to dense, and what it all cost."""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lighthouse_core import figures
from lighthouse_core.estimate import flops_per_token
from lighthouse_core.runs.rows import read_rows
from lighthouse_core.runs.run import Run

# Rows that a smoothed loss is the mean of.
_SMOOTH = 5
FIGURES = ("compare.png", "compare.svg")
AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training", "flops": "model FLOPs"}


@dataclass(frozen=True)
class Point:
    """One logged training loss and what had been spent by then."""

    step: int
    tokens: int
    seconds: float
    flops: float
    loss: float
    leaky: bool


@dataclass(frozen=True)
class Curve:
    """One run.

    Attributes:
        name: of the run.
        points: its training rows, oldest first.
        validation: (step, loss, leaky) of its validation rows.
        switch: step after which every layer is dense; None for a run that is dense from the start, or has not switched.
        dense: whether it is dense from the start.
    """

    name: str
    points: tuple[Point, ...]
    validation: tuple[tuple[int, float, bool], ...]
    switch: int | None
    dense: bool


@dataclass(frozen=True)
class Summary:
    """Of one run; losses in nats per token, None for what there is not.

    Attributes:
        name: of the run.
        step, tokens, seconds, flops: at its last row.
        loss: mean of the last five rows of its last stage.
        val_loss, leaky: its last validation, and whether later tokens took part in it.
        jump: first dense loss less the mean of the last five before the switch (of fewer, a quarter of all, where there
            are fewer than twenty).
        spike: the highest of the first five dense losses less the same mean.
        back: steps after the switch until the mean of five rows' steps is below that of before it.
        below_dense: steps after the switch until it is below that of the dense run at the same tokens.
    """

    name: str
    step: int
    tokens: int
    seconds: float
    flops: float
    loss: float
    val_loss: float | None
    leaky: bool | None
    jump: float | None
    spike: float | None
    back: int | None
    below_dense: int | None


def read(run: Run) -> Curve:
    """A run's curve, from its metrics.jsonl."""
    per_step = run.recipe.training.global_batch_size * run.recipe.training.seq_len

    def flops(stage: str, first: int, last: int) -> float:
        # A row may repeat a step that a crash cost.
        return (last - first + 1) * per_step * flops_per_token(run.recipe, stage, (first, max(first, last)))

    rows = read_rows(run.path / "metrics.jsonl", ("stage", "leaky"))
    rows = [row for row in rows if "loss" not in row or ("seconds" in row and "tokens" in row)]
    return curve(run.name, rows, run.ledger["stages"], flops)


def unlike_texts(texts: Iterable[tuple[str, Any]]) -> str | None:
    """Whether losses of runs are of one text, in words; None where they are.

    Args:
        texts: of every run its name, and the fingerprint that its ledger has of its data.
    """
    runs = [(name, data if isinstance(data, str) else None) for name, data in texts]
    if len(runs) > 1 and (unknown := [name for name, data in runs if data is None]):
        return (
            f"whether the losses are of the same text is not known: the ledger of {unknown[0]} does not name its data"
        )
    for name, data in runs:
        if data != runs[0][1]:
            return (
                f"the losses of {runs[0][0]} and {name} are of other data, or of another order, split, tokenizer or "
                "padding of it (data.align pads the documents of several runs alike)"
            )
    return None


def curve(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    flops_of: Callable[[str, int, int], float],
) -> Curve:
    """A run's curve. Rows whose loss is not finite are left out, but not their time. Steps that an interruption left
    without a row count as those of the next one.

    Args:
        name: of the run.
        rows: of its metrics.jsonl.
        stages: of its ledger.
        flops_of: a stage and its steps, first and last: their model FLOPs.
    """
    dense = stages[0]["stage"] == "dense"
    seconds = flops = 0.0
    points, step = [], 0
    for row in rows:
        if "loss" in row:
            seconds += (row["step"] - step) * row["seconds"]
            flops += flops_of(row["stage"], step + 1, row["step"])
            step = row["step"]
            if row["loss"] is not None and math.isfinite(row["loss"]):
                points.append(Point(row["step"], row["tokens"], seconds, flops, row["loss"], row["leaky"]))
    return Curve(
        name=name,
        points=tuple(points),
        validation=tuple((row["step"], row["val_loss"], row["leaky"]) for row in rows if "val_loss" in row),
        switch=None if dense or len(stages) < 2 else stages[1]["start"],
        dense=dense,
    )


def summarize(curve: Curve, dense: Curve | None = None) -> Summary:
    """What a curve comes to, beside that of a dense run of the same data."""
    last = curve.points[-1]
    jump = spike = back = below = None
    switch = curve.switch
    before = [p for p in curve.points if switch is not None and p.step <= switch]
    after = [p for p in curve.points if switch is not None and p.step > switch]
    if switch is not None and before and after:
        # Not of the beginning, where the loss falls fast.
        level = fmean(p.loss for p in before[-max(1, min(_SMOOTH, len(before) // 4)) :])
        jump = after[0].loss - level
        spike = max(p.loss for p in after[:_SMOOTH]) - level
        smooth = _smooth(after)
        back = next((p.step - switch for p, loss in smooth if loss < level), None)
        if dense is not None:
            other = _smooth(dense.points)
            for p, loss in smooth:
                then = next((theirs for q, theirs in other if q.tokens >= p.tokens), None)
                if then is not None and loss < then:
                    below = p.step - switch
                    break
    _, val_loss, leaky = curve.validation[-1] if curve.validation else (None, None, None)
    return Summary(
        curve.name,
        last.step,
        last.tokens,
        last.seconds,
        last.flops,
        fmean(p.loss for p in (after or curve.points)[-_SMOOTH:]),
        val_loss,
        leaky,
        jump,
        spike,
        back,
        below,
    )


def _smooth(points: Sequence[Point]) -> list[tuple[Point, float]]:
    """Points from the fifth or so on, each with the mean loss of five rows' steps: a launch logs its first step, too,
    and what is drawn must not depend on where there was one."""
    if len(points) < 2:
        return []
    apart = median(q.step - p.step for p, q in itertools.pairwise(points))
    found, first = [], 0
    for i, point in enumerate(points):
        while points[first].step <= point.step - _SMOOTH * apart:
            first += 1
        if point.step >= points[0].step + (_SMOOTH - 1) * apart:
            found.append((point, fmean(p.loss for p in points[first : i + 1])))
    return found


def plot(curves: Sequence[Curve], folder: Path, against: Mapping[str, str] = AXES) -> list[Path] | None:
    """One page with the loss against each of AXES or some, means of five rows, leaky parts dotted, as PNG and SVG.

    Returns:
        The files; None where matplotlib is missing.
    """
    pyplot = figures.pyplot()
    if pyplot is None:
        return None
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8), sharey=True)
    colors = pyplot.get_cmap("tab10" if len(curves) <= 10 else "tab20").colors
    for axes in grid.flat[len(against) :]:
        axes.remove()
    for axes, (key, label) in zip(grid.flat, against.items(), strict=False):
        for number, curve in enumerate(curves):
            # Dashed where the colours begin anew.
            again, color = divmod(number, len(colors))
            color = colors[color]
            parts = itertools.groupby(curve.points, key=lambda p: p.leaky)
            for part, (leaky, points) in enumerate(parts):
                shown = list(points)
                style = ":" if leaky else "--" if again else "-"
                name = figures.label(curve.name) + " (leaky)" * leaky if part == 0 or leaky else None
                smooth = _smooth(shown) if len(shown) >= 2 * _SMOOTH else [(p, p.loss) for p in shown]
                shown, losses = [p for p, _ in smooth], [loss for _, loss in smooth]
                axes.plot([getattr(p, key) for p in shown], losses, style, color=color, label=name)
            if curve.switch is not None:
                at = next((getattr(p, key) for p in curve.points if p.step > curve.switch), None)
                if at is not None:
                    axes.axvline(at, color=color, alpha=0.4, linewidth=1)
        axes.set(xlabel=label, ylabel="nats per token", yscale="log")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    names = grid.flat[0].get_legend_handles_labels()
    figure.legend(*names, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figures.save(figure, folder / "compare")


def is_comparison(content: Mapping[str, Any]) -> bool:
    """Whether that is what `as_json` writes."""
    runs = content.get("runs")
    return (
        "version" in content and isinstance(runs, list) and all(isinstance(run, dict) and "jump" in run for run in runs)
    )


def as_json(summaries: Sequence[Summary]) -> str:
    """Schema version 1."""
    runs: list[dict[str, Any]] = [vars(summary) for summary in summaries]
    return json.dumps({"version": 1, "runs": runs}, indent=1, allow_nan=False)
