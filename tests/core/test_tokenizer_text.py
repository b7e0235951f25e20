"""What every kind of text becomes: under tokenizers that were trained on odd samples, and in the odd characters."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from model_files import bpe_model
from tokenizers import Tokenizer

from lighthouse_core.config.data import DataSection
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.data.tokenizers.model_file import add_pieces, parse
from lighthouse_core.data.tokenizers.train import train_tokenizer
from lighthouse_core.errors import DataError, UserError
from lighthouse_core.export.tokenizer import write_tokenizer

SPACE = "\u2581"

# Name: (text, a vocabulary that it can fill).
SAMPLES = {
    "no spaces": ("abcabcabdabcab" * 50, 270),
    "digits": ("0123456789" * 50, 273),
    "chinese": ("东西南北中文西南" * 50, 272),
    "one character": ("a", 264),
    "one character, often": ("a" * 10_000, 264),
    "one newline": ("\n", 263),
    "newlines": ("\n" * 100, 264),
    "windows": ("\r\n" * 500 + "x", 266),
    "one space": (" ", 263),
    "spaces": (" " * 100, 264),
    "nearly all spaces": (" " * 90_000 + "a", 266),
    "tabs": ("\t" * 100, 264),
    "emoji": ("😀😁👩‍👩‍👧" * 50, 272),
    "marks": ("<s></s><unk>" * 50, 263),
    "spelled bytes": ("<0x0A><0xaa>" * 50, 271),
    "stand-ins": ("a\U0010fff0\U0010fff1\u2585" * 50, 264),
}


def train(folder, text, vocab, split=0.0):
    (folder / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    data = DataSection(source="files", paths=(f"{folder}/a.jsonl",), validation=split)
    return train_tokenizer(data, folder / "a.model", vocab)


@pytest.fixture(scope="module", params=SAMPLES)
def trained(request, tmp_path_factory):
    """(tokenizer, the exported one) of a sample."""
    folder = tmp_path_factory.mktemp("sample")
    text, vocab = SAMPLES[request.param]
    assert train(folder, text, vocab).vocab_size == vocab
    tokenizer = build_tokenizer(str(folder / "a.model"))
    write_tokenizer(folder, tokenizer, max_length=77)
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # What spells a special token is its characters, as in training.
    written.encode_special_tokens = True
    return tokenizer, written


@given(text=st.text())
@example(text=" ")
@example(text="a b\tc\r\nd\n\n  e")
@example(text="\ufeff\x00中 文 \U0010fff0\u2585<s> <0x41> ⁇")
@example(text="a\u2581b")
def test_every_text_comes_back_whatever_the_sample(trained, text):
    tokenizer, written = trained
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace(SPACE, " ")
    assert tokenizer.encode(text.encode()).tolist() == ids.tolist()
    assert written.encode(text, add_special_tokens=False).ids == ids.tolist()


def test_layout_is_in_every_vocabulary(trained):
    tokenizer, _ = trained
    pieces = [piece.text for piece in tokenizer.model.pieces]
    assert {SPACE, "\n", "\r", "\t"} <= set(pieces) and len(pieces) == len(set(pieces)) == tokenizer.vocab_size
    for char in " \n\r\t":
        assert len(tokenizer.encode(char)) == 1


@pytest.mark.parametrize(
    "text, vocab, words",
    [
        ("a", 263, "need 264"),
        ("a", 265, "at most 264"),
        ("\n", 264, "at most 263"),
        ("0123456789" * 50, 272, "need 273"),
        ("ab" * 50, 262, "no room"),
    ],
)
def test_a_vocabulary_that_does_not_fit_says_what_does(text, vocab, words, tmp_path):
    with pytest.raises(UserError, match=words):
        train(tmp_path, text, vocab)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_usual_text_is_not_changed_by_it(spm):
    """What has its layout already gets nothing more."""
    content = spm.read_bytes()
    assert add_pieces(content, [], 1500) == content
    scores = [piece.score for piece in parse(content).pieces[259:]]
    assert scores == [-float(i) for i in range(len(scores))]


def test_pieces_are_added_behind_the_others_for_the_last_ones(spm):
    content = spm.read_bytes()
    before, after = parse(content).pieces, parse(add_pieces(content, ["é", "中"], 1501)).pieces
    last = max(i for i, piece in enumerate(before) if len(piece.text) > 1)
    assert after[:-2] == (*before[:last], *before[last + 1 :]) and len(after) == 1501
    assert [piece.text for piece in after[-2:]] == ["é", "中"]
    assert after[-1].score < after[-2].score < min(piece.score for piece in before)


# Odd characters


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A tokenizer of each kind that knows "a" and the space, by name."""
    found = {"bytes": build_tokenizer("bytes")}
    for name, fallback in (("fallback", True), ("no fallback", False)):
        path = tmp_path_factory.mktemp("kinds") / "a.model"
        path.write_bytes(bpe_model([(SPACE, -1.0), ("a", -2.0)], byte_fallback=fallback))
        found[name] = build_tokenizer(str(path))
    for name in tuple(found):
        folder = tmp_path_factory.mktemp("kinds")
        write_tokenizer(folder, found[name], max_length=77)
        found[f"json of {name}"] = build_tokenizer(str(folder / "tokenizer.json"))
    return found


BYTES = ("bytes", "json of bytes")
FALLBACK = ("fallback", "json of fallback")
NO_FALLBACK = ("no fallback", "json of no fallback")


@pytest.mark.parametrize("text", ["a\u2581a", "\u2581", "a\u2581\u2581 a"])
def test_u2581_is_a_space_to_sentencepiece_alone(text, kinds):
    for name, tokenizer in kinds.items():
        for given_text in (text, text.encode()):
            ids = tokenizer.encode(given_text)
            assert tokenizer.decode(ids) == (text if name in BYTES else text.replace(SPACE, " "))
        if name not in BYTES:
            assert ids.tolist() == tokenizer.encode(text.replace(SPACE, " ")).tolist()


@pytest.mark.parametrize("char", ["\0", "\ufeff", "\ufffd", "\ufffe", "\U0010ffff", "\u202e", "\x85"])
@pytest.mark.parametrize("place", ["{}", "{}a", "a{}", "a{}a"])
def test_other_characters_are_kept_or_unknown(char, place, kinds):
    """A byte-order mark and NUL have no meaning of their own, at the beginning of a text neither."""
    text = place.format(char)
    for name, tokenizer in kinds.items():
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.encode(text.encode()).tolist() == ids
        if name in NO_FALLBACK:
            unknown = tokenizer.encode("z").tolist()
            a = tokenizer.encode("a").tolist()
            assert ids == [i for c in text for i in (a if c == "a" else unknown)]
        else:
            assert tokenizer.decode(ids) == text
            sizes = tokenizer.token_bytes()
            assert b"".join(sizes[i] for i in ids) == text.encode()


@pytest.mark.parametrize("text", ["\ud800", "a\udfffa", "\udc80", "\ud83d a", "\udce9"])
def test_lone_surrogates_are_an_error_everywhere(text, kinds):
    at = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    for tokenizer in kinds.values():
        with pytest.raises(DataError, match=f"U\\+{ord(text[at]):04X}, at character {at}"):
            tokenizer.encode(text)


@pytest.mark.parametrize(
    "data",
    [b"\xff", b"a\xff\xfea", b"\xed\xa0\x80", b"\xe2\x96", b"a\xc3", b"\xff\xfea\0", b"\xf4\x90\x80\x80", b"\xc0\x80"],
)
def test_bytes_that_are_not_utf8_are_kept_or_an_error(data, kinds):
    """UTF-16, halves of surrogate pairs, cut characters and overlong forms are bytes like any other."""
    for name, tokenizer in kinds.items():
        if name in ("bytes", "fallback"):
            ids = tokenizer.encode(data)
            assert b"".join(tokenizer.token_bytes()[i] for i in ids) == data
            assert "\ufffd" in tokenizer.decode(ids)
        else:
            with pytest.raises(DataError, match="not UTF-8"):
                tokenizer.encode(data)


@given(st.lists(st.integers(-(2**40), 2**40) | st.integers(-1, 270), max_size=8))
def test_any_ids_decode(kinds, ids):
    """BOS, EOS and ids that are no row of the vocabulary stand for nothing."""
    for tokenizer in kinds.values():
        inside = [i for i in ids if 0 <= i < tokenizer.vocab_size and i not in (tokenizer.bos_id, tokenizer.eos_id)]
        assert tokenizer.decode(ids) == tokenizer.decode(inside)
