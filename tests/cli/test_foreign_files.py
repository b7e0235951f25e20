"""Files of a run, of a sweep and of prepared tokens that somebody else wrote: each is refused by name, or left out."""

import contextlib
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bad_input import DATA, ROW, check_refused, tree
from tiny_recipe import RECIPE
from whole_place import COMMANDS, TYPES, Opened, make

from lighthouse_core.config import load_recipe, loads_recipe
from lighthouse_core.config.sweep import load_sweep
from lighthouse_core.data.build import build_source, open_tokens
from lighthouse_core.data.checks import checked_tokenizer
from lighthouse_core.data.prepare import prepare
from lighthouse_core.errors import LighthouseError
from lighthouse_core.reading import parse_json, parse_toml, read_json, read_regular
from lighthouse_core.runs.listing import summarize
from lighthouse_core.runs.rows import Tail, can_be_shown, parse_row, read_rows
from lighthouse_core.runs.run import Run
from lighthouse_core.seal import seal
from lighthouse_core.sweep import collect
from lighthouse_core.sweep.state import report

BIG = "9" * 5000
DEEP = "[" * 100_000
LEDGER = {"version": 1, "stages": [{"stage": "lighthouse", "start": 0, "end": 100}]}
# What a file can hold instead of what it should.
ODD = {
    "nothing": b"",
    "nested too deeply": DEEP.encode(),
    "closed, and nested too deeply": b"[" * 500 + b"]" * 500,
    "tables nested too deeply": b'{"a":' * 50_000,
    "a long integer": BIG.encode(),
    "no UTF-8": b"\xff\xfe{}",
    "null": b"null",
    "a number": b"1",
    "a list": b"[1, 2]",
    "a string": b'"\\u001b[2J"',
    "escapes": b"\x1b[2J\x9b",
    "NUL": bytes(100),
    "a byte-order mark": b"\xef\xbb\xbf{}",
}


def make_run(path: Path, **files: bytes) -> Path:
    """A run with rows and no checkpoint, but for the files that are given."""
    whole = {"recipe.toml": (RECIPE + DATA).encode(), "ledger.json": json.dumps(LEDGER).encode()}
    whole |= {"environment.json": b"{}", "metrics.jsonl": json.dumps(ROW).encode() + b"\n"}
    path.mkdir(parents=True)
    for name, content in (whole | files).items():
        (path / name).write_bytes(content)
    return path


READ_A_RUN = [("compare", "bad"), ("recover", "bad", "--dry-run"), ("pretrain", "--resume", "bad", "--dry-run")]


@pytest.fixture
def bad(here, monkeypatch) -> Path:
    """A run that is whole as yet, beside another one."""
    monkeypatch.setattr("lighthouse_core.evaluate.compare.plot", lambda curves, folder: [])
    (here / "corpus").mkdir()
    (here / "corpus/a.py").write_text("print('hello')")
    for run in ("good", "bad"):
        checkpoint = make_run(here / f"runs/{run}") / "checkpoints/step-60"
        checkpoint.mkdir(parents=True)
        seal(checkpoint)
    return here / "runs/bad"


@pytest.mark.parametrize("command", READ_A_RUN)
def test_with_whole_files_all_commands_go_on(lighthouse, trainer, bad, command):
    assert lighthouse(*command).code == 0


@pytest.mark.parametrize("name", ["recipe.toml", "ledger.json", "metrics.jsonl", "environment.json"])
@pytest.mark.parametrize("kind", [*ODD, "a folder", "a pipe", "a device", "a link to itself"])
def test_one_odd_file_of_a_run(lighthouse, trainer, bad, name, kind):
    (bad / name).unlink()
    if kind in ODD:
        (bad / name).write_bytes(ODD[kind])
    elif kind == "a folder":
        (bad / name).mkdir()
    elif kind == "a pipe":
        os.mkfifo(bad / name)
    else:
        os.symlink("/dev/zero" if kind == "a device" else name, bad / name)
    listed = lighthouse("runs", "--json")
    # A pipe, a folder or a device is no recipe.toml, and so no run.
    names = {run["name"] for run in json.loads(listed.out)}
    assert listed.code == 0 and names in ({"good", "bad"}, {"good"}) and not listed.err
    assert lighthouse("runs").code == 0
    for command in READ_A_RUN:
        answer = lighthouse(*command)
        if name in ("recipe.toml", "ledger.json") or (name, command[0]) == ("metrics.jsonl", "compare"):
            assert f"runs/bad/{name}" in check_refused(answer) or "runs/bad is not a run: its recipe.toml" in answer.err
        else:
            assert answer.code == 0, answer
    assert not trainer.launches


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10**400, 10**400 + 9),
    st.floats(),
    st.text(),
    st.sampled_from(["dense", "lighthouse", "\x1b[2J"]),
)
documents = st.recursive(
    leaves,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.sampled_from([*ROW, "val_loss", "x"]), part),
    max_leaves=8,
)
ledgers = st.fixed_dictionaries(
    {},
    optional={
        "version": st.just(1) | leaves,
        "stages": st.lists(
            st.fixed_dictionaries({}, optional={key: leaves for key in ("stage", "start", "end", "measured_dense")}),
            max_size=3,
        )
        | documents,
    },
)


@given(rows=st.lists(documents, max_size=4), ledger=documents | ledgers)
def test_any_json_in_a_run(tmp_path_factory, rows, ledger):
    run = make_run(
        tmp_path_factory.mktemp("runs") / "bad",
        **{
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
            "ledger.json": json.dumps(ledger).encode(),
        },
    )
    summary = summarize(run)
    assert summary.stage in (None, "dense", "lighthouse") and summary.leaky in (None, False, True)
    f"{summary.loss or 0.0:.4f} {summary.val_loss or 0.0:.4f} {summary.step}/{summary.end}"
    for row in read_rows(run / "metrics.jsonl"):
        assert type(row["step"]) is int and isinstance(row.get("loss", 0.0), int | float)
    try:
        found = Run(run)
    except LighthouseError as error:
        assert "\n" not in str(error)
    else:
        found.settle()
        assert found.start < found.end


@pytest.mark.parametrize(
    "line",
    [
        "null",
        "{}",
        '{"step": null}',
        '{"step": true, "loss": 1.0}',
        '{"step": -1, "loss": 1.0}',
        '{"step": 1.5, "loss": 1.0}',
        '{"step": "1", "loss": 1.0}',
        '{"step": 1, "loss": "low"}',
        '{"step": 1, "loss": [1]}',
        '{"step": 1, "loss": 1.0, "stage": "\\u001b[2J"}',
        '{"step": 1, "loss": 1.0, "leaky": "no"}',
        '{"step": 1, "loss": 1.0, "seconds": {}}',
        f'{{"step": {BIG}, "loss": 1.0}}',
        f'{{"step": 1, "loss": {"9" * 400}}}',
        f'{{"step": 1, "loss": 1.0, "x": {DEEP}',
    ],
    ids=range(15),
)
def test_a_line_that_is_no_row(tmp_path, line):
    assert parse_row(line) is None
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n")
    tail = Tail(path)
    (tmp_path / "new").write_text(f"{line}\n{json.dumps(ROW)}\n")
    os.replace(tmp_path / "new", path)
    assert [row for _, row in tail.read()] == [ROW] and can_be_shown(ROW)


def test_a_metrics_file_that_somebody_empties_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    path.write_text(f"{json.dumps(ROW)}\n" * 3)
    assert len(tail.read()) == 3
    path.write_text(f"{json.dumps(ROW)}\n")
    assert len(tail.read()) == 1


def test_recovery_with_rows_of_somebody_else(lighthouse, trainer, here):
    trainer.rows = [ROW]
    assert lighthouse("pretrain", "tiny.toml", "--name", "a").code == 0
    odd = [b"null", b'{"step": null, "loss": null}', b'"x"', b"\xff\xfe", b'{"step": 3, "loss": "low"}', DEEP.encode()]
    with open("runs/a/metrics.jsonl", "ab") as file:
        file.write(b"\n".join(odd) + b"\n")
    trainer.rows = []
    answer = lighthouse("recover", "a")
    assert answer.code == 0 and "Traceback" not in answer.err
    assert lighthouse("compare", "a", "--json").code == 0


def test_reading_ends(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"")
    os.truncate(tmp_path / "large", 1 << 40)
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(OSError):
            read_regular(path)
    with pytest.raises(OSError, match="larger than"):
        read_json(tmp_path / "large")


@given(depth=st.integers(1, 3000))
def test_what_is_read_can_be_walked(depth):
    texts = ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)
    for text in texts:
        try:
            value = parse_json(text)
        except ValueError as error:
            assert depth > 64 and str(error) == "nested too deeply"
        else:
            assert depth <= 65 and json.dumps(value)
    try:
        parse_toml(".".join(["a"] * depth) + " = 1")
    except ValueError as error:
        assert depth > 60 and str(error) == "nested too deeply"


def seal_index(folder: Path, change) -> None:
    """Change an index of prepared tokens, and seal it again, as anybody can."""
    index = json.loads((folder / "tokens.json").read_text())
    index.pop("seal")
    change(index)
    seal = hashlib.blake2b(json.dumps(index).encode(), digest_size=8).hexdigest()
    (folder / "tokens.json").write_text(json.dumps({**index, "seal": seal}))


TEXT = RECIPE + 'source = "files"\npaths = ["a.txt"]\nvalidation = 0.0\n'


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    with contextlib.chdir(folder):
        Path("a.txt").write_text("some words\n" * 300)
        prepare(loads_recipe(TEXT), Path("out"), workers=1, progress=lambda done: None)
    return folder


@pytest.fixture
def prepared(prepared_once, here) -> Path:
    # With their times: they are part of what the work is known by.
    shutil.copytree(prepared_once, here, dirs_exist_ok=True)
    (here / "text.toml").write_text(TEXT)
    (here / "tokens.toml").write_text(TEXT.replace("files", "tokens").replace("a.txt", "out"))
    return here / "out"


def first(index: dict) -> list:
    return index["splits"]["train"]["shards"][0]


CHANGES = {
    "a shard elsewhere": lambda index: first(index).__setitem__(0, "../out/train-00000.tokens"),
    "a shard by its whole path": lambda index: first(index).__setitem__(0, "/etc/passwd"),
    "a shard with a NUL": lambda index: first(index).__setitem__(0, "a\0b"),
    "a shard that is the folder": lambda index: first(index).__setitem__(0, "."),
    "a name that is none": lambda index: first(index).__setitem__(0, 3),
    "counts that are none": lambda index: first(index).__setitem__(1, "many"),
    "counts below zero": lambda index: first(index).__setitem__(1, -1),
    "a count of its own": lambda index: index["splits"]["train"]["units"][0][1][0].__setitem__(2, 5),
    "a shard that is not there": lambda index: index["splits"]["train"]["units"][0][1][0].__setitem__(0, 7),
    "no splits": lambda index: index.pop("splits"),
    "other splits": lambda index: index["splits"].pop("validation"),
    "splits that are a list": lambda index: index.__setitem__("splits", []),
    "no version": lambda index: index.pop("version"),
    "a share that is none": lambda index: index.__setitem__("validation", "half"),
    "a fingerprint that is none": lambda index: index.__setitem__("fingerprint", None),
    "no vocabulary": lambda index: index.pop("vocab_size"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_of_prepared_tokens_that_somebody_sealed_again(lighthouse, trainer, prepared, change):
    seal_index(prepared, CHANGES[change])
    error = check_refused(lighthouse("pretrain", "tokens.toml", "--dry-run"))
    assert "tokens.json is damaged" in error or "has format version" in error
    check_refused(lighthouse("data", "inspect", "tokens.toml", "--verify"))


def reseal_shard(folder: Path, change) -> None:
    """Change the ids and the documents of the first shard, and write every checksum anew."""
    path = folder / "train-00000.tokens"
    content = bytearray(path.read_bytes())
    fields = list(struct.Struct("<8sIIQQQQ32s").unpack(content[:80]))
    tokens, documents = fields[6], fields[5]
    starts = 88 + tokens * 2 + -tokens * 2 % 8
    change(
        np.frombuffer(content, dtype="<u2", offset=88, count=tokens),
        np.frombuffer(content, dtype="<u8", offset=starts, count=documents),
    )
    fields[7] = hashlib.blake2b(content[88:], digest_size=32).digest()
    header = struct.Struct("<8sIIQQQQ32s").pack(*fields)
    content[:88] = header + hashlib.blake2b(header, digest_size=8).digest()
    path.write_bytes(content)
    seal_index(folder, lambda index: first(index).__setitem__(3, fields[7].hex()))


@pytest.mark.parametrize("place", [0, 100, -1])
def test_ids_that_the_vocabulary_does_not_have(lighthouse, trainer, prepared, place):
    def change(ids, starts):
        ids[place] = 258

    reseal_shard(prepared, change)
    words = "has the id 258, and its tokenizer has 258"
    assert words in check_refused(lighthouse("pretrain", "tokens.toml", "--name", "a"))
    assert words in check_refused(lighthouse("data", "inspect", "tokens.toml", "--verify"))
    # Reading finds it, too, of a shard that was verified before it changed.
    recipe = load_recipe("tokens.toml")
    units = open_tokens(recipe.data, checked_tokenizer(recipe)).units("train")
    with pytest.raises(LighthouseError, match=words):
        for unit in units:
            unit.open()(0, unit.length)


@pytest.mark.parametrize("begins", [(5,), (1 << 60,)])
def test_documents_that_begin_elsewhere(lighthouse, trainer, prepared, begins):
    def change(ids, starts):
        starts[: len(begins)] = begins

    reseal_shard(prepared, change)
    error = check_refused(lighthouse("data", "inspect", "tokens.toml"))
    assert "has documents that do not follow one another" in error


PLANS = {
    "no work": {"format": "lighthouse plan"},
    "no tasks": {"format": "lighthouse plan", "work": None},
    "tasks that are none": {"format": "lighthouse plan", "tasks": 3},
    "pieces that are none": {"format": "lighthouse plan", "tasks": [[["a", 1]]]},
    "pieces below zero": {"format": "lighthouse plan", "tasks": [[[-1, 0, 0, None, 5]]]},
    "a unit that is not there": {"format": "lighthouse plan", "tasks": [[[7, 0, 0, None, 5]]]},
    "no piece": {"format": "lighthouse plan", "tasks": []},
    "odd words": {"format": "\x1b[2J"},
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_that_somebody_else_wrote(lighthouse, prepared, here, plan):
    work = None
    shutil.rmtree(prepared)
    prepared.mkdir()
    (prepared / "progress").mkdir()
    if PLANS[plan].get("tasks") is not None:
        # The work is right, and the tasks are not.
        recipe = load_recipe("text.toml")
        source, tokenizer = build_source(recipe.data), checked_tokenizer(recipe)
        work = {"listing": source.fingerprint, "tokenizer": tokenizer.fingerprint, "validation": 0.0, "units": 1}
    (prepared / "progress/plan.json").write_text(json.dumps({"work": work, **PLANS[plan]}))
    before = sorted(prepared.rglob("*"))
    error = check_refused(lighthouse("data", "prepare", "text.toml", "out", "--workers", "1"))
    assert "out/progress/plan.json is " in error or error == "error: out was begun with other data or settings"
    assert sorted(prepared.rglob("*")) == before


def test_a_record_that_somebody_else_wrote(lighthouse, prepared, here):
    record = {
        "train": {"shard": ["../../etc/x", 1, 1, "0"], "units": [[0, 1, 1]]},
        "validation": {"shard": None, "units": []},
    }
    (here / "again").mkdir()
    (prepared / "tokens.json").unlink()
    (prepared / "progress").mkdir()
    recipe = load_recipe("text.toml")
    source, tokenizer = build_source(recipe.data), checked_tokenizer(recipe)
    work = {"listing": source.fingerprint, "tokenizer": tokenizer.fingerprint, "validation": 0.0, "units": 1}
    plan = {"format": "lighthouse plan", "work": work, "tasks": [[[0, 0, 0, None, 3300]]]}
    (prepared / "progress/plan.json").write_text(json.dumps(plan))
    for odd in (record, {}, [], {"train": None, "validation": None}, {"train": {"shard": None, "units": [[1]]}}):
        (prepared / "progress/00000.json").write_text(json.dumps(odd))
        assert "00000.json is damaged" in check_refused(lighthouse("data", "prepare", "text.toml", "out"))


@pytest.mark.parametrize("name", ["switch", "end"])
@pytest.mark.parametrize("kind", ODD)
def test_what_a_sweep_reads_of_its_runs(lighthouse, here, name, kind):
    run = make_run(here / "runs/one", **{"environment.json": ODD[kind]})
    (run / f"eval/{name}").mkdir(parents=True)
    (run / f"eval/{name}/results.json").write_bytes(ODD[kind])
    (here / "corpus").mkdir()
    (here / "whole.toml").write_text(RECIPE + DATA)
    (here / "sweep.toml").write_text('recipe = "whole.toml"\n[runs.one]\n')
    assert report(run, name) in (None, {})
    collected = collect(load_sweep(here / "sweep.toml"), "sweep", here / "runs")
    assert collected["runs"]["one"]["python"] is None and collected["runs"]["one"]["rows"] == [ROW]


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_MODEL = ("config.json", "generation_config.json", *TOKENIZER)
# Every file of a working directory that a command opens for reading, text to train on and its own output left out.
# A test finds out whether there are more.
FILES = [
    "small.toml",
    "tokens.toml",
    "sweep.toml",
    "begin.toml",
    *(f"model/{name}" for name in ("config.json", "generation_config.json", "model.safetensors")),
    *(f"runs/next/{name}" for name in ("recipe.toml", "ledger.json", *TOKENIZER, "chat_template.jinja")),
    *(f"runs/next/origin/{name}" for name in ("config.json", "generation_config.json")),
    *(f"runs/next/checkpoints/step-0/{name}" for name in ("manifest.json", ".metadata", "__0_0.distcp")),
    *(f"given/{name}" for name in (*TOKENIZER, "chat_template.jinja")),
    *(f"runs/tiny/{name}" for name in ("recipe.toml", "ledger.json", "metrics.jsonl", *TOKENIZER)),
    *(f"runs/tiny/eval/{which}/results.json" for which in ("switch", "end")),
    *(f"runs/tiny/checkpoints/step-10/{name}" for name in ("manifest.json", ".metadata", "__0_0.distcp")),
    *(f"runs/later/{name}" for name in ("recipe.toml", "recover.toml", "ledger.json", "metrics.jsonl", *TOKENIZER)),
    "runs/later/chat_template.jinja",
    *(f"runs/later/checkpoints/step-12/{name}" for name in ("manifest.json", ".metadata", "__0_0.distcp")),
    *(f"{folder}/{name}" for folder in ("exported", "parts") for name in _MODEL),
    "exported/model.safetensors",
    "parts/model.safetensors.index.json",
    "parts/model-0.safetensors",
    "parts/model-1.safetensors",
    "tokens/tokens.json",
    "tokens/train-00000.tokens",
    "tokens/validation-00000.tokens",
    "begun/progress/plan.json",
    "begun/progress/00000.json",
    "measured/results.json",
    "compared/compare.json",
    "profiled/results.json",
]
# What is read in Rust or beside this process, which no hook of the interpreter sees.
UNSEEN = {
    "exported/model.safetensors": "eval, exported",
    "model/model.safetensors": "begin",
    "parts/model-0.safetensors": "eval, in parts",
    "parts/model-1.safetensors": "eval, in parts",
    "runs/tiny/checkpoints/step-10/manifest.json": "resume",
    "runs/later/checkpoints/step-12/manifest.json": "recover again",
}
# Commands that take a second or more: where another one reads a file, that is enough for the quick tests.
HEAVY = (
    "strip",
    "strip, begun",
    "profile",
    "eval, recovered",
    "eval, tokens",
    "eval",
    "compare",
    "eval, exported",
    "eval, in parts",
)


def reset(here: Path, kept: Path) -> None:
    """The working directory as it was made."""
    for path in here.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.copytree(kept, here, dirs_exist_ok=True, symlinks=True)


@pytest.fixture
def place(lighthouse, trainer, here, tmp_path_factory, monkeypatch):
    """Makes a working directory with what some commands read, and finds out which reads what."""
    monkeypatch.setattr("lighthouse_core.evaluate.compare.plot", lambda curves, folder: [])
    monkeypatch.setattr("lighthouse_core.evaluate.plot", lambda report, folder: [])
    monkeypatch.setattr("lighthouse_core.profile.selection_figure.draw", lambda view, path: [])

    def build(commands) -> SimpleNamespace:
        make(here, lighthouse, commands)
        kept = tmp_path_factory.mktemp("kept")
        (here / "canaries").mkdir()
        (here / "canaries/thesis").write_text("of somebody else")
        shutil.copytree(here, kept, dirs_exist_ok=True, symlinks=True)
        opened, readers = Opened(), {name: [command] for name, command in UNSEEN.items() if command in commands}
        for command in commands:
            opened.folder, opened.names = here, set()
            done = lighthouse(*COMMANDS[command])
            opened.folder = None
            assert done.code == 0, (command, done)
            for name in opened.names:
                if (kept / name).is_file() and not name.startswith("corpus/"):
                    readers.setdefault(name, []).append(command)
            reset(here, kept)
        return SimpleNamespace(here=here, kept=kept, readers=readers)

    return build


def problem(place, lighthouse, name: str, kind: str, command: str, named: bool = False) -> str | None:
    """What a command does wrong where a file is another thing; None for nothing. `named`: an error has to name it."""
    path = place.here / name
    content = path.read_bytes()
    path.unlink()
    TYPES[kind](path, content)
    before = tree(place.here / "canaries")
    try:
        answer = lighthouse(*COMMANDS[command])
        if answer.code:
            error = check_refused(answer, answer.code if answer.code == 1 else 2)
            if named and not names(error, name):
                return f"{name} as {kind}: {command} does not name it: {error}"
        elif "Traceback" in answer.err or not may_pass(name, kind, command, content, answer.err):
            return f"{name} as {kind}: {command} goes on: {answer.err[-300:]}"
        if tree(place.here / "canaries") != before:
            return f"{name} as {kind}: {command} changed another's file"
        # Where "a link to nothing" leads.
        if path.with_name("nowhere").exists():
            return f"{name} as {kind}: {command} wrote through the link"
    except BaseException as error:
        return f"{name} as {kind}: {command}: {type(error).__name__}: {str(error)[:400]}"
    finally:
        reset(place.here, place.kept)
    return None


# Not "a link to another's file": where a file is only read, a link to it is as good, as in a cache of downloads.
def names(error: str, name: str) -> bool:
    """Whether an error names a file, or the checkpoint that the file belongs to."""
    path = Path(name)
    return path.name in error or (path.parent.parent.name == "checkpoints" and path.parent.name in error)


_NO_FILE = ("a folder", "a folder with a file", "a pipe", "a socket", "an endless device", "an empty device",
            "a link to itself", "a link to nothing", "a link to a folder")  # fmt: skip


def may_pass(name: str, kind: str, command: str, content: bytes, said: str) -> bool:
    """Whether a command can do without a file, or with what is left of it."""
    last = Path(name).name
    # It lists what it can; a run without its rows is one that has not begun; a report that is none is made again.
    if command in ("runs", "sweep") and last in ("ledger.json", "metrics.jsonl", "results.json", "recover.toml"):
        return True
    if last == "metrics.jsonl":
        return True
    # An older checkpoint is taken, and both are named.
    if "/checkpoints/" in name and "is damaged" in said and "going on from step" in said:
        return True
    # Settings of sampling, which measure nothing.
    if last == "generation_config.json":
        return True
    if last in ("special_tokens_map.json", "tokenizer_config.json", "compare.json") or name == "measured/results.json":
        return kind == "nothing" or (kind == "all but a byte" and content.endswith(b"\n"))
    # It is copied as it is, and any text is a template.
    if last == "chat_template.jinja":
        return kind not in _NO_FILE
    # A task without its record is done again, and the new record takes the place of a link.
    if last == "00000.json" and kind in ("nothing", "a link to nothing"):
        return True
    # The line break at its end.
    return kind == "all but a byte" and content.endswith(b"\n")


@pytest.mark.slow
def test_every_file_as_every_kind_of_thing_for_every_command(place, lighthouse):
    whole = place(COMMANDS)
    assert set(whole.readers) == set(FILES)
    tried = [(name, kind, command) for name in FILES for kind in TYPES for command in whole.readers[name]]
    found = [wrong for case in tried if (wrong := problem(whole, lighthouse, *case))]
    assert not found, f"{len(found)} of {len(tried)}:\n" + "\n".join(found)


def test_files_that_commands_read_as_other_things(place, lighthouse):
    """Each file that a quick command reads as three kinds of things, in turn; the slow test tries all of all."""
    some = place([command for command in COMMANDS if command not in HEAVY])
    assert set(some.readers) <= set(FILES)
    kinds, found = list(TYPES), []
    for number, name in enumerate(sorted(some.readers)):
        for kind in (kinds[(3 * number + i) % len(kinds)] for i in range(3)):
            command = some.readers[name][number % len(some.readers[name])]
            found.append(problem(some, lighthouse, name, kind, command, named=True))
    assert len(found) > 60 and not any(found), "\n".join(filter(None, found))
