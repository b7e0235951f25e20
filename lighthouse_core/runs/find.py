"""The run, or the checkpoint of one, that a user means. Nothing here imports torch."""

import os
import re
from pathlib import Path

from lighthouse_core.config.origin import split_checkpoint
from lighthouse_core.errors import RunError, did_you_mean
from lighthouse_core.reading import home_expanded
from lighthouse_core.runs.listing import run_dirs
from lighthouse_core.runs.run import Run


def find_run(spec: str | Path | None, output_dir: str | Path = "runs") -> Run:
    """The run that a user means.

    Args:
        spec: a run directory, or the name of one under `output_dir`; None or "latest" is the newest one there by
            the modification time of its directory.
        output_dir: where runs live.

    Raises:
        RunError: there is no such run.
    """
    output_dir = Path(output_dir)
    runs = run_dirs(output_dir)
    if spec is None or (str(spec) == "latest" and output_dir / "latest" not in runs):
        if not runs:
            raise RunError(f"there is no run under {output_dir}", hint="lighthouse pretrain RECIPE makes one")
        return Run(runs[0])
    for path in (Path(spec), output_dir / spec):
        if (path / "recipe.toml").is_file():
            return Run(path)
    for path in (Path(spec), output_dir / spec):
        if path.is_dir():
            odd = os.path.lexists(path / "recipe.toml")
            raise RunError(
                f"{path} is not a run: {'its recipe.toml is no file' if odd else 'it has no recipe.toml'}",
                hint="give a folder that lighthouse pretrain made, or its name",
            )
    meant = did_you_mean(str(spec), (path.name for path in runs), before="")
    raise RunError(
        f"no run {spec}, here or under {output_dir}",
        hint=meant or f"give a run directory, or the name of one under {output_dir}",
    )


def find_origin(spec: str, output_dir: str | Path = "runs") -> str:
    """The directory that a user means by --from: a path, or the name of a run, maybe with /checkpoints/step-N.

    Raises:
        RunError: there is neither.
    """
    path = home_expanded(spec)
    # A folder of a run's name that is neither a run nor a model does not hide the run.
    if any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        return os.path.abspath(path)
    try:
        return os.path.abspath(find_checkpoint(path, output_dir))
    except RunError:
        if not path.exists() and not path.parent.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
            raise RunError(
                f"{spec} is not on this machine: --from takes a directory or a run",
                hint=f"hf download {spec} --local-dir DIR fetches a model of the Hugging Face hub",
            ) from None
        if not path.exists():
            raise
        # What is wrong with it is said of both kinds.
        return os.path.abspath(path)


def find_checkpoint(spec: str | Path, output_dir: str | Path = "runs") -> Path:
    """The run, or the checkpoint of one, that a user means; whether the checkpoint is there is not looked at.

    Args:
        spec: as in `find_run`, or that and /checkpoints/step-N.
        output_dir: where runs live.

    Raises:
        RunError: there is no such run.
    """
    # Path.resolve raises for a link that leads to itself.
    path = Path(os.path.realpath(spec))
    _, step = split_checkpoint(path)
    if step is None:
        return find_run(spec, output_dir).path
    parents = Path(spec).parents
    if path.exists() or len(parents) < 2:
        return path
    return find_run(parents[1], output_dir).path / "checkpoints" / path.name
