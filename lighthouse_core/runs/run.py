"""A run is a directory: its recipe, its ledger of stages, its checkpoints. Nothing here imports torch."""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lighthouse_core.checkpoint import METADATA, check_contents
from lighthouse_core.config import Recipe, dump_recipe, load_recipe
from lighthouse_core.config.load import known_keys, parse_override
from lighthouse_core.config.origin import DTYPES, ORIGIN, TOKENIZER
from lighthouse_core.config.positions import flatten, spelled
from lighthouse_core.errors import CheckpointError, RunError, UserError, refusal
from lighthouse_core.files import RUN_FOLDERS, refuse_links, write_atomically
from lighthouse_core.reading import is_count, is_number, read_json
from lighthouse_core.runs.ledger import account
from lighthouse_core.runs.listing import checkpoint_steps
from lighthouse_core.runs.rows import read_rows
from lighthouse_core.seal import Verification, damage

if TYPE_CHECKING:
    from lighthouse_core.runs.recovery import Recovery

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
    # Of the launch, and not of what is trained.
    "titan.comm",
)


# Longer than `in_use` holds a folder.
_PROBE_SECONDS = 0.2


class Newest(NamedTuple):
    """The newest sound checkpoint of a run.

    Attributes:
        step: its step.
        damaged: what is wrong with each newer one, by its step.
    """

    step: int
    damaged: dict[int, str]


class Run:
    """One run directory.

    Attributes:
        path: the directory.
        name: its last part.
        recipe: the resolved recipe of the stage in progress (recover.toml in a recovery, else recipe.toml).
        ledger: `{"version": 1, "stages": [{"stage": "lighthouse" | "dense", "start": 0, "end": 120}, ...]}`;
            a stage trains the steps start + 1 .. end. lighthouse_core.runs.ledger adds what they cost.

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
        self._held = False

    @property
    def recipe_path(self) -> Path:
        # Without its recover.toml a recovery would go on by the settings of stage 1.
        return self.path / ("recover.toml" if self.recovering else "recipe.toml")

    @cached_property
    def recipe(self) -> Recipe:
        return with_own_tokenizer(load_recipe(self.recipe_path, of_run=True), self.path)

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

    @property
    def complete(self) -> bool:
        """Whether there is a checkpoint of the last step of the last stage. The same on all machines."""
        return max(self.checkpoint_steps(), default=0) >= self.end

    def checkpoint_steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first."""
        return checkpoint_steps(self.path)

    def checkpoint_dir(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step}"

    def verify_ahead(self) -> Verification | None:
        """Begin to read the newest checkpoint, for `newest_checkpoint`, while this process has other things to do."""
        steps = self.checkpoint_steps()
        return Verification(self.checkpoint_dir(steps[-1])) if steps else None

    def newest_checkpoint(self, strict: bool = False, ahead: Verification | None = None) -> Newest:
        """The newest checkpoint whose every byte is as it was written.

        Args:
            strict: refuse to fall back to an older one.
            ahead: of `verify_ahead`, where that was begun.

        Raises:
            CheckpointError: there is none, or the newest is damaged and `strict` forbids another, or it holds what no
                checkpoint does.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.checkpoint_steps()):
            path = self.checkpoint_dir(step)
            reason = ahead.result() if ahead and ahead.folder == path else damage(path)
            if reason is None:
                if (path / METADATA).exists():
                    # A seal tells damage, and not who made what is sealed: that is refused rather than passed over.
                    check_contents(path)
                return Newest(step, damaged)
            damaged[step] = f"checkpoint {path} is damaged: {reason}"
            if strict:
                raise CheckpointError(damaged[step], hint="without --strict an older sound one is taken")
        if damaged:
            raise CheckpointError(
                f"every checkpoint of {self.path} is damaged; {damaged[max(damaged)]}",
                hint="put a sound copy of one back",
            )
        hint = "its checkpoints are lost: put a sound copy of one back, or delete the run and start again"
        if self.unsaved():
            hint = f"lighthouse pretrain --resume {self.path} begins it at step 0"
        if in_use(self.path, ours=self._held):
            hint = "another process trains it: wait for its first one"
        raise CheckpointError(f"run {self.path} has no complete checkpoint", hint=hint)

    def unsaved(self) -> bool:
        """Whether the run ended before its first checkpoint: to go on is to begin at step 0.

        False while another process trains it, and where its rows show that it had a checkpoint.
        """
        if self.recovering or any(self.path.glob("checkpoints/step-*")) or in_use(self.path, ours=self._held):
            return False
        try:
            rows = read_rows(self.path / "metrics.jsonl")
        except OSError:
            return False
        # An asynchronous save is complete before the next one begins.
        return all(row["step"] < 2 * self.recipe.checkpoint.interval for row in rows)

    def set_aside(self, damaged: Iterable[int]) -> None:
        """Rename the damaged checkpoints of these steps to step-N.damaged, so that training goes on before them."""
        for step in damaged:
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
        self.recipe = with_own_tokenizer(load_recipe(self.recipe_path, overrides, of_run=True), self.path)

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
                _take(directory)
            except BlockingIOError:
                raise RunError(
                    f"run {self.path} is being trained by another process", hint="wait until it ends, or interrupt it"
                ) from None
            self._held = True
            # As it is now that nobody else changes it.
            self.ledger = self._read_ledger()
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
        if problem := _odd_stages(ledger.get("stages")) or _odd_weights(ledger.get("weights")):
            raise RunError(f"cannot read {path}: {problem}", hint="put a sound copy of it back")
        return ledger


def _take(directory: int) -> None:
    """Lock an open folder for this process alone, or raise BlockingIOError."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # Another process may only look, by `in_use`, which holds the folder for a moment.
        time.sleep(_PROBE_SECONDS)
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_use(path: Path, *, ours: bool = False) -> bool:
    """Whether another process holds a run: a launcher, or processes that have outlived theirs. A run that this user
    may not open counts as held: another user may train it.

    Args:
        path: of the run.
        ours: whether this process holds it as its launcher.
    """
    for folder in (path / "checkpoints", *([] if ours else [path])):
        try:
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except PermissionError:
            return True
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
        drawn = stage.get("sources_since_start", {})
        if not isinstance(drawn, dict) or not all(map(_is_drawn, drawn.values())):
            return "its sources have no samples and epoch"
        unread = stage.get("unread", {})
        if not isinstance(unread, dict) or not all(map(is_count, unread.values())):
            return "the files that could not be read have no sizes"
        last = start
    return None


def _odd_weights(weights: Any) -> str | None:
    """What is wrong with what a ledger says of the weights that the run began with; None if nothing is."""
    if weights is None:
        return None
    if not isinstance(weights, dict) or type(weights.get("recovered")) is not bool:
        return "its weights do not say whether they were recovered"
    others, files = weights.get("others"), weights.get("files")
    if not isinstance(others, dict) or any(kind not in DTYPES for kind in (weights.get("dtype"), *others.values())):
        return f"its weights have a dtype that is not one of {', '.join(DTYPES)}"
    if not isinstance(files, dict) or not isinstance(weights.get(ORIGIN), list):
        return "its weights name no files"
    return None


def _is_drawn(source: Any) -> bool:
    return isinstance(source, dict) and all(is_count(source.get(key)) for key in ("samples", "epoch"))


def check_resumable(overrides: Sequence[str]) -> None:
    """Refuse settings that the checkpoint would override; unknown keys are left to the loader's better words.

    Args:
        overrides: as `--set` takes them, for what goes on from a checkpoint.

    Raises:
        UserError: the checkpoint decides one of them.
    """
    for override in overrides:
        for path, value in flatten(parse_override(override)).items():
            section, key = str(path[0]), spelled(path[:2])
            known = section == "titan" or (len(path) == 2 and path[1] in known_keys().get(section, ()))
            if not isinstance(value, dict) and known and section not in RESUMABLE and key not in RESUMABLE:
                wildcards = [f"{name}.*" if "." not in name else name for name in RESUMABLE]
                raise UserError(f"--set {key}: the checkpoint decides {key}", hint=f"free are {', '.join(wildcards)}")


def with_own_tokenizer(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with the tokenizer that the run at `path` keeps: the run may have moved since it was saved."""
    suffix = Path(recipe.data.tokenizer).suffix
    places = (path / TOKENIZER / f"tokenizer{suffix}", path / f"tokenizer{suffix}")
    own = next((place for place in places if place.is_file()), None)
    if suffix not in (".model", ".json") or own is None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": str(own)})})
