"""Shell completion, through the environment variables with which the shells ask for it."""

import json
import os
import subprocess
import sys

import pytest

from lighthouse_core.shelf import shipped_recipes

SCRIPT = """
import sys
from lighthouse_cli.app import main
try:
    main()
finally:
    heavy = [name for name in ("torch", "numpy", "lighthouse_core.config") if name in sys.modules]
    print(heavy or "", end="", file=sys.stderr)
"""

# The same for many questions: each is answered by a fork of one process, which has imported the command.
ANSWERS = """
import json, os, sys
from lighthouse_cli.app import main
for line in sys.stdin:
    environment, folder, place = json.loads(line)
    if os.fork():
        os.wait()
        print(flush=True)
        continue
    os.chdir(folder)
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(f"{place}/{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        heavy = [name for name in ("torch", "numpy", "lighthouse_core.config") if name in sys.modules]
        print(heavy or "", end="", file=sys.stderr)
        sys.stdout.flush()
        os.write(2, str(code).encode())
        os._exit(0)
"""

NOTHING = """
import typer
app = typer.Typer()
app.command("strip")(lambda run=typer.Argument(""): None)
app.command("recover")(lambda run=typer.Argument(""): None)
app(prog_name="lighthouse")
"""


def asking(words: str, shell: str) -> dict[str, str]:
    """What a shell's completion puts into the environment."""
    asked = {"_LIGHTHOUSE_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "_TYPER_COMPLETE_ARGS": words}
    return asked | {"COMP_CWORD": str(len(words.split(" ")) - 1)}


def run(words: str, cwd, script: str) -> None:
    """A question to a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | asking(words, "bash")
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", ANSWERS], env=environment, **pipes) as process:

        def ask(words: str, cwd, shell: str = "bash") -> list[str]:
            print(json.dumps([asking(words, shell), str(cwd), str(folder)]), file=process.stdin, flush=True)
            assert process.stdout.readline() == "\n"
            assert (folder / "2").read_text() == "0"
            return (folder / "1").read_text().split()

        yield ask
        process.stdin.close()


@pytest.fixture
def place(tmp_path):
    for name, time_ in (("older", 1000), ("newer", 2000)):
        for folder in ("step-5", ".step-10.saving"):
            (tmp_path / f"runs/{name}/checkpoints/{folder}").mkdir(parents=True)
        (tmp_path / f"runs/{name}/recipe.toml").touch()
        os.utime(tmp_path / f"runs/{name}", (time_, time_))
    (tmp_path / "mine.toml").touch()
    return tmp_path


def test_what_is_offered(place, ask):
    names = {"pretrain", "recover", "strip", "profile", "runs", "recipes", "data", "tokenizer"}
    assert names <= set(ask("lighthouse ", place))
    assert ask("lighthouse profile ", place) == ["step", "tune", "selection"]
    assert ask("lighthouse recover ", place) == ["newer", "older"]
    assert ask("lighthouse recover o", place) == ["older"]
    assert ask("lighthouse pretrain --resume ", place) == ["latest", "newer", "older"]
    assert "runs/newer/checkpoints/step-5" in ask("lighthouse pretrain --from ", place)
    assert ask("lighthouse pretrain ", place) == sorted([*shipped_recipes(), "mine.toml"])
    for command in ("data prepare", "data inspect", "tokenizer train", "profile step", "profile tune"):
        assert ask(f"lighthouse {command} ", place) == sorted([*shipped_recipes(), "mine.toml"])
    assert ask("lighthouse recipes copy quick", place) == ["quickstart"]
    for command in ("strip", "profile selection"):
        assert ask(f"lighthouse {command} ", place) == [
            "newer",
            "older",
            "runs/newer/checkpoints/step-5",
            "runs/older/checkpoints/step-5",
        ]
    # Nothing to offer leaves file names to the shell.
    assert ask("lighthouse pretrain recipes/", place) == []
    assert ask("lighthouse recover ", place / "runs") == []


def test_zsh(place, ask):
    assert ask("lighthouse recover o", place, "zsh") == ["_arguments", "'*:", ':(("older"))\'']
    assert ask("lighthouse pretrain recipes/", place, "zsh") == ["_files"]


def test_it_is_quick(place):
    """Processor time, which a busy machine does not stretch, against that of a Typer program that does nothing."""

    def seconds(script):
        before = os.times()
        run("lighthouse strip ", place, script)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    times = [(seconds(SCRIPT), seconds(NOTHING)) for _ in range(4)]
    ours, nothing = (min(column) for column in zip(*times, strict=True))
    assert ours < 2 * nothing
