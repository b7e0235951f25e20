"""What there is of a run of a sweep, as its directory tells."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from lighthouse_core.data.tokenizers.huggingface import COMPANIONS
from lighthouse_core.errors import RunError
from lighthouse_core.files import write_atomically
from lighthouse_core.ledger import GIVEN
from lighthouse_core.listing import checkpoint_steps
from lighthouse_core.reading import read_json
from lighthouse_core.runs import Run
from lighthouse_core.train.progress import finite, read_rows

_TOKENIZER = "|".join(map(re.escape, COMPANIONS))
# What `pretrain` makes of files before the first checkpoint, below a run, with the temporary names that they may have.
_FILES = re.compile(
    rf"(recipe\.toml|environment\.json|ledger\.json|metrics\.jsonl|tokenizer\.(json|model)|{_TOKENIZER}|wandb-id"
    r"|logs/rank[0-9]+\.log|tb/([^/]+/)?events\.out\.tfevents\.[^/]+|wandb/.*"
    r"|\.(recipe\.toml|environment\.json|ledger\.json|metrics\.jsonl|wandb-id)\.[0-9a-f]+"
    r"|checkpoints/\.step-[0-9]+\.(saving|deleting)/.*)"
)


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
        found = read_json(path / f"eval/{which}/results.json")
        return found if isinstance(found, dict) else None
    return None


def claim(path: Path) -> None:
    """Note that what is about to be made at `path`, where there is nothing, is this sweep's."""
    if not os.path.lexists(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_claim(path), "")


def settle(path: Path) -> None:
    """Bring the note of `claim` up to date after a command of the sweep: a run with a checkpoint is never removed, and
    what is made later at the path of one that is gone is somebody else's."""
    note = _claim(path)
    if not note.is_file():
        return
    if begun(path) or not path.is_dir():
        note.unlink()
    else:
        write_atomically(note, f"{path.stat().st_ino}\n")


def _claim(path: Path) -> Path:
    return path.with_name(f".{path.name}.begun")


def _claimed(path: Path) -> bool:
    """Whether a sweep made this folder, by its own notes."""
    try:
        note = _claim(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return False
    # A sweep that was killed could not say which folder its command made.
    return not note or note == str(path.stat().st_ino)


def clear(path: Path) -> bool:
    """Remove what a sweep began and what was cut off before its first checkpoint, from which nothing can go on.

    Returns:
        Whether there was something.

    Raises:
        RunError: another process trains it, no sweep began it, or it holds something else.
    """
    if begun(path) or not os.path.lexists(path):
        return False
    hint = "move it, or choose another --output"
    if path.is_symlink() or not path.is_dir() or not _claimed(path):
        raise RunError(f"{path} is there already, has no checkpoint to go on from, and is not of this sweep", hint=hint)
    if foreign := _foreign(path):
        raise RunError(f"{path} has no checkpoint to go on from, and holds {foreign}", hint=hint)
    with Run(path).lock() if (path / "recipe.toml").is_file() else contextlib.nullcontext():
        shutil.rmtree(path)
    _claim(path).unlink()
    return True


def _foreign(path: Path) -> str | None:
    """The first thing in a folder that no run makes before its first checkpoint."""
    for found in sorted(path.rglob("*")):
        name = found.relative_to(path).as_posix()
        if found.is_symlink() or (not found.is_dir() and not _FILES.fullmatch(name)):
            return name
        # Of folders, only those of a checkpoint tell anything.
        if found.is_dir() and re.fullmatch(r"checkpoints/[^.][^/]*", name):
            return name
    return None


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
    if temporary.is_symlink():
        raise RunError(f"{temporary} is a link, and is not written to", hint="move it out of the way")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    shutil.copytree(run.checkpoint_dir(step), temporary / f"checkpoints/step-{step}", copy_function=os.link)
    rows = read_rows(run.path / "metrics.jsonl", ("stage",))
    kept = [finite(row) for row in rows if row["step"] <= step and row["stage"] == first["stage"]]
    (temporary / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    ledger = {"version": run.ledger["version"], "stages": [first]}
    (temporary / "ledger.json").write_text(json.dumps(ledger, indent=1) + "\n", encoding="utf-8")
    for file in run.path.iterdir():
        if file.name in ("recipe.toml", "environment.json") or file.name.startswith("tokenizer"):
            shutil.copy(file, temporary / file.name)
    temporary.rename(path)
    return Run(path)
