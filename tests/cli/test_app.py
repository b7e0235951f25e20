"""The command itself: help, version, what it imports, and how errors leave it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from children import PYTHON, start

from lighthouse_core.runs import find

HEAVY = ("torch", "numpy", "transformers", "torchtitan")


def shell(*arguments: str, cwd=None) -> subprocess.CompletedProcess:
    # Where the package is not installed, another working directory must still find it.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=cwd, env=environment
    )


CASES = [
    (["--help"], (*HEAVY, "pydantic")),
    (["--version"], (*HEAVY, "pydantic")),
    (["pretrain", "--help"], HEAVY),
    (["recover", "--help"], HEAVY),
    (["strip", "--help"], HEAVY),
    (["profile", "--help"], HEAVY),
    (["profile", "step", "--help"], HEAVY),
    (["profile", "tune", "--help"], HEAVY),
    (["profile", "selection", "--help"], HEAVY),
    (["runs", "--help"], HEAVY),
    (["data", "prepare", "--help"], HEAVY),
    (["tokenizer", "train", "--help"], HEAVY),
    (["recipes", "copy", "--help"], HEAVY),
    (["runs"], HEAVY),
    (["recipes", "list"], HEAVY),
    (["profile"], HEAVY),
    (["profile", "--seq", "many"], HEAVY),
    (["profile", "--recipe", "quickstart"], HEAVY),
    (["profile", "--seq", "2048", "--topk", "5"], ("torch",)),
    (["profile", "step", "none.toml"], ("torch",)),
    (["profile", "tune", "--floor", "2"], ("torch",)),
    (["profile", "selection", "none"], ("torch",)),
    (["pretrain"], ("torch",)),
    (["pretrain", "none.toml"], ("torch",)),
    (["pretrain", "quickstart", "--set", "training.step=3"], ("torch",)),
    (["recover", "none"], ("torch",)),
    (["strip", "none", "out"], ("torch",)),
]
# One process imports the command, and each case goes on in a fork of it.
SCRIPT = """
import os, sys
from lighthouse_cli.app import main
for number, (arguments, heavy) in enumerate({cases!r}):
    if os.fork():
        os.wait()
        continue
    words = os.open(str(number), os.O_WRONLY | os.O_CREAT)
    os.dup2(words, 1)
    os.dup2(words, 2)
    sys.argv = ["lighthouse", *arguments]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        print("HEAVY", [name for name in heavy if name in sys.modules], "code", code, file=sys.stderr, flush=True)
        os._exit(0)
"""


@pytest.fixture(scope="module")
def last_words(tmp_path_factory):
    """The last line of each case: what it has imported, and its exit code."""
    folder = tmp_path_factory.mktemp("cases")
    answer = shell("-c", SCRIPT.format(cases=CASES), cwd=folder)
    assert answer.returncode == 0, answer.stderr
    return [(folder / str(number)).read_text().splitlines()[-1] for number in range(len(CASES))]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(arguments) for arguments, _ in CASES])
def test_help_and_argument_errors_import_nothing_heavy(last_words, number):
    assert last_words[number] in ("HEAVY [] code 0", "HEAVY [] code 2")


def test_help_is_quick():
    def seconds():
        begin = time.perf_counter()
        assert shell("-m", "lighthouse_cli", "--help").returncode == 0
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(3)) < 0.6


def test_help_lists_the_commands():
    answer = shell("-m", "lighthouse_cli", "--help")
    assert all(name in answer.stdout for name in ("pretrain", "recover", "strip", "profile", "runs", "recipes", "data"))
    assert "\x1b" not in answer.stdout
    answer = shell("-m", "lighthouse_cli", "--version")
    assert answer.stdout.startswith("lighthouse ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain"], "give either a RECIPE or --resume RUN"),
        (["pretrain", "tiny.toml", "--resume", "a"], "give either a RECIPE or --resume RUN"),
        (["pretrain", "none.toml"], "no recipe none.toml"),
        (["pretrain", "."], ". is a directory"),
        (["pretrain", "tiny.toml", "--set", "training.sequence_len=3"], "did you mean training.seq_len?"),
        (["pretrain", "tiny.toml", "--set", "training.steps=-1"], "training.steps must be above 0, not -1"),
        (["pretrain", "tiny.toml", "--set", "lighthouse.pooling=3"], "pooling must be a power of two"),
        (["pretrain", "tiny.toml", "--set", "lighthouse.topk=20"], "topk must be a positive multiple of tile_parents"),
        (["pretrain", "tiny.toml", "--set", "lighthouse.topk=1024"], "S = "),
        (["pretrain", "tiny.toml", "--set", "model.dense_layers=[2]"], "layer 2 is outside 0..1"),
        (["pretrain", "tiny.toml", "--set", "lighthouse.scorer=norm"], "norm is not a TOML value"),
        (["pretrain", "tiny.toml", "--set", "steps"], "expected key=value"),
        (["pretrain", "tiny.toml", "--name", "a/b"], "cannot name a run"),
        (["pretrain", "tiny.toml", "--nproc", "two"], "--nproc must be"),
        (["pretrain", "tiny.toml", "--nproc", "3"], "training.local_batch_size (1) x 3 processes"),
        (["pretrain", "tiny.toml", "--nnodes", "2"], "needs a --name"),
        (["pretrain", "tiny.toml", "--nnodes", "2", "--name", "a"], "--rdzv-endpoint"),
        (["pretrain", "tiny.toml", "--node-rank", "1", "--name", "a"], "--node-rank must be between 0 and 0"),
        (["pretrain", "--resume", "none"], "no run none"),
        (["pretrain", "--resume", "latest"], "no run under runs"),
        (["pretrain", "--resume", "latest", "--name", "a"], "--name is for a new run"),
        (["recover"], "no run under runs"),
        (["recover", "none"], "no run none"),
        (["strip", "none", "out"], "no run none"),
        (["profile", "--seq", "0"], "--seq must be at least 1"),
        (["profile", "--seq", "4096", "--pooling", "3"], "pooling must be a power of two"),
        (["profile", "--seq", "4096", "--topk", "100"], "topk must be a positive multiple"),
    ],
)
def test_a_users_mistake_is_one_line(lighthouse, trainer, here, arguments, message):
    assert message in lighthouse(*arguments).error
    assert not trainer.launches
    assert not list((here / "runs").glob("*"))


def test_an_error_in_a_file_names_the_line(lighthouse, here):
    (here / "tiny.toml").write_text((here / "tiny.toml").read_text().replace("seq_len", "sequence_len"))
    answer = lighthouse("pretrain", "tiny.toml")
    assert answer.err == "error: tiny.toml:13: unknown key training.sequence_len; did you mean training.seq_len?\n"
    assert answer.code == 2


def test_an_unexpected_error_keeps_its_traceback(lighthouse, here, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(find, "find_run", broken)
    with pytest.raises(ZeroDivisionError):
        lighthouse("recover")


IMPORTING = """
import sys, time, types

app = types.ModuleType("lighthouse_cli.app")

def main():
    import slow
    time.sleep(60)

app.main = main
sys.modules["lighthouse_cli.app"] = app
from lighthouse_cli._start import main
main()
"""


@pytest.mark.parametrize(("presses", "takes", "code"), [(1, 2, 130), (2, 60, -signal.SIGINT)])
def test_an_interrupt_within_an_import_waits_for_its_end_and_a_second_does_not(tmp_path, presses, takes, code):
    (tmp_path / "slow.py").write_text(
        f"import time\nprint('begun', flush=True)\ntime.sleep({takes})\nprint('ended', flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with start([*PYTHON, "-c", IMPORTING], env=environment, cwd=tmp_path, seconds=30, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "interrupted: ending\n"
        if presses == 2:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (code, "ended\n" if presses == 1 else "", "")


CHILD = """
import subprocess, sys, types
app = types.ModuleType("lighthouse_cli.app")
app.main = lambda: print(subprocess.run([sys.executable, "-c", "raise SystemExit(7)"]).returncode)
sys.modules["lighthouse_cli.app"] = app
from lighthouse_cli._start import main
main()
"""


def test_what_is_started_has_its_exit_code_whoever_started_us():
    """With SIGCHLD ignored, the system keeps none, and Python takes a process that failed for one that did not."""

    def ignore() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    with start([*PYTHON, "-c", CHILD], preexec_fn=ignore, stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate()[0] == "7\n"
