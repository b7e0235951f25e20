"""What there is of a run of a sweep, as its directory tells."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from lighthouse_core.errors import RunError
from lighthouse_core.ledger import GIVEN
from lighthouse_core.listing import checkpoint_steps
from lighthouse_core.runs import Run
from lighthouse_core.train.progress import finite, read_rows

# What `pretrain` makes before recipe.toml.
_UNFINISHED = r"\.?(checkpoints|tokenizer|environment|ledger|metrics|recipe)\b.*"


def begun(path: Path) -> bool:
    """Whether there is something of a run to go on from."""
    return (path / "recipe.toml").is_file() and bool(checkpoint_steps(path))


def stage_1_end(run: Run) -> int:
    """The step that the first stage ends with."""
    stages = run.ledger["stages"]
    return stages[1]["start"] if len(stages) > 1 else stages[0]["end"]


def stage_1_done(path: Path, at: int = 0) -> bool:
    """Whether there is a checkpoint of a step of the first stage; 0 for its end."""
    if not begun(path):
        return False
    run = Run(path)
    return (at or stage_1_end(run)) in run.checkpoint_steps()


def report(path: Path, which: str) -> dict[str, Any] | None:
    """A report of `lighthouse eval`; None without a whole one."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((path / f"eval/{which}/results.json").read_bytes())
    return None


def clear(path: Path) -> bool:
    """Remove what was cut off before its first checkpoint, from which nothing can go on.

    Returns:
        Whether there was something.

    Raises:
        RunError: another process trains it, or it is no run.
    """
    if begun(path) or not path.exists():
        return False
    if (path / "recipe.toml").is_file():
        with Run(path).lock():
            shutil.rmtree(path)
    elif all(re.fullmatch(_UNFINISHED, file.name) for file in path.iterdir()):
        shutil.rmtree(path)
    else:
        raise RunError(f"{path} is there already, and is no run")
    return True


def branch(run: Run, path: Path, at: int = 0) -> Run:
    """A new run that stands where another one's first stage ended; the checkpoint is linked rather than copied.

    Args:
        run: has the checkpoint.
        path: of the new run.
        at: another step of the first stage, which is the new one's end.
    """
    step = at or stage_1_end(run)
    first = {key: value for key, value in run.ledger["stages"][0].items() if key in GIVEN} | {"end": step}
    temporary = path.with_name(f".{path.name}.branching")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(run.checkpoint_dir(step), temporary / f"checkpoints/step-{step}", copy_function=os.link)
    rows = read_rows(run.path / "metrics.jsonl")
    kept = [finite(row) for row in rows if row["step"] <= step and row["stage"] == first["stage"]]
    (temporary / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    ledger = {"version": run.ledger["version"], "stages": [first]}
    (temporary / "ledger.json").write_text(json.dumps(ledger, indent=1) + "\n", encoding="utf-8")
    for file in run.path.iterdir():
        if file.name in ("recipe.toml", "environment.json") or file.name.startswith("tokenizer"):
            shutil.copy(file, temporary / file.name)
    temporary.rename(path)
    return Run(path)
