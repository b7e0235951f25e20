"""Commands print what users have named and written, whatever characters the output has: escapes, never a traceback."""

import io
import json
import os
import subprocess
import sys

import pytest
from children import LIGHTHOUSE

from lighthouse_cli import _output
from lighthouse_core.config import load_recipe
from lighthouse_core.runs.create import create_run
from lighthouse_core.seal import seal

# Of one, two, three and four bytes in UTF-8, and a character that combines.
NAME = "größe-西南-ключ-𝄞-e\u0301"
# How Python sees stdout: what the locale says, and what PYTHONIOENCODING may say instead.
STREAMS = {
    "ascii terminal": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"},
    "ascii, strict": {"PYTHONIOENCODING": "ascii:strict"},
    "ascii, as file names": {"PYTHONIOENCODING": "ascii:surrogateescape"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which everything that has a name of its own has an odd one."""
    folder = tmp_path_factory.mktemp("place")
    (folder / NAME).mkdir()
    (folder / NAME / "src").mkdir()
    for number in range(3):
        (folder / NAME / f"src/{NAME}{number}.txt").write_text(f"{NAME} {number}\n", encoding="utf-8")
    recipe = folder / NAME / f"{NAME}.toml"
    recipe.write_text(
        "[model]\ndim = 64\nlayers = 2\nheads = 2\nffn_dim = 96\nvocab_size = 320\n"
        "[lighthouse]\ntopk = 16\ntile_parents = 8\n[training]\nseq_len = 1024\nglobal_batch_size = 4\nsteps = 10\n"
        f'[optimizer]\nlr = 1e-3\n[data]\nsource = "files"\npaths = ["{NAME}/src/*.txt"]\nvalidation = 0\n'
        'packing = "concat"\n'
        f'[output]\ndir = "{NAME}/runs"\n',
        encoding="utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = create_run(load_recipe(recipe), NAME, "run")
        run.checkpoint_dir(10).mkdir(parents=True)
        seal(run.checkpoint_dir(10))
        row = {"step": 10, "stage": "lighthouse", "leaky": False, "loss": 1.0, "grad_norm": 1.0, "lr": 1e-3}
        row |= {"tokens": 10, "tokens_per_second": 1.0, "seconds": 1.0, "data_seconds": 0.0, "memory_gib": 1.0}
        (run.path / "metrics.jsonl").write_text(json.dumps(row | {"steps": 10}) + "\n")
    return folder


RECIPE = f"{NAME}/{NAME}.toml"
COMMANDS = {
    "inspect": ["data", "inspect", RECIPE],
    "dry run": ["pretrain", RECIPE, "--dry-run"],
    "runs": ["runs", f"{NAME}/runs"],
    "prepare": ["data", "prepare", RECIPE, f"{NAME}/{{out}}", "--workers", "1"],
    "tokenizer": ["tokenizer", "train", RECIPE, f"{NAME}/{{out}}.model", "--vocab", "290"],
    "recover": ["recover", f"{NAME}/runs/run", "--steps", "5", "--dry-run"],
    "no such run": ["recover", NAME],
    "no such recipe": ["pretrain", NAME + ".tml"],
    "no such setting": ["pretrain", RECIPE, "--set", f'model.{NAME}="{NAME}"'],
    "no such option": ["pretrain", f"--{NAME}"],
    "no such command": [NAME],
}


def call(arguments, place, stream, **options):
    # Arguments and names of files are bytes; only what is printed depends on the stream.
    command = [part.encode() for part in (*LIGHTHOUSE, *arguments)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(command, cwd=place, env=variables | stream, capture_output=True, timeout=120, **options)


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_names_in_any_encoding(place, name, stream):
    number = list(STREAMS).index(stream)
    done = call([part.replace("{out}", f"out{number}") for part in COMMANDS[name]], place, STREAMS[stream])
    assert b"Traceback" not in done.stderr and b"UnicodeEncodeError" not in done.stderr, done
    if done.returncode == 2 and not name.startswith("no such"):
        # In the C locale a recipe's names, which are UTF-8, name no files.
        assert "LC_ALL" in STREAMS[stream] and b"the locale has no characters" in done.stderr, done
        return
    assert done.returncode == (2 if name.startswith("no such") else 0), done
    if name == "inspect":
        assert b"--- document 3\n" in done.stdout and b"\\u897f\\u5357" in done.stdout


def test_what_is_printed_on_an_ascii_terminal(place):
    (place / "plain").mkdir()
    (place / "plain/a.txt").write_text(NAME, encoding="utf-8")
    done = call(["data", "inspect", RECIPE, "--set", 'data.paths=["plain/*"]'], place, STREAMS["ascii terminal"])
    assert done.returncode == 0, done.stderr
    shown = b"gr\\xf6\\xdfe-\\u897f\\u5357-\\u043a\\u043b\\u044e\\u0447-\\U0001d11e-e\\u0301"
    assert b"--- document 1\n" + shown in done.stdout
    refused = call(["data", "inspect", RECIPE], place, STREAMS["ascii terminal"])
    assert refused.returncode == 2 and b"PYTHONUTF8=1" in refused.stderr and b"Traceback" not in refused.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252", "utf-16"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_any_text_is_printed(monkeypatch, encoding, errors):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    monkeypatch.setattr(sys, "stdout", out)
    text = NAME + "".join(map(chr, (0, 127, 128, 255, 0x2028, 0xFFFF, 0x10FFFF, 0xD800, 0xDFFF)))
    _output.data(text)
    _output.table("", (NAME,), [(text,)])
    assert out.buffer.getvalue()


def test_the_name_of_a_file_is_its_characters(monkeypatch):
    """In the C locale Python reads the bytes of a name as surrogates."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdout", out)
    _output.data("größe".encode().decode("ascii", "surrogateescape") + " é")
    assert out.buffer.getvalue() == b"gr\\xf6\\xdfe \\xe9\n"
