"""Curves of a sweep: figures by matplotlib, and text by plotext for a terminal far away. Both are extras."""

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lighthouse_core import figures
from lighthouse_core.profile.attention import Call
from lighthouse_core.profile.sweep import Curve, Sweep

_MARKERS = "oxvs^d*"
_Value = TypeVar("_Value", float, float | None)


def _ms(call: Call) -> float:
    return call.both_ms.median


def _gib(call: Call) -> float | None:
    return call.peak_gib


def short(tokens: int) -> str:
    """A length as an axis has it: 98304 is 96K."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def draw(sweep: Sweep, folder: Path) -> list[Path]:
    """latency and, where memory was measured, memory as PNG and SVG; nothing without matplotlib."""
    plot = figures.pyplot()
    if plot is None:
        return []
    files = _draw(plot, sweep, _ms, "milliseconds, forward and backward", folder / "latency")
    if any(_gib(call) for curve in sweep.curves for call in curve.calls):
        files += _draw(plot, sweep, _gib, "GiB at the peak, forward and backward", folder / "memory")
    return files


def _draw(plot: Any, sweep: Sweep, value: Callable[[Call], float | None], unit: str, path: Path) -> list[Path]:
    from matplotlib.ticker import LogLocator

    figure, axes = plot.subplots(figsize=(7, 4.5))
    for number, curve in enumerate(sweep.curves):
        label = _label(curve) if value is _ms else curve.label
        measured, worked_out, colour = _measured(curve, value), _worked_out(curve, value), f"C{number}"
        if measured:
            axes.plot(*zip(*measured, strict=True), marker=_MARKERS[number % 7], color=colour, label=label)
        if worked_out:
            axes.plot(*zip(*worked_out, strict=True), linestyle="--", color=colour, label=None if measured else label)
    marked = [(name, found.tokens) for name, found in sweep.crossovers.items() if found.tokens and value is _ms]
    for line, (name, tokens) in enumerate(marked):
        axes.axvline(tokens, linestyle=":", color="grey", linewidth=1)
        # A line each, for they may lie close together.
        axes.annotate(f" {tokens:,.0f}: {name}", (tokens, 0.93 - 0.06 * line), xycoords=("data", "axes fraction"))
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
    lengths = sweep.curves[0].tokens
    axes.set_xticks(lengths, [short(n) for n in lengths])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    how = "by the square of the length" if value is _ms else "in proportion to the length"
    dashed = f"dashed: {how}" if any(_worked_out(curve, value) for curve in sweep.curves) else None
    axes.legend(title=dashed, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    return figures.save(figure, path)


def _label(curve: Curve) -> str:
    if curve.varied:
        return f"{curve.label}, another pyramid at each length"
    return curve.label + (f", slope {curve.law.slope:.2f}" if curve.law else "")


def _measured(curve: Curve, value: Callable[[Call], _Value]) -> list[tuple[int, _Value]]:
    return [(n, value(call)) for n, call in curve.measured]


def _worked_out(curve: Curve, value: Callable[[Call], _Value]) -> list[tuple[int, _Value]]:
    """What was not measured, with the last measured point before it."""
    pairs = list(zip(curve.tokens, curve.calls, strict=True))
    first = next((number for number, (_, call) in enumerate(pairs) if call.extrapolated), None)
    return [] if first is None else [(n, value(call)) for n, call in pairs[max(0, first - 1) :]]


def terminal(sweep: Sweep, columns: int, *, colour: bool) -> str | None:
    """The latency plot as text; None without plotext, or for one length."""
    try:
        import plotext
    except ImportError:
        return None
    lengths = sweep.curves[0].tokens
    if len(lengths) < 2:
        return None
    figure = plotext.figure
    figure.clear()
    figure.plot_size(min(columns, 100), 22)
    times, labels = [], []
    # On a logarithmic ruler of its own plotext loses points.
    for number, curve in enumerate(sweep.curves):
        label, measured, worked_out = _label(curve), _measured(curve, _ms), _worked_out(curve, _ms)
        if worked_out:
            label += " (dots: worked out)"
            figure.draw(_signal(figure, worked_out, "."))
        if measured:
            figure.draw(_signal(figure, measured, _MARKERS[number % 7]))
        labels.append(f"{_MARKERS[number % 7]} {label}")
        times += [math.log10(_ms(call)) for call in curve.calls]
    figure.ruler(0).ticks([math.log10(n) for n in lengths], [short(n) for n in lengths])
    decades = range(math.floor(min(times)), math.ceil(max(times)) + 1)
    figure.ruler(1).ticks(list(decades), [f"{10.0**n:g}" for n in decades])
    figure.title("milliseconds, forward and backward, by tokens")
    # Below the plot, which plotext's own legend covers.
    legend = (line for label in labels for line in textwrap.wrap(label, columns, subsequent_indent="  "))
    return "\n".join([figure.build().string(colorless=not colour), *legend])


def _signal(figure: Any, points: list[tuple[int, float]], marker: str) -> Any:
    x, y = zip(*((math.log10(n), math.log10(ms)) for n, ms in points), strict=True)
    return figure.signal(list(x), list(y), marker=marker).lines(True)
