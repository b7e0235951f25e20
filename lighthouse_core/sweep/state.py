"""What there is of a run of a sweep, as its directory tells."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lighthouse_core.config import dump_recipe, load_recipe
from lighthouse_core.data.tokenizers.huggingface import COMPANIONS
from lighthouse_core.errors import RunError
from lighthouse_core.files import write_atomically
from lighthouse_core.reading import RECIPE_BYTES, read_json, read_regular
from lighthouse_core.runs.ledger import GIVEN
from lighthouse_core.runs.listing import checkpoint_steps
from lighthouse_core.runs.rows import finite, read_rows
from lighthouse_core.runs.run import Run
from lighthouse_core.runs.unfinished import foreign

_OWN_TOKENIZER = re.compile(r"tokenizer\.(json|model)")


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
        note = read_regular(_claim(path), RECIPE_BYTES).decode("ascii").strip()
    except (OSError, ValueError):
        return False
    # A sweep that was killed could not say which folder its command made.
    return not note or note == str(path.stat().st_ino)


def left_over(path: Path) -> bool:
    """Whether there is something at the place of a run that `clear` removes: from it nothing can go on.

    Raises:
        RunError: no sweep began it, or it holds something else.
    """
    if begun(path) or not os.path.lexists(path):
        return False
    hint = "move it, or choose another --output"
    # A run whose recipe.toml was lost has its checkpoints still.
    lacks = f"{path} has no {'checkpoint' if (path / 'recipe.toml').is_file() else 'recipe.toml'} to go on from"
    if path.is_symlink() or not path.is_dir() or not _claimed(path):
        raise RunError(f"{lacks}, and is not of this sweep", hint=hint)
    if other := foreign(path):
        raise RunError(f"{lacks}, and holds {other}", hint=hint)
    return True


def clear(path: Path) -> bool:
    """Remove what a sweep began and what was cut off before its first checkpoint, from which nothing can go on.

    Returns:
        Whether there was something.

    Raises:
        RunError: another process trains it, no sweep began it, or it holds something else.
    """
    if not left_over(path):
        return False
    with Run(path).lock() if (path / "recipe.toml").is_file() else contextlib.nullcontext():
        # Only now does nobody add to it.
        if not left_over(path):
            return False
        shutil.rmtree(path)
    _claim(path).unlink()
    return True


def branch(run: Run, path: Path, at: int = 0, settings: Sequence[str] = ()) -> Run:
    """A new run that stands where another one's first stage ended; the checkpoint is linked rather than copied. The
    checkpoint has the weights, the optimizer's state and the place in the data.

    Args:
        run: has the checkpoint.
        path: of the new run.
        at: another step of the first stage, which is the new one's end.
        settings: `lighthouse.phases=...`, with which the new run goes on to the end of that first stage.
    """
    step = at or stage_1_end(run)
    recipe = load_recipe(run.path / "recipe.toml", settings, of_run=True) if settings else None
    end = recipe.training.steps if recipe else step
    first = {key: value for key, value in run.ledger["stages"][0].items() if key in GIVEN} | {"end": end}
    temporary = path.with_name(f".{path.name}.branching")
    if os.path.lexists(temporary):
        if temporary.is_symlink() or not _claimed(temporary):
            raise RunError(f"{temporary} is there already, and is not of this sweep", hint="move it out of the way")
        shutil.rmtree(temporary)
    claim(temporary)
    try:
        temporary.mkdir()
        shutil.copytree(run.checkpoint_dir(step), temporary / f"checkpoints/step-{step}", copy_function=os.link)
        rows = read_rows(run.path / "metrics.jsonl", ("stage",))
        kept = [finite(row) for row in rows if row["step"] <= step and row["stage"] == first["stage"]]
        (temporary / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        ledger = {"version": run.ledger["version"], "stages": [first]}
        (temporary / "ledger.json").write_text(json.dumps(ledger, indent=1) + "\n", encoding="utf-8")
        for file in run.path.iterdir():
            ours = file.name in ("recipe.toml", "environment.json", *COMPANIONS) or _OWN_TOKENIZER.fullmatch(file.name)
            # A folder or a device of that name is nobody's file.
            if ours and file.is_file():
                shutil.copy(file, temporary / file.name)
        if recipe:
            text = f"# Stage 1 of {path.name}, begun by {run.name}.\n\n{dump_recipe(recipe)}"
            (temporary / "recipe.toml").write_text(text, encoding="utf-8")
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        _claim(temporary).unlink(missing_ok=True)
    return Run(path)
