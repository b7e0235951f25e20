"""What was measured of a sweep, as one document."""

import contextlib
from pathlib import Path
from typing import Any

from lighthouse_core.config.sweep import RunSection, Sweep
from lighthouse_core.errors import LighthouseError
from lighthouse_core.reading import read_json
from lighthouse_core.runs.rows import finite, read_rows
from lighthouse_core.runs.run import Run
from lighthouse_core.sweep.state import report


def collect(sweep: Sweep, name: str, output: Path) -> dict[str, Any]:
    """All that was measured of a sweep so far: of each run its settings, recipe, ledger, rows and reports.

    A run that has not begun, or that cannot be read, is left out. Schema version 1.

    Args:
        sweep: the sweep.
        name: of it.
        output: where the runs live.
    """
    runs = {}
    for run_name, wanted in sweep.runs.items():
        with contextlib.suppress(LighthouseError, OSError):
            runs[run_name] = _measured(Run(output / run_name), wanted)
    about = {"about": sweep.about, "recipe": sweep.recipe, "per_gpu": sweep.per_gpu, "set": list(sweep.set)}
    return {"version": 1, "sweep": name, **about, "runs": runs}


def _measured(run: Run, wanted: RunSection) -> dict[str, Any]:
    environment = _environment(run.path / "environment.json")
    evaluations = {which: report(run.path, which) for which in ("switch", "end")}
    return {
        "settings": wanted.model_dump(),
        "recipe": run.recipe.model_dump(mode="json"),
        "ledger": run.ledger,
        "rows": [finite(row) for row in read_rows(run.path / "metrics.jsonl")],
        "evaluations": {which: found for which, found in evaluations.items() if found is not None},
        **environment,
    }


def _environment(path: Path) -> dict[str, Any]:
    """What of a run's environment is collected; None for what its file does not tell."""
    found = None
    with contextlib.suppress(OSError, ValueError):
        found = read_json(path)
    return {key: found.get(key) if isinstance(found, dict) else None for key in ("python", "versions", "git_commit")}
