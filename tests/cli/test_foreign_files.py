"""Files of a run, of a sweep and of prepared tokens that somebody else wrote: each is refused by name, or left out."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bad_input import DATA, ROW, check_refused
from tiny_recipe import RECIPE

from lighthouse_core.config import load_recipe
from lighthouse_core.config.sweep import load_sweep
from lighthouse_core.data.build import build_source, open_tokens
from lighthouse_core.data.checks import checked_tokenizer
from lighthouse_core.errors import LighthouseError
from lighthouse_core.listing import summarize
from lighthouse_core.reading import parse_json, parse_toml, read_json, read_regular
from lighthouse_core.runs import Run
from lighthouse_core.sweep import collect
from lighthouse_core.sweep.state import report
from lighthouse_core.train.progress import Tail, can_be_shown, parse_row, read_rows

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


@pytest.mark.parametrize("name", ["recipe.toml", "ledger.json", "metrics.jsonl", "environment.json"])
@pytest.mark.parametrize("kind", [*ODD, "a folder", "a pipe", "a device", "a link to itself"])
def test_one_odd_file_of_a_run(lighthouse, trainer, here, monkeypatch, name, kind):
    monkeypatch.setattr("lighthouse_core.evaluate.compare.plot", lambda curves, folder: [])
    (here / "corpus").mkdir()
    (here / "corpus/a.py").write_text("print('hello')")
    make_run(here / "runs/good")
    bad = make_run(here / "runs/bad")
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
    for command in (("compare", "bad"), ("recover", "bad", "--dry-run"), ("pretrain", "--resume", "bad", "--dry-run")):
        answer = lighthouse(*command)
        if answer.code or name in ("recipe.toml", "ledger.json"):
            check_refused(answer, answer.code if answer.code == 1 else 2)
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


@pytest.fixture
def prepared(lighthouse, here) -> Path:
    (here / "a.txt").write_text("some words\n" * 300)
    data = '[data]\nsource = "files"\npaths = ["a.txt"]\nvalidation = 0.0\n'
    (here / "text.toml").write_text(RECIPE + data)
    assert lighthouse("data", "prepare", "text.toml", "out", "--workers", "1").code == 0
    (here / "tokens.toml").write_text(RECIPE + data.replace("files", "tokens").replace("a.txt", "out"))
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
    check_refused(lighthouse("data", "prepare", "text.toml", "out", "--workers", "1"))
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
