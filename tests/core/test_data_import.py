"""Token files of other programs, written here as their formats are published, become shards with the same documents."""

import itertools
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighthouse_core.config.data import DataSection
from lighthouse_core.data import imported
from lighthouse_core.data.build import open_tokens
from lighthouse_core.data.documents import Place, held_out
from lighthouse_core.data.imported import TokenFiles
from lighthouse_core.data.loader import build_loader
from lighthouse_core.data.prepare import import_tokens
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError

BOS, EOS = 256, 257
BYTES = build_tokenizer("bytes")


def megatron(path, documents, dtype="<u2", code=8, sequences=1):
    """`sequences` a document; with EOS at the end, as --append-eod has it."""
    parts = [part for document in documents for part in np.array_split(np.array([*document, EOS]), sequences)]
    path.with_suffix(".bin").write_bytes(b"".join(part.astype(dtype).tobytes() for part in parts))
    sizes = np.array([len(part) for part in parts], dtype="<i4")
    begins = np.cumsum([0, *sizes[:-1]]).astype("<i8") * np.dtype(dtype).itemsize
    listed = np.arange(len(documents) + 1, dtype="<i8") * sequences
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(listed))
    path.with_suffix(".idx").write_bytes(head + sizes.tobytes() + begins.tobytes() + listed.tobytes())


def ended(documents, dtype):
    return np.array([i for document in documents for i in (*document, EOS)], dtype=dtype)


def llmc(path, documents, magic=20240520, dtype="<u2", before=()):
    ids = np.array([i for document in documents for i in (*before, *document)], dtype=dtype)
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())


def saved(path, documents):
    with path.open("wb") as file:
        np.save(file, ended(documents, "<i4"))


WRITERS = {
    "megatron.bin": megatron,
    "megatron.idx": lambda path, documents: megatron(path, documents, "<i4", 4, sequences=3),
    "raw.npy": lambda path, documents: path.write_bytes(ended(documents, "<u2").tobytes()),
    "wide.npy": lambda path, documents: path.write_bytes(ended(documents, "<u4").tobytes()),
    "saved.npy": saved,
    "nanogpt.bin": lambda path, documents: path.write_bytes(ended(documents, "<u2").tobytes()),
    "wide.bin": lambda path, documents: path.write_bytes(ended(documents, "<u4").tobytes()),
    "widest.bin": lambda path, documents: path.write_bytes(ended(documents, "<i8").tobytes()),
    "llmc.bin": lambda path, documents: llmc(path, documents, before=(BOS,)),
    "llama.bin": lambda path, documents: llmc(path, documents, 20240801, "<u4", before=(BOS,)),
}
DOCUMENTS = [list(b"one"), list(b"two, which is longer"), [], list(b"x"), list(range(1, 250)), list(b"the last")] * 4
WHOLE = [document for document in DOCUMENTS if document]


def take(path, out, tokenizer="bytes", **options):
    options = {"format": None, "validation": 0.0, "workers": 1, "progress": lambda progress: None} | options
    return import_tokens(str(path), out, tokenizer, **options)


def documents_of(out, split="train", validation=0.0):
    data = DataSection(source="tokens", paths=(str(out),), tokenizer="bytes", validation=validation)
    prepared = open_tokens(data, BYTES)
    prepared.verify()
    found = []
    for unit in prepared.units(split):
        read, at = unit.open(), 0
        for length in map(int, unit.document_lengths()):
            found.append(read(at, length)[0].tolist())
            at += length
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_documents_become_shards_with_bos_and_eos(tmp_path, name):
    WRITERS[name](tmp_path / name, DOCUMENTS)
    made = take(tmp_path / name, tmp_path / "out")
    assert documents_of(tmp_path / "out") == [[BOS, *document, EOS] for document in WHOLE]
    assert made.documents == {"train": len(WHOLE), "validation": 0}
    # A second call finds it done, and training reads it.
    assert take(tmp_path / name, tmp_path / "out") == made
    data = DataSection(source="tokens", paths=(str(tmp_path / "out"),), tokenizer="bytes", validation=0.0)
    inputs, _ = next(iter(build_loader(data, 16, 1, 0, 1, 0, prefetch=0)))
    assert inputs["input"].shape == (1, 16)


@pytest.mark.parametrize("name", WRITERS)
@given(documents=st.lists(st.lists(st.integers(0, 255), max_size=40), min_size=1), part=st.integers(4, 50))
def test_parts_and_cuts_change_no_document(tmp_path_factory, name, documents, part):
    folder = tmp_path_factory.mktemp("any")
    if not any(documents):
        return
    # The width of an id is told by upper halves that are 0.
    documents = [[i or 1 for i in document] for document in documents]
    WRITERS[name](folder / name, documents)
    source = TokenFiles(str(folder / name), BYTES)
    before, imported._PART = imported._PART, part
    try:
        whole = list(source.records(0, Place(), lambda identity: True))
        cuts = source.cuts(0, 64)
        pieces = []
        for (place, _), end in zip(cuts, [*(place.row for place, _ in cuts[1:]), None], strict=True):
            pieces += source.records(0, place, lambda identity: True, end)
    finally:
        imported._PART = before
    assert pieces == whole and sum(size for _, size in cuts) == source.sizes[0] and cuts[0][0] == Place()
    found = []
    for record in whole:
        ids = np.frombuffer(record.content, dtype=np.int32).tolist()
        found = [*found, ids] if record.first else [*found[:-1], found[-1] + ids]
    assert found == [document for document in documents if document]
    assert whole[-1].last and all(a.last == b.first for a, b in itertools.pairwise(whole))


def test_a_token_that_is_bos_and_eos_parts_documents(tmp_path, monkeypatch):
    both = type("Both", (), {"bos_id": 5, "eos_id": 5, "vocab_size": 10})
    np.array([5, 1, 2, 5, 5, 3, 5, 4], dtype="<u2").tofile(tmp_path / "a.bin")
    found = TokenFiles(str(tmp_path / "a.bin"), both).records(0, Place(), lambda identity: True)
    assert [np.frombuffer(record.content, np.int32).tolist() for record in found] == [[1, 2], [3], [4]]


def test_a_folder_is_taken_whole_and_split_by_identity(tmp_path):
    (tmp_path / "set/deep").mkdir(parents=True)
    megatron(tmp_path / "set/a.bin", [[i] * 3 for i in range(1, 100)])
    WRITERS["raw.npy"](tmp_path / "set/deep/b.npy", [[i] * 5 for i in range(1, 100)])
    (tmp_path / "set/meta.pkl").write_bytes(b"nothing")
    take(tmp_path / "set", tmp_path / "out", validation=0.2, workers=2)
    kept = documents_of(tmp_path / "out", "validation", 0.2)
    wanted = [
        [BOS, *[i] * count, EOS]
        for name, count in (("set/a.idx", 3), ("set/deep/b.npy", 5))
        for i in range(1, 100)
        if held_out(f"{name}:{i - 1}", 0.2)
    ]
    assert kept == wanted and 10 < len(kept) < 80
    assert len(documents_of(tmp_path / "out", "train", 0.2)) == 198 - len(kept)


def damaged_index(change):
    def write(path):
        megatron(path.with_suffix(".bin"), WHOLE)
        content = bytearray(path.with_suffix(".idx").read_bytes())
        change(content)
        path.with_suffix(".idx").write_bytes(content)

    return write


def put(at, value):
    def change(content):
        content[at : at + len(value)] = value

    return change


def cut_ids(path):
    megatron(path, WHOLE)
    path.with_suffix(".bin").write_bytes(path.with_suffix(".bin").read_bytes()[:-4])


DAMAGED = {
    "ids.bin": (lambda path: np.array([1, 2, 300], "<u2").tofile(path), "token 2 is the id 300.*258 ids"),
    "negative.idx": (lambda path: megatron(path, [[1], [-2]], "<i4", 4), "token 2 is the id -2"),
    "other.bin": (
        lambda path: np.array([5, 70, 128_000, 9] * 20, "<u4").tofile(path),
        "token 2 is the id 128000.*258 ids",
    ),
    "cutoff.bin": (lambda path: path.write_bytes(ended(WHOLE, "<u4").tobytes()[:-2]), "not whole ids of 4 bytes"),
    "zeros.bin": (lambda path: path.write_bytes(bytes(64)), "zeros wherever .* how many bytes an id has"),
    "zeros.npy": (lambda path: path.write_bytes(bytes(64)), "zeros wherever .* how many bytes an id has"),
    "odd.bin": (lambda path: path.write_bytes(b"abc"), "3 bytes are not whole ids of 2 bytes"),
    "none.bin": (lambda path: path.write_bytes(b""), "holds no ids"),
    "version.bin": (
        lambda path: path.write_bytes(struct.pack("<3i", 20240520, 7, 0) + bytes(1012)),
        "version 7 of llm.c",
    ),
    "count.bin": (
        lambda path: path.write_bytes(struct.pack("<3i", 20240520, 1, 9) + bytes(1014)),
        "are not 9 ids of 2 bytes",
    ),
    "short.bin": (lambda path: path.write_bytes(struct.pack("<3i", 20240520, 1, 9)), "does not begin as llm.c"),
    "float.npy": (lambda path: np.save(path, np.ones(3)), "an array of float64"),
    "square.npy": (lambda path: np.save(path, np.ones((3, 3), "<u2")), r"uint16 \[3, 3\], not a row"),
    "header.npy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x05\x00{oh}\n"), "damaged header of NumPy"),
    "object.npy": (lambda path: np.save(path, np.array([{}]), allow_pickle=True), "an array of object"),
    "cut.npy": (lambda path: (saved(path, WHOLE), path.write_bytes(path.read_bytes()[:-4])), "bytes are not"),
    "magic.idx": (damaged_index(put(0, b"X")), "is no index of Megatron"),
    "version.idx": (damaged_index(put(9, b"\x02")), "version 2 and type 8"),
    "type.idx": (damaged_index(put(17, b"\x06")), "version 1 and type 6"),
    "counts.idx": (damaged_index(put(18, b"\xff\xff\xff\xff\xff\xff\xff\x7f")), "bytes are not .* sequences"),
    "sizes.idx": (damaged_index(put(34, b"\xff\xff\xff\xff")), "sequences that are not in"),
    "cut.idx": (cut_ids, "sequences that are not in .*cut.bin"),
    "order.idx": (damaged_index(lambda content: put(len(content) - 8, bytes(8))(content)), "do not follow one another"),
    "alone.idx": (damaged_index(lambda content: None), "cannot read .*alone.bin"),
    "a.text": (lambda path: path.write_bytes(b"abcd"), "does not end as token files do"),
    "missing.bin": (lambda path: None, "cannot read .*missing.bin"),
    "empty": (lambda path: path.mkdir(), "has no token files"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_token_files_are_one_line_that_names_them(tmp_path, name):
    write, message = DAMAGED[name]
    write(tmp_path / name)
    if name == "alone.idx":
        (tmp_path / "alone.bin").unlink()
    with pytest.raises(DataError, match=message) as error:
        take(tmp_path / name, tmp_path / "out")
    assert name.partition(".")[0] in str(error.value) and "\n" not in str(error.value)
    assert error.value.exit_code == 2 and error.value.hint
    assert not (tmp_path / "out/tokens.json").exists()


def by_names(root, *names):
    """One document a file, of its number in `names`."""
    for number, name in enumerate(names, 1):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.array([number, EOS], dtype="<u2").tofile(root / name)


@pytest.mark.parametrize(
    ("names", "validation"),
    [
        (["train.bin", "val.bin"], [2]),
        (["tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"], [2]),
        (["fineweb_train_000001.bin", "fineweb_val_000000.bin", "fineweb_train_000002.bin"], [2]),
        (["train/0.npy", "valid/0.npy", "valid/train_set_2.npy"], [2]),
        (["more.bin", "val.bin"], [2]),
    ],
)
def test_files_that_are_split_by_their_names_stay_so(tmp_path, names, validation):
    said = []
    by_names(tmp_path / "ids", *names)
    prepared = take(tmp_path / "ids", tmp_path / "out", validation=None, say=said.append)
    assert prepared.documents == {"train": len(names) - len(validation), "validation": len(validation)}
    assert "validation is " in said[0] and "--validation" in said[0]
    # Whatever share a recipe names.
    for share in (0.0, 0.05, 0.3):
        assert documents_of(tmp_path / "out", "validation", share) == [[BOS, one, EOS] for one in validation]
    # The same call leaves it, and others do not take it for theirs.
    take(tmp_path / "ids", tmp_path / "out", validation=None)
    for share in (0.0, 0.05):
        with pytest.raises(DataError, match="was prepared from other data"):
            take(tmp_path / "ids", tmp_path / "out", validation=share)


def test_a_share_that_is_asked_for_pools_files_of_any_name(tmp_path):
    by_names(tmp_path / "ids", "train.bin", "val.bin")
    assert take(tmp_path / "ids", tmp_path / "out", validation=0.0).documents == {"train": 2, "validation": 0}


@pytest.mark.parametrize("names", [["train.bin", "more.bin"], ["val.bin"], ["train_val.bin", "train.bin"]])
def test_names_that_tell_no_split_are_split_by_chance(tmp_path, names):
    by_names(tmp_path / "val", *names)
    source = TokenFiles(str(tmp_path / "val"), BYTES)
    assert not source.split_by_names and len(source.files) == len(names)


def test_a_test_split_is_left_out_and_said(tmp_path):
    by_names(tmp_path / "ids", "train.bin", "val.bin", "test.bin")
    source = TokenFiles(str(tmp_path / "ids"), BYTES)
    assert [(file.identity, file.split) for file in source.files] == [
        ("ids/train.bin", "train"),
        ("ids/val.bin", "validation"),
    ]
    assert "left out, as the names say test: test.bin" in str(source)


def test_a_failed_import_does_not_stand_in_the_way_of_the_corrected_one(tmp_path):
    np.array([1, 2, 3] * 30, dtype="<u2").tofile(tmp_path / "train.bin")
    share = next(share for share in (0.5, 0.9, 0.99) if held_out(f"{tmp_path.name}/train.bin:0", share))
    with pytest.raises(DataError, match="leaves no documents for train") as error:
        take(tmp_path / "train.bin", tmp_path / "out", validation=share)
    assert "--validation 0" in error.value.hint and "data." not in error.value.hint
    assert take(tmp_path / "train.bin", tmp_path / "out").documents["train"] == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokens.json", "train-00000.tokens"]


def test_what_was_interrupted_is_not_begun_anew_with_other_settings(tmp_path):
    np.array([1, 2, 3, EOS] * 30, dtype="<u2").tofile(tmp_path / "train.bin")

    def interrupt(progress):
        if progress.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(tmp_path / "train.bin", tmp_path / "out", progress=interrupt)
    with pytest.raises(DataError, match="begun with other data or settings"):
        take(tmp_path / "train.bin", tmp_path / "out", validation=0.5)
    assert take(tmp_path / "train.bin", tmp_path / "out").documents["train"] == 30


def test_a_directory_that_is_there_is_no_matter_of_a_recipe(tmp_path, spm):
    np.array([1, 2, 3, 100] * 30, dtype="<u2").tofile(tmp_path / "train.bin")
    take(tmp_path / "train.bin", tmp_path / "out")
    for options in ({"tokenizer": str(spm)}, {"validation": 0.5}):
        with pytest.raises(DataError, match="was prepared with") as error:
            take(tmp_path / "train.bin", tmp_path / "out", **options)
        assert error.value.hint == "choose another OUT, or remove it"


def test_a_kind_that_is_named_is_not_guessed(tmp_path):
    np.array([20240520 & 0xFFFF, 20240520 >> 16, 1, 2], "<u2").tofile(tmp_path / "a.bin")
    wide = type("Wide", (), {"bos_id": None, "eos_id": 0, "vocab_size": 65536})
    with pytest.raises(DataError, match=r"llm\.c"):
        TokenFiles(str(tmp_path / "a.bin"), wide)
    assert TokenFiles(str(tmp_path / "a.bin"), wide, "nanogpt").files[0].count == 4
    with pytest.raises(DataError, match=r"llm\.c"):
        TokenFiles(str(tmp_path / "a.bin"), wide, "llmc")


LARGE = type("Large", (), {"bos_id": None, "eos_id": 128_001, "vocab_size": 128_256})
SMALL = type("Small", (), {"bos_id": None, "eos_id": 0, "vocab_size": 50_257})


@pytest.mark.parametrize("name", ["a.bin", "a.npy"])
@pytest.mark.parametrize(
    ("tokenizer", "dtype", "ids"),
    [
        (LARGE, "uint32", [128_000, 791, 4062, 128_001] * 3),
        (LARGE, "uint32", [791, 4062]),
        (LARGE, "uint64", [128_000, 791, 4062, 128_001]),
        (SMALL, "uint32", [791, 50_256, 4062]),
        (SMALL, "uint16", [791, 50_256, 4062]),
        # Its beginning fits both widths, and its end one.
        (SMALL, "uint32", [*[0] * 400_000, 791, 4062]),
        (SMALL, "uint16", [*[791, 0] * 400_000, 791, 50_256]),
    ],
)
def test_the_width_is_told_by_the_vocabulary_and_the_whole_file(tmp_path, name, tokenizer, dtype, ids):
    np.array(ids, dtype).tofile(tmp_path / name)
    source = TokenFiles(str(tmp_path / name), tokenizer)
    assert (source.files[0].dtype, source.files[0].count) == (np.dtype(dtype).str, len(ids))
    kind = "nanogpt" if name == "a.bin" else "olmo"
    assert str(source) == f"read as {kind} {dtype}: {len(ids):,} tokens"


def test_ids_too_wide_for_their_file_are_refused(tmp_path):
    """Of two bytes, with a vocabulary that needs more."""
    np.array([791, 4062, 50_000, 7], "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match="token 0 is the id 266208023"):
        list(TokenFiles(str(tmp_path / "a.bin"), LARGE).records(0, Place(), lambda identity: True))


def test_what_was_read_is_said(tmp_path):
    (tmp_path / "set").mkdir()
    for number in range(2):
        WRITERS["nanogpt.bin"](tmp_path / f"set/{number}.bin", WHOLE)
    WRITERS["wide.npy"](tmp_path / "set/a.npy", WHOLE)
    said = []
    take(tmp_path / "set", tmp_path / "out", say=said.append)
    count = 3 * len(ended(WHOLE, "<u2"))
    assert said == [f"read as nanogpt uint16 (2 files), olmo uint32: {count:,} tokens"]


def test_the_index_counts_rows_without_text(tmp_path):
    WRITERS["raw.npy"](tmp_path / "a.npy", WHOLE)
    assert take(tmp_path / "a.npy", tmp_path / "out").nulls == 0
    assert json.loads((tmp_path / "out/tokens.json").read_text())["nulls"] == 0
