"""Disks that take nothing, or no more: every command ends in one line, and leaves the disk as it was."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from array import array
from concurrent.futures import Future
from pathlib import Path

import pytest
from directories import plain
from faulty_disk import ERRORS, Faults, failing
from test_bad_input import ROW, WRITTEN, a_run, check_refused, place, tree  # noqa: F401 (some are fixtures)
from tiny_recipe import RECIPE

from lighthouse_cli.app import app
from lighthouse_core.job import launch

# ruff: noqa: F811 (fixtures of another module)

# What each command is asked for in `world`, by what it writes. A command that is in neither fails a test.
WRITES = {
    "pretrain": ("pretrain", "tiny.toml", "--name", "new"),
    "pretrain --from": ("pretrain", "begin.toml", "--name", "new", "--from", "given"),
    "pretrain --from, a run": ("pretrain", "begin.toml", "--name", "new", "--from", "runs/cut"),
    "pretrain --resume": ("pretrain", "--resume", "runs/cut", "--set", "checkpoint.interval=7"),
    "recover": ("recover", "runs/cut"),
    "strip": ("strip", "runs/whole", "model"),
    "strip, deeper": ("strip", "runs/whole", "a/b/model"),
    "eval": ("eval", "runs/whole"),
    "eval --out": ("eval", "runs/whole", "--out", "a/b"),
    "compare": ("compare", "runs/whole", "--out", "a/b"),
    "profile --seq": ("profile", "--seq", "1024,2048", "--out", "a/b"),
    "profile step": ("profile", "step", "tiny.toml", "--nproc", "1", "--out", "a/b"),
    "profile tune": ("profile", "tune", "tiny.toml", "--nproc", "1", "--out", "a/b"),
    "profile selection": ("profile", "selection", "runs/cut", "--out", "a/b"),
    "sweep": ("sweep", "sweep.toml"),
    "sweep --output": ("sweep", "sweep.toml", "--output", "a/b"),
    "data prepare": ("data", "prepare", "tiny.toml", "tokens", "--workers", "1"),
    "data prepare, deeper": ("data", "prepare", "tiny.toml", "a/b", "--workers", "1"),
    "data import": ("data", "import", "taken", "--from", "ids.bin", "--tokenizer", "bytes", "--workers", "1"),
    "tokenizer train": ("tokenizer", "train", "tiny.toml", "t.model", "--vocab", "280"),
    "recipes copy": ("recipes", "copy", "quickstart"),
    "recipes copy, a name": ("recipes", "copy", "quickstart", "folder/mine.toml"),
}
READS = {"runs", "data inspect", "recipes list", "recipes show"}


def commands() -> set[str]:
    """Every command of the command line."""

    def name(command) -> str:
        return command.name or command.callback.__name__.replace("_", "-")

    found = {name(command) for command in app.registered_commands}
    for group in app.registered_groups:
        # One that does something of its own when no command is named.
        found |= {group.name} if group.typer_instance.info.invoke_without_command is True else set()
        found |= {f"{group.name} {name(command)}" for command in group.typer_instance.registered_commands}
    return found


def command_of(case: str) -> str:
    """The command of a case of WRITES."""
    return next(name for name in sorted(commands(), key=len, reverse=True) if case.startswith(name))


def test_every_command_is_known_to_write_or_not_to():
    assert {command_of(case) for case in WRITES} | READS == commands()


SWEEP = """recipe = "tiny.toml"
set = ["checkpoint.keep=0"]

[runs.one]

[runs.two]
stage_1 = "one"
recover = 7
"""
# In the place of the commands of a sweep: the runs that they would make.
CHILD = """
import pathlib, shutil, sys
what, target, *rest = sys.argv[1:]
output = pathlib.Path(OUTPUT)
name = "one" if what == "pretrain" else "two"
shutil.copytree(pathlib.Path("made") / name, output / name, dirs_exist_ok=True)
"""
# Files of other people, which no command changes.
CANARIES = ("notes.txt", "runs/notes.txt", "runs/whole/notes.txt", "runs/cut/mine/a.txt", "folder/notes.txt")


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Runs, recipes, text, and files of other people."""
    import torch
    import torch.distributed.checkpoint as dcp

    from lighthouse_core.config import load_recipe
    from lighthouse_core.runs.create import create_run
    from lighthouse_core.runs.recovery import plan_recovery
    from lighthouse_core.seal import seal

    here = tmp_path_factory.mktemp("template")
    (here / "corpus").mkdir()
    for name in map("{}.txt".format, range(12)):
        (here / f"corpus/{name}").write_text("hello world, and more of the same\n" * 50)
    data = 'source = "files"\npaths = ["corpus/*.txt"]\nvalidation = 0.25\n'
    (here / "tiny.toml").write_text(RECIPE.replace("steps = 20", "steps = 7") + data)
    text = (here / "tiny.toml").read_text()
    (here / "begin.toml").write_text(text[text.index("[lighthouse]") :] + 'tokenizer = "bytes"\n')
    (here / "sweep.toml").write_text(SWEEP)
    # Token ids as nanoGPT has them: bytes, and the tokenizer's EOS behind each document.
    (here / "ids.bin").write_bytes(array("H", [*b"hello world", 257] * 60).tobytes())
    (here / "runs").mkdir()

    def make(path: str, step: int, recovered: bool):
        recipe = load_recipe(here / "tiny.toml", ["checkpoint.keep=0", f'output.dir="{here / Path(path).parent}"'])
        run = create_run(recipe, "tiny", Path(path).name)
        if recovered:
            save(run, 100)
            run.write_recovery(plan_recovery(run))
        save(run, step)
        rows = [ROW | {"step": n, "tokens": n} for n in range(step - 20, step + 1)]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def save(run, step: int) -> None:
        weights = {entry.source: torch.zeros(entry.shape) for entry in run.recipe.model.kind.entries(run.recipe.model)}
        folder = run.checkpoint_dir(step)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(weights, checkpoint_id=folder, no_dist=True)
        seal(folder)

    plain(load_recipe(here / "tiny.toml").model, here / "given")
    make("runs/whole", 107, True)
    make("runs/cut", 60, False)
    make("made/one", 100, False)
    make("made/two", 107, True)
    for name in CANARIES:
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("mine\n")
    return here


class InProcess:
    """A pool of one, which works at once and here."""

    def __init__(self, workers, context, begin, arguments):
        from lighthouse_core.data import prepare
        from lighthouse_core.data.tokenizer import build_tokenizer

        source, tokenizer, validation, out, stop, counts = arguments
        prepare._job = prepare._Job(source, build_tokenizer(tokenizer), validation, Path(out), stop, counts)

    def submit(self, function, *arguments) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **options) -> None:
        pass


@pytest.fixture
def world(template, here, lighthouse, trainer, monkeypatch):
    """A copy of `template` to work in, and commands that write what they do, but measure and train nothing."""
    from lighthouse_core import evaluate, files
    from lighthouse_core.data import prepare
    from lighthouse_core.evaluate import load
    from lighthouse_core.export import publish, verify
    from lighthouse_core.profile import report, run
    from lighthouse_core.sweep import runner

    shutil.copytree(template, here, dirs_exist_ok=True)
    mean = {"mean": 1.0, "standard_error": 0.1, "sequences": 1}
    bins = [{"first": n, "last": n, "loss": mean} for n in (1, 2)]
    measured = {"subject": "a", "leaky": False, "loss": {"nats_per_token": mean, "bits_per_byte": mean}}
    measured["by_position"] = bins
    subject = type("Subject", (), {"name": "whole step 107", "tokens": 1024, "model": None, "leaky": False})
    recipe = _recipe(here)
    monkeypatch.setattr(load, "load_checkpoint", lambda path, **named: (subject, recipe))
    monkeypatch.setattr(evaluate, "evaluate", lambda *given, **options: measured)
    monkeypatch.setattr(verify, "compare_logits", lambda *given: 0.0)
    monkeypatch.setattr(publish, "check_tokenizer", lambda *given, **options: 1.0)
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", InProcess)
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(runner.Runner.__init__, "__defaults__", ((sys.executable, "-S", "child.py"),))

    def draw(name):
        def figure(folder: Path) -> list[Path]:
            for suffix in ("png", "svg"):
                with files.replacing(folder / f"{name}.{suffix}") as file:
                    file.write(b"a figure" * 2000)
            return [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]

        return figure

    def profiled(kind: str, figure: str) -> report.Report:
        return report.Report("title", kind, MACHINE, ["words"], {}, None, draw(figure))

    def attention(shapes, folder, say, **options):
        first = profiled("attention", "latency")
        # Of the first length; a second one is to come.
        first.write(folder)
        return first, None

    monkeypatch.setattr(run, "attention", attention)
    for kind in ("step", "tune", "selection"):
        monkeypatch.setattr(run, kind, lambda *given, kind=kind: profiled(kind, kind))
    monkeypatch.setattr(evaluate, "plot", lambda report, folder: draw("by_position")(folder))
    from lighthouse_core.evaluate import compare

    monkeypatch.setattr(compare, "plot", lambda curves, folder: draw("compare")(folder))

    def launched(run_dir, plan, watcher):
        trainer.faults.paused = True
        try:
            return trainer(run_dir, plan, watcher)
        finally:
            trainer.faults.paused = False

    monkeypatch.setattr(launch, "launch", launched)
    return here


MACHINE = {"device": "cpu", "memory_gib": 1, "packages": {}, "git_commit": None, "python": "3"}


def _recipe(here: Path):
    from lighthouse_core.config import load_recipe

    return load_recipe(here / "tiny.toml")


def asked(case: str, here: Path) -> tuple[str, ...]:
    """The arguments of a case, for which a sweep's commands are made ready."""
    arguments = WRITES[case]
    output = "a/b" if "--output" in arguments else "runs"
    (here / "child.py").write_text(CHILD.replace("OUTPUT", repr(output)))
    return arguments


def names(tree: dict) -> list[str]:
    """The paths of a tree, those that are drawn by chance or by the clock as one."""
    return sorted(re.sub(r"[0-9a-f]{8,}|[0-9]{8}-[0-9]{6}", "*", name) for name in tree)


def difference(before: dict, after: dict) -> dict:
    """Paths that differ between two trees: whether each was there, and is."""
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    return {name: (name in before, name in after) for name in changed}


SWEEP_MAKES = ("sweep.json", ".sweep.lock", ".one.begun", "one.log", "two.log", "one", "two")
# What is there after a fault though it was not before: it holds nothing half, and is what it says.
LEFT = {
    # Who holds the lock must not delete its file; what a command said is what a log is for.
    "sweep": {
        "runs/sweep.json",
        "runs/.sweep.lock",
        "runs/one.log",
        "runs/two.log",
        "runs/one",
        "runs/two",
        "runs/.one.begun",
    },
    "sweep --output": {"a/b/.sweep.lock", "a/b/one.log", "a/b/two.log", "a", "a/b"},
    # The same command goes on from the shards that are whole.
    "data prepare": {"tokens"},
    "data prepare, deeper": {"a", "a/b"},
    "data import": {"taken"},
    # What was measured of the first lengths stays.
    "profile --seq": {"a", "a/b"},
}


# Each costs a second or two.
QUICK = {
    "pretrain",
    "pretrain --from",
    "eval --out",
    "compare",
    "profile selection",
    "data prepare",
    "tokenizer train",
    "recipes copy",
}
CASES = [
    pytest.param(case, lasting, marks=() if case in QUICK and not lasting else pytest.mark.slow)
    for case in WRITES
    for lasting in (False, True)
]


@pytest.mark.parametrize(("case", "lasting"), CASES)
def test_an_operation_that_fails(world, template, lighthouse, trainer, case, lasting):
    arguments = asked(case, world)
    clean = tree(world)
    trainer.faults = Faults(str(world), 10**9, 0)
    answer = lighthouse(*arguments)
    assert answer.code == 0, answer
    whole = tree(world)
    restore(world, template, clean)
    for at in itertools.count():
        error = ERRORS[at % len(ERRORS)]
        faults = Faults(str(world), at, error, lasting)
        trainer.faults = faults
        with failing(faults):
            answer = lighthouse(*arguments)
        after = tree(world)
        if not faults.struck:
            assert answer.code == 0 and names(after) == names(whole), answer
            break
        words = f"{faults.seen[at]} failed with {os.strerror(error)}: {answer}\n{difference(clean, after)}"
        check_after(case, answer, clean, after, whole, words)
        restore(world, template, clean)
    assert at > 1
    assert all((world / name).read_text() == "mine\n" for name in CANARIES)


# Commands that write a report over an earlier one.
OVER = ["eval", "eval --out", "compare", "profile --seq", "profile step", "profile tune", "profile selection"]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in ("eval", "profile selection") else pytest.mark.slow) for case in OVER],
)
def test_a_report_that_fails_over_an_earlier_one(world, tmp_path_factory, lighthouse, case):
    """The earlier report stays as a whole. The disk fails once: what cannot be put back is `test_links`' case."""
    clean = tree(world)
    assert lighthouse(*WRITES[case]).code == 0
    report = {name for name in difference(clean, tree(world)) if (world / name).is_file()}
    assert len(report) > 2
    for name in report:
        with (world / name).open("ab") as file:
            file.write(b"  " if name.endswith(".json") else b"the earlier one")
    template = tmp_path_factory.mktemp("earlier") / "world"
    shutil.copytree(world, template)
    before = tree(world)
    failed = 0
    for at in itertools.count():
        faults = Faults(str(world), at, ERRORS[at % len(ERRORS)])
        with failing(faults):
            answer = lighthouse(*WRITES[case])
        after = tree(world)
        if not faults.struck:
            break
        words = f"{faults.seen[at]} failed: {answer}\n{difference(before, after)}"
        assert names(after) == names(before), words
        changed = {name for name in report if before[name] != after[name]}
        # Of several lengths each has a report.
        assert changed in ((set(), report) if answer.code == 0 or case == "profile --seq" else (set(),)), words
        failed += answer.code != 0
        restore(world, template, before)
    assert answer.code == 0 and failed > 2 * len(report) and not report & {n for n in report if before[n] == after[n]}


def check_after(case: str, answer, before: dict, after: dict, whole: dict, words: str) -> None:
    """That a command ended as it should after a fault, and left what it should."""
    assert "Traceback" not in answer.err, words
    hidden = [name for name in after if name not in before and name not in whole and Path(name).name.startswith(".")]
    # A report that cannot be put back: the command says where it is.
    kept = re.search(r"the earlier files are in (\S+/\.writing-[0-9a-f]+)/\.earlier", answer.err)
    hidden = [name for name in hidden if not kept or not Path(name).is_relative_to(kept[1])]
    # The last one says whose a folder is that a sweep's command has made.
    assert not [name for name in hidden if not name.endswith(".begun")], words
    if answer.code == 0:
        # It was done in another way, or what was done without is said.
        assert names(after) == names(whole) or "warning: " in answer.err, words
        return
    if not case.startswith("sweep"):
        error = check_refused(answer, answer.code)
        assert any(os.strerror(number) in error for number in ERRORS), words
    assert answer.code in (1, 2), words
    changed = difference(before, after)
    left = LEFT.get(case, set())
    assert not {name for name in changed if not any(name == one or name.startswith(f"{one}/") for one in left)}, words


def restore(world: Path, template: Path, clean: dict) -> None:
    """Have the world as it was."""
    for name in sorted(difference(clean, tree(world)), reverse=True):
        path, original = world / name, template / name
        if name not in clean:
            path.rmdir() if path.is_dir() else path.unlink()
        elif original.is_file():
            shutil.copy(original, path)
    assert tree(world) == clean


@pytest.fixture
def disk(place, small_disk):
    """A small disk of its own, disk/, which a test can fill or make read-only."""
    return small_disk(place / "disk", "64k")


ON_A_DISK = [name for name in WRITTEN if name != "strip" and "name" not in name and "dry" not in name]


@pytest.mark.parametrize("command", ON_A_DISK)
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_nothing(lighthouse, trainer, place, a_run, disk, command, fault):
    if fault == "full":
        with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1024))
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = tree(place)
    answer = lighthouse(*(part.replace("{}", "disk/x") for part in WRITTEN[command]))
    error = check_refused(answer, 1 if fault == "full" else 2)
    assert "disk/x" in error
    assert error.endswith("No space left on device" if fault == "full" else "Read-only file system")
    assert tree(place) == before and not trainer.launches


def test_a_folder_that_is_deleted_under_a_job(lighthouse, trainer, place, monkeypatch):
    def delete(run_dir, plan, watcher):
        subprocess.run(["rm", "-r", str(place / "runs")], check=True)
        watcher.tick(False)
        return 0

    monkeypatch.setattr(launch, "launch", delete)
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a")
    # The job itself went well; what it cost can be written nowhere.
    assert answer.code == 0 and "the costs in runs/a/ledger.json are not up to date" in answer.err
