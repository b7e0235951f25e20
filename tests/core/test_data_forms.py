"""Every kind of file gives the documents of the plain .jsonl of the same text, from any place; unsuited files are one
clear line."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighthouse_core.config.data import DataSection
from lighthouse_core.data import compressed, forms, rows
from lighthouse_core.data.compressed import from_byte, to_byte
from lighthouse_core.data.documents import Place
from lighthouse_core.data.files import FilesSource
from lighthouse_core.data.loader import build_loader
from lighthouse_core.errors import DataError


def zstd(content):
    return pa.compress(content, codec="zstd", asbytes=True)


def split(content, parts):
    step = max(1, len(content) // parts)
    return [content[at : at + step] for at in range(0, len(content), step)] or [b""]


def members(content):
    """Several members, one of them empty, filled up with zeros."""
    first, *rest = map(gzip.compress, split(content, 5))
    return first + gzip.compress(b"") + b"".join(rest) + bytes(70)


def frames(content):
    """Several frames, and one that is to be skipped."""
    first, *rest = map(zstd, split(content, 5))
    return first + struct.pack("<II", 0x184D2A53, 7) + b"skipped" + b"".join(rest)


def lines(texts, escape=True):
    return b"".join(json.dumps({"n": 1, "text": text}, ensure_ascii=escape).encode() + b"\n" for text in texts)


def array(texts, indent=None):
    return json.dumps([{"n": [1, {"a": "]}"}], "text": text} for text in texts], indent=indent).encode()


def table(texts, **options):
    file = io.StringIO(newline="")
    writer = csv.writer(file, **options)
    writer.writerows([["n", "text", "more"], *([i, text, "x,\ny"] for i, text in enumerate(texts))])
    return file.getvalue().encode()


def parquet(texts):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), file, row_group_size=3)
    return file.getvalue()


BOM = b"\xef\xbb\xbf"
KINDS = {
    "a.jsonl": lines,
    "raw.jsonl": lambda texts: lines(texts, escape=False),
    "bom.jsonl": lambda texts: BOM + lines(texts),
    "strings.jsonl": lambda texts: b"\n".join(json.dumps(text).encode() for text in texts),
    "a.jsonl.gz": lambda texts: gzip.compress(lines(texts)),
    "members.jsonl.gz": lambda texts: members(lines(texts)),
    "bom.jsonl.gz": lambda texts: members(BOM + lines(texts)),
    "plain.jsonl.gz": lines,
    "packed.jsonl": lambda texts: members(lines(texts)),
    "other.jsonl.gz": lambda texts: zstd(lines(texts)),
    "a.jsonl.zst": lambda texts: zstd(lines(texts)),
    "frames.jsonl.zst": lambda texts: frames(lines(texts)),
    "other.jsonl.zst": lambda texts: members(lines(texts)),
    "lines.json": lines,
    "lines.json.gz": lambda texts: members(lines(texts)),
    "a.json": array,
    "array.jsonl": array,
    "bom.json": lambda texts: BOM + b"\n " + array(texts, indent=2) + b"\n\n",
    "strings.json": lambda texts: json.dumps(texts, ensure_ascii=False).encode(),
    "a.json.gz": lambda texts: gzip.compress(array(texts)),
    "members.json.gz": lambda texts: members(array(texts, indent=1)),
    "frames.json.zst": lambda texts: frames(array(texts)),
    "a.csv": table,
    "bom.csv": lambda texts: BOM + table(texts, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC),
    "quoted.csv": lambda texts: b"\r\n" + table(texts, quoting=csv.QUOTE_ALL),
    "a.csv.gz": lambda texts: gzip.compress(table(texts)),
    "members.csv.gz": lambda texts: members(table(texts)),
    "frames.csv.zst": lambda texts: frames(table(texts)),
    "a.parquet": parquet,
    "parquet.jsonl": parquet,
}
TEXTS = [
    "one",
    'a "quoted", text\nof lines\r\n',
    "",
    "\u2028 \u2029 \x85 \v",
    "\ufeffmark",
    "\\",
    "\U0001f511鍵",
    "[{",
    "x" * 300,
]


def source(folder, name, content):
    (folder / name).write_bytes(content)
    return FilesSource([str(folder / name)], "text")


def contents(found, place=None):
    return [record.content for record in found.records(0, place or Place(), lambda identity: True)]


@pytest.fixture(params=[1 << 20, 16], ids=["one buffer", "many"])
def buffers(request, monkeypatch):
    for module in (rows, forms):
        monkeypatch.setattr(module, "BUFFER", request.param)
    monkeypatch.setattr(compressed, "_CHUNK", request.param)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_documents_from_any_place(tmp_path, buffers, name):
    texts = TEXTS * 3
    whole = source(tmp_path, name, KINDS[name](texts))
    records = list(whole.records(0, Place(), lambda identity: True))
    assert [record.content for record in records] == [text for text in texts if text] and whole.nulls == 3
    for number, record in enumerate(records):
        assert list(whole.records(0, record.start, lambda identity: True)) == records[number:]
        assert contents(whole, record.end) == [record.content for record in records[number + 1 :]]
        assert contents(whole, Place(record.start.row)) == [record.content for record in records[number:]]


@pytest.mark.parametrize("name", KINDS)
def test_training_sees_the_tokens_of_the_plain_lines_and_goes_on_from_any_batch(tmp_path, name):
    def loader(name):
        source(tmp_path, name, KINDS[name](TEXTS * 2))
        data = DataSection(source="files", paths=(str(tmp_path / name),), tokenizer="bytes", validation=0.0)
        return build_loader(data, 40, 1, 0, 1, 0, prefetch=0)

    plain = [inputs["input"].tolist() for inputs, _ in itertools.islice(loader("a.jsonl"), 60)]
    one = loader(name)
    for number, (inputs, _) in enumerate(itertools.islice(one, 60)):
        assert inputs["input"].tolist() == plain[number]
        # What a checkpoint keeps is JSON.
        state = json.loads(json.dumps(one.state_dict()))
        if number < 58:
            other = loader(name)
            other.load_state_dict(state)
            assert next(iter(other))[0]["input"].tolist() == plain[number + 1]


@pytest.mark.parametrize("name", KINDS)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\n\r",\\[]{}\u2028\0\ufeff')))
)
def test_any_text_comes_back(tmp_path_factory, name, texts):
    folder = tmp_path_factory.mktemp("any")
    content = KINDS[name](texts)
    if not content:
        return
    whole = source(folder, name, content)
    assert contents(whole) == [text for text in texts if text]
    assert whole.nulls == texts.count("")


@pytest.mark.parametrize("name", ["a.jsonl", "frames.jsonl.zst", "members.json.gz", "a.csv", "a.parquet"])
def test_a_split_counts_its_own_rows_without_text(tmp_path, name):
    texts = ["a", "", "b", "", "", "c"]
    whole = source(tmp_path, name, KINDS[name](texts))
    odd = [r.content for r in whole.records(0, Place(), lambda identity: int(identity.rpartition(":")[2]) % 2 == 1)]
    assert odd == ["c"] and whole.nulls == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'null\n{"text": null}\n\n{"text": ""}\n{"text": "a"}\n'),
        ("a.json", b'[null, {"text": null}, {"text": ""}, {"text": "a"}]'),
        ("a.csv", b"id,text\n1,\n\n2,\n3,\n4,a\n"),
        ("a.parquet", parquet([None, None, "", "a"])),
    ],
)
def test_rows_without_text_are_passed_over_and_counted(tmp_path, name, content):
    whole = source(tmp_path, name, content)
    assert contents(whole) == ["a"] and whole.nulls == 3


@given(size=st.integers(1, 1 << 50), part=st.integers(0, 1 << 50), inner=st.integers(0, 1 << 40))
def test_a_place_names_part_and_byte_or_leaves_the_rows_to_be_counted(size, part, inner):
    part %= size
    byte = to_byte(part, inner, size)
    assert 0 <= byte < 1 << 63
    assert from_byte(byte, size) == (part, inner) or (byte == 0 and part and inner * size + part >= 1 << 62)


@pytest.mark.parametrize("name", ["members.jsonl.gz", "frames.json.zst", "members.csv.gz"])
def test_places_without_room_for_a_byte_count_rows(tmp_path, monkeypatch, name):
    monkeypatch.setattr(forms, "to_byte", lambda part, inner, size: 0 if part else inner)
    test_every_kind_gives_the_same_documents_from_any_place(tmp_path, None, name)


@pytest.mark.parametrize("name", ["members.jsonl.gz", "frames.jsonl.zst", "members.json.gz", "frames.csv.zst"])
def test_going_on_reads_nothing_before_the_part(tmp_path, monkeypatch, name):
    monkeypatch.setattr(forms, "_HEAD", 64)
    texts = [hashlib.blake2b(b"%d" % i).hexdigest() for i in range(9000)]
    whole = source(tmp_path, name, KINDS[name](texts))
    (record,) = itertools.islice(whole.records(0, Place(), lambda identity: True), 8000, 8001)
    part, _ = from_byte(record.start.byte, whole.sizes[0])
    # The first part tells what the file is, and has the header; those between it and the last one are damaged.
    second = whole.sizes[0] // 4
    assert part > 2 * second
    content = bytearray((tmp_path / name).read_bytes())
    content[second:part] = bytes(part - second)
    (tmp_path / name).write_bytes(content)
    following = next(whole.records(0, record.start, lambda identity: True))
    assert following == record
    with pytest.raises(DataError):
        contents(whole)


def framed(content, descriptor, rest):
    """One frame of zstd with one block that is not compressed, and a header of its own."""
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content
    return zstd(b"a")[:4] + bytes([descriptor]) + rest + block


BOMB = b'{"text": "' + b"a" * 5000 + b'"}\n'


def flipped(content):
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


GOOD = lines(str(i) * 40 for i in range(200))
UNSUITED = {
    "cut.jsonl.gz": (gzip.compress(GOOD)[:-9], "cut off within its gzip data"),
    "checksum.jsonl.gz": (gzip.compress(GOOD)[:-8] + bytes(8), "damaged gzip data: incorrect data check"),
    "flipped.jsonl.gz": (flipped(gzip.compress(GOOD)), "damaged gzip data"),
    "flipped.csv.gz": (flipped(gzip.compress(b"text\n" + GOOD)), "damaged gzip data"),
    "followed.jsonl.gz": (gzip.compress(GOOD) + b"more", "followed by something else .byte"),
    "head.jsonl.gz": (gzip.compress(GOOD)[:5], "cut off within its gzip data"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(GOOD)), "is gzip data within gzip data.*gunzip|gzip data within"),
    "tar.jsonl.gz": (gzip.compress(bytes(257) + b"ustar" + bytes(300)), "tar archive"),
    "bomb.jsonl.gz": (gzip.compress(BOMB), r"bomb\.jsonl\.gz:1: longer than"),
    "bomb.jsonl.zst": (zstd(BOMB), r"bomb\.jsonl\.zst:1: longer than"),
    "bomb.json.gz": (gzip.compress(b"[" + BOMB), r"row 1: longer than .*not closed"),
    "bomb.csv.gz": (gzip.compress(b'text\n"' + b"a\n" * 3000), "row 1: longer than .*quote not closed"),
    "cut.jsonl.zst": (zstd(GOOD)[:-2], "cut off within its zstd data"),
    "block.jsonl.zst": (zstd(GOOD)[:6] + b"\xff" * 90, "damaged zstd data"),
    "followed.jsonl.zst": (zstd(GOOD) + b"more", "followed by something else"),
    "window.jsonl.zst": (
        framed(GOOD, 0, bytes([21 << 3])),
        "zstd data with a window of 2048 MiB, more than the 128 MiB",
    ),
    "above.jsonl.zst": (framed(GOOD, 0, bytes([17 << 3 | 1])), "window of 144 MiB, more than the 128 MiB"),
    "whole.jsonl.zst": (framed(GOOD, 0xA0, struct.pack("<I", 200 << 20)), "window of 200 MiB, more than the 128 MiB"),
    "zip.jsonl": (b"PK\x03\x04" + bytes(60), "is a zip archive"),
    "bz2.jsonl": (b"BZh91AY", "is bzip2 data"),
    "xz.jsonl": (b"\xfd7zXZ\0", "is xz data"),
    "gzip.txt": (gzip.compress(b"a text"), "is gzip data"),
    "gzip.parquet": (gzip.compress(b"PAR1"), "a parquet file is compressed within"),
    "no.parquet": (b"text", "not a parquet file"),
    "wide.json": ("[]".encode("utf-16"), "UTF-16 or UTF-32"),
    "wide.csv": ("text\na".encode("utf-16"), "the header: not UTF-8 text but UTF-16"),
    "object.json": (b'{\n "rows": []\n}', "json:1: not valid JSON: the value goes on after its line"),
    "pretty.json.gz": (
        gzip.compress(b'{ "text":\r\n "a"}\n'),
        "gz:1: not valid JSON: the value goes on after its line",
    ),
    "pretty.jsonl": (b'{"text": "a"}\n\n{"text": "b",\n"n": 1}\n', "jsonl:3: .* the value goes on after its line"),
    "within.json": (b'{"data": [{"text": "a"}]}', 'json:1: no key "text" .* there are: data'),
    "ended.jsonl": (GOOD + b'{"text": ', "jsonl:201: not valid JSON: Expecting value"),
    "open.json": (b'[{"text": "a"}, {"text": "b"}', "row 2: the array is not closed"),
    "comma.json": (b'[{"text": "a"},]', "row 2: not valid JSON: ] and no value"),
    "commas.json": (b'[,{"text": "a"}]', "row 1: not valid JSON: , and no value"),
    "brace.json": (b'[{"text": "a"}}]', "row 1: not valid JSON: } and no value"),
    "missing.json": (b'[{"text": "a"} {"text": "b"}]', "row 1: not valid JSON: Extra data"),
    "number.json": (b'[{"text": "a"}, 5]', "row 2: not a JSON object"),
    "more.json": (b'["a"] ["b"]', "row 2: something follows the array"),
    "deep.json": (b"[" * 100_000, "array is not closed|nested too deeply"),
    "closed.json": (b"[" * 50_000 + b"]" * 50_000, "nested too deeply"),
    "key.json": (b'[{"txt": "a"}]', 'row 1: no key "text".*there are: txt'),
    "half.json": (b'["\\ud800"]', "row 1: .*half a surrogate"),
    "latin.json": (b'["\xff"]', "row 1: not UTF-8"),
    "column.csv": (b"id;text\n1;a\n", 'the column "text" .* is missing; there are: id;text'),
    "twice.csv": (b"text,text\na,b\n", "is there more than once"),
    "blank.csv": (b"\n\n", "is missing"),
    "cells.csv": (b"id,text\n1,a\n2\n", "row 2: 1 cells, and the header has 2"),
    "quote.csv": (b'text\n"a\nb', "row 1: not valid CSV: unexpected end of data"),
    "after.csv": (b'text\n"a"b\n', "row 1: not valid CSV"),
    "latin.csv": (b"text\ngood\n\xff\n", "row 2: not UTF-8 text"),
    "old.csv": (b"text\ra\rb\n", "not valid CSV: a carriage return outside quotes"),
}


@pytest.mark.parametrize("name", UNSUITED)
def test_unsuited_files_are_one_line_that_names_them(tmp_path, monkeypatch, name):
    content, message = UNSUITED[name]
    if "bomb" in name:
        monkeypatch.setattr(rows, "LARGEST", 4096)
    with pytest.raises(DataError, match=message) as error:
        contents(source(tmp_path, name, content))
    assert name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500
    assert error.value.exit_code == 2 and error.value.hint


def test_what_unpacks_to_something_else_is_told_by_its_checksum(tmp_path):
    """Wherever a byte of gzip is another one; in the header it may tell nothing."""
    good, told = gzip.compress(GOOD), 0
    for at in range(12, len(good), 7):
        with pytest.raises(DataError) as error:
            contents(source(tmp_path, "a.jsonl.gz", good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]))
        assert any(words in str(error.value) for words in ("damaged gzip data", "cut off", "followed by"))
        told += "incorrect data check" in str(error.value)
    assert told > 3
    # zstd as pyarrow writes it has no checksum.
    with pytest.raises(DataError, match="not valid JSON") as error:
        contents(source(tmp_path, "a.jsonl.zst", zstd(GOOD + b"{\n")))
    assert "may be damaged" in error.value.hint
    with pytest.raises(DataError, match="not valid JSON") as error:
        contents(source(tmp_path, "a.jsonl.gz", gzip.compress(GOOD + b"{\n")))
    assert "damaged" not in error.value.hint


@pytest.mark.parametrize(
    "name", ["members.jsonl.gz", "frames.jsonl.zst", "members.json.gz", "frames.csv.zst", "a.jsonl"]
)
def test_a_run_goes_on_with_a_file_mended(tmp_path, monkeypatch, name):
    # An array is read so many bytes ahead.
    monkeypatch.setattr(rows, "BUFFER", 16)
    texts = [hashlib.blake2b(b"%d" % i).hexdigest() for i in range(100)]
    whole = KINDS[name](texts)
    at = len(whole) * 3 // 4
    damaged = whole[:at] + (b"\n{\n" + whole[at:] if name == "a.jsonl" else b"")
    (tmp_path / "src").mkdir()
    (tmp_path / "src/b.jsonl").write_bytes(lines(texts[:40]))
    path = tmp_path / "src" / f"a-{name}"
    data = DataSection(source="files", paths=[f"{tmp_path}/src/*"], validation=0.0)

    def loader(**more):
        return build_loader(data, 50, 1, 0, 1, 0, prefetch=0, **more)

    def samples(one, count):
        return [batch[0]["input"].tolist() for batch in itertools.islice(one, count)]

    path.write_bytes(whole)
    expected = samples(loader(), 400)
    path.write_bytes(damaged)
    one, seen, state = loader(), [], {}
    with pytest.raises(DataError) as error:
        for batch in one:
            seen.append(batch[0]["input"].tolist())
            state = one.state_dict()
    unread = dict([error.value.file])
    assert seen == expected[: len(seen)] and 100 < len(seen) < 390
    assert unread == {f"src/a-{name}": len(damaged)}
    path.write_bytes(whole)
    with pytest.raises(DataError, match="changed since the checkpoint"):
        loader().load_state_dict(state)
    again = loader(mended=unread)
    again.load_state_dict(state)
    assert samples(again, 400 - len(seen)) == expected[len(seen) :]
    # Where another file has changed as well.
    (tmp_path / "src/b.jsonl").write_bytes(lines(texts[:41]))
    with pytest.raises(DataError, match="changed since the checkpoint"):
        loader(mended=unread).load_state_dict(state)


@pytest.mark.parametrize("name", ["object.json", "pretty.jsonl", "within.json", "more.json"])
def test_what_is_no_row_is_told_how_json_is_read(tmp_path, name):
    with pytest.raises(DataError) as error:
        contents(source(tmp_path, name, UNSUITED[name][0]))
    assert "one array, or an object a line" in error.value.hint
    assert name != "within.json" or 'if the rows are in "data"' in error.value.hint


def test_the_largest_window_is_read(tmp_path):
    assert len(contents(source(tmp_path, "a.jsonl.zst", framed(GOOD, 0, bytes([17 << 3]))))) == 200


def test_kinds_that_are_not_read_name_what_reads_them(tmp_path):
    """And no hint sends to a source whose own hint sends back."""
    for name in ("a.arrow", "a.tsv", "a.bin", "a.txt.gz"):
        with pytest.raises(DataError, match="is not one of") as error:
            source(tmp_path, name, b"x")
        assert 'data.source = "hf" reads a folder' in error.value.hint and "data import" in error.value.hint
