"""A sweep under way: what is next of each run is told from its directory, so it goes on wherever it was stopped."""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lighthouse_core.config import Recipe, load_recipe
from lighthouse_core.config.positions import flatten
from lighthouse_core.config.sweep import RunSection, Sweep
from lighthouse_core.errors import LighthouseError, RunError
from lighthouse_core.launch import follow_parent
from lighthouse_core.listing import checkpoint_steps
from lighthouse_core.runs import RESUMABLE, Run
from lighthouse_core.train.progress import finite, read_rows
from lighthouse_core.train.stop import SAME_REQUEST_SECONDS

# Too little for a process to start and to be worth it.
_LEAST_SECONDS = 30
# Exit codes of commands that were asked to end, and can go on.
_SAVED = (130, 143, -signal.SIGINT, -signal.SIGTERM)
_POLL_SECONDS = 0.2
# What a run may have otherwise than the sweep asks: what it keeps of its own, and what resuming it may change.
_FREE = frozenset({*RESUMABLE, "output", "data.tokenizer", "data.hf_revision"})
# What `pretrain` makes before recipe.toml.
_UNFINISHED = r"\.?(checkpoints|tokenizer|environment|ledger|metrics|recipe)\b.*"


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
    if not _begun(path):
        settings = [*sweep.settings(name), f"output.dir={json.dumps(str(output))}"]
        return recover if wanted.stage_1 else ["pretrain", str(base), "--name", name, *_set(settings)]
    run = Run(path)
    if not run.recovering and not _stage_1_done(path):
        return ["pretrain", "--resume", str(path)]
    evaluate = sweep.evaluate
    if wanted.recover and not run.recovering:
        if evaluate and not wanted.stage_1 and _results(path, "switch") is None:
            return _eval(sweep, path, "switch", evaluate.at_switch)
        return recover
    if run.recovering and (not run.checkpoint_steps() or run.checkpoint_steps()[-1] < run.end):
        return ["recover", str(path)]
    if evaluate and _results(path, "end") is None:
        return _eval(sweep, path, "end", evaluate.only)
    return None


def waits(sweep: Sweep, name: str, output: Path) -> bool:
    """Whether a run needs another one's first stage, which is not there yet."""
    parent = sweep.runs[name].stage_1
    return bool(parent) and not _begun(output / name) and not _stage_1_done(output / parent)


def check(sweep: Sweep, base: Path, output: Path) -> None:
    """Compare what was trained and measured with what the sweep asks for now.

    Args:
        sweep: the sweep.
        base: the recipe file.
        output: where the runs live.

    Raises:
        RunError: the sweep has changed since.
    """
    for name, wanted in sweep.runs.items():
        path, settings, free = output / name, sweep.settings(name), _FREE
        if not _begun(path):
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
        for which in ("switch", "end"):
            found = _results(path, which) if sweep.evaluate else None
            for key in ("tokens", "sequences") if found is not None else ():
                pairs[f"evaluate.{key} ({which})"] = found.get(key), getattr(sweep.evaluate, key)
        for key, (old, new) in pairs.items():
            if old != new:
                raise RunError(
                    f"run {path} has {key} = {json.dumps(old)}, and the sweep asks for {json.dumps(new)}",
                    hint="delete the run or choose another --output",
                )


@contextlib.contextmanager
def lock(output: Path, name: str) -> Iterator[None]:
    """Hold a sweep for this process.

    Raises:
        RunError: another process has it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process runs the sweep {name} under {output}") from None
        yield


def clear(path: Path) -> bool:
    """Remove what was cut off before its first checkpoint, from which nothing can go on.

    Returns:
        Whether there was something.

    Raises:
        RunError: another process trains it, or it is no run.
    """
    if _begun(path) or not path.exists():
        return False
    if (path / "recipe.toml").is_file():
        with Run(path).lock():
            shutil.rmtree(path)
    elif all(re.fullmatch(_UNFINISHED, file.name) for file in path.iterdir()):
        shutil.rmtree(path)
    else:
        raise RunError(f"{path} is there already, and is no run")
    return True


def branch(run: Run, path: Path) -> Run:
    """A new run that stands where another one's first stage ended; the checkpoint is linked rather than copied.

    Args:
        run: has the checkpoint of its first stage's end.
        path: of the new run.
    """
    first = run.ledger["stages"][0]
    step = _stage_1_end(run)
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


class Runner:
    """Brings the runs of a sweep forward, as many at a time as there are places, each a command of ours.

    Args:
        sweep: the sweep.
        base: the recipe file.
        output: where the runs live; what a command prints goes to NAME.log there.
        places: environment variables of each place: which GPU its commands see.
        say: told what begins and what fails.
        command: what a command of ours begins with.

    Attributes:
        left: runs that are not complete.
        failed: those of them that failed.
        stuck: those that wait for the first stage of another one, which does not come.
        asked: the signal upon which `run` ended, or 0.
    """

    def __init__(
        self,
        sweep: Sweep,
        base: Path,
        output: Path,
        places: Sequence[Mapping[str, str]],
        say: Callable[[str], None],
        command: Sequence[str] = (sys.executable, "-m", "lighthouse_cli"),
    ):
        self.sweep, self.base, self.output, self.say, self.command = sweep, base, output, say, command
        self.left = list(sweep.runs)
        self.failed: list[str] = []
        self.stuck: list[str] = []
        self.asked = 0
        self._since = math.inf
        self._at_once = False
        self._last: dict[str, list[str]] = {}
        self._free = list(places)
        self._busy: dict[str, tuple[subprocess.Popen, Mapping[str, str]]] = {}

    def run(self, seconds: float | None = None) -> bool:
        """Go on until all is done, for at most about so long; then what trains is asked to save.

        Returns:
            Whether all is done. A run that fails is left, and the others go on.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        try:
            while not self.asked and time.monotonic() < end:
                early = end - time.monotonic() > _LEAST_SECONDS
                if early:
                    self._fill()
                if not self._busy:
                    self.stuck = [name for name in self.left if early and name not in self.failed]
                    break
                time.sleep(_POLL_SECONDS)
                self._reap()
        finally:
            self._stop()
        return not self.left

    def interrupt(self, number: int, frame: object = None) -> None:
        """A handler of signals. Upon the first one `run` has all commands save, upon a second one it kills them."""
        now = time.monotonic()
        self._at_once = now - self._since > SAME_REQUEST_SECONDS
        self._since = min(self._since, now)
        self.asked = self.asked or number

    def _stop(self) -> None:
        try:
            for child, _ in self._busy.values():
                # Not SIGINT, which a background job's commands ignore.
                child.terminate()
            while self._busy and not self._at_once:
                time.sleep(_POLL_SECONDS)
                self._reap()
        finally:
            for child, _ in self._busy.values():
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def _fill(self) -> None:
        for name in list(self.left):
            if not self._free:
                return
            if name not in self._busy and name not in self.failed:
                try:
                    self._begin(name)
                except (LighthouseError, OSError, ValueError) as error:
                    self._fail(name, str(error))

    def _begin(self, name: str) -> None:
        if waits(self.sweep, name, self.output):
            return
        path = self.output / name
        if clear(path):
            self.say(f"{name}: {path} held no checkpoint and is removed; it begins anew")
        stage_1 = self.sweep.runs[name].stage_1
        if stage_1 and not _begun(path):
            branch(Run(self.output / stage_1), path)
        arguments = next_command(self.sweep, self.base, name, self.output)
        if arguments is None:
            self.left.remove(name)
            self.say(f"{name}: done")
            return
        words = f"lighthouse {' '.join(arguments)}"
        if arguments == self._last.get(name):
            raise LighthouseError(f"{words} ended, and would be next again; see {self._log(name)}")
        self._last[name] = arguments
        self.say(f"{name}: {words}")
        self.output.mkdir(parents=True, exist_ok=True)
        with self._log(name).open("a", encoding="utf-8") as log:
            # A session of its own: Ctrl-C reaches it once, from us.
            child = subprocess.Popen(
                [*self.command, *arguments],
                env={**os.environ, **self._free[0]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=follow_parent,
            )
        self._busy[name] = child, self._free.pop(0)

    def _log(self, name: str) -> Path:
        return self.output / f"{name}.log"

    def _fail(self, name: str, why: str) -> None:
        self.failed.append(name)
        self.say(f"{name}: failed: {why}")

    def _reap(self) -> None:
        for name, (child, place) in list(self._busy.items()):
            code = child.poll()
            if code is None:
                continue
            del self._busy[name]
            self._free.append(place)
            if code and code not in _SAVED:
                self._fail(name, f"exit code {code}; {self._log(name)} has its last words")


def places() -> list[dict[str, str]]:
    """One for each GPU that this process sees; without any, one."""
    from lighthouse_core.launch import local_gpus

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(local_gpus())]
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names] or [{}]


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
        with contextlib.suppress(LighthouseError):
            runs[run_name] = _measured(Run(output / run_name), wanted)
    whole = {"version": 1, "sweep": name, "about": sweep.about, "recipe": sweep.recipe, "set": list(sweep.set)}
    return whole | {"runs": runs}


def _measured(run: Run, wanted: RunSection) -> dict[str, Any]:
    environment = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    evaluations = {which: _results(run.path, which) for which in ("switch", "end")}
    return {
        "settings": wanted.model_dump(),
        "recipe": run.recipe.model_dump(mode="json"),
        "ledger": run.ledger,
        "rows": [finite(row) for row in read_rows(run.path / "metrics.jsonl")],
        "evaluations": {which: found for which, found in evaluations.items() if found is not None},
        "versions": environment["versions"],
        "git_commit": environment["git_commit"],
    }


def _begun(path: Path) -> bool:
    """Whether there is something of a run to go on from."""
    return (path / "recipe.toml").is_file() and bool(checkpoint_steps(path))


def _pairs(one: Recipe, other: Recipe, free: frozenset[str]) -> dict[str, tuple[Any, Any]]:
    """The values of every key in both recipes, but for the keys and sections that are free."""
    first, second = (
        {".".join(path): value for path, value in flatten(recipe.model_dump(mode="json")).items()}
        for recipe in (one, other)
    )
    return {
        key: (first.get(key), second.get(key))
        for key in first | second
        if not free & {key, key.partition(".")[0]} and not isinstance((first | second)[key], dict)
    }


def _stage_1_end(run: Run) -> int:
    stages = run.ledger["stages"]
    return stages[1]["start"] if len(stages) > 1 else stages[0]["end"]


def _stage_1_done(path: Path) -> bool:
    if not _begun(path):
        return False
    run = Run(path)
    return _stage_1_end(run) in run.checkpoint_steps()


def _set(settings) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def _results(path: Path, which: str) -> dict[str, Any] | None:
    """A report of `lighthouse eval`; None without a whole one."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((path / f"eval/{which}/results.json").read_bytes())
    return None


def _eval(sweep: Sweep, path: Path, which: str, only: str) -> list[str]:
    evaluate = sweep.evaluate
    assert evaluate is not None
    numbers = ("tokens", "sequences", "context", "trials")
    options = [part for name in numbers for part in (f"--{name}", str(getattr(evaluate, name)))]
    options += ["--recipe", evaluate.recipe, *_set(evaluate.set)] if evaluate.recipe else []
    return ["eval", str(path), "--out", str(path / "eval" / which), *options, *(["--only", only] if only else [])]
