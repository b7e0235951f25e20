"""Figures by matplotlib, which is an extra."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lighthouse_core.files import replacing
from lighthouse_core.shown import shortened, shown


def pyplot() -> Any | None:
    """matplotlib's, drawing to files; None where it is missing."""
    try:
        with _elsewhere():
            import matplotlib
    except ImportError:
        return None
    # The same figures for everybody, whatever another file of settings says.
    matplotlib.rcdefaults()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same file for the same figure.
    matplotlib.rcParams["svg.hashsalt"] = "lighthouse"
    return pyplot


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """Within, the working directory is another one: matplotlib obeys a matplotlibrc that it finds there when it is
    imported, as far as running LaTeX, and ends at one that cannot be read."""
    here = os.open(".", getattr(os, "O_PATH", os.O_RDONLY) | os.O_CLOEXEC)
    try:
        os.chdir(os.sep)
        yield
    finally:
        os.fchdir(here)
        os.close(here)


def label(name: str) -> str:
    """A name from outside as text of a figure: one reads $...$ as TeX, and leaves out of its legend what begins with an
    underscore."""
    text = shown(shortened(name, 120)).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def save(figure: Any, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG, and close it.

    Args:
        figure: of matplotlib.
        path: of the files, without suffix.
    """
    from matplotlib import pyplot

    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]
    for file in files:
        kind = file.suffix[1:]
        metadata = {"Date": None} if kind == "svg" else None
        with replacing(file) as opened:
            figure.savefig(opened, format=kind, bbox_inches="tight", dpi=150, metadata=metadata)
    pyplot.close(figure)
    return files
