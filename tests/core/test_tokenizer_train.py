"""Training a tokenizer: the text it sees, the pieces it learns, the errors."""

import json
import signal
from pathlib import Path

import pytest

from lighthouse_core.config.data import DataSection
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.data.tokenizers import train
from lighthouse_core.data.tokenizers.train import _BLOCK, _blocks, texts_of, train_tokenizer
from lighthouse_core.errors import DataError, UserError


@pytest.fixture
def lines(tmp_path):
    """A `[data]` section of two .jsonl files, one ten times as large as the other."""
    for name, count in (("large", 2000), ("small", 200)):
        rows = (json.dumps({"text": f"{name} text number {i} of the file\n"}) for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return DataSection(source="files", paths=(f"{tmp_path}/*.jsonl",), validation=0.1)


def test_the_same_text_gives_the_same_file(sources, spm, tmp_path):
    report = train_tokenizer(sources, tmp_path / "again.model", 1500, 400_000)
    assert (tmp_path / "again.model").read_bytes() == spm.read_bytes()
    assert report.vocab_size == build_tokenizer(str(spm)).vocab_size == 1500
    assert report.held_out and report.measured_bytes > 10_000 and 400_000 <= report.training_bytes < 410_000
    assert 2 < report.bytes_per_token < 6
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]


def test_bytes_per_token_is_what_it_says(sources, spm, tmp_path):
    report = train_tokenizer(sources, tmp_path / "again.model", 1500, 400_000)
    tokenizer = build_tokenizer(str(spm))
    texts = list(texts_of(sources, "validation", 1_000_000))
    size = sum(len(text.encode()) for text in texts)
    assert report.measured_bytes == size
    assert report.bytes_per_token == pytest.approx(size / sum(len(tokenizer.encode(text)) for text in texts))


def test_pieces(spm):
    pieces = [piece.text for piece in build_tokenizer(str(spm)).model.pieces]
    assert pieces[:3] == ["<unk>", "<s>", "</s>"] and pieces[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    learnt = pieces[259:]
    assert {"\n", "\t", "\r\n", "\u2581" * 4, "\u2581return"} <= set(learnt)
    assert not any(0x10FFF0 <= ord(char) <= 0x10FFFF for piece in learnt for char in piece)
    for piece in learnt:
        # A space begins a piece, or the piece is all spaces.
        assert "\u2581" not in piece.lstrip("\u2581") and (len(piece) == 1 or not any(map(str.isdigit, piece)))


def test_without_held_out_text_it_measures_on_training_text(sources, tmp_path):
    report = train_tokenizer(sources.model_copy(update={"validation": 0.0}), tmp_path / "a.model", 1000, 200_000)
    assert not report.held_out and report.measured_bytes > 0


def test_every_file_gives_its_share(lines):
    texts = list(texts_of(lines, "train", 20_000))
    size = sum(len(text) for text in texts)
    assert 20_000 <= size < 20_100
    small = sum(len(text) for text in texts if text.startswith("small"))
    assert 0.06 * size < small < 0.14 * size
    assert texts == list(texts_of(lines, "train", 20_000))


def test_all_text_of_a_split_is_used_if_the_limit_allows(lines):
    train, validation = (set(texts_of(lines, split, 10**9)) for split in ("train", "validation"))
    assert len(train | validation) == 2200 and not train & validation and 100 < len(validation) < 350


def test_a_long_document_is_cut(tmp_path):
    (tmp_path / "long.txt").write_text("é" * 5000)
    (tmp_path / "short.txt").write_text("café")
    data = DataSection(source="files", paths=(f"{tmp_path}/*.txt",), validation=0.0)
    assert sorted(texts_of(data, "train", 10**6), key=len) == ["café", "é" * 5000]
    assert sum(len(text.encode()) for text in texts_of(data, "train", 3001)) <= 3001


@pytest.mark.parametrize(
    "text", ["", "a b " * 3000, "x" * 9999, " " * 9999, "word " + " " * 5000 + "tail", "ab\n" * 3000]
)
def test_blocks_are_the_text_in_pieces(text):
    blocks = list(_blocks(text))
    assert "".join(blocks) == text and all(0 < len(block) <= _BLOCK for block in blocks)
    if text.startswith(("a b", "word")):
        assert all(block.startswith(" ") for block in blocks[1:])


def test_bytes_that_are_not_utf8_are_left_out(tmp_path):
    (tmp_path / "a.py").write_bytes(b"caf\xc3\xa9 \xff!")
    data = DataSection(source="python-sources", paths=(str(tmp_path),), validation=0.0)
    assert list(texts_of(data, "train", 10**6)) == ["café !"]


@pytest.mark.parametrize(
    "name, vocab, size, message",
    [
        ("a.model", 259, 1000, "259"),
        ("a.model", 1000, 0, "at least 1 byte"),
        ("a.model", 20000, 3000, "20000 can be made from this text: Vocabulary size too high"),
        ("a.model", 262, 1000, "262"),
        ("a.model", 270, 100_000, "270 can be made from this text: Vocabulary size is smaller"),
        ("a.model", 2**31, 1000, "2147483647"),
        ("a.json", 1000, 1000, ".model"),
        ("none/a.model", 1000, 1000, "no directory"),
    ],
)
def test_what_cannot_be_made(name, vocab, size, message, sources, tmp_path):
    with pytest.raises(UserError) as caught:
        train_tokenizer(sources, tmp_path / name, vocab, size)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_met_before_training(sources, monkeypatch):
    monkeypatch.setattr(train, "_train", lambda texts, vocab_size: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"cannot write /proc/a\.model"):
        train_tokenizer(sources, Path("/proc/a.model"), 1000)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_an_interruption_after_training_leaves_nothing(sources, tmp_path, monkeypatch, handler):
    def interrupt(model, data):
        assert model.is_file() and signal.getsignal(signal.SIGINT) is handler
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_measure", interrupt)
    previous = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(sources, tmp_path / "a.model", 400, 10_000)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_kept(sources, tmp_path):
    (tmp_path / "a.model").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        train_tokenizer(sources, tmp_path / "a.model", 1000)
    assert (tmp_path / "a.model").read_text() == "mine"


def test_data_without_text(tmp_path):
    out = tmp_path / "a.model"
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(DataSection(source="tokens", paths=("x",)), out, 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "\\u0000\\u2581"}\n')
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(DataSection(source="files", paths=(f"{tmp_path}/a.jsonl",), validation=0.0), out, 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(DataError, match="text"):
        train_tokenizer(DataSection(source="files", paths=(f"{tmp_path}/a.jsonl",), validation=0.0), out, 1000)
    assert not out.exists()
