"""Links and other people's files where this program writes: nothing outside is changed, nothing foreign is replaced."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lighthouse_cli import _output
from lighthouse_cli.app import main
from lighthouse_core import files, launch
from lighthouse_core.config import load_recipe
from lighthouse_core.data.tokenizers.huggingface import COMPANIONS
from lighthouse_core.errors import RunError, UserError
from lighthouse_core.export.publish import _published
from lighthouse_core.figures import save as save_figure
from lighthouse_core.profile.report import Report, prepare
from lighthouse_core.runs import Run, create_run, plan_recovery
from lighthouse_core.seal import damage, seal
from lighthouse_core.sweep import claim, clear, lock
from lighthouse_core.titan.loggers import TensorBoard
from lighthouse_core.titan.metrics import keep_rows
from lighthouse_core.train.worker import _set_up_logging

RECIPE = Path("recipes/quickstart.toml").resolve()


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: what each name is, and what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        where = os.readlink(path) if path.is_symlink() else ""
        mode = path.lstat().st_mode
        found[path.relative_to(folder).as_posix()] = f"{mode} {where} {hashlib.sha256(content).hexdigest()}"
    return found


@pytest.fixture
def canaries(tmp_path):
    """Somebody else's files, which no test may change."""
    folder = tmp_path / "canaries"
    (folder / "step-7").mkdir(parents=True)
    for name in ("thesis.tex", "metrics.jsonl", "step-7/weights", "results.json"):
        (folder / name).write_text(f"of {name}\n")
    before = tree(folder)
    yield folder
    assert tree(folder) == before


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    monkeypatch.chdir(tmp_path)
    run = create_run(load_recipe(RECIPE, ["training.steps=10", "recover.steps=2"]), "quickstart", "one")
    run.checkpoint_dir(10).mkdir(parents=True)
    seal(run.checkpoint_dir(10))
    (run.path / "metrics.jsonl").write_text('{"step": 10, "stage": "lighthouse", "loss": 1.0, "leaky": true}\n')
    return run


@pytest.fixture
def lighthouse(monkeypatch, capsys):
    """Calls the command line; nothing is trained."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lighthouse", *arguments])
        monkeypatch.setattr(_output, "_quiet", False)
        monkeypatch.setattr(launch, "launch", lambda *parts: pytest.fail("it was trained"))
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return code, said

    return call


def test_a_file_takes_the_place_of_a_link(tmp_path, canaries):
    path = tmp_path / "ledger.json"
    for name in ("ledger.json", f".ledger.json.{os.getpid()}", ".ledger.json.tmp", "ledger.tmp"):
        (tmp_path / name).symlink_to(canaries / "thesis.tex")
    files.write_atomically(path, "{}")
    assert path.read_text() == "{}" and not path.is_symlink()


def test_what_fails_leaves_nothing(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "a") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "before"}


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe", "device"])
def test_only_ordinary_files_are_added_to(tmp_path, canaries, kind):
    path = tmp_path / "rank0.log"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        where = {"link": canaries / "thesis.tex", "dangling": canaries / "new", "device": Path("/dev/null")}[kind]
        path.symlink_to(where)
    with pytest.raises((UserError, IsADirectoryError)):
        files.open_to_append(path)


def test_files_are_added_to_and_not_emptied(tmp_path):
    for text in (b"one\n", b"two\n"):
        with files.open_to_append(tmp_path / "log") as file:
            file.write(text)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


def test_links_in_a_run_are_not_written_through(run, canaries):
    for name in ("metrics.tmp", ".metrics.jsonl.tmp", f".recover.toml.{os.getpid()}", f".ledger.json.{os.getpid()}"):
        (run.path / name).symlink_to(canaries / "metrics.jsonl")
    assert len(keep_rows(run.path / "metrics.jsonl", 10)) == 1
    run.note(data="x")
    run.write_recovery(plan_recovery(run))
    (run.path / "metrics.jsonl").unlink()
    (run.path / "metrics.jsonl").symlink_to(canaries / "metrics.jsonl")
    keep_rows(run.path / "metrics.jsonl", 10)
    assert not (run.path / "metrics.jsonl").is_symlink()


def test_the_log_of_a_process_is_no_link(run, canaries):
    (run.path / "logs").mkdir()
    (run.path / "logs/rank0.log").symlink_to(canaries / "thesis.tex")
    with pytest.raises(UserError, match="link"):
        _set_up_logging(run.path, 0, True)


@pytest.mark.parametrize("name", files.RUN_FOLDERS)
def test_a_run_whose_folder_is_a_link_is_not_trained(run, canaries, lighthouse, name):
    """Least of all one whose checkpoints are another run's: older ones would be deleted."""
    if (run.path / name).exists():
        (run.path / name).rename(canaries.parent / "aside")
    where = canaries if name != "checkpoints" else canaries.parent / "aside"
    (run.path / name).symlink_to(where)
    before = tree(run.path), tree(where)
    with pytest.raises(UserError, match=f"{name} is a link"):
        _set_up_logging(run.path, 0, True)
    for command in (["recover", "one"], ["pretrain", "--resume", "one", "--set", "training.compile=false"]):
        code, said = lighthouse(*command)
        assert code == 2 and said.count("error: ") == 1
        # The run is complete before it is a link, for --resume.
        assert "is a link" in said or "complete" in said
    assert (tree(run.path), tree(where)) == before


@pytest.mark.parametrize("which", ["eval", "eval/here"])
def test_results_do_not_go_through_a_link(run, canaries, which):
    (run.path / which).parent.mkdir(exist_ok=True)
    (run.path / which).symlink_to(canaries)
    with pytest.raises(UserError, match="link"):
        files.refuse_links(run.path, "eval/here")


def test_a_sweep_locks_no_link(tmp_path, canaries):
    (tmp_path / ".s.lock").symlink_to(canaries / "thesis.tex")
    with pytest.raises(UserError, match="link"), lock(tmp_path, "s"):
        pass


def test_figures_do_not_go_through_links(tmp_path, canaries):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    for suffix in ("png", "svg"):
        (tmp_path / f"loss.{suffix}").symlink_to(canaries / "thesis.tex")
    drawn = save_figure(pyplot.figure(), tmp_path / "loss")
    assert [file.read_bytes()[:5] for file in drawn] == [b"\x89PNG\r", b"<?xml"]


REPORT = Report(
    "One", "attention", {"packages": {}, "git_commit": None, "device": "cpu", "memory_gib": 1, "python": "3"}, [], {}
)


def test_a_report_does_not_go_through_links(tmp_path, canaries):
    for name in ("report.md", "results.json"):
        (tmp_path / name).symlink_to(canaries / name)
    REPORT.write(tmp_path)
    assert not (tmp_path / "report.md").is_symlink()


FOREIGN = {
    "a list": ("results.json", "[1, 2]"),
    "numbers": ("results.json", '{"loss": 2.0}'),
    "of eval": ("results.json", '{"version": 1, "subject": "one", "leaky": false}'),
    "a kind of its own": ("results.json", '{"kind": "mine", "machine": 1}'),
    "broken": ("results.json", '{"kind"'),
    "words": ("report.md", "# My notes\n"),
    "a figure": ("latency.png", "PNG"),
    "a log": ("pretrain.log", "of mine\n"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_profile_replaces_only_its_own(tmp_path, kind):
    folder = tmp_path / "out"
    folder.mkdir()
    name, text = FOREIGN[kind]
    (folder / name).write_text(text)
    (folder / "notes.txt").write_text("kept\n")
    before = tree(folder)
    with pytest.raises(UserError):
        prepare(folder, "attention")
    assert tree(folder) == before


def test_profile_replaces_its_own(tmp_path):
    prepare(tmp_path / "out", "attention")
    REPORT.write(tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("kept\n")
    prepare(tmp_path / "out", "attention")
    with pytest.raises(UserError, match="another kind"):
        prepare(tmp_path / "out", "step")
    # What was cut off before its report.
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/pretrain.log").write_text("")
    prepare(tmp_path / "cut", "step")


@pytest.mark.parametrize("kind", ["a list", "numbers", "of profile", "a figure"])
def test_eval_replaces_only_its_own(run, lighthouse, monkeypatch, kind):
    from lighthouse_core import evaluate
    from lighthouse_core.evaluate import load

    subject = type("Subject", (), {"name": "one", "tokens": 1024, "model": None, "leaky": False})
    monkeypatch.setattr(load, "load_checkpoint", lambda path, attention: (subject, run.recipe))
    monkeypatch.setattr(evaluate, "evaluate", lambda *parts, **named: pytest.fail("it was measured"))
    folder = Path("out")
    folder.mkdir()
    if kind == "of profile":
        REPORT.write(folder)
    else:
        name, text = FOREIGN[kind] if kind != "a figure" else ("needles.png", "PNG")
        (folder / name).write_text(text)
    before = tree(folder)
    code, said = lighthouse("eval", "one", "--out", "out")
    assert code == 2 and "is no report of this kind" in said and tree(folder) == before


def test_compare_replaces_only_its_own(run, lighthouse, monkeypatch):
    monkeypatch.setattr("lighthouse_core.evaluate.compare.plot", lambda *parts: [])
    run.note(conditions={}, steps=10)
    rows = {"step": 10, "stage": "lighthouse", "loss": 1.0, "leaky": True, "tokens": 10, "seconds": 0.1}
    (run.path / "metrics.jsonl").write_text(json.dumps(rows) + "\n")
    for name in ("compare.json", "compare.png"):
        Path("compare").mkdir(exist_ok=True)
        Path("compare", name).write_text('{"mine": 1}')
        before = tree(Path("compare"))
        code, said = lighthouse("compare", "one")
        assert code == 2 and name in said and tree(Path("compare")) == before
        Path("compare", name).unlink()
    assert lighthouse("compare", "one")[0] == 0
    assert lighthouse("compare", "one")[0] == 0


INSIDE = ["checkpoints/step-10", "checkpoints/step-10/out", "checkpoints", "checkpoints/out", "checkpoints/step-99",
          "step-99", ".step-3.saving", "checkpoints/step-10/a/b", "step-4.damaged"]  # fmt: skip


@pytest.mark.parametrize("where", INSIDE)
def test_results_do_not_go_into_checkpoints(run, lighthouse, where):
    before = tree(run.path)
    out = run.path / where
    for command in (
        ["eval", "one", "--out", str(out)],
        ["compare", "one", "--out", str(out)],
        ["profile", "--selection", "one", "--out", str(out)],
    ):
        code, said = lighthouse(*command)
        words = ("has the name of a checkpoint", "among the checkpoints", "in a sealed folder")
        assert code == 2 and any(text in said for text in words), said
    with pytest.raises(UserError), _published(out):
        pytest.fail("it was written")
    assert tree(run.path) == before and damage(run.checkpoint_dir(10)) is None


def test_results_do_not_go_into_checkpoints_by_a_link(run, tmp_path):
    (tmp_path / "link").symlink_to(run.checkpoint_dir(10))
    with pytest.raises(UserError, match="checkpoint"):
        files.check_output(tmp_path / "link/out")
    with pytest.raises(UserError, match="checkpoint"):
        files.check_output(tmp_path / "other/../link")
    # A copy under another name is sealed, too.
    run.checkpoint_dir(10).rename(tmp_path / "copy")
    with pytest.raises(UserError, match="sealed"):
        files.check_output(tmp_path / "copy/out")
    for fine in ("out", "step", "a/step-by-step", "stepping-3"):
        files.check_output(tmp_path / fine)


def checkpoints_alone(path: Path) -> None:
    (path / "checkpoints/step-4").mkdir(parents=True)
    (path / "checkpoints/step-4/weights").write_text("weights")


def damaged_with_notes(path: Path) -> None:
    """All that a run makes before its first checkpoint."""
    create_run(load_recipe(RECIPE, [f'output.dir="{path.parent}"']), "quickstart", path.name)
    TensorBoard(path / "tb", 0).close()
    for name in ("wandb-id", ".wandb-id.0123abcd", "metrics.jsonl", "logs/rank0.log", "tokenizer.json", *COMPANIONS):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).touch()
    (path / "checkpoints/step-4.damaged").mkdir(parents=True)
    (path / "notes.md").write_text("of mine")


def one_file(name: str):
    def make(path: Path) -> None:
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text("of mine")

    return make


def linked(path: Path) -> None:
    path.symlink_to(path.parent)


def run_of_mine(path: Path) -> None:
    """All that a run makes before its first checkpoint."""
    create_run(load_recipe(RECIPE, [f'output.dir="{path.parent}"']), "quickstart", path.name)
    TensorBoard(path / "tb", 0).close()
    for name in ("wandb-id", ".wandb-id.0123abcd", "metrics.jsonl", "logs/rank0.log", "tokenizer.json", *COMPANIONS):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).touch()


NOT_THE_SWEEPS = {
    "checkpoints and no recipe": checkpoints_alone,
    "damaged checkpoints and notes": damaged_with_notes,
    "metrics-2024.csv": one_file("metrics-2024.csv"),
    "recipe-notes": one_file("recipe-notes/one.md"),
    "tokenizer.json.bak": one_file("tokenizer.json.bak"),
    "checkpoints/notes": one_file("checkpoints/notes.md"),
    "logs of mine": one_file("logs/of-mine.log"),
    "a hidden file": one_file(".recipe"),
    "a link": linked,
    "a file": lambda path: path.write_text("of mine"),
}


@pytest.mark.parametrize("claimed", [False, True])
@pytest.mark.parametrize("kind", [*NOT_THE_SWEEPS, "a run of mine", "nothing"])
def test_a_sweep_deletes_what_it_made_alone(tmp_path, kind, claimed):
    path = tmp_path / "runs/one"
    path.parent.mkdir()
    if claimed:
        claim(path)
    {"a run of mine": run_of_mine, "nothing": Path.mkdir, **NOT_THE_SWEEPS}[kind](path)
    if claimed and kind in ("a run of mine", "nothing"):
        assert clear(path) and os.listdir(path.parent) == []
        return
    before = tree(tmp_path)
    with pytest.raises(RunError, match="to go on from"):
        clear(path)
    assert tree(tmp_path) == before


def test_a_run_that_is_gone_is_no_longer_the_sweeps(tmp_path):
    from lighthouse_core.sweep.state import settle

    path = tmp_path / "one"
    claim(path)
    settle(path)
    assert os.listdir(tmp_path) == []
    claim(path)
    path.mkdir()
    settle(path)
    # Another folder of that name.
    path.rename(tmp_path / "aside")
    path.mkdir()
    with pytest.raises(RunError):
        clear(path)
    path.rmdir()
    (tmp_path / "aside").rename(path)
    assert clear(path)


def test_a_sweep_replaces_only_its_own_collection(tmp_path, lighthouse):
    (tmp_path / "base.toml").write_text(RECIPE.read_text())
    (tmp_path / "s.toml").write_text('recipe = "base.toml"\n[runs.a]\n')
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/s.json").write_text('{"mine": 1}')
    before = tree(tmp_path)
    code, said = lighthouse("sweep", str(tmp_path / "s.toml"), "--output", str(tmp_path / "runs"))
    assert code == 2 and "s.json" in said and tree(tmp_path) == before


def test_a_worker_says_so_in_one_line(run, canaries):
    (run.path / "logs").symlink_to(canaries)
    command = [sys.executable, "-m", "lighthouse_core.train.worker", str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "logs is a link" in done.stderr and "Traceback" not in done.stderr
