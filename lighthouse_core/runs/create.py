"""Making the directory of a new run. Nothing here imports torch."""

import errno
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lighthouse_core.config import Recipe, dump_recipe
from lighthouse_core.config.origin import DESCRIPTIONS, ORIGIN, read_origin
from lighthouse_core.errors import RunError, refusal
from lighthouse_core.files import check_output, remove_empty, write_atomically
from lighthouse_core.runs.listing import checkpoint_steps
from lighthouse_core.runs.run import Run, in_use, with_own_tokenizer
from lighthouse_core.shown import shortened, shown

# Where this code is, as a checkout.
_CHECKOUT = Path(__file__).resolve().parents[2]
_RECORDED = ("lighthouse-pretrain", "torch", "triton", "flash-attn-4", "torchtitan", "numpy", "safetensors", "pydantic")


def check_free(recipe: Recipe, name: str = "") -> None:
    """Raise RunError if create_run could not give a new run this name, or else the recipe's."""
    name = name or recipe.output.name
    wanted = Path(recipe.output.dir)
    check_output(wanted)
    try:
        if name and (path := run_path(recipe, name)).exists():
            raise _taken(path, name)
        home = next((path for path in (wanted, *wanted.parents) if os.path.lexists(path)), Path())
    except OSError as error:
        hint = "choose another output.dir or --name"
        raise refusal(error, f"cannot create a run in {shortened(wanted)}", hint, RunError) from None
    if not home.is_dir():
        raise RunError(f"output.dir cannot be {wanted}: {home} is a file", hint="choose another output.dir")


def _taken(path: Path, name: str) -> RunError:
    hint = "give the run a --name"
    if name and checkpoint_steps(path):
        hint = f"continue it with --resume {name}, or choose another --name"
    elif name and in_use(path):
        hint = "another process trains it: choose another --name"
    elif name and (path / "recipe.toml").is_file():
        hint = f"it has no checkpoint: --resume {name} begins it at step 0; or choose another --name"
    elif name:
        hint = "it has no checkpoint: choose another --name, or delete it"
    return RunError(f"run {path} exists", hint=hint)


def create_run(
    recipe: Recipe, stem: str, name: str = "", *, source: str = "", weights: dict[str, Any] | None = None
) -> Run:
    """Make the directory of a new run.

    Args:
        recipe: what it trains.
        stem: of the recipe's file; with the UTC time it names a run that has no name.
        name: of the run; else `recipe.output.name`.
        source: where the recipe came from, for a comment in the saved recipe.
        weights: for the ledger, what it begins with; the files that describe these are kept in `origin`.

    Raises:
        RunError: the name is taken or cannot be a directory's name.
    """
    name = name or recipe.output.name
    given = name
    name = name or f"{stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    path = run_path(recipe, name)
    check_output(path.parent)
    made = [above for above in path.parents if not os.path.lexists(above)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError:
        if not path.parent.is_dir():
            raise RunError(
                f"output.dir cannot be {path.parent}: that is a file", hint="choose another output.dir"
            ) from None
        raise _taken(path, given) from None
    except OSError as error:
        remove_empty(made)
        hint = "choose another output.dir" + ", or a shorter --name" * (error.errno == errno.ENAMETOOLONG)
        raise refusal(error, f"cannot create {path}", hint, RunError) from None
    try:
        recipe = _keep_tokenizer(recipe, path)
        stage = "lighthouse" if recipe.lighthouse.enabled else "dense"
        ledger: dict[str, Any] = {
            "version": 1,
            "stages": [{"stage": stage, "start": 0, "end": recipe.training.steps}],
        }
        if weights is not None:
            ledger["weights"] = weights | {ORIGIN: _keep_origin(recipe, path)}
        write_atomically(path / "environment.json", json.dumps(_environment(), indent=1) + "\n")
        write_atomically(path / "ledger.json", json.dumps(ledger, indent=1) + "\n")
        comment = f"# Every setting of run {name}" + (f", from {shown(source)}" if source else "")
        # The recipe comes last: a directory with one is a run.
        write_atomically(path / "recipe.toml", f"{comment}.\n\n{dump_recipe(recipe)}")
    except BaseException as error:
        # A start that failed leaves its name free.
        shutil.rmtree(path, ignore_errors=True)
        remove_empty(made)
        if isinstance(error, OSError):
            raise refusal(error, f"cannot write {path}", kind=RunError) from None
        raise
    return Run(path)


def _keep_tokenizer(recipe: Recipe, path: Path) -> Recipe:
    """Copy the files of the recipe's tokenizer into the run; returns the recipe that names the copy."""
    from lighthouse_core.data.tokenizer import tokenizer_files

    files = tokenizer_files(recipe.data.tokenizer)
    for name, file in files.items():
        try:
            (path / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, path / name)
        except OSError as error:
            raise refusal(error, f"cannot copy the tokenizer {file} into the run", kind=RunError) from None
    if files:
        # Of a directory, the file in it: the first.
        recipe = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"tokenizer": str(next(iter(files.values())))})}
        )
    return with_own_tokenizer(recipe, path)


def _keep_origin(recipe: Recipe, path: Path) -> list[str]:
    """Copy into the run what describes the weights that it begins with, for an export to have it again; returns the
    names of the files."""
    origin = read_origin(recipe.model.origin)
    # A run has it from where its own weights came from.
    folder = origin.path / ORIGIN if origin.run else origin.path
    files = [folder / name for name in DESCRIPTIONS if (folder / name).is_file()]
    try:
        if files:
            (path / ORIGIN).mkdir()
        for file in files:
            shutil.copyfile(file, path / ORIGIN / file.name)
    except OSError as error:
        raise refusal(error, f"cannot copy {folder} into the run", kind=RunError) from None
    return [file.name for file in files]


def run_path(recipe: Recipe, name: str) -> Path:
    """Where a run of that name lives.

    Raises:
        RunError: the name cannot be a directory's name.
    """
    if name == "latest":
        raise RunError("no run can be named latest, which stands for the newest one", hint="choose another name")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}", name):
        raise RunError(
            f"{shortened(name, 60)!r} cannot name a run",
            hint="use up to 200 letters, digits and . _ + -, beginning with a letter, digit or _",
        )
    return Path(recipe.output.dir) / name


def _environment() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in _RECORDED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": git_commit(),
        "versions": versions,
    }


def git_commit(checkout: Path = _CHECKOUT) -> str | None:
    """Commit of the checkout that this code runs from, with "-dirty" where tracked files differ from it; None where it
    was installed as a package."""

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(("git", *arguments), cwd=checkout, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    if git("rev-parse", "--show-toplevel") != str(checkout):
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
