"""A name from outside is shown, not obeyed: whatever reaches a terminal, a figure or a page is text and no more."""

import io
import json
import logging
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bad_input import DATA, ROW
from test_foreign_files import make_run
from tiny_recipe import RECIPE

from lighthouse_cli import _output, _view
from lighthouse_core import figures
from lighthouse_core.profile.report import Report, Table
from lighthouse_core.runs.rows import Point, Progress
from lighthouse_core.shown import shown, shown_drawing, shown_lines
from lighthouse_core.worker import _Shown

# A cleared screen, a title, a colour, a link, a bell, C1's CSI, a backspace, a line of its own, and bidi controls.
HOSTILE = (
    "a\x1b[2J\x1b]0;owned\x07\x1b[31m\x1b]8;;http://x\x1b\\\x9b2J\b\r\nerror: owned"
    "\u202e\u2066\u2028\u200e\ufeff\udcff\U000e0041"
)
# What a file's name can hold of it.
NAME = HOSTILE.replace("/", "-")
_OBEYED = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
text = st.text(st.characters(), max_size=60) | st.text(st.sampled_from(HOSTILE + 'x\t"\\|$_'), max_size=40)


def check_shown(printed: str) -> None:
    assert not _OBEYED.search(printed), printed
    assert "error: owned" not in printed.splitlines(), printed


@given(text=text)
def test_what_is_shown_is_one_line_of_text(text):
    line = shown(text)
    check_shown(line)
    assert "\n" not in line and shown(line) == line
    assert [shown(part) for part in text.replace("\t", "").split("\n")] == shown_lines(text.replace("\t", "")).split(
        "\n"
    )
    if text.isprintable():
        assert line == text


@given(text=text)
def test_json_that_is_shown_stays_the_same_document(text):
    for ascii in (True, False):
        document = json.dumps({text: [text]}, indent=1, ensure_ascii=ascii)
        if not any(ord(character) > 0xFFFF for character in text):
            assert json.loads(shown_lines(document)) == json.loads(document)


@given(text=text)
def test_a_drawing_keeps_its_colours_alone(text):
    assert shown_drawing(f"\x1b[31;1m{text}\x1b[0m").replace("\x1b[31;1m", "").replace("\x1b[0m", "").count(
        "\x1b"
    ) <= len(re.findall(r"\x1b\[[0-9;]*m", text))


@given(text=text, other=text)
def test_the_printer_shows_everything(text, other):
    out, err = io.StringIO(), io.StringIO()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    _output.set_quiet(False)
    try:
        _output.data(text)
        _output.say(text)
        _output.warn(text)
        _output.final(text)
        _output.error(text, other)
        _output.table(text, (text, other), [(other, text), (text, other)])
        screen = _output.Screen()
        screen.words(f"{text}\n")
    finally:
        sys.stdout, sys.stderr = before
    check_shown(out.getvalue().replace("\t", ""))
    # The screen's own sequences, from which on it draws, are at the end.
    words, _, drawn = err.getvalue().rpartition("\r\x1b[J")
    check_shown(words)
    check_shown(drawn.replace("\t", ""))
    assert words.count("\n") == (5 if other else 4)


@given(name=text)
def test_the_view_shows_a_name(name):
    progress = Progress(name, "dense", 0, 10, 0, 1, 0.0, points=[Point(1, "dense", 1.0, False)], row=ROW)
    for line in _view.render(progress, 1.0, 200):
        check_shown(line.plain)


def test_what_the_processes_say(capsys):
    record = logging.LogRecord("lighthouse_core", logging.WARNING, "", 0, "the file %s", (HOSTILE,), None)
    line = _Shown("%(message)s").format(record)
    check_shown(line)
    assert "\n" not in line


@pytest.fixture
def hostile(here) -> Path:
    """Everything that has a name, with a hostile one."""
    (here / NAME).mkdir()
    for folder in ("corpus", "odd"):
        (here / folder).mkdir()
    (here / "corpus/a.py").write_text("print('hello')\n" * 50)
    (here / f"odd/{NAME}.jsonl").write_text(json.dumps({"text": HOSTILE, HOSTILE: 1}) + "\n")
    (here / f"odd/{NAME}2.jsonl").write_text(json.dumps({"text": "x" * 500}) + "\n")
    (here / f"{NAME}.toml").write_text(
        f"# {HOSTILE[:60]}\n".replace("\n", " ") + "\n" + RECIPE + DATA, errors="replace"
    )
    (here / "tiny.toml").write_text(RECIPE + DATA)
    make_run(here / f"runs/{NAME}")
    make_run(here / "runs/_b$\\frac{$")
    return here


def toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=True).replace("\\udcff", "").replace("\\udb40\\udc41", "")


ODD = ("--set", f"data.text_key={toml(HOSTILE)}")
FILES = ("--set", 'data.source="files"', "--set", 'data.paths=["odd/*.jsonl"]')


@pytest.mark.parametrize(
    "arguments",
    [
        ("pretrain", NAME),
        ("pretrain", f"{NAME}.toml", "--dry-run"),
        ("pretrain", "tiny.toml", "--dry-run", *FILES, *ODD),
        ("pretrain", "tiny.toml", "--name", NAME),
        ("pretrain", "tiny.toml", "--set", f"{NAME}=1"),
        ("pretrain", "tiny.toml", "--set", f"training.steps={NAME}"),
        ("pretrain", "tiny.toml", "--set", f"data.tokenizer={toml(HOSTILE)}"),
        ("pretrain", "tiny.toml", "--set", f"data.paths=[{toml(HOSTILE)}]"),
        ("pretrain", "tiny.toml", "--set", f"titan.{toml(HOSTILE)}.a=1"),
        ("pretrain", "tiny.toml", f"--{NAME}"),
        ("pretrain", "tiny.toml", "--nproc", NAME),
        ("pretrain", "--resume", NAME, "--dry-run"),
        ("pretrain", "tiny.toml", "--from", NAME, "--dry-run"),
        ("pretrain", "tiny.toml", "--from", f"{NAME}x"),
        ("pretrain", "tiny.toml", "--set", f"model.from={toml(HOSTILE)}"),
        ("recover", NAME, "--dry-run"),
        ("recover", f"{NAME}x"),
        ("strip", NAME, "out"),
        ("strip", f"{NAME}x", "out"),
        ("eval", NAME),
        ("eval", f"{NAME}x"),
        ("eval", NAME, "--only", NAME),
        ("runs",),
        ("runs", NAME),
        ("compare", NAME, "_b$\\frac{$", "--out", f"{NAME}-out"),
        ("compare", f"{NAME}x"),
        ("sweep", NAME),
        ("sweep", "odd.toml"),
        ("profile", "--seq", NAME),
        ("profile", NAME),
        ("profile", f"--{NAME}"),
        ("profile", "selection", NAME),
        ("profile", "step", NAME),
        ("profile", "tune", NAME),
        ("profile", "--seq", "1024", "--scorer", NAME),
        ("profile", "--seq", "1024", "--dtype", NAME),
        ("tokenizer", "train", NAME, "t.model"),
        ("tokenizer", "train", "tiny.toml", f"{NAME}/t"),
        ("recipes", "show", NAME),
        ("recipes", "copy", "quickstart", NAME),
        ("data", "inspect", NAME),
        ("data", "inspect", "tiny.toml", *FILES),
        ("data", "inspect", "tiny.toml", *FILES, *ODD),
        ("data", "inspect", "tiny.toml", *FILES, "--json"),
        ("data", "prepare", "tiny.toml", f"{NAME}/x", "--workers", "1", *FILES),
        (NAME,),
    ],
    ids=lambda arguments: " ".join(shown(part)[:12] for part in arguments),
)
def test_a_hostile_name_is_shown(lighthouse, trainer, hostile, arguments):
    (hostile / "odd.toml").write_text(f'recipe = "tiny.toml"\n[runs.{toml(HOSTILE)}]\n', errors="replace")
    answer = lighthouse(*arguments)
    check_shown(answer.out.replace("\t", ""))
    check_shown(answer.err)
    assert answer.code in (0, 1, 2) and (answer.out or answer.err)


def test_json_output_has_the_name_as_it_is(lighthouse, hostile):
    names = {run["name"] for run in json.loads(lighthouse("runs", "--json").out)}
    assert names == {NAME, "_b$\\frac{$"}


@pytest.mark.parametrize("name", [NAME, r"$\frac{$", "a$b$c", "_hidden", "$", r"\$", r"\\$x$", "x" * 5000, "é漢"])
def test_a_name_in_a_figure(tmp_path, name):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots()
    axes.plot([1, 2], label=figures.label(name))
    axes.set_title(figures.label(name))
    legend = axes.legend()
    assert len(legend.get_texts()) == 1
    check_shown(axes.get_title())
    assert all(path.stat().st_size for path in figures.save(figure, tmp_path / "figure"))


def test_a_name_on_a_page(tmp_path):
    name = HOSTILE + "|x|<script>[a](javascript:b)`![c](d)"
    machine = {"device": name, "memory_gib": 1, "packages": {}, "python": "3", "git_commit": None}
    Report(name, "step", machine, [Table(name, ("a", name), [(name, "1")])], {}).write(tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    check_shown(page)
    assert not re.search(r"(?<!\\)[<\[`]", page)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
