"""recipes/extend_demo.sh: its commands are valid, and it shows what an extension gains."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from lighthouse_cli.app import app
from lighthouse_core.config import load_recipe
from lighthouse_core.config.origin import changes
from lighthouse_core.runs.create import create_run

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPT = RECIPES / "extend_demo.sh"


def commands() -> list[list[str]]:
    """Words of each `lighthouse` command of the script, its variables put in."""
    text = SCRIPT.read_text().replace("\\\n", " ").replace("$recipe", str(RECIPES / "extend_2048.toml"))
    found = re.findall(r"^ *lighthouse ([^|\n]*)", text, re.MULTILINE)
    measured = re.findall(r"^measure (.*)$", text, re.MULTILINE)
    plain = [shlex.split(line) for line in found if "${@" not in line]
    [through] = (shlex.split(line) for line in found if "${@" in line)
    for words in map(shlex.split, measured):
        place = through.index("${@:2}")
        plain.append([*through[:place], *words[1:], *through[place + 1 :]])
    return plain


def test_its_commands_have_the_options_that_they_name():
    group = typer.main.get_command(app)
    seen = []
    for words in commands():
        command = group.commands[words[0]]
        # Raises for an option that is not there, a value of another type, or a missing argument.
        command.make_context(words[0], words[1:])
        seen.append(words[0])
    assert sorted(seen) == ["eval"] * 4 + ["pretrain"] * 2 + ["recover", "strip"]


def test_its_second_run_continues_the_first_with_another_rotation_and_length(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (words for words in commands() if words[0] == "pretrain")

    def settings(words):
        return [words[n + 1] for n, word in enumerate(words) if word == "--set"]

    run = create_run(load_recipe(RECIPES / f"{first[1]}.toml", settings(first)), "quickstart", "short")
    longer = load_recipe(second[1], [*settings(second), f'model.from="{run.path.resolve()}"'])
    assert (run.recipe.training.seq_len, longer.training.seq_len) == (512, 2048)
    assert list(changes(longer.model.origin, longer.model.model_dump())) == ["rope_theta"]
    # So that all are measured on the same held-out text.
    assert longer.data == run.recipe.data


@pytest.mark.slow
def test_it_ends_with_a_gain(tmp_path):
    pytest.importorskip("transformers")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        ("bash", SCRIPT, "demo"),
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.strip().splitlines()[-4:]
    number = r"(-?[\d.]+) ± [\d.]+"
    shape = rf"(.*): +beyond 512 tokens: {number} with all of them, {number} with no more than 512; .* worth {number}"
    found = [re.fullmatch(shape, line) for line in lines]
    assert all(found), lines
    names = [one[1] for one in found]
    assert names == [
        "trained at 512",
        "the same, with the new rotation",
        "extended to 2048",
        "exported, run by transformers",
    ]
    before, turned, after, exported = (float(one[2]) for one in found)
    worth = [float(one[4]) for one in found]
    assert after < before - 0.1 and after < turned
    # Far tokens did harm before, and do not afterwards.
    assert worth[0] < -0.1 and worth[2] > -0.02
    # In bfloat16.
    assert exported == pytest.approx(after, abs=0.02)
