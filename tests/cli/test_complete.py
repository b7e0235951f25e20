"""Shell completion, through the environment variables with which the shells ask for it."""

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

NOTHING = """
import typer
app = typer.Typer()
app.command("strip")(lambda run=typer.Argument(""): None)
app.command("recover")(lambda run=typer.Argument(""): None)
app(prog_name="lighthouse")
"""


def ask(words: str, cwd, shell: str = "bash", script: str = SCRIPT) -> list[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"_LIGHTHOUSE_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "_TYPER_COMPLETE_ARGS": words}
    environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    return answer.stdout.split()


@pytest.fixture
def place(tmp_path):
    for name, time_ in (("older", 1000), ("newer", 2000)):
        for folder in ("step-5", ".step-10.saving"):
            (tmp_path / f"runs/{name}/checkpoints/{folder}").mkdir(parents=True)
        (tmp_path / f"runs/{name}/recipe.toml").touch()
        os.utime(tmp_path / f"runs/{name}", (time_, time_))
    (tmp_path / "mine.toml").touch()
    return tmp_path


def test_what_is_offered(place):
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


def test_zsh(place):
    assert ask("lighthouse recover o", place, "zsh") == ["_arguments", "'*:", ':(("older"))\'']
    assert ask("lighthouse pretrain recipes/", place, "zsh") == ["_files"]


def test_it_is_quick(place):
    """Processor time, which a busy machine does not stretch, against that of a Typer program that does nothing."""

    def seconds(script):
        before = os.times()
        ask("lighthouse strip ", place, script=script)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    times = [(seconds(SCRIPT), seconds(NOTHING)) for _ in range(4)]
    ours, nothing = (min(column) for column in zip(*times, strict=True))
    assert ours < 2 * nothing
