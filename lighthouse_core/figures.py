"""Figures by matplotlib, which is an extra."""

from pathlib import Path
from typing import Any


def pyplot() -> Any | None:
    """matplotlib's, drawing to files; None where it is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same file for the same figure.
    matplotlib.rcParams["svg.hashsalt"] = "lighthouse"
    return pyplot


def save(figure: Any, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG, and close it.

    Args:
        figure: of matplotlib.
        path: of the files, without suffix.
    """
    from matplotlib import pyplot

    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]
    for file in files:
        figure.savefig(file, bbox_inches="tight", dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
    return files
