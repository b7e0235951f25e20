"""lighthouse data prepare and inspect."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
from children import LIGHTHOUSE, start, wait_until

from lighthouse_core.config import load_recipe
from lighthouse_core.data import check
from lighthouse_core.errors import DataError

RECIPE = """
[model]
dim = 64
layers = 2
heads = 2
head_dim = 32
ffn_dim = 64
vocab_size = 320
[lighthouse]
enabled = false
[training]
seq_len = 64
local_batch_size = 1
global_batch_size = 1
steps = 1
[optimizer]
lr = 1e-3
[data]
source = "files"
paths = ["src/*.jsonl"]
validation = 0.25
"""


def shell(*arguments, cwd, **options):
    command = [sys.executable, "-m", "lighthouse_cli", "data", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def here(place, monkeypatch):
    """The fixture `lighthouse` calls the command line in this process, in `place`."""
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "src").mkdir()
    (root / "r.toml").write_text(RECIPE)
    lines = [json.dumps({"text": f"ключ {i} " + "y" * (200 if i % 10 == 0 else 0)}) for i in range(100)]
    (root / "src/a.jsonl").write_text("\n".join(lines))
    return root


def as_tokens(out):
    return ["--set", 'data.source="tokens"', "--set", f'data.paths=["{out}"]']


def test_prepare_then_inspect_agree_with_the_live_source(place):
    done = shell("prepare", "r.toml", "out", "--workers", "2", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out\n" and "100.0%" in done.stderr
    live = json.loads(shell("inspect", "r.toml", "--json", cwd=place).stdout)
    ready = json.loads(shell("inspect", "r.toml", "--json", "--verify", *as_tokens("out"), cwd=place).stdout)
    assert live == ready
    train, validation = live
    assert train["complete"] and train["documents"] + validation["documents"] == 100
    assert train["longest"] > 64 > train["median"] and 0 < train["share_in_long"] < 1
    assert len(train["samples"]) == 3 and all(sample.startswith("ключ") for sample in train["samples"])
    lines = (place / "src/a.jsonl").read_text().splitlines()
    total = sum(len(json.loads(line)["text"].encode()) + 2 for line in lines)
    assert train["tokens"] + validation["tokens"] == total


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_prepare_says_how_to_go_on(place, number):
    (place / "many").mkdir(exist_ok=True)
    (place / "many/a.jsonl").write_text('{"text": "some words"}\n' * 2_000_000)
    command = [*LIGHTHOUSE, "data", "prepare", "r.toml", f"many/out{number}", "--workers", "1"]
    with start(
        [*command, "--set", 'data.paths=["many/*.jsonl"]'], cwd=place, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stderr.readline()
        process.send_signal(number)
        said = process.stderr.read()
    (place / "many/a.jsonl").unlink()
    assert process.returncode == 128 + number and "same command" in said and "Traceback" not in said
    assert not list((place / f"many/out{number}").rglob(".*"))


# What each Python process runs at its start. A worker takes longer than this test lets the command live.
SLOW_WORKERS = """
import sys, time

if "--multiprocessing-fork" in sys.orig_argv:
    open("begun", "w").close()
    time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_prepare_ends_without_waiting_for_workers_that_have_not_begun(place, tmp_path, number):
    (tmp_path / "sitecustomize.py").write_text(SLOW_WORKERS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [*LIGHTHOUSE, "data", "prepare", place / "r.toml", "out", "--workers", "2"]
    command += ["--set", f'data.paths=["{place}/src/*.jsonl"]']
    with start(command, cwd=tmp_path, env=environment, seconds=60, stderr=subprocess.PIPE, text=True) as process:
        wait_until((tmp_path / "begun").exists, process)
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == 128 + number and "same command" in said and "Traceback" not in said


@pytest.mark.parametrize("room", [0, 4096])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(place, room):
    (place / "full").mkdir(exist_ok=True)
    (place / "full/a.txt").write_text("some words\n" * 10_000)
    arguments = ["prepare", "r.toml", f"full{room}", "--set", 'data.paths=["full/*.txt"]', "--set", "data.validation=0"]
    done = shell(*arguments, cwd=place, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    *_, error, hint = done.stderr.splitlines()
    assert error.startswith(f"error: cannot write full{room}") and "the same command" in hint
    assert not list((place / f"full{room}").rglob(".*"))
    assert shell(*arguments, cwd=place).returncode == 0


def test_inspect_shows_a_table_and_samples(place):
    done = shell("inspect", "r.toml", "--samples", "1", cwd=place)
    assert done.returncode == 0 and "in long documents" in done.stdout and "--- document 1\nключ" in done.stdout


def test_what_a_document_holds_does_nothing_to_the_terminal(place):
    (place / "odd").mkdir()
    odd = "a\tb\nc\rd\x1b]0;title\x07\x7f\x9b2J\x00"
    (place / "odd/a.jsonl").write_text(json.dumps({"text": odd}))
    wanted = ["inspect", "r.toml", "--set", 'data.paths=["odd/*"]', "--set", "data.validation=0.0"]
    shown = shell(*wanted, cwd=place).stdout
    assert shown.endswith("--- document 1\na\tb\nc\\rd\\x1b]0;title\\x07\\u007f\\u009b2J\\x00\n")
    as_json = shell(*wanted, "--json", cwd=place).stdout
    assert json.loads(as_json)[0]["samples"] == [odd] and as_json.isascii()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_inspect_escapes_what_the_output_has_no_characters_for(place, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.setenv("PYTHONUTF8", "0")
    done = shell("inspect", "r.toml", "--samples", "1", cwd=place)
    assert done.returncode == 0 and "--- document 1\n\\u043a\\u043b" in done.stdout, done.stderr
    done = shell("inspect", "r.toml", "--samples", "1", "--json", cwd=place)
    assert json.loads(done.stdout)[0]["samples"][0].startswith("ключ")


@pytest.mark.parametrize("source", ["files", "tokens"])
def test_inspect_says_that_a_split_is_empty_and_what_that_means(lighthouse, place, source):
    (place / "one").mkdir(exist_ok=True)
    (place / "one/a.txt").write_text("one document")
    settings = ["--set", "data.validation=1e-9", "--set"]
    files = [*settings, 'data.paths=["one/*.txt"]']
    if source == "tokens":
        assert lighthouse("data", "prepare", "r.toml", "one/out", *files).code == 0
    chosen = files if source == "files" else [*settings[:2], *as_tokens("one/out")]
    done = lighthouse("data", "inspect", "r.toml", "--json", *chosen)
    assert [split["documents"] for split in json.loads(done.out)] == [1, 0]
    what = "data.validation = 1e-09 leaves no documents for validation"
    assert [line for line in done.err.splitlines() if "warning" in line] == [
        f"warning: {what}, so training will not start; hold none out where there are few: --set data.validation=0 "
        "--set metrics.validation_every=0; else name more in data.paths"
    ]
    with pytest.raises(DataError, match=what):  # of what pretrain and recover check
        check(load_recipe("r.toml", chosen[1::2]))
    done = lighthouse("data", "inspect", "r.toml", *chosen)
    assert "validation" in done.out and what in done.err
    done = lighthouse("data", "inspect", "r.toml", *chosen[:1], "data.validation=0.0", *chosen[2:])
    assert "document 1" in done.out and "warning" not in done.err


def test_inspect_ends_in_time_and_says_so(place):
    (place / "large").mkdir()
    (place / "large/a.jsonl").write_text('{"text": "some words"}\n' * 2_000_000)
    done = shell("inspect", "r.toml", "--seconds", "0.5", "--set", 'data.paths=["large/*"]', cwd=place)
    (place / "large/a.jsonl").unlink()
    assert done.returncode == 0 and "more than" in done.stdout and "not all" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "r.toml", "src"], "src is not empty"),
        (["inspect", "r.toml", "--verify"], "--verify is for"),
        (["inspect", "r.toml", "--set", 'data.paths=["no/*.txt"]'], "no files match"),
        (["inspect", "r.toml", "--set", 'data.hf_split="x"'], "data.hf_split is for data.source"),
        (["inspect", "r.toml", "--set", 'data.source="tokens"', "--set", 'data.paths=["a", "b"]'], "one entry"),
        (
            ["prepare", "r.toml", "new", "--set", "model.vocab_size=300", "--set", 'data.tokenizer="no.model"'],
            "no.model",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(lighthouse, arguments, message):
    assert message in lighthouse("data", *arguments).error


def test_preparing_without_a_document_for_validation_says_so(lighthouse, place):
    (place / "single").mkdir()
    (place / "single/a.txt").write_text("one document")
    wanted = ["data", "prepare", "r.toml", "single/out", "--set", 'data.paths=["single/*.txt"]', "--set"]
    done = lighthouse(*wanted, "data.validation=1e-9")
    assert done.code == 0 and "no document fell to validation" in done.err
