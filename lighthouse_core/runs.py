"""A run is a directory: its recipe, its ledger of stages, its checkpoints. Nothing here imports torch."""

import difflib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from lighthouse_core.checkpoint import METADATA, check_contents
from lighthouse_core.config import Recipe, dump_recipe, load_recipe
from lighthouse_core.config.load import known_keys, parse_override
from lighthouse_core.config.positions import flatten
from lighthouse_core.errors import CheckpointError, RunError, UserError, refusal
from lighthouse_core.files import RUN_FOLDERS, check_output, refuse_links, remove_empty, write_atomically
from lighthouse_core.ledger import account
from lighthouse_core.listing import checkpoint_steps, run_dirs
from lighthouse_core.reading import is_count, is_number, read_json
from lighthouse_core.seal import Verification, damage
from lighthouse_core.shown import shortened, shown
from lighthouse_core.train.schedule import lr_factor

# Sections and keys that still take effect when training goes on from a checkpoint.
RESUMABLE = (
    "recover",
    "training.compile",
    "training.activation_checkpointing",
    "training.loss_chunk",
    "training.local_batch_size",
    "training.nonfinite",
    "training.nonfinite_limit",
    "parallel",
    "checkpoint",
    "metrics",
    "lighthouse.backend",
    "lighthouse.dense_backend",
)
# Where this code is, as a checkout.
_CHECKOUT = Path(__file__).resolve().parents[1]
_RECORDED = ("lighthouse-pretrain", "torch", "triton", "flash-attn-4", "torchtitan", "numpy", "safetensors", "pydantic")


class Run:
    """One run directory.

    Attributes:
        path: the directory.
        name: its last part.
        recipe: the resolved recipe of the stage in progress (recover.toml in a recovery, else recipe.toml).
        damaged: what `newest_step` found wrong with newer checkpoints, by step.
        ledger: `{"version": 1, "stages": [{"stage": "lighthouse" | "dense", "start": 0, "end": 120}, ...]}`;
            a stage trains the steps start + 1 .. end. lighthouse_core.ledger adds what they cost.

    Raises:
        RunError: the directory is not a run, or its ledger cannot be read.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.name = Path(os.path.realpath(self.path)).name
        if not (self.path / "recipe.toml").is_file():
            raise RunError(
                f"{path} is not a run: it has no recipe.toml",
                hint="give a folder that lighthouse pretrain made, or its name",
            )
        self.ledger = self._read_ledger()
        self.damaged: dict[int, str] = {}
        self._ahead: Verification | None = None
        self._held = False

    @property
    def recipe_path(self) -> Path:
        # Without its recover.toml a recovery would go on by the settings of stage 1.
        return self.path / ("recover.toml" if self.recovering else "recipe.toml")

    @cached_property
    def recipe(self) -> Recipe:
        return _with_own_tokenizer(load_recipe(self.recipe_path), self.path)

    @property
    def stage(self) -> str:
        """Of the last stage: "lighthouse" or "dense"."""
        return self.ledger["stages"][-1]["stage"]

    @property
    def start(self) -> int:
        return self.ledger["stages"][-1]["start"]

    @property
    def end(self) -> int:
        return self.ledger["stages"][-1]["end"]

    @property
    def recovering(self) -> bool:
        """Whether the last stage is a recovery; a dense run from step 0 is none."""
        return len(self.ledger["stages"]) > 1

    def checkpoint_steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first."""
        return checkpoint_steps(self.path)

    def checkpoint_dir(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step}"

    def verify_ahead(self) -> None:
        """Begin to read the newest checkpoint, for `newest_step`, while this process has other things to do."""
        for step in self.checkpoint_steps()[-1:]:
            self._ahead = Verification(self.checkpoint_dir(step))

    def newest_step(self, strict: bool = False) -> int:
        """Step of the newest checkpoint whose every byte is as it was written. Newer ones go into `damaged`.

        Args:
            strict: refuse to fall back to an older one.

        Raises:
            CheckpointError: there is none, or the newest is damaged and `strict` forbids another, or it holds what no
                checkpoint does.
        """
        self.damaged.clear()
        ahead, self._ahead = self._ahead, None
        for step in reversed(self.checkpoint_steps()):
            path = self.checkpoint_dir(step)
            reason = ahead.result() if ahead and ahead.folder == path else damage(path)
            if reason is None:
                if (path / METADATA).exists():
                    # A seal tells damage, and not who made what is sealed: that is refused rather than passed over.
                    check_contents(path)
                return step
            self.damaged[step] = f"checkpoint {path} is damaged: {reason}"
            if strict:
                raise CheckpointError(self.damaged[step], hint="without --strict an older sound one is taken")
        if self.damaged:
            raise CheckpointError(
                f"every checkpoint of {self.path} is damaged; {self.damaged[max(self.damaged)]}",
                hint="put a sound copy of one back",
            )
        hint = "delete it and start again; a smaller checkpoint.interval saves earlier"
        if _in_use(self.path, ours=self._held):
            hint = "another process trains it: wait for its first one"
        raise CheckpointError(f"run {self.path} has no complete checkpoint", hint=hint)

    def set_aside(self) -> None:
        """Rename what `newest_step` found damaged to step-N.damaged, so that training goes on before it."""
        for step in self.damaged:
            path = self.checkpoint_dir(step)
            names = (path.with_name(f"{path.name}.damaged{i or ''}") for i in range(1000))
            path.rename(next(name for name in names if not name.exists()))

    def write_recovery(self, recovery: "Recovery") -> None:
        """Make the recovery the last stage, and its recipe recover.toml."""
        ledger, path = self.ledger, self.path / "recover.toml"
        before = ledger["stages"][:-1] if self.recovering else ledger["stages"]
        new = not path.exists()
        # The recipe first: it counts only once the ledger has the stage.
        write_atomically(path, f"# Stage 2 of {self.name}.\n\n{dump_recipe(recovery.recipe)}")
        stage = {"stage": "dense", "start": recovery.start, "end": recovery.end}
        self.ledger = {**ledger, "stages": [*before, stage]}
        try:
            self._write_ledger()
        except BaseException:
            self.ledger = ledger
            if new:
                path.unlink(missing_ok=True)
            raise
        self.__dict__.pop("recipe", None)

    def change(self, overrides: Sequence[str]) -> None:
        """Take settings for the rest of the stage. Writes nothing.

        Args:
            overrides: `a.b=value` settings, of those that take effect on resuming.

        Raises:
            UserError: the checkpoint decides one of them.
        """
        check_resumable(overrides)
        self.recipe = _with_own_tokenizer(load_recipe(self.recipe_path, overrides), self.path)

    def write_recipe(self) -> None:
        """Save the recipe as it has become."""
        path = self.recipe_path
        comment = path.read_text(encoding="utf-8").partition("\n")[0]
        write_atomically(path, f"{comment}\n\n{dump_recipe(self.recipe)}")

    def note(self, **facts: Any) -> None:
        """Add facts to the ledger's last stage."""
        self.ledger = self._read_ledger()
        self.ledger["stages"][-1] |= facts
        self._write_ledger()

    def settle(self) -> None:
        """Bring the costs in the ledger up to date."""
        self.ledger = self._read_ledger()
        self.ledger = account(self)
        self._write_ledger()

    def _write_ledger(self) -> None:
        write_atomically(self.path / "ledger.json", json.dumps(self.ledger, indent=1) + "\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            RunError: another process trains it.
            UserError: a folder that training writes into, or deletes from, is a link.
        """
        refuse_links(self.path, *RUN_FOLDERS)
        directory = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"run {self.path} is being trained by another process", hint="wait until it ends, or interrupt it"
                ) from None
            self._held = True
            yield
        finally:
            self._held = False
            os.close(directory)

    def _read_ledger(self) -> dict[str, Any]:
        path = self.path / "ledger.json"
        try:
            ledger = read_json(path)
        except OSError as error:
            raise refusal(error, f"cannot read {path}", kind=RunError) from None
        except ValueError as error:
            raise RunError(f"cannot read {path}: {error}", hint="put a sound copy of it back") from None
        if not isinstance(ledger, dict) or ledger.get("version") != 1:
            raise RunError(f"{path} is not of a version that this release reads", hint="put a sound copy of it back")
        if (problem := _odd_stages(ledger.get("stages"))) is not None:
            raise RunError(f"cannot read {path}: {problem}", hint="put a sound copy of it back")
        return ledger


def _in_use(path: Path, *, ours: bool = False) -> bool:
    """Whether another process holds a run: a launcher, or processes that have outlived theirs.

    Args:
        path: of the run.
        ours: whether this process holds it as its launcher.
    """
    for folder in (path / "checkpoints", *([] if ours else [path])):
        try:
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(opened)
    return False


def _odd_stages(stages: Any) -> str | None:
    """What is wrong with the stages of a ledger, which somebody else may have written; None if nothing is."""
    if not isinstance(stages, list) or not stages:
        return "it has no stages"
    last = 0
    for stage in stages:
        if not isinstance(stage, dict) or stage.get("stage") not in ("lighthouse", "dense"):
            return 'a stage is neither "lighthouse" nor "dense"'
        start, end = stage.get("start"), stage.get("end")
        if not is_count(start) or not is_count(end) or not last <= start < end:
            return "the steps of its stages do not follow one another"
        measured = stage.get("measured_dense")
        if measured is not None and not (isinstance(measured, dict) and is_number(measured.get("seconds"))):
            return "measured_dense has no seconds"
        last = start
    return None


@dataclass(frozen=True)
class Recovery:
    """A stage 2 that is about to be trained.

    Attributes:
        recipe: its settings; recover.steps is its whole length.
        start, end: the switch step and the last step.
        step: of the checkpoint it goes on from.
        stopped_early: stage 1 did not reach its end.
        rates: learning rates of the last update before an extension and of its first one, where the schedule has a
            step between them.
    """

    recipe: Recipe
    start: int
    end: int
    step: int
    stopped_early: bool
    rates: tuple[float, float] | None = None


def plan_recovery(
    run: Run,
    steps: int | None = None,
    extend: int | None = None,
    overrides: Sequence[str] = (),
    strict: bool = False,
) -> Recovery:
    """What `lighthouse recover` has to train: a new recovery, or the rest of one that was begun. Writes nothing.

    A run that is dense from the start has one, too: more steps, or a decay of its rate.

    Args:
        run: the run.
        steps: length of the recovery; else `[recover] steps`.
        extend: steps to add to a recovery that was begun.
        overrides: `a.b=value` settings, of those that take effect on resuming.
        strict: refuse to fall back to an older checkpoint where the newest is damaged.

    Raises:
        RunError: the recovery is complete or of another length, or the run decays by its own schedule.
        CheckpointError: there is no checkpoint to go on from.
        UserError: a number or a setting that cannot be used.
    """
    for option, number in (("--steps", steps), ("--extend", extend)):
        if number is not None and number < 1:
            raise UserError(f"{option} must be at least 1, not {number}")
    if steps is not None and extend is not None:
        raise UserError("--steps and --extend exclude each other", hint="--extend adds to a recovery begun before")
    check_resumable(overrides)
    if steps is not None:
        overrides = [*overrides, f"recover.steps={steps}"]
    if run.recovering:
        # The ledger has the length; recover.toml runs ahead of it if an --extend was cut off between the two.
        overrides = [f"recover.steps={run.end - run.start}", *overrides]
    recipe = _with_own_tokenizer(load_recipe(run.recipe_path, overrides), run.path)
    if not run.recovering:
        return _begin_recovery(run, recipe, extend, strict)
    recovery = _continue_recovery(run, recipe, extend, strict)
    chosen = any("decay" in parse_override(override).get("recover", {}) for override in overrides)
    if recovery.rates and not chosen:
        before, after = recovery.rates
        raise UserError(
            f"with --extend {extend} the learning rate of run {run.path}, {before:.3g} at step {recovery.step}, would "
            f"rise to {after:.3g} at step {recovery.step + 1}",
            hint=f"choose: --set 'recover.decay=\"linear\"' takes the higher rate to zero at step {recovery.end}, as "
            f"if planned so; --set 'recover.decay=\"none\"' keeps it at {recipe.optimizer.lr:.3g}",
        )
    return recovery


def _begin_recovery(run: Run, recipe: Recipe, extend: int | None, strict: bool) -> Recovery:
    if extend is not None:
        raise RunError(f"run {run.path} has no recovery to extend", hint="lighthouse recover --steps N begins one")
    if not recipe.recover.steps:
        raise UserError(f"the recipe of run {run.path} has no recover.steps", hint="give --steps N")
    if recipe.schedule.decay_steps:
        raise RunError(
            f"the rate of run {run.path} goes to zero by its own schedule.decay_steps",
            hint=f"lighthouse pretrain --resume {run.path} finishes it; a run without has recover.decay",
        )
    step = run.newest_step(strict)
    return Recovery(recipe, step, step + recipe.recover.steps, step, stopped_early=step < run.end)


def _continue_recovery(run: Run, recipe: Recipe, extend: int | None, strict: bool) -> Recovery:
    step, begun = run.newest_step(strict), run.end - run.start
    if step < run.start:
        raise CheckpointError(
            f"run {run.path} lost its checkpoint of step {run.start}, where its recovery began",
            hint="put that checkpoint back",
        )
    # Before its first checkpoint nothing of it is lost, so that a mistaken length can be corrected.
    if recipe.recover.steps != begun and step > run.start:
        raise RunError(
            f"the recovery of run {run.path} was begun with {begun} steps, not {recipe.recover.steps}",
            hint=f"without --steps it is finished at step {run.end}; --extend M adds M steps",
        )
    # What comes on top may go on at the full rate; any other change would give steps that are done another schedule.
    ends_decay = extend is not None and recipe.recover.decay == "none"
    if step > run.start and recipe.recover.decay != run.recipe.recover.decay and not ends_decay:
        raise RunError(f'the recovery of run {run.path} is under way with recover.decay "{run.recipe.recover.decay}"')
    if step >= run.end and extend is None:
        raise RunError(
            f"the recovery of run {run.path} is complete at step {step}",
            hint=f"lighthouse strip {run.path} OUT exports it; --extend M adds M steps",
        )
    length = recipe.recover.steps + (extend or 0)
    recipe = recipe.model_copy(update={"recover": recipe.recover.model_copy(update={"steps": length})})
    end, rates = run.start + length, None
    if extend is not None and step > run.start and run.recipe.recover.decay != "none":
        rates = recovery_rate(run.recipe, step - 1, run.start, run.end), recovery_rate(recipe, step, run.start, end)
    return Recovery(recipe, run.start, end, step, stopped_early=False, rates=rates)


def recovery_rate(recipe: Recipe, step: int, start: int, end: int) -> float:
    """Learning rate of the update that follows `step` finished steps, of a recovery between two steps of its run."""
    decay = (start, end) if recipe.recover.decay == "linear" else None
    return recipe.optimizer.lr * lr_factor(step, warmup=recipe.schedule.warmup_steps, decay=decay)


def check_resumable(overrides: Sequence[str]) -> None:
    """Refuse settings that the checkpoint would override; unknown keys are left to the loader's better words.

    Args:
        overrides: as `--set` takes them, for what goes on from a checkpoint.

    Raises:
        UserError: the checkpoint decides one of them.
    """
    for override in overrides:
        for path, value in flatten(parse_override(override)).items():
            section, key = path[0], ".".join(path[:2])
            known = section == "titan" or (len(path) == 2 and path[1] in known_keys().get(section, ()))
            if not isinstance(value, dict) and known and section not in RESUMABLE and key not in RESUMABLE:
                wildcards = [f"{name}.*" if "." not in name else name for name in RESUMABLE]
                raise UserError(f"--set {key}: the checkpoint decides {key}", hint=f"free are {', '.join(wildcards)}")


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
    elif name and _in_use(path):
        hint = "another process trains it: choose another --name"
    elif name:
        hint = "it has no checkpoint: choose another --name, or delete it"
    return RunError(f"run {path} exists", hint=hint)


def create_run(recipe: Recipe, stem: str, name: str = "", *, source: str = "") -> Run:
    """Make the directory of a new run.

    Args:
        recipe: what it trains.
        stem: of the recipe's file; with the UTC time it names a run that has no name.
        name: of the run; else `recipe.output.name`.
        source: where the recipe came from, for a comment in the saved recipe.

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
        ledger = {"version": 1, "stages": [{"stage": stage, "start": 0, "end": recipe.training.steps}]}
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

    for name, file in tokenizer_files(recipe.data.tokenizer).items():
        try:
            shutil.copyfile(file, path / name)
        except OSError as error:
            raise refusal(error, f"cannot copy the tokenizer {file} into the run", kind=RunError) from None
    return _with_own_tokenizer(recipe, path)


def _with_own_tokenizer(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with the tokenizer that the run at `path` keeps: the run may have moved since it was saved."""
    suffix = Path(recipe.data.tokenizer).suffix
    own = path / f"tokenizer{suffix}"
    if suffix not in (".model", ".json") or not own.is_file():
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": str(own)})})


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
    if Path(spec).is_dir():
        raise RunError(
            f"{spec} is not a run: it has no recipe.toml",
            hint="give a folder that lighthouse pretrain made, or its name",
        )
    near = difflib.get_close_matches(str(spec), [path.name for path in runs], n=1)
    raise RunError(
        f"no run {spec}, here or under {output_dir}",
        hint=f"did you mean {near[0]}?" if near else f"give a run directory, or the name of one under {output_dir}",
    )


def split_checkpoint(path: Path) -> tuple[Path, int | None]:
    """The run and N of a RUN/checkpoints/step-N; any other path itself, and None."""
    match = re.fullmatch(r"step-(0|[1-9][0-9]{0,15})", path.name)
    return (path.parents[1], int(match[1])) if match and path.parent.name == "checkpoints" else (path, None)


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


def _environment() -> dict[str, Any]:
    versions = {}
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
