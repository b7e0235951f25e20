"""Prepared directories: resumable after a kill, refused when damaged or made for something else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import start

from lighthouse_core.config import loads_recipe
from lighthouse_core.data import check, verified
from lighthouse_core.data.loader import build_loader
from lighthouse_core.data.prepare import prepare
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
validation = 0.1
"""


def recipe(pattern, *settings):
    return loads_recipe(RECIPE + f"paths = [{json.dumps(str(pattern))}]\n", settings)


def tokens(out, *settings):
    return recipe(out, 'data.source="tokens"', *settings)


def write_lines(path, count, size=60):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w") as f:
        f.writelines(json.dumps({"text": f"{i} " + "x" * (i % size)}) + "\n" for i in range(count))


def quietly(progress):
    pass


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_lines(folder / "src/a.jsonl", 300)
    prepare(recipe(folder / "src/*.jsonl"), folder / "out", 1, quietly)
    return folder


@pytest.fixture
def made(made_once, tmp_path):
    """A copy: where the text lies is no part of what was prepared."""
    shutil.copytree(made_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def first_shard(out):
    return sorted(out.glob("train-*.tokens"))[0]


def test_a_finished_directory_holds_shards_and_an_index_only(made):
    assert sorted(path.name for path in made.iterdir()) == [
        "tokens.json",
        "train-00000.tokens",
        "validation-00000.tokens",
    ]
    assert check(tokens(made)) == []


@pytest.mark.parametrize("place", [0, 9, 30, 90, 1000, -1])
def test_a_flipped_bit_anywhere_is_found_before_training(made, place):
    content = bytearray(first_shard(made).read_bytes())
    content[place] ^= 1
    first_shard(made).write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000.tokens") as error:
        check(tokens(made))
    assert "prepare" in error.value.hint


@pytest.mark.parametrize("size", [0, 50, 88, 5000])
def test_a_truncated_shard_is_found_even_without_checksums(made, size):
    os.truncate(first_shard(made), size)
    with pytest.raises(DataError, match=r"damaged|not a token shard"):
        build_loader(tokens(made).data, 64, 1, 0, 1, 0)


def test_a_missing_or_foreign_shard_is_found(made, tmp_path):
    write_lines(tmp_path / "src2/a.jsonl", 299)
    prepare(recipe(tmp_path / "src2/*.jsonl"), tmp_path / "out2", 1, quietly)
    first_shard(tmp_path / "out2").replace(first_shard(made))
    with pytest.raises(DataError, match="does not belong"):
        check(tokens(made))
    first_shard(made).unlink()
    with pytest.raises(DataError, match="cannot read"):
        check(tokens(made))


def test_a_changed_index_is_found(made):
    index = made / "tokens.json"
    index.write_text(index.read_text().replace('"validation": 0.1', '"validation": 0.2'))
    with pytest.raises(DataError, match=r"tokens.json is damaged"):
        check(tokens(made))
    index.unlink()
    with pytest.raises(DataError, match="holds no prepared tokens"):
        check(tokens(made))


def test_settings_that_do_not_fit_are_refused(made, monkeypatch):
    with pytest.raises(DataError, match=r"validation = 0.1, not 0.2") as error:
        check(tokens(made, "data.validation=0.2"))
    assert "0.1" in error.value.hint
    from lighthouse_core.data.tokenizer import BytesTokenizer

    monkeypatch.setattr(BytesTokenizer, "fingerprint", 1)
    with pytest.raises(DataError, match="another tokenizer"):
        check(tokens(made))


def test_a_vocabulary_larger_than_the_model_is_refused(made, monkeypatch):
    from lighthouse_core.data.tokenizer import BytesTokenizer

    monkeypatch.setattr(BytesTokenizer, "vocab_size", 1000)
    with pytest.raises(DataError, match=r"320 .* 1000"):
        check(tokens(made))


def flip(path, place=1000):
    """Damage a file as a disk may, or a copy that keeps times."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/lighthouse/verified.json"


@pytest.fixture
def read(monkeypatch):
    """The files that are compared with their checksums."""
    paths = []
    opened = verified.open_regular
    monkeypatch.setattr(
        verified, "open_regular", lambda path, **options: paths.append(path.name) or opened(path, **options)
    )
    return paths


def test_shards_that_agreed_are_not_read_again_until_they_change(made, cache, read):
    names = ["train-00000.tokens", "validation-00000.tokens"]
    check(tokens(made))
    assert sorted(read) == names and list(cache.parent.iterdir()) == [cache]
    check(tokens(made))
    assert sorted(read) == names
    os.utime(first_shard(made))
    check(tokens(made))
    assert read[2:] == names[:1]
    # Its size and its time are what they were.
    flip(first_shard(made))
    for _ in range(2):
        with pytest.raises(DataError, match=r"train-00000.tokens is damaged"):
            check(tokens(made))


def test_another_file_in_the_place_of_a_shard_that_agreed_is_read(made, cache, read, tmp_path):
    check(tokens(made))
    shard = first_shard(made)
    shutil.copy2(shard, tmp_path / "other")
    flip(tmp_path / "other")
    os.replace(tmp_path / "other", shard)
    with pytest.raises(DataError, match=r"train-00000.tokens is damaged"):
        check(tokens(made))


@pytest.mark.parametrize("content", ["", "[]", '{"a": ', "\0"])
def test_a_damaged_or_unwritable_cache_is_no_error(made, cache, read, content):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    check(tokens(made))
    assert len(json.loads(cache.read_text())) == 2
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_text("no folder")
    check(tokens(made))
    assert len(read) == 4


def test_verification_that_takes_long_says_how_far_it_is(made, cache, monkeypatch):
    monkeypatch.setattr(verified, "_REPORT_SECONDS", 0.01)
    opened = verified.open_regular
    monkeypatch.setattr(verified, "open_regular", lambda *a, **o: time.sleep(0.1) or opened(*a, **o))
    said = []
    check(tokens(made), said.append)
    assert said and said[0].startswith("verifying checksums: 0.0 of 0.0 GiB")


def test_preparing_a_damaged_directory_again_says_what_helps(made, tmp_path):
    flip(first_shard(made))
    again = recipe(tmp_path / "src/*.jsonl")
    with pytest.raises(DataError, match=r"train-00000.tokens is damaged") as error:
        prepare(again, made, 1, quietly)
    os.truncate(first_shard(made), 5000)
    with pytest.raises(DataError, match="5000 bytes") as other:
        prepare(again, made, 1, quietly)
    assert error.value.hint == other.value.hint and error.value.hint.startswith(f"remove {made} and")
    shutil.rmtree(made)
    prepare(again, made, 1, quietly)
    assert check(tokens(made)) == []


def test_prepared_tokens_of_other_content_are_other_data(made, tmp_path):
    state = build_loader(tokens(made).data, 64, 1, 0, 1, 0).state_dict()
    build_loader(tokens(made).data, 64, 1, 0, 1, 0).load_state_dict(state)
    source = tmp_path / "src/a.jsonl"
    source.write_text(source.read_text().replace("xx", "yy"))
    shutil.rmtree(made)
    prepare(recipe(tmp_path / "src/*.jsonl"), made, 1, quietly)
    with pytest.raises(DataError, match="training data changed"):
        build_loader(tokens(made).data, 64, 1, 0, 1, 0).load_state_dict(state)


def test_preparing_again_is_nothing_and_other_data_is_refused(made, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    prepare(recipe(tmp_path / "src/*.jsonl"), made, 1, quietly)
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    write_lines(tmp_path / "src/a.jsonl", 301)
    with pytest.raises(DataError, match="other data"):
        prepare(recipe(tmp_path / "src/*.jsonl"), made, 1, quietly)
    with pytest.raises(DataError, match="not empty"):
        prepare(recipe(tmp_path / "src/*.jsonl"), tmp_path / "src", 1, quietly)
    with pytest.raises(DataError, match="prepared already"):
        prepare(tokens(made), tmp_path / "again", 1, quietly)


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def begun(tmp_path):
    """A directory whose preparation was stopped by a bad line."""
    write_lines(tmp_path / "src/a.jsonl", 10)
    with open(tmp_path / "src/a.jsonl", "a") as f:
        f.write("bad\n")
    with pytest.raises(DataError, match="not valid JSON"):
        prepare(recipe(tmp_path / "src/*.jsonl"), tmp_path / "out", 1, quietly)
    return tmp_path / "out"


# What ends the name of a file that is being written.
RANDOM = "0123456789abcdef"


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("new", ["progress/thesis.txt", f".notes.{RANDOM}"]),
        ("new", ["progress/plan.json", "progress/00000.json", f".train-00000.tokens.{RANDOM}"]),
        ("new", [f"progress/.plan.json.{RANDOM}", "a.txt"]),
        ("begun", ["download.partial"]),
        ("begun", [f".download.{RANDOM}"]),
        ("begun", ["progress/results/a.txt"]),
    ],
)
def test_files_of_others_are_an_error_and_stay(tmp_path, folder, names):
    write_lines(tmp_path / "src/a.jsonl", 10)
    out = begun(tmp_path) if folder == "begun" else tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    before = everything(out)
    with pytest.raises(DataError, match="not empty" if folder == "new" else r"download|results"):
        prepare(recipe(tmp_path / "src/*.jsonl"), out, 1, quietly)
    assert everything(out) == before


def test_a_folder_of_that_name_in_a_finished_directory_stays(made, tmp_path):
    (made / "progress").mkdir()
    (made / "progress/00000.json").write_text("mine")
    prepare(recipe(tmp_path / "src/*.jsonl"), made, 1, quietly)
    assert (made / "progress/00000.json").read_text() == "mine"


def test_what_a_killed_process_left_is_removed(tmp_path):
    out = begun(tmp_path)
    names = ("train-00000.tokens", "tokens.json", "progress/plan.json", "progress/00003.json")
    left = [(out / name).with_name(f".{Path(name).name}.{RANDOM}") for name in names]
    # As an earlier release called them.
    left += [out / f"{name}.4711.partial" for name in names]
    for path in left:
        path.touch()
    with pytest.raises(DataError, match="not valid JSON"):
        prepare(recipe(tmp_path / "src/*.jsonl"), out, 1, quietly)
    assert not [path for path in left if path.exists()]


def test_a_bad_line_stops_it_with_file_and_line_and_it_begins_anew_with_the_line_mended(tmp_path):
    write_lines(tmp_path / "src/a.jsonl", 10)
    with open(tmp_path / "src/a.jsonl", "a") as f:
        f.write("bad\n")
    with pytest.raises(DataError, match=r"a\.jsonl:11: not valid JSON"):
        prepare(recipe(tmp_path / "src/*.jsonl"), tmp_path / "out", 2, quietly)
    with pytest.raises(DataError, match="is not finished"):
        check(tokens(tmp_path / "out"))
    write_lines(tmp_path / "src/a.jsonl", 10)
    prepare(recipe(tmp_path / "src/*.jsonl"), tmp_path / "out", 2, quietly)
    check(tokens(tmp_path / "out"))


SCRIPT = """
import json, sys, time
from pathlib import Path
from lighthouse_core.config import load_recipe
from lighthouse_core.data.prepare import prepare

if __name__ == "__main__":
    def progress(done):
        print(done.done, flush=True)
        time.sleep(0.2)
    prepare(load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), progress)
"""


def alive(pid):
    """Commands of the processes of the group `pid`, zombies apart."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            words = (stat.parent / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            found.append(words)
    return found


def assert_all_end(group, seconds=60):
    """Processes that watch for the end of their parent, such as multiprocessing's tracker, outlive it a little."""
    deadline = time.monotonic() + seconds
    while alive(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(group) == []


def test_a_kill_loses_no_finished_piece_and_leaves_no_process(tmp_path):
    write_lines(tmp_path / "src/a.jsonl", 60_000, size=250)
    made = recipe(tmp_path / "src/*.jsonl")
    prepare(made, tmp_path / "whole", 2, quietly)
    from lighthouse_core.config import dump_recipe

    (tmp_path / "recipe.toml").write_text(dump_recipe(made))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "recipe.toml", "out"]
    with start([*command, "2"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        while float(process.stdout.readline()) < 0.2:
            pass
        process.kill()
    assert_all_end(process.pid)
    done = list((tmp_path / "out/progress").glob("0*.json"))
    times = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "out").glob("*.tokens")
        if path.stem[-5:] in {d.stem for d in done}
    }
    assert done and times and not (tmp_path / "out/tokens.json").exists()
    prepare(made, tmp_path / "out", 1, quietly)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    assert check(tokens(tmp_path / "out")) == []


def test_an_interrupt_ends_it_soon_and_its_repetition_finishes(tmp_path):
    write_lines(tmp_path / "src/a.jsonl", 60_000, size=250)
    from lighthouse_core.config import dump_recipe

    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe(tmp_path / "src/*.jsonl")))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "recipe.toml", "out", "2"]
    with start(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        while float(process.stdout.readline()) < 0.1:
            pass
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    assert_all_end(process.pid)
    prepare(recipe(tmp_path / "src/*.jsonl"), tmp_path / "out", 2, quietly)
    assert check(tokens(tmp_path / "out")) == []


def test_a_piece_that_takes_long_counts_on(tmp_path, foreign_spm):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.md").write_text("the cat sat on the mat, " * 800_000)
    changes = ["data.validation=0", "model.vocab_size=400", f'data.tokenizer="{foreign_spm("plain")}"']
    seen = []
    made = prepare(recipe(tmp_path / "src/*.md", *changes), tmp_path / "out", 1, seen.append)
    assert [one for one in seen if one.done == 0 < one.tokens < made.tokens["train"]]
    assert seen[-1][:3] == (1, made.tokens["train"], 1)
