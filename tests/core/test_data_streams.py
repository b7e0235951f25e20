"""Every source gives one stream: on any number of ranks, after any interruption, live or prepared."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lighthouse_core.config import loads_recipe
from lighthouse_core.data import files, forms
from lighthouse_core.data import prepare as preparing
from lighthouse_core.data.documents import Place, stable_hash, with_ends
from lighthouse_core.data.files import FilesSource, list_files
from lighthouse_core.data.loader import build_loader
from lighthouse_core.data.prepare import prepare
from lighthouse_core.data.survey import survey
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError

BOS, EOS = 256, 257
SEQ = 50


def text(i):
    """Documents of many lengths, some empty, some longer than a sample."""
    return "" if i % 13 == 5 else f"{i}: " + "ключ 鍵 \U0001f511 abc\n" * (i % 7) + ("x" * 700 if i % 17 == 3 else "")


def write_lines(path, rows):
    path.write_bytes(
        b"".join(json.dumps({"text": row, "n": 1}, ensure_ascii=n % 2 == 0).encode() + b"\n" for n, row in rows)
    )


def write_table(path, rows, group):
    pq.write_table(pa.table({"n": range(len(rows)), "text": [row for _, row in rows]}), path, row_group_size=group)


def numbered(count, begin=0):
    return [(i, text(begin + i)) for i in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    (root / "docs/deep").mkdir(parents=True)
    for i in range(25):
        (root / f"docs/{'deep/' if i % 2 else ''}{i}.{'md' if i % 3 else 'txt'}").write_text(text(i))
    (root / "lines").mkdir()
    for part in range(3):
        write_lines(root / f"lines/{part}.jsonl", numbered(40 + part, 100 * part))
    (root / "tables").mkdir()
    for part in range(2):
        write_table(root / f"tables/{part}.parquet", numbered(45, 100 * part), group=20)
    (root / "py/pkg").mkdir(parents=True)
    for i in range(12):
        (root / f"py/pkg/{i}").mkdir()
        (root / f"py/pkg/{i}/a.py").write_text(text(i) or "#")
    return root


KINDS = ["docs", "lines", "tables", "mixed", "hf", "python-sources"]
PATHS = {
    "docs": ["docs/**/*.txt", "docs/**/*.md"],
    "lines": ["lines/*.jsonl"],
    "tables": ["tables/*.parquet"],
    "mixed": ["lines/*.jsonl", "docs/*.txt", "tables/*.parquet"],
    "hf": ["lines"],
    "python-sources": ["py"],
}


def settings(corpus, kind, **change):
    if kind == "hf":
        pytest.importorskip("datasets")
    return recipe(corpus, kind, **change).data


def recipe(corpus, kind, **change):
    source = kind if kind in ("hf", "python-sources") else "files"
    paths = [str(corpus / path) for path in PATHS[kind]]
    # The stream itself; what shuffles its samples is tested with the loader.
    data = {"source": source, "paths": paths, "shuffle": "documents", "validation": 0.2} | change
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in data.items())
    return loads_recipe(
        "[model]\ndim = 64\nlayers = 2\nheads = 2\nhead_dim = 32\nffn_dim = 64\nvocab_size = 400\n"
        "[lighthouse]\nenabled = false\n"
        f"[training]\nseq_len = {SEQ}\nlocal_batch_size = 1\nglobal_batch_size = 1\nsteps = 1\n"
        f"[optimizer]\nlr = 1e-3\n[data]\n{lines}\n"
    )


def prepared(tmp_path, corpus, kind, **change):
    """Settings that read what was prepared from `kind`."""
    made = recipe(corpus, kind, **change)
    prepare(made, tmp_path / "out", 1, lambda progress: None)
    return made.data.model_copy(update={"source": "tokens", "paths": (str(tmp_path / "out"),)})


def loader(data, local_batch_size=1, rank=0, world_size=1, seed=0, split="train", **options):
    return build_loader(data, SEQ, local_batch_size, rank, world_size, seed, split, **options)


def first_sample(one):
    """Global index of the first row of the batch last taken from a loader."""
    return one.state_dict()["samples"] - (one.world_size - one.rank) * one.local_batch_size


def global_rows(loaders, steps):
    """{sample: (its tokens and the next, their positions)} of `steps` micro-batches of all ranks."""
    samples = {}
    for one in loaders:
        for inputs, labels in itertools.islice(one, steps):
            assert inputs["input"].dtype == labels.dtype == torch.int64 and inputs["positions"].dtype == torch.int32
            ids = torch.cat([inputs["input"], labels[:, -1:]], dim=1).tolist()
            assert labels.tolist() == [row[1:] for row in ids]
            rows = zip(ids, inputs["positions"].tolist(), strict=True)
            samples |= dict(enumerate(rows, first_sample(one)))
    return samples


def slow_units(corpus, kind):
    """{unit: [(identity, text)]}, written with no code of the package but its hash."""
    units = {}
    for i in range(25):
        name = f"docs/{'deep/' if i % 2 else ''}{i}.{'md' if i % 3 else 'txt'}"
        if kind == "docs" or (kind == "mixed" and name.endswith("txt") and "deep" not in name):
            units[name] = [(name, text(i))]
    if kind in ("lines", "mixed"):
        units |= {
            f"lines/{part}.jsonl": [(f"lines/{part}.jsonl:{i}", text(100 * part + i)) for i in range(40 + part)]
            for part in range(3)
        }
    if kind in ("tables", "mixed"):
        units |= {
            f"tables/{part}.parquet": [(f"tables/{part}.parquet:{i}", text(100 * part + i)) for i in range(45)]
            for part in range(2)
        }
    if kind == "hf":
        units = {
            f"lines/train/{part}": [(f"lines/train/{part}:{i}", text(100 * part + i)) for i in range(40 + part)]
            for part in range(3)
        }
    if kind == "python-sources":
        units = {f"py/pkg/{i}": [(f"py/pkg/{i}", text(i) or "#")] for i in range(12)}
    return units


def slow_samples(corpus, kind, count, seed=0, split="train", validation=0.2):
    units, tokens, places = slow_units(corpus, kind), [], []
    for epoch in itertools.count():
        for unit in sorted(units, key=lambda unit: stable_hash("order", seed, epoch, unit)):
            for identity, content in units[unit]:
                out = stable_hash("heldout", identity) < validation * 2**63
                if content and out == (split == "validation"):
                    document = [BOS, *content.encode(), EOS]
                    tokens += document
                    places += range(len(document))
        if len(tokens) > count * SEQ:
            cut = [slice(i * SEQ, (i + 1) * SEQ) for i in range(count)]
            return {i: (tokens[c.start : c.stop + 1], places[c]) for i, c in enumerate(cut)}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_stream_equals_a_slow_construction_over_epochs(corpus, kind, split):
    seed = 3 if split == "train" else 0
    expected = slow_samples(corpus, kind, 400, seed, split)
    one = loader(settings(corpus, kind), seed=3, split=split)
    assert global_rows([one], 400) == expected
    assert one.state_dict()["epoch"] >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_equals_live(corpus, kind, tmp_path):
    live = settings(corpus, kind)
    ready = prepared(tmp_path, corpus, kind)
    for split, seed in (("train", 0), ("train", 7), ("validation", 0)):
        expected = global_rows([loader(live, seed=seed, split=split)], 300)
        assert global_rows([loader(ready, seed=seed, split=split)], 300) == expected


@pytest.mark.parametrize("kind", [*KINDS, "tokens"])
def test_ranks_batch_sizes_and_interruptions_leave_the_stream_alone(corpus, kind, tmp_path):
    data = prepared(tmp_path, corpus, "mixed") if kind == "tokens" else settings(corpus, kind)
    expected = slow_samples(corpus, "mixed" if kind == "tokens" else kind, 160)
    for world_size, local_batch_size in [(2, 1), (3, 2)]:
        ranks = [loader(data, local_batch_size, rank, world_size) for rank in range(world_size)]
        done = 20 * world_size * local_batch_size
        assert global_rows(ranks, 20) == {i: expected[i] for i in range(done)}
        states = [one.state_dict() for one in ranks]
        assert all(state == states[0] for state in states)
    one = loader(data)
    batches = iter(one)
    for done in range(0, 120, 7):
        state = one.state_dict()
        assert all(type(value) is int and 0 <= value < 2**63 for value in state.values())
        for world_size in (1, 2, 3):
            ranks = [loader(data, 1, rank, world_size) for rank in range(world_size)]
            for rank in ranks:
                rank.load_state_dict(state)
            assert global_rows(ranks, 2) == {i: expected[i] for i in range(done, done + 2 * world_size)}
        for _ in range(7):
            next(batches)


def test_several_processes_that_all_tokenize_are_warned_of_once(corpus, tmp_path, caplog):
    for split in ("train", "validation"):
        for rank in range(2):
            loader(settings(corpus, "lines"), rank=rank, world_size=2, split=split)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "data prepare" in caplog.text
    caplog.clear()
    loader(settings(corpus, "lines"))
    loader(settings(corpus, "python-sources"), world_size=2)
    loader(prepared(tmp_path, corpus, "lines"), world_size=2)
    assert not caplog.records


def test_the_state_names_its_integers(corpus, tmp_path):
    common = {"samples", "seq_len", "seed", "fingerprint", "epoch", "offset"}
    assert loader(settings(corpus, "lines")).state_dict().keys() == common | {"file", "row", "byte"}
    assert loader(prepared(tmp_path, corpus, "lines")).state_dict().keys() == common | {"document"}


def test_seeking_reads_on_from_the_place(corpus, monkeypatch):
    one = loader(settings(corpus, "lines"), prefetch=0)
    list(itertools.islice(one, 60))
    state = one.state_dict()
    assert state["byte"] > 1000
    asked = []
    original = FilesSource.records
    monkeypatch.setattr(
        FilesSource, "records", lambda self, unit, place, keep: asked.append(place) or original(self, unit, place, keep)
    )
    other = loader(settings(corpus, "lines"), prefetch=0)
    other.load_state_dict(state)
    assert not asked
    next(iter(other))
    assert asked[0] == Place(state["row"], state["byte"])


def test_another_order_split_or_key_is_another_stream(corpus, tmp_path):
    state = loader(settings(corpus, "lines")).state_dict()
    for change in ({"validation": 0.3}, {"paths": [str(corpus / "lines/0.jsonl")]}):
        with pytest.raises(DataError, match="data changed"):
            loader(settings(corpus, "lines", **change)).load_state_dict(state)
    with pytest.raises(DataError, match="seed = 0, not 1"):
        loader(settings(corpus, "lines"), seed=1).load_state_dict(state)


@pytest.mark.parametrize("kind", ["docs", "lines", "tables"])
def test_a_split_without_documents_is_an_error_and_no_endless_search(corpus, kind):
    with pytest.raises(DataError, match="for train"):
        next(iter(loader(settings(corpus, kind, validation=0.9999999))))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_hint_for_a_split_without_documents_is_true(tmp_path, split):
    (tmp_path / "a.txt").write_text("words")
    change = {"paths": [str(tmp_path / "*.txt")]}
    data = settings(tmp_path, "docs", validation=0.9999999 if split == "train" else 1e-9, **change)
    with pytest.raises(DataError, match=f"no documents for {split}") as error:
        next(iter(loader(data, split=split)))
    assert "--set data.validation=0 " in error.value.hint
    if split == "validation":
        ready = prepared(tmp_path, tmp_path, "docs", validation=1e-9, **change)
        with pytest.raises(DataError, match="for validation"):
            loader(ready, split=split)
        assert next(iter(loader(ready.model_copy(update={"validation": 0.0}))))
    assert next(iter(loader(data.model_copy(update={"validation": 0.0}))))


def test_documents_that_are_all_empty_are_said_to_be(tmp_path):
    write_lines(tmp_path / "a.jsonl", [(0, ""), (1, "")])
    change = {"paths": [str(tmp_path / "*.jsonl")], "validation": 0}
    with pytest.raises(DataError, match="every document is empty"):
        next(iter(loader(settings(tmp_path, "lines", **change))))
    with pytest.raises(DataError, match="every document is empty"):
        prepared(tmp_path, tmp_path, "lines", **change)


def test_local_data_sets_need_no_network(corpus, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert global_rows([loader(settings(corpus, "hf"))], 5) == slow_samples(corpus, "hf", 5)


def test_data_sets_of_save_to_disk_are_read(corpus, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [text(i) for i in range(40)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(tmp_path / "a"))
    datasets.DatasetDict({"dev": datasets.Dataset.from_dict({"text": rows})}).save_to_disk(str(tmp_path / "b"))
    data = settings(corpus, "hf", paths=[str(tmp_path / "a")], validation=0)
    other = settings(corpus, "hf", paths=[str(tmp_path / "b")], validation=0, hf_split="dev")
    expected = list(itertools.chain.from_iterable([BOS, *row.encode(), EOS] for row in rows if row))
    for one in (data, other):
        assert next(iter(loader(one)))[0]["input"][0].tolist() == expected[:SEQ]


def test_hf_mistakes_are_the_users(corpus, tmp_path):
    for change, message in [
        ({"text_key": "content"}, 'no column "content".*n, text'),
        ({"hf_split": "nowhere"}, "cannot load the data set"),
        ({"paths": [str(tmp_path)]}, "cannot load the data set"),
        ({"hf_revision": "main"}, "not for a directory"),
    ]:
        with pytest.raises(DataError, match=message):
            loader(settings(corpus, "hf", **change))


def lines_source(tmp_path, content, **options):
    (tmp_path / "bad").mkdir(exist_ok=True)
    (tmp_path / "bad/a.jsonl").write_bytes(content)
    return FilesSource([str(tmp_path / "bad/*.jsonl")], options.get("text_key", "text"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a', "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"txt": "a", "n": 1}', 'no key "text".*there are: n, txt'),
        (b'{"text": 1}', '"text" is not a string but int'),
        (b'{"text": "\xff"}', "not UTF-8 text .byte 10"),
        (b'{"text": "\\ud800"}', "half a surrogate"),
        (b"[" * 100_000, "nested too deeply|not valid JSON"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, line, message):
    source = lines_source(tmp_path, b'{"text": "good"}\n\n' + line + b'\n{"text": "after"}\n')
    records = source.records(0, Place(), lambda identity: True)
    assert next(records).content == "good"
    with pytest.raises(DataError, match=rf"bad/a\.jsonl:3: .*({message})"):
        next(records)


def test_a_last_line_needs_no_end_but_must_be_whole(tmp_path):
    assert [r.content for r in lines_source(tmp_path, b'{"text": "a"}\n{"text": "b"}').records(0, Place(), bool)] == [
        "a",
        "b",
    ]
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        list(lines_source(tmp_path, b'{"text": "a"}\n{"text": "b').records(0, Place(), bool))


def test_bad_text_and_tables_name_their_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(DataError, match=r"a\.txt:3: not UTF-8 text"):
        list(FilesSource([str(tmp_path / "a.txt")], "text").records(0, Place(), bool))
    for name, table, message in [
        ("type", {"text": [1]}, "has the type int64"),
        ("missing", {"other": ["a"]}, "is missing; there are: other"),
        ("twice", pa.Table.from_arrays([["a"], ["b"]], ["text", "text"]), "is there more than once"),
    ]:
        pq.write_table(pa.table(table) if isinstance(table, dict) else table, tmp_path / f"{name}.parquet")
        with pytest.raises(DataError, match=rf"{name}\.parquet: .*{message}"):
            list(FilesSource([str(tmp_path / f"{name}.parquet")], "text").records(0, Place(), bool))
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a parquet file"):
        list(FilesSource([str(tmp_path / "no.parquet")], "text").records(0, Place(), bool))


@pytest.mark.parametrize("kind", ["string_view", "large_string", "dictionary"])
def test_every_kind_of_text_column_is_read(tmp_path, kind):
    column = pa.array(["a", "ключ" * 9])
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif not hasattr(pa, kind):
        pytest.skip(f"this pyarrow has no {kind}")
    else:
        column = column.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert pq.read_schema(tmp_path / "a.parquet").field("text").type == column.type
    found = FilesSource([str(tmp_path / "a.parquet")], "text").records(0, Place(), bool)
    assert [record.content for record in found] == ["a", "ключ" * 9]


def test_lines_may_begin_with_a_byte_order_mark(tmp_path):
    source = lines_source(tmp_path, b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    records = list(source.records(0, Place(), bool))
    assert [record.content for record in records] == ["a", "b"] and records[1].start == Place(1, 17)
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        list(lines_source(tmp_path, b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n').records(0, Place(), bool))


@pytest.mark.parametrize(
    ("error", "hint"), [(PermissionError(13, "shut"), False), (FileNotFoundError(2, "gone"), True)]
)
def test_a_hint_of_changed_files_is_for_those_that_are_gone(tmp_path, monkeypatch, error, hint):
    source = lines_source(tmp_path, b'{"text": "a"}\n')

    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(forms, "open", refuse, raising=False)
    with pytest.raises(DataError, match="cannot read") as found:
        next(source.records(0, Place(), bool))
    assert bool(found.value.hint) == hint


def test_a_bad_line_ends_training_and_not_only_its_thread(tmp_path, corpus):
    lines_source(tmp_path, b'{"text": "good"}\nbad\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        list(
            itertools.islice(loader(settings(corpus, "lines", paths=[str(tmp_path / "bad/*.jsonl")], validation=0)), 9)
        )


def test_a_process_may_end_while_a_batch_is_made(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some words of text"}\n' * 30_000)
    # Three processes, which import torch once.
    script = (
        "import os, sys; from lighthouse_core.config.data import DataSection\n"
        "from lighthouse_core.data.loader import build_loader\n"
        "for _ in range(3):\n"
        "    if not os.fork(): break\n"
        "    if code := os.waitstatus_to_exitcode(os.wait()[1]): sys.exit(f'ended with {code}')\n"
        "else: sys.exit()\n"
        f"data = DataSection(source='files', paths=['{tmp_path}/*'], validation=0)\n"
        "loaders = [build_loader(data, 100_000, 1, 0, 1, seed) for seed in range(4)]\n"
        "for one in loaders: one.batches = iter(one); next(one.batches)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_tokenizer_that_takes_text_alone_gets_text():
    def encode(content):
        if isinstance(content, bytes):
            raise DataError("not UTF-8")
        return np.array([ord(char) for char in content])

    strict = SimpleNamespace(encode=encode, bos_id=1, eos_id=2)
    assert with_ends(strict, b"a\xffb").tolist() == [1, 97, 0xFFFD, 98, 2]


def test_listing_mistakes_have_hints(tmp_path):
    (tmp_path / "a.tsv").write_text("x")
    (tmp_path / "b.txt").write_text("x")
    for paths, message in [
        (["nowhere/*.txt"], "no files match"),
        ([""], "no files match"),
        (["*"], "is not one of .txt"),
        (["*.txt", "b.*"], "twice"),
    ]:
        with pytest.raises(DataError, match=message) as error:
            list_files([str(tmp_path / path) for path in paths])
        assert error.value.hint


@pytest.mark.parametrize("pattern", ["**/*.txt", "*/*.txt", "*/deep/*.txt", "**"])
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, pattern):
    for folder in ("a/deep", "shut/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.txt").write_text("x")
        (tmp_path / folder / "../x.txt").write_text("y")
    assert list_files([str(tmp_path / pattern)])
    # Permissions do not hold root back.
    monkeypatch.setattr(os, "access", lambda path, mode: "shut" not in path)
    with pytest.raises(DataError, match=r"cannot list .*/shut/"):
        list_files([str(tmp_path / pattern)])
    assert list_files([str(tmp_path / "a" / "*.txt")])


def test_a_link_to_nothing_is_an_error_where_it_matches(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.md").symlink_to(tmp_path / "nowhere")
    assert len(list_files([str(tmp_path / "*.txt")])) == 1
    with pytest.raises(DataError, match=r"b\.md is a link to nothing"):
        list_files([str(tmp_path / "*")])


def test_identities_tell_roots_apart_and_no_machine(tmp_path):
    for root in ("x/src", "y/src"):
        (tmp_path / root / "d").mkdir(parents=True)
        (tmp_path / root / "d/a.txt").write_text("x")
        (tmp_path / root / "b.md").write_text("x")
    globs = ["x/src/**/*.txt", "y/src/**/*.txt", "x/src/*.md"]
    found = [file.identity for file in list_files([str(tmp_path / one) for one in globs])]
    assert found == ["src/b.md", "src/d/a.txt", "src:2/d/a.txt"]


def test_a_file_that_changes_is_an_error(corpus, tmp_path):
    source = lines_source(tmp_path, b'{"text": "a"}\n')
    (tmp_path / "bad/a.jsonl").write_bytes(b'{"text": "ab"}\n')
    with pytest.raises(DataError, match="changed from 14 to 15 bytes"):
        next(source.records(0, Place(), bool))


def test_cuts_cover_every_record_once(corpus):
    for kind in ("lines", "tables"):
        data = settings(corpus, kind)
        source = FilesSource(data.paths, "text")
        for unit, size in enumerate(source.sizes):
            cuts = source.cuts(unit, 300)
            assert len(cuts) > 1 and cuts[0][0] == Place() and sum(size for _, size in cuts) == size
            whole = list(source.records(unit, Place(), bool))
            ends = [*(place.row for place, _ in cuts[1:]), 10**9]
            pieces = [
                record
                for (place, _), end in zip(cuts, ends, strict=True)
                for record in source.records(unit, place, bool)
                if record.start.row < end
            ]
            assert pieces == whole


def test_a_single_row_group_is_cut_by_rows(tmp_path):
    write_table(tmp_path / "a.parquet", numbered(1000), group=1000)
    source = FilesSource([str(tmp_path / "*.parquet")], "text")
    cuts = source.cuts(0, source.sizes[0] // 20)
    assert [place.row for place, _ in cuts] == [0, 125, 250, 375, 500, 625, 750, 875]
    assert sum(size for _, size in cuts) == source.sizes[0]
    whole = list(source.records(0, Place(), bool))
    for place, _ in cuts:
        assert list(source.records(0, place, bool)) == [record for record in whole if record.start.row >= place.row]


def test_pieces_over_several_shards_give_the_same_stream(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "_SMALLEST", 500)
    ready = prepared(tmp_path, corpus, "mixed")
    assert len(list((tmp_path / "out").glob("train-*.tokens"))) > 20
    assert global_rows([loader(ready)], 300) == global_rows([loader(settings(corpus, "mixed"))], 300)


def slow_parts(content, size):
    """Cut after the last line that ends within `size` bytes, else before the last character."""
    while len(content) > size:
        cut = content[:size].rfind(b"\n") + 1
        if not cut:
            # The characters that begin within `size` bytes, but the last.
            cut = max(at for at in range(size) if content[at] < 0x80 or content[at] >= 0xC0)
        yield content[:cut]
        content = content[cut:]
    yield content


LONG = {
    "a.txt": "one line\n" + "a second, longer line of words\n" * 9,
    "b.md": "ключ鍵\U0001f511" * 60 + "\n" + "x" * 200,
    "c.txt": "short\n",
    "d.txt": "\n" * 90 + "y" * 64,
}


@pytest.mark.parametrize("size", [31, 32, 33, 34, 64])
def test_long_text_comes_in_parts_from_any_place(tmp_path, monkeypatch, foreign_spm, size):
    monkeypatch.setattr(files, "_PART", size)
    (tmp_path / "long").mkdir()
    for name, content in LONG.items():
        (tmp_path / "long" / name).write_text(content)
    tokenizer = build_tokenizer(str(foreign_spm("prefix", add_dummy_prefix=True)))
    data = settings(tmp_path, "docs", paths=[str(tmp_path / "long/*")], validation=0)
    data = data.model_copy(update={"tokenizer": str(foreign_spm("prefix"))})
    tokens, places = [], []
    for epoch in range(3):
        for name in sorted(LONG, key=lambda name: stable_hash("order", 0, epoch, f"long/{name}")):
            parts = list(slow_parts(LONG[name].encode(), size))
            assert len(parts) > 2 or name == "c.txt"
            document = [tokenizer.bos_id, *(i for part in parts for i in tokenizer.encode(part)), tokenizer.eos_id]
            tokens += document
            places += range(len(document))
    count = (len(tokens) - 1) // SEQ
    expected = {i: (tokens[i * SEQ :][: SEQ + 1], places[i * SEQ :][:SEQ]) for i in range(count)}
    assert global_rows([loader(data)], count) == expected
    one = loader(data)
    batches = iter(one)
    for done in range(count - 1):
        ranks = [loader(data, 1, rank, 2) for rank in range(2)]
        for rank in ranks:
            rank.load_state_dict(one.state_dict())
        assert global_rows(ranks, 1) == {i: expected[i] for i in (done, done + 1)}
        next(batches)


def test_a_survey_counts_a_document_in_parts_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PART", 64)
    for name, content in LONG.items():
        (tmp_path / name).write_text(content)
    [found] = survey(
        recipe(tmp_path, "docs", paths=[str(tmp_path / "*.*")], validation=0), "train", seconds=60, samples=4
    )
    assert sorted(found.lengths) == sorted(len(content.encode()) + 2 for content in LONG.values())
    assert all(sample and any(content.startswith(sample) for content in LONG.values()) for sample in found.samples)
    assert len({sample[:5] for sample in found.samples}) == 4


def test_bad_bytes_in_a_later_part_name_their_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PART", 16)
    for number, content in enumerate((b"line\n" * 20 + b"\xff\n", b"line\n" * 20 + b"x" * 50 + b"\xff" * 50)):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{number}\.txt:21: not UTF-8 text .byte {content.index(255)} of"):
            list(FilesSource([str(path)], "text").records(0, Place(), bool))


def test_a_document_that_became_shorter_is_an_error_on_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PART", 64)
    (tmp_path / "a.txt").write_text("ж" * 200)
    data = settings(tmp_path, "docs", paths=[str(tmp_path / "*.txt")], validation=0)
    state = loader(data).state_dict() | {"offset": 403}
    one = loader(data)
    one.load_state_dict(state)
    with pytest.raises(DataError, match="its place is not in the data"):
        next(iter(one))


def test_prepared_equals_live_where_text_comes_in_parts(tmp_path, foreign_spm):
    (tmp_path / "docs").mkdir()
    line = "the cat sat on the mat with  the other cats "
    # More than a part of lines, and more than one of a single line.
    (tmp_path / "docs/a.txt").write_text((line + "\n") * 98_000 + line * 98_000)
    (tmp_path / "docs/b.txt").write_text("def f(x): return x + 1\n" * 300)
    change = {"tokenizer": str(foreign_spm("prefix")), "validation": 0, "paths": [str(tmp_path / "docs/*.txt")]}
    live = loader(recipe(tmp_path, "docs", **change).data, 64)
    ready = loader(prepared(tmp_path, tmp_path, "docs", **change), 64)
    steps = 0
    for (inputs, labels), (others, other_labels) in zip(live, ready, strict=False):
        assert torch.equal(labels, other_labels)
        assert all(torch.equal(inputs[key], others[key]) for key in inputs)
        steps += 1
        if live.state_dict()["epoch"] == 1:
            break
    assert steps > 500


def test_ids_above_16_bits_take_32(corpus, tmp_path, monkeypatch):
    tokenizer = build_tokenizer("bytes")
    wide = SimpleNamespace(
        vocab_size=70_000,
        bos_id=69_000,
        eos_id=69_001,
        fingerprint=5,
        encode=lambda text: tokenizer.encode(text) + 66_000,
    )
    from lighthouse_core.data.shards import PreparedTokens, ShardWriter, write_index

    writer = ShardWriter(tmp_path / "train-0.tokens", wide)
    tokens = np.array([69_000, 66_001, 69_001], dtype=np.int32)
    writer.add(tokens)
    shard = list(writer.publish())
    empty = {"shards": [], "units": []}
    splits = {"train": {"shards": [shard], "units": [["a", [[0, 1, 3]]]]}, "validation": empty}
    write_index(tmp_path, {"fingerprint": 1, "tokenizer": 5, "vocab_size": 70_000, "validation": 0.0, "splits": splits})
    found = PreparedTokens(tmp_path, wide)
    found.verify()
    ids, places = found.units("train")[0].open()(0, 9)
    assert ids.tolist() == tokens.tolist() and places.tolist() == [0, 1, 2]
    assert Path(tmp_path / shard[0]).stat().st_size == 88 + 16 + 8
