"""lighthouse runs: what has been trained here."""

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from lighthouse_cli import _output


def runs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the runs live.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the runs, newest first."""
    from dataclasses import asdict

    from lighthouse_core.errors import UserError
    from lighthouse_core.runs.listing import run_dirs, summarize
    from lighthouse_core.runs.rows import finite

    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    if not directory.exists() and directory != Path("runs"):
        raise UserError(f"there is no directory {directory}", hint="runs lie in output.dir of their recipe")
    found = [summarize(path) for path in run_dirs(directory)]
    if as_json:
        _output.data(json.dumps([finite(asdict(run)) for run in found], indent=1, allow_nan=False))
        return
    if not found:
        _output.say(f"no run under {directory}; lighthouse pretrain RECIPE makes one")
        return

    def text(value: object) -> str:
        return "-" if value is None else str(value)

    def loss(value: float | None, leaky: bool | None) -> str:
        return "-" if value is None else f"{value:.4f}{' (leaky)' if leaky else ''}"

    rows = [
        (
            run.name,
            text(run.stage),
            f"{text(run.step)}/{text(run.end)}",
            text(run.saved),
            loss(run.loss, run.leaky),
            loss(run.val_loss, run.val_leaky),
            f"{datetime.fromisoformat(run.updated).astimezone():%Y-%m-%d %H:%M}",
        )
        for run in found
    ]
    _output.table("", ("name", "attention", "step", "saved", "loss", "validation", "updated"), rows, text_columns=2)
