"""Links and other people's files where this program writes: nothing outside is changed, nothing foreign is replaced."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import children
import pytest

from lighthouse_cli import _output
from lighthouse_cli.app import main
from lighthouse_core import files
from lighthouse_core.config import load_recipe
from lighthouse_core.data.tokenizers.huggingface import COMPANIONS
from lighthouse_core.errors import RunError, UserError
from lighthouse_core.export.publish import _published
from lighthouse_core.figures import save as save_figure
from lighthouse_core.job import launch
from lighthouse_core.profile.report import Report, give_up, prepare
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.recovery import plan_recovery
from lighthouse_core.runs.run import Run
from lighthouse_core.seal import damage, seal
from lighthouse_core.sweep import claim, clear, lock
from lighthouse_core.sweep.state import branch
from lighthouse_core.titan.loggers import TensorBoard
from lighthouse_core.titan.metrics import keep_rows
from lighthouse_core.worker import _set_up_logging

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


@pytest.mark.parametrize("command", [["recover", "one"], ["pretrain", "--resume", "one"]])
def test_a_titan_key_of_a_run_that_is_refused_changes_nothing(run, lighthouse, canaries, command):
    run.checkpoint_dir(10).rename(run.checkpoint_dir(5))
    seal(run.checkpoint_dir(5))
    with (run.path / "recipe.toml").open("a") as file:
        file.write(f'\n[titan.job]\nsave_config_file = "{canaries}/thesis.tex"\n')
    before = tree(run.path)
    code, said = lighthouse(*command)
    assert code == 2 and "titan.job.save_config_file cannot be set" in said and tree(run.path) == before


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


@pytest.mark.parametrize(
    "content", [b"text.usetex: True\n", b"figure.figsize: 1, 1\n", b"\xff\xfe", b"nothing: such\n"]
)
def test_figures_obey_no_file_of_the_working_directory(tmp_path, content):
    pytest.importorskip("matplotlib")
    (tmp_path / "matplotlibrc").write_bytes(content)
    code = """
import sys
from pathlib import Path
from lighthouse_core.figures import pyplot, save
save(pyplot().figure(), Path("loss"))
import matplotlib
print(matplotlib.rcParams["text.usetex"], matplotlib.rcParams["figure.figsize"], Path("loss.png").exists())
"""
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False [6.4, 4.8] True\n" and not done.stderr, done


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
    prepare(tmp_path / "cut", "step")
    (tmp_path / "cut/pretrain.log").write_text("")
    prepare(tmp_path / "cut", "step")


@pytest.mark.parametrize(
    "names", [["pretrain.log"], ["pretrain.log", "runs/a/recipe.toml"], ["dense/x", "trace.json.gz"]]
)
def test_names_that_a_profile_uses_are_not_its_own_for_that(tmp_path, names):
    """Somebody's project has runs/ and a pretrain.log, too."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of mine\n")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="no report"):
        prepare(tmp_path, "step")
    assert tree(tmp_path) == before


def test_a_profile_that_measured_nothing_leaves_nothing(tmp_path):
    made = prepare(tmp_path / "a/b", "step")
    give_up(tmp_path / "a/b", made)
    assert os.listdir(tmp_path) == []
    made = prepare(tmp_path / "a/b", "step")
    (tmp_path / "a/b/pretrain.log").touch()
    give_up(tmp_path / "a/b", made)
    assert (tmp_path / "a/b/pretrain.log").exists()
    REPORT.write(tmp_path / "a/b")
    assert sorted(os.listdir(tmp_path / "a/b")) == ["pretrain.log", "report.md", "results.json"]


def test_a_profile_that_fails_over_a_report_leaves_no_mark(tmp_path):
    """The mark would call ours a pretrain.log that somebody puts there later."""
    REPORT.write(tmp_path / "a")
    before = tree(tmp_path)
    give_up(tmp_path / "a", prepare(tmp_path / "a", "attention"))
    assert tree(tmp_path) == before


def write_together(folder: Path, text: str) -> None:
    with files.together(folder) as place:
        for name in ("a", "b", "c"):
            (place / name).write_text(text)


def test_files_that_cannot_be_put_back_are_kept(tmp_path, monkeypatch):
    write_together(tmp_path, "earlier")
    real = os.replace

    def replace(source, place):
        if Path(place).name == "b" or Path(source).parent.name == ".earlier":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(place))
        real(source, place)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output error; the earlier files are in ") as caught:
        write_together(tmp_path, "new")
    kept = Path(caught.value.strerror.partition(" are in ")[2])
    assert (kept / "a").read_text() == "earlier" and kept.is_relative_to(tmp_path)
    monkeypatch.undo()
    write_together(tmp_path, "newer")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize("links", [True, False])
def test_a_report_of_several_files_is_the_earlier_one_or_the_new_one(tmp_path, monkeypatch, links):
    """Also on a file system without links, and where what is in the way is somebody's folder."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *given, **named: os.open("/nowhere/at/all", os.O_RDONLY))
    write_together(tmp_path, "earlier")
    (tmp_path / "b").unlink()
    (tmp_path / "c").unlink()
    (tmp_path / "c").mkdir()
    (tmp_path / "c/mine").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OSError, match="directory"):
        write_together(tmp_path, "new")
    assert tree(tmp_path) == before
    shutil.rmtree(tmp_path / "c")
    write_together(tmp_path, "new")
    assert {(tmp_path / name).read_text() for name in os.listdir(tmp_path)} == {"new"}


def test_what_a_killed_write_leaves_goes_at_the_next(tmp_path):
    left = tmp_path / f".{files.STAGING}{'0' * 16}"
    alike = tmp_path / f".{files.STAGING}mine"
    for folder in (left, alike):
        folder.mkdir()
        (folder / "a").write_text("half")
    with files.together(tmp_path) as place:
        (place / "a").write_text("new")
        # Another process that writes there now.
        write_together(tmp_path, "other")
        assert place.is_dir() and not left.exists()
    assert sorted(os.listdir(tmp_path)) == sorted([alike.name, "a", "b", "c"])
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("kind", ["a list", "numbers", "of profile", "a figure"])
def test_eval_replaces_only_its_own(run, lighthouse, monkeypatch, kind):
    from lighthouse_core import evaluate
    from lighthouse_core.evaluate import load

    subject = type("Subject", (), {"name": "one", "tokens": 1024, "model": None, "leaky": False})
    monkeypatch.setattr(load, "load_checkpoint", lambda path, **named: (subject, run.recipe))
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
    Path("s.toml").write_text(f'recipe = "{RECIPE}"\n[runs.a]\n')
    for command in (
        ["eval", "one", "--out", str(out)],
        ["compare", "one", "--out", str(out)],
        ["profile", "selection", "one", "--out", str(out)],
        ["profile", "step", str(RECIPE), "--out", str(out)],
        ["profile", "tune", str(RECIPE), "--out", str(out)],
        ["profile", "--seq", "256", "--out", str(out)],
        ["recipes", "copy", "quickstart", str(out)],
        ["data", "prepare", str(RECIPE), str(out)],
        ["tokenizer", "train", str(RECIPE), str(out / "t.model")],
        ["sweep", "s.toml", "--output", str(out)],
        ["sweep", "s.toml", "--output", str(out), "--dry-run"],
        ["pretrain", str(RECIPE), "--name", "new", "--set", f'output.dir="{out}"'],
        ["pretrain", str(RECIPE), "--name", "new", "--set", f'output.dir="{out}"', "--dry-run"],
    ):
        code, said = lighthouse(*command)
        words = ["has the name of a checkpoint", "among the checkpoints", "in a sealed folder"]
        # Of a folder that is not there.
        words += ["there is no directory"] * (command[0] == "tokenizer")
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


def test_a_branch_replaces_only_what_the_sweep_began(run):
    path = run.path.with_name("two")
    temporary = path.with_name(".two.branching")
    temporary.mkdir()
    (temporary / "thesis.tex").write_text("of mine")
    before = tree(run.path.parent)
    with pytest.raises(RunError, match="not of this sweep"):
        branch(run, path, 10)
    assert tree(run.path.parent) == before
    shutil.rmtree(temporary)
    # What a sweep began that was killed.
    claim(temporary)
    (temporary / "checkpoints").mkdir(parents=True)
    branch(run, path, 10)
    assert sorted(os.listdir(run.path.parent)) == ["one", "two"]


def test_a_run_that_failed_at_once_keeps_what_somebody_put_there(tmp_path, monkeypatch, lighthouse):
    monkeypatch.chdir(tmp_path)
    command = ["pretrain", str(RECIPE), "--name", "new", "--set", "model.layers=2", "--set", "model.dense_layers=[]"]
    for notes in (False, True):

        def fail(run_dir, plan, notes=notes, **named):
            if notes:
                (run_dir / "notes.md").write_text("of mine")
            raise UserError("it fails")

        monkeypatch.setattr("lighthouse_cli._train.train", lambda path, *rest, fail=fail, **named: fail(path, None))
        monkeypatch.setattr(sys, "argv", ["lighthouse", *command])
        with pytest.raises(SystemExit):
            main()
        assert (tmp_path / "runs/new/notes.md").exists() == notes == (tmp_path / "runs/new").exists()


@pytest.mark.parametrize("holder", ["launcher", "processes that outlived it"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_no_bad_advice_on_a_run_that_another_process_trains(run, lighthouse, holder, checkpoint):
    if not checkpoint:
        shutil.rmtree(run.checkpoint_dir(10))
    Path("s.toml").write_text(f'recipe = "{RECIPE}"\n[runs.one]\n')
    held = os.open(run.path if holder == "launcher" else run.path / "checkpoints", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    before = tree(run.path)
    commands = [
        ["pretrain", str(RECIPE), "--name", "one"],
        ["pretrain", str(RECIPE), "--name", "one", "--dry-run"],
    ]
    if not checkpoint:
        commands += [
            ["pretrain", "--resume", "one"],
            ["recover", "one"],
            ["strip", "one", "out", "--allow-unrecovered"],
            ["eval", "one"],
            ["profile", "selection", "one"],
        ]
    try:
        for command in commands:
            code, said = lighthouse(*command)
            assert code == 2 and "delete" not in said and said.count("hint: ") == 1, said
            assert checkpoint or "another process" in said, said
            assert tree(run.path) == before
    finally:
        os.close(held)
    if not checkpoint:
        code, said = lighthouse("strip", "one", "out", "--allow-unrecovered")
        assert code == 2 and "begins it at step 0" in said


def test_a_sweep_replaces_only_its_own_collection(tmp_path, lighthouse):
    (tmp_path / "base.toml").write_text(RECIPE.read_text())
    (tmp_path / "s.toml").write_text('recipe = "base.toml"\n[runs.a]\n')
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/s.json").write_text('{"mine": 1}')
    before = tree(tmp_path)
    code, said = lighthouse("sweep", str(tmp_path / "s.toml"), "--output", str(tmp_path / "runs"))
    assert code == 2 and "s.json" in said and tree(tmp_path) == before


def test_a_dry_run_of_a_sweep_refuses_what_the_sweep_would(run, lighthouse):
    Path("s.toml").write_text(f'recipe = "{RECIPE}"\n[runs.one]\n')
    (run.path / "recipe.toml").rename("aside")
    before = tree(run.path)
    code, said = lighthouse("sweep", "s.toml", "--dry-run")
    assert code == 2 and "runs/one has no recipe.toml to go on from, and is not of this sweep" in said
    assert tree(run.path) == before


def test_a_worker_says_so_in_one_line(run, canaries):
    (run.path / "logs").symlink_to(canaries)
    command = [sys.executable, "-m", "lighthouse_core.worker", str(run.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "logs is a link" in done.stderr and "Traceback" not in done.stderr


# What a sitecustomize does in every process of a command: note each name that is made or opened for writing.
TRACE = """
import json, os, stat, sys
log = os.open(os.environ["LIGHTHOUSE_TEST_WRITES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
places = {"os.mkdir": 0, "os.rename": 1, "os.symlink": 1, "os.link": 1, "os.truncate": 0, "os.chmod": 0, "os.chown": 0}
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

def is_folder(path):
    # No folder is opened for writing. The tempfile module names one, and makes a file without a name there.
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False

def note(event, arguments):
    flags = arguments[2] if event == "open" else 0
    if event in places or (event == "open" and isinstance(flags, int) and flags & writing):
        path = arguments[places.get(event, 0)]
        if not isinstance(path, int) and not (event == "open" and is_folder(path)):
            line = json.dumps([event, os.path.abspath(os.fsdecode(path)), flags])
            os.write(log, line.encode() + b"\\n")

sys.addaudithook(note)
"""
_RANDOM = r"\.[0-9a-f]{16}"
_FOLDER = r"checkpoints/(\.step-[0-9]+\.saving|step-[0-9]+|\.step-[0-9]+\.deleting)"
# All names of a run that training writes. Another one here wants a case above: what if a link is there?
TRAINING = re.compile(
    rf"|\.?(environment\.json|ledger\.json|recipe\.toml|recover\.toml|metrics\.jsonl)({_RANDOM})?"
    r"|origin(/(generation_)?config\.json)?"
    r"|logs(/rank[0-9]+\.log)?|tb(/events\.out\.tfevents\.[^/]+)?"
    rf"|checkpoints|{_FOLDER}(/(__[0-9]+_[0-9]+\.distcp|\.metadata(\.tmp)?|manifest\.json|\.manifest\.json{_RANDOM}))?"
)
_PLOTS = r"(by_position|needles)\.(png|svg)"
# Files that belong together are made, and those that they replace are kept, in a folder whose name nobody can guess.
_STAGING = r"\.writing-[0-9a-f]{16}(/\.earlier)?"
_REPORT = rf"(results\.json|{_PLOTS}|\.(results\.json|{_PLOTS}){_RANDOM})"
EVALUATION = re.compile(rf"eval(/[^/]+(/({_STAGING}|({_STAGING}/)?{_REPORT}))?)?")
SMALL = [
    "model.dim=32", "model.layers=1", "model.dense_layers=[]", "model.heads=2", "model.head_dim=16", "model.ffn_dim=48",
    "lighthouse.topk=16", "training.seq_len=512", "training.global_batch_size=1", "training.steps=2", "recover.steps=1",
    "checkpoint.interval=1", "metrics.validation_batches=1",
]  # fmt: skip


class Traced:
    """Commands in processes of their own whose every write is noted."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder / "work", folder / "log"
        (folder / "hook").mkdir()
        self.folder.mkdir()
        (folder / "hook/sitecustomize.py").write_text(TRACE)
        (folder / "tmp").mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
            "PYTHONPATH": str(folder / "hook"),
            "LIGHTHOUSE_TEST_WRITES": str(self.log),
            "TMPDIR": str(folder / "tmp"),
        }

    def run(self, *arguments: str) -> list[tuple[str, str, int]]:
        """The events of one command below the working directory, which must succeed: what, the name, and its flags."""
        self.log.write_text("")
        command = [*children.LIGHTHOUSE, *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=150
        )
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in self.log.read_text().splitlines()]
        below = f"{self.folder}/"
        return [(what, name.removeprefix(below), flags) for what, name, flags in events if name.startswith(below)]


def unsafe(events: list[tuple[str, str, int]], run: str, names: re.Pattern) -> list[str]:
    """The names that are not listed, and those through which a link would be written: made or replaced are all others,
    but for what lies in a folder that was made for a checkpoint just now."""
    made, found = set(), []
    for what, name, flags in events:
        inside = name.removeprefix(run).removeprefix("/")
        if what == "os.mkdir":
            made.add(name)
        if name.startswith(run) and not names.fullmatch(inside):
            found.append(name)
        fresh = os.path.dirname(name) in made and re.fullmatch(r"\.step-[0-9]+\.saving", Path(name).parent.name)
        nameless = hasattr(os, "O_TMPFILE") and flags & os.O_TMPFILE == os.O_TMPFILE
        if what == "open" and not flags & (os.O_EXCL | os.O_NOFOLLOW) and not fresh and not nameless:
            found.append(f"{name} follows links")
        if what in ("os.chmod", "os.chown", "os.truncate", "os.symlink"):
            found.append(f"{what} {name}")
    return found


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A small run that was trained while all of its writes were noted, and these."""
    traced = Traced(tmp_path_factory.mktemp("traced"))
    settings = [part for setting in SMALL for part in ("--set", setting)]
    return traced, traced.run("pretrain", str(RECIPE), "--name", "a", "--nproc", "1", "--quiet", *settings)


def test_training_writes_the_names_that_are_listed_and_follows_no_links(traced):
    traced, events = traced
    assert len(events) > 20 and not unsafe(events, "runs/a", TRAINING)
    names = {name for _, name, _ in events}
    assert {"runs/a/metrics.jsonl", "runs/a/logs/rank0.log", "runs/a/checkpoints/step-2"} <= names
    # What no audit sees, as files written by libraries in C++.
    run = traced.folder / "runs/a"
    written = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    assert all(TRAINING.fullmatch(name) for name in written), written


def test_names_that_are_not_listed_are_found():
    assert unsafe([("open", "runs/a/metrics.tmp", os.O_CREAT | os.O_EXCL)], "runs/a", TRAINING)
    assert unsafe([("open", "runs/a/metrics.jsonl", os.O_CREAT | os.O_WRONLY)], "runs/a", TRAINING)
    assert unsafe([("open", "runs/a/checkpoints/.step-2.saving/__0_0.distcp", os.O_CREAT)], "runs/a", TRAINING)
    assert not unsafe([("open", "runs/a/metrics.jsonl", os.O_CREAT | os.O_NOFOLLOW)], "runs/a", TRAINING)


@pytest.mark.slow
def test_other_commands_write_into_a_run_what_is_listed(traced):
    traced, _ = traced
    nothing = re.compile("(?!)")
    shutil.rmtree(traced.folder / "runs/a/checkpoints/step-2")
    measured = ["--tokens", "256", "--sequences", "2", "--only", "loss"]
    for command, names in (
        (["pretrain", "--resume", "a", "--nproc", "1", "--quiet", "--set", "checkpoint.keep=3"], TRAINING),
        (["recover", "a", "--nproc", "1", "--quiet"], TRAINING),
        (["eval", "a", *measured], EVALUATION),
        # Once more, which replaces a report.
        (["eval", "a", *measured], EVALUATION),
        (["compare", "a"], nothing),
        (["strip", "a", "out"], nothing),
        (["profile", "selection", "runs/a/checkpoints/step-1", "--sequences", "1"], nothing),
        (["runs"], nothing),
        (["recipes", "copy", "quickstart", "mine.toml"], nothing),
    ):
        events = [event for event in traced.run(*command) if not re.match(r"\.out\.[0-9a-f]+\.partial", event[1])]
        assert not unsafe(events, "runs/a", names), command
