"""lighthouse data prepare and inspect."""

import gzip
import itertools
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from children import LIGHTHOUSE, start, wait_until

from lighthouse_cli import _train
from lighthouse_core.config import load_recipe, loads_recipe
from lighthouse_core.data import check
from lighthouse_core.data.loader import build_loader
from lighthouse_core.data.survey import survey
from lighthouse_core.errors import DataError
from lighthouse_core.estimate import DENSE, flops_per_token, mean_keys

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


def test_prepare_then_inspect_agree_with_the_live_source(lighthouse, place):
    done = shell("prepare", "r.toml", "out", "--workers", "2", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out\n" and "100.0%" in done.stderr
    live = json.loads(lighthouse("data", "inspect", "r.toml", "--json").out)
    ready = json.loads(lighthouse("data", "inspect", "r.toml", "--json", "--verify", *as_tokens("out")).out)
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


# A signal at the moment at which the pool of workers has no thread yet.
SIGNAL_AT_BEGINNING = """
import os, threading

start = threading.Thread.start

def interrupted(thread):
    if type(thread).__module__ == "concurrent.futures.process":
        os.kill(os.getpid(), int(os.environ["SENT"]))
    start(thread)

threading.Thread.start = interrupted
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_workers_begin_is_an_interruption(place, tmp_path, number):
    (tmp_path / "sitecustomize.py").write_text(SIGNAL_AT_BEGINNING)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = ["data", "prepare", place / "r.toml", "out", "--workers", "2"]
    command += ["--set", f'data.paths=["{place}/src/*.jsonl"]']
    environment["SENT"] = str(int(number))
    process = start([*LIGHTHOUSE, *command], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    _, said = process.communicate()
    assert process.returncode == 128 + number and "same command" in said and "Traceback" not in said


@pytest.mark.parametrize("room", [0, 4096])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(lighthouse, place, room):
    (place / "full").mkdir(exist_ok=True)
    (place / "full/a.txt").write_text("some words\n" * 10_000)
    arguments = [
        "prepare",
        "r.toml",
        f"full{room}",
        "--workers",
        "1",
        "--set",
        'data.paths=["full/*.txt"]',
        "--set",
        "data.validation=0",
    ]
    done = shell(*arguments, cwd=place, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    *_, error, hint = done.stderr.splitlines()
    assert error.startswith(f"error: cannot write full{room}") and "the same command" in hint
    assert not list((place / f"full{room}").rglob(".*"))
    assert lighthouse("data", *arguments).code == 0


def test_inspect_shows_a_table_and_samples(place):
    done = shell("inspect", "r.toml", "--samples", "1", cwd=place)
    assert done.returncode == 0 and "in long documents" in done.stdout and "--- document 1\nключ" in done.stdout


def test_inspect_and_a_dry_run_tell_what_keeping_documents_apart_costs(lighthouse, here, monkeypatch):
    apart = ["--set", 'data.packing="documents"']
    pooled = ["--set", "lighthouse.enabled=true", "--set", "lighthouse.window=8", "--set", "lighthouse.topk=2"]
    pooled += ["--set", "lighthouse.tile_parents=2", "--set", "training.seq_len=128"]
    lines = (here / "src/a.jsonl").read_text().splitlines()
    lengths = [len(json.loads(line)["text"].encode()) + 2 for line in lines]
    total = sum(-(-length // 16) * 16 for length in lengths)
    padding, ignored = 1 - sum(lengths) / total, (total - sum(lengths) + len(lengths)) / total
    settings = [*apart, *pooled, "--set", "data.validation=0.0", "--set", "metrics.validation_every=0"]
    found = json.loads(lighthouse("data", "inspect", "r.toml", "--json", *settings).out)[0]
    assert (found["align"], found["longer"]) == (16, sum(length > 128 for length in lengths))
    assert found["mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert (found["padding"], found["ignored_labels"]) == pytest.approx((padding, ignored))
    assert f"{padding:.2%}" in lighthouse("data", "inspect", "r.toml", *settings).out
    done = lighthouse("pretrain", "r.toml", "--dry-run", "--nproc", "1", *settings)
    assert done.code == 0, done.err
    assert f"# padding               {padding:.2%} of the tokens, each document to a multiple of 16" in done.out
    assert f"{ignored:.2%} of the labels are ignored" in done.out and f"longest {max(lengths)};" in done.out
    assert loads_recipe(done.out).data.packing == "documents"
    recipe = loads_recipe(done.out)
    pieces = survey(recipe, "train", seconds=60, samples=0)[0].pieces
    keys, flops = mean_keys(recipe, pieces.tolist()), flops_per_token(recipe, "lighthouse", lengths=pieces.tolist())
    assert 0 < max(pieces) <= 128 and keys[DENSE] < 64
    assert f"# keys a query (mean)   {keys[1]:.0f}; dense {keys[DENSE]:.0f}\n" in done.out
    assert done.out.count("FLOPs per token") == 1 and f"# FLOPs per token       {flops / 1e3:.1f}k in stage" in done.out
    # Where nothing could be read in time.
    with monkeypatch.context() as patch:
        patch.setattr(_train, "_LOOK", 0.0)
        done = lighthouse("pretrain", "r.toml", "--dry-run", "--nproc", "1", *settings)
    assert "# documents             0 in the first 0 seconds of reading\n" in done.out
    assert "lengths are not known: one document a sequence is counted" in done.out and "; dense 64\n" in done.out
    for command in (("data", "inspect"), ("pretrain", "--dry-run", "--nproc", "1")):
        done = lighthouse(*command, "r.toml", "--set", 'data.packing="concat"')
        assert done.code == 0 and "padding" not in done.out


def test_what_only_reads_the_data_asks_for_no_attention_that_fits_its_packing(lighthouse, here):
    packed = [*("--set", 'data.packing="documents"', "--set", "lighthouse.enabled=true", "--set", "lighthouse.topk=2")]
    packed += [
        "--set",
        'lighthouse.dense_backend="cudnn"',
        "--set",
        "lighthouse.tile_parents=2",
        "--set",
        "training.seq_len=128",
    ]
    out = str(here / "read")
    assert lighthouse("data", "inspect", "r.toml", *packed).code == 0
    assert lighthouse("data", "prepare", "r.toml", out, "--workers", "1", *packed).code == 0
    # By now it is about the text alone.
    assert "vocabulary" in lighthouse("tokenizer", "train", "r.toml", f"{out}.model", "--vocab", "9", *packed).err
    for more in ((), ("--dry-run",)):
        assert (
            'data.packing "documents", the default, is not for'
            in lighthouse("pretrain", "r.toml", *packed, *more).error
        )


def test_a_dry_run_says_what_is_known_of_files(lighthouse, here, monkeypatch):
    (here / "known").mkdir()
    rows = b"".join(json.dumps({"text": "x" * 98}).encode() + b"\n" for _ in range(64))
    (here / "known/a.jsonl").write_bytes(rows)
    (here / "known/a.jsonl.gz").write_bytes(packed := gzip.compress(rows))
    settings = ["--set", "data.validation=0", "--set", "metrics.validation_every=0", "--set", "training.steps=50"]

    def known(name):
        paths = ["--set", f'data.paths=["known/{name}"]']
        done = lighthouse("pretrain", "r.toml", "--dry-run", "--nproc", "1", *paths, *settings)
        # Without a pyramid documents are not padded.
        assert done.code == 0 and "padding" not in done.out and "multiple of 1 " not in done.out
        assert "multiple of" not in lighthouse("data", "inspect", "r.toml", *paths, *settings).out
        return done.out

    tokens = "6,400 tokens, 0.50 epochs in the run\n"
    assert f"# data                  {len(rows):,} bytes, {tokens}" in known("a.jsonl")
    assert f"# data                  {len(packed):,} compressed bytes, {tokens}" in known("a.jsonl.gz")
    monkeypatch.setattr(_train, "_LOOK", 0.0)
    assert f"{len(packed):,} compressed bytes; tokens and epochs are not known beforehand\n" in known("a.jsonl.gz")


def test_a_dry_run_tells_the_padding_of_a_mixture_by_its_shares(lighthouse, here):
    lengths = {}
    for name, sizes in (("short", [3, 20]), ("long", [100, 150, 14])):
        (here / f"apart/{name}").mkdir(parents=True)
        texts = [name[0] * size for size in sizes]
        (here / f"apart/{name}/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        lengths[name] = [size + 2 for size in sizes]
    text = (
        (here / "r.toml").read_text().replace('source = "files"\npaths = ["src/*.jsonl"]\n', 'packing = "documents"\n')
    )
    text = text.replace("validation = 0.25", "validation = 0.0\n[metrics]\nvalidation_every = 0")
    text = text.replace("seq_len = 64", "seq_len = 128")
    text = text.replace("enabled = false", "enabled = true\nwindow = 8\ntopk = 2\ntile_parents = 2")
    for name, weight in (("short", 3), ("long", 1)):
        text += f'[[data.sources]]\nsource = "files"\npaths = ["apart/{name}/*"]\nweight = {weight}\n'
    (here / "apart/r.toml").write_text(text)
    done = lighthouse("pretrain", "apart/r.toml", "--dry-run", "--nproc", "1")
    assert done.code == 0, done.err
    padding = ignored = 0
    for name, share in (("short", 0.75), ("long", 0.25)):
        own, whole = lengths[name], sum(-(-length // 16) * 16 for length in lengths[name])
        assert f"# documents of {name}" in done.out and f"longest {max(own)};" in done.out
        assert f"; padding {1 - sum(own) / whole:.2%}\n" in done.out
        padding += share * (1 - sum(own) / whole)
        ignored += share * (whole - sum(own) + len(own)) / whole
    assert f"{padding:.2%} of the tokens, each document to a multiple of 16; {ignored:.2%} of the labels" in done.out
    assert "# source short          75.00% of the sequences" in done.out
    assert loads_recipe(done.out).data.names == ("short", "long")
    inspected = lighthouse("data", "inspect", "apart/r.toml", "--samples", "0").out
    assert all(
        f"{1 - sum(own) / sum(-(-length // 16) * 16 for length in own):.2%}" in inspected for own in lengths.values()
    )


def test_inspect_shows_each_source_of_a_mixture(lighthouse, here):
    assert lighthouse("data", "prepare", "r.toml", "first").code == 0
    (here / "second").mkdir()
    (here / "second/a.jsonl").write_text((json.dumps({"text": "second"}) + "\n") * 50)
    text = (here / "r.toml").read_text().replace('source = "files"\npaths = ["src/*.jsonl"]\n', "")
    first = '[[data.sources]]\nsource = "tokens"\npaths = ["first"]\nweight = 3\n'
    second = '[[data.sources]]\nsource = "files"\npaths = ["second/*"]\nweight = 1\nname = "b"\n'
    (here / "mixture.toml").write_text(text + first + second)
    found = json.loads(lighthouse("data", "inspect", "mixture.toml", "--verify", "--json").out)
    assert [(one["source"], one["split"], one["share"]) for one in found] == [
        ("first", "train", 0.75), ("b", "train", 0.25), ("first", "validation", 0.75), ("b", "validation", 0.25),
    ]  # fmt: skip
    for one, share in zip(found[:2], (0.75, 0.25), strict=True):
        assert one["epochs"] == pytest.approx(share * 64 / one["tokens"]) and one["bytes"] > 0
    shown = lighthouse("data", "inspect", "mixture.toml", "--samples", "1").out
    assert "75.00%" in shown and "--- source b: document 1\nsecond\n" in shown
    done = lighthouse("data", "prepare", "mixture.toml", "third")
    assert done.code == 2 and 'source = "tokens"' in done.err and not (here / "third").exists()


def test_what_a_document_holds_does_nothing_to_the_terminal(lighthouse, place):
    (place / "odd").mkdir()
    odd = "a\tb\nc\rd\x1b]0;title\x07\x7f\x9b2J\x00"
    (place / "odd/a.jsonl").write_text(json.dumps({"text": odd}))
    wanted = ["data", "inspect", "r.toml", "--set", 'data.paths=["odd/*"]', "--set", "data.validation=0.0"]
    shown = lighthouse(*wanted).out
    assert shown.endswith("--- document 1\na\tb\nc\\rd\\x1b]0;title\\x07\\u007f\\u009b2J\\x00\n")
    as_json = lighthouse(*wanted, "--json").out
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


@pytest.mark.parametrize("workers", ["1", "2"])
def test_rows_without_text_are_counted_where_rows_are(lighthouse, place, tmp_path, caplog, workers):
    rows = ['{"text": "some words"}', '{"text": null}', "null"] * 40_000
    (tmp_path / "a.jsonl").write_text("\n".join(rows[: 60 if workers == "1" else None]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows[:60]).encode()))
    settings = ["--set", f'data.paths=["{tmp_path}/*"]', "--set", "data.validation=0"]
    count = 80 if workers == "1" else 80_040
    done = lighthouse("data", "prepare", "r.toml", str(tmp_path / "out"), "--workers", workers, *settings)
    assert done.code == 0 and f"passed over, as their text is null or empty: {count:,} rows" in done.err
    if workers == "1":
        shown = lighthouse("data", "inspect", "r.toml", *settings)
        assert "train: passed over, as their text is null or empty: 80 rows" in shown.err
        (found,) = json.loads(lighthouse("data", "inspect", "r.toml", "--json", *settings).out)
        assert found["complete"] and found["documents"] == 40 and found["nulls"] == 80
        overrides = [setting for setting in settings if setting != "--set"]
        data = load_recipe("r.toml", overrides).data
        for rank in range(2):
            list(itertools.islice(build_loader(data, 64, 1, rank, 2, 0, prefetch=0), 5))
        said = [record.message for record in caplog.records if "null or empty" in record.message]
        assert len(said) == 1 and said[0].startswith("rows whose text is null or empty are passed over: ")


def test_a_folder_of_nanogpt_keeps_its_validation_split(lighthouse, place, tmp_path):
    for name, count in (("train", 60), ("val", 7)):
        np.array([1, 2, 3, 257] * count, dtype="<u2").tofile(tmp_path / f"{name}.bin")
    out = str(tmp_path / "out")
    done = lighthouse("data", "import", out, "--from", str(tmp_path), "--tokenizer", "bytes", "--workers", "1")
    assert done.code == 0 and "validation is val.bin, and training all else (--validation SHARE pools them)" in done.err
    assert "train: 60 documents" in done.err and "validation: 7 documents" in done.err
    assert "--set data.validation" not in done.err
    found = json.loads(lighthouse("data", "inspect", str(place / "r.toml"), "--json", *as_tokens(out)).out)
    assert [one["documents"] for one in found] == [60, 7]
    pooled = lighthouse(
        *("data", "import", f"{out}2", "--from", str(tmp_path), "--tokenizer", "bytes", "--validation", "0")
    )
    assert pooled.code == 0 and "train: 67 documents" in pooled.err


def test_token_files_are_imported_and_trained_on(lighthouse, place, tmp_path):
    np.array([1, 2, 3, 257, 4, 5, 257] * 30, dtype="<u2").tofile(tmp_path / "train.bin")
    out = str(tmp_path / "out")
    take = ("data", "import", out, "--from", str(tmp_path / "train.bin"), "--tokenizer", "bytes", "--workers", "1")
    done = lighthouse(*take, "--validation", "0")
    assert done.code == 0 and done.out == f"{out}\n" and "train: 60 documents, 270 tokens" in done.err
    assert "read as nanogpt uint16: 210 tokens" in done.err
    assert """--set 'data.tokenizer="bytes"' --set data.validation=0.0""" in done.err
    (found,) = json.loads(
        lighthouse("data", "inspect", "r.toml", "--json", "--verify", *as_tokens(out), "--set", "data.validation=0").out
    )
    assert found["documents"] == 60 and found["longest"] == 5
    assert "was prepared with data.validation = 0.0" in lighthouse(*take, "--validation", "0.5").error
    np.array([1, 2, 3] * 30, dtype="<u2").tofile(tmp_path / "train.bin")
    other = (*take[:2], f"{out}2", *take[3:], "--validation", "0")
    assert "the whole text is one document" in lighthouse(*other).err
    (tmp_path / "train.bin").write_bytes(b"abc")
    assert "3 bytes are not whole ids" in lighthouse(*other[:2], f"{out}3", *other[3:]).error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"text": "some words"}\n' * 1000)[:-9], "cut.jsonl.gz: cut off within"),
        ("open.json", b'[{"text": "a"}', "open.json: row 1: the array is not closed"),
        ("quote.csv", b'text\n"a', "quote.csv: row 1: not valid CSV"),
    ],
)
def test_damaged_files_are_one_line_and_exit_with_2(lighthouse, place, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    settings = ["--set", f'data.paths=["{tmp_path}/{name}"]', "--set", "data.validation=0"]
    assert message in lighthouse("data", "inspect", "r.toml", *settings).error
    out = str(tmp_path / "out")
    # Progress is said before.
    done = lighthouse("data", "prepare", "r.toml", out, "--workers", "1", *settings)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
