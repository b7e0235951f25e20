"""What is next of each run of a sweep, and whether what is there is what the sweep asks for."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lighthouse_core.config import Recipe, load_recipe
from lighthouse_core.config.positions import flatten, spelled
from lighthouse_core.config.sweep import Sweep
from lighthouse_core.errors import LighthouseError, RecipeError, RunError, UserError
from lighthouse_core.files import same_paths
from lighthouse_core.runs.run import RESUMABLE, Run, check_resumable
from lighthouse_core.sweep.state import begun, report, stage_1_done

# What a run may have otherwise than the sweep asks: what it keeps of its own, and what resuming it may change.
_FREE = frozenset({*RESUMABLE, "output", "data.tokenizer", "data.hf_revision"})


def next_command(sweep: Sweep, base: Path, name: str, output: Path) -> list[str] | None:
    """Arguments of the `lighthouse` command that brings a run of the sweep forward; None once it is complete.

    Args:
        sweep: the sweep.
        base: the recipe file.
        name: of the run.
        output: where the runs live.
    """
    wanted = sweep.runs[name]
    path = output / name
    recover = ["recover", str(path), "--steps", str(wanted.recover), *_set(wanted.recover_set)]
    if not begun(path) and wanted.other_phases:
        return ["pretrain", "--resume", str(path)]
    if not begun(path) and wanted.stage_1:
        return recover
    if not begun(path):
        settings = [*sweep.settings(name), f"output.dir={json.dumps(str(output))}"]
        settings += _also(sweep, name, load_recipe(base, settings))
        return ["pretrain", str(base), "--name", name, *_set(settings)]
    run = Run(path)
    if not run.recovering and not stage_1_done(path):
        return ["pretrain", "--resume", str(path), *_set(_also(sweep, name, run.recipe))]
    evaluate = sweep.evaluate
    before_switch = run.stage == "lighthouse"
    # What only others recover from is measured at the switch alone.
    shared = before_switch and not wanted.recover and any(other.stage_1 == name for other in sweep.runs.values())
    own = not wanted.stage_1 or wanted.other_phases
    switches = shared or (before_switch and wanted.recover and own)
    # After a dense phase there is no switch to measure.
    if evaluate and switches and not run.recipe.phases[-1].dense and report(path, "switch") is None:
        return _eval(sweep, path, "switch", evaluate.at_switch)
    if wanted.recover and not run.recovering:
        return recover
    if run.recovering and (not run.checkpoint_steps() or run.checkpoint_steps()[-1] < run.end):
        return ["recover", str(path)]
    if evaluate and not shared and report(path, "end") is None:
        return _eval(sweep, path, "end", evaluate.only)
    return None


def waits(sweep: Sweep, name: str, output: Path) -> bool:
    """Whether a run needs a checkpoint of another one's first stage, which is not there yet."""
    wanted = sweep.runs[name]
    return bool(wanted.stage_1) and not begun(output / name) and not stage_1_done(output / wanted.stage_1, wanted.at)


def check(sweep: Sweep, base: Path, output: Path) -> None:
    """Compare what was trained and measured with what the sweep asks for now, and this with what a recovery may set.

    Args:
        sweep: the sweep.
        base: the recipe file.
        output: where the runs live.

    Raises:
        RecipeError: a recovery would set what its checkpoint decides.
        RunError: the sweep has changed since.
    """
    for name, wanted in sweep.runs.items():
        path, settings, free = output / name, sweep.settings(name), _FREE
        try:
            check_resumable(wanted.recover_set)
        except UserError as error:
            raise RecipeError(f"run {name}: recover_set: {error}", hint=error.hint) from None
        if not begun(path):
            continue
        try:
            run = Run(path)
            was = run.recipe
        except LighthouseError:
            # When its turn comes, what is wrong with it is said.
            continue
        if run.recovering:
            settings += [*wanted.recover_set, f"recover.steps={wanted.recover}"]
            free -= {"recover"}
        pairs = _pairs(was, load_recipe(base, settings), free)
        if wanted.stage_1 and not wanted.other_phases:
            pairs["at"] = run.ledger["stages"][0]["end"], wanted.at or was.training.steps
        for which in ("switch", "end"):
            found = report(path, which) if sweep.evaluate else None
            if found is None:
                continue
            for key in ("tokens", "sequences"):
                pairs[f"evaluate.{key} ({which})"] = found.get(key), getattr(sweep.evaluate, key)
            measured = found.get("data")
            if isinstance(measured, dict):
                pairs |= _pairs_of_text(sweep, was, measured, which)
        for step in sweep.branches(name) if not run.recovering else ():
            done = run.checkpoint_steps()
            waiting = [other for other, its in sweep.runs.items() if its.stage_1 == name and its.at == step]
            if step not in done and done[-1] > step and not all(begun(output / other) for other in waiting):
                raise RunError(
                    f"run {path} is past step {step}, from which {', '.join(waiting)} should begin, and has no "
                    f"checkpoint of it",
                    hint="delete the run or choose another --output",
                )
        for key, (old, new) in pairs.items():
            if old != new:
                raise RunError(
                    f"run {path} has {key} = {json.dumps(old)}, and the sweep asks for {json.dumps(new)}",
                    hint="delete the run or choose another --output",
                )


def _pairs_of_text(sweep: Sweep, own: Recipe, measured: dict[str, Any], which: str) -> dict[str, tuple[Any, Any]]:
    """The text that a report is of, and the one that the sweep asks for."""
    evaluate = sweep.evaluate
    assert evaluate is not None
    data = (load_recipe(Path(evaluate.recipe), evaluate.set) if evaluate.recipe else own).data
    was, wanted = _leaves(measured), _leaves(data.origin)
    return {
        f"evaluate: data.{key} ({which})": (was.get(key), wanted.get(key))
        for key in was | wanted
        if key != "sha256" and not same_paths(was.get(key), wanted.get(key))
    }


def _pairs(one: Recipe, other: Recipe, free: frozenset[str]) -> dict[str, tuple[Any, Any]]:
    """The values of every key in both recipes, but for the keys and sections that are free."""
    first, second = (_leaves(recipe.model_dump(mode="json")) for recipe in (one, other))
    return {
        key: (first.get(key), second.get(key))
        for key in first | second
        if not free & {key, key.partition(".")[0]}
        and not (key.startswith("data.") and key.endswith(".paths") and same_paths(first.get(key), second.get(key)))
    }


def _leaves(table: dict[str, Any]) -> dict[str, Any]:
    """Every value that is no table and no list of tables, by its key with dots."""
    flat = {spelled(path): value for path, value in flatten(table).items()}
    return {key: value for key, value in flat.items() if not isinstance(value, dict) and f"{key}[1]" not in flat}


def _also(sweep: Sweep, name: str, recipe: Recipe) -> list[str]:
    """The setting that has those steps saved which others begin from, where the recipe does not do so."""
    wanted = {*recipe.checkpoint.also, *sweep.branches(name)}
    return [f"checkpoint.also={sorted(wanted)}"] if wanted - set(recipe.checkpoint.also) else []


def _set(settings: Iterable[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def _eval(sweep: Sweep, path: Path, which: str, only: str) -> list[str]:
    evaluate = sweep.evaluate
    assert evaluate is not None
    numbers = ("tokens", "sequences", "context", "trials")
    options = [part for name in numbers for part in (f"--{name}", str(getattr(evaluate, name)))]
    options += ["--recipe", evaluate.recipe, *_set(evaluate.set)] if evaluate.recipe else []
    return ["eval", str(path), "--out", str(path / "eval" / which), *options, *(["--only", only] if only else [])]
