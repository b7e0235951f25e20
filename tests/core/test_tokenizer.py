"""Tokenizers: what comes back from the ids, and what is refused."""

import json
import pickle
import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lighthouse_core.data.tokenizer import build_tokenizer, tokenizer_files
from lighthouse_core.data.tokenizers.model_file import NORMAL, parse, rename_pieces
from lighthouse_core.errors import DataError

BYTES = build_tokenizer("bytes")
TEXTS = [
    "",
    " ",
    " a  b   c    ",
    "\n",
    "\r\n\r\n\tx\t\ty\r",
    "    def f(x):\n\n\n        return x\n",
    "\x00\x01\x1f\x7f\x85\u2028\ufeff\ufffd",
    "é ß 中文 עברית \u202e 👩‍👩‍👧 🇳🇱 e\u0301 \U0010fff0\U0010ffff",
    "<s></s><unk><0x41> ▅ ⁇",
    "-" * 20000,
]


@pytest.fixture(scope="session")
def trained(spm):
    return build_tokenizer(str(spm))


@pytest.fixture
def hf(tmp_path):
    """Writes a tokenizer.json of 256 bytes, `added` tokens and other parts; returns its path."""

    def write(added=("<s>", "</s>"), post=None, config=None, **parts):
        vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        from tokenizers import decoders

        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(added))
        if post:
            tokenizer.post_processor = post(tokenizer)
        for name, value in parts.items():
            getattr(tokenizer, name)(**value)
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return path

    return write


def refused(name) -> DataError:
    with pytest.raises(DataError) as caught:
        build_tokenizer(str(name))
    assert "\n" not in str(caught.value)
    return caught.value


def test_ids_are_the_bytes():
    assert BYTES.encode(bytes(range(256))).tolist() == list(range(256))
    assert BYTES.encode("é").tolist() == [0xC3, 0xA9]
    assert (BYTES.vocab_size, BYTES.bos_id, BYTES.eos_id) == (258, 256, 257)


@given(st.text())
def test_text_round_trips(text):
    assert BYTES.decode(BYTES.encode(text)) == text


@given(st.binary())
def test_any_bytes_round_trip(data):
    assert BYTES.decode_bytes(BYTES.encode(data)) == data


def test_decode_marks_invalid_bytes_and_drops_what_is_not_text():
    assert BYTES.decode([256, 0x61, 0xFF, 0x62, 257, 300]) == "a\ufffdb"
    assert BYTES.decode(np.array([256, 257])) == ""
    assert BYTES.decode([]) == ""


def test_unknown_tokenizer_is_the_users_error(tmp_path):
    assert "wordpiece" in str(refused("wordpiece")) and ".model" in refused("wordpiece").hint
    assert "tokenizer.json" in refused(tmp_path).hint


@pytest.mark.parametrize("name", ["nowhere.model", "nowhere.json"])
def test_a_missing_file(name, tmp_path):
    error = refused(tmp_path / name)
    assert name in str(error) and "No such file" in str(error) and "current directory" in error.hint


def test_a_file_that_is_something_else(tmp_path, spm):
    (tmp_path / "a.model").write_bytes(b"not a model at all")
    (tmp_path / "cut.model").write_bytes(spm.read_bytes()[:-7])
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "a.json").write_text("{]")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text('{"model": {"type": "None of these"}}')
    for name in ("a.model", "cut.model", "empty.model", "a.json", "list.json", "other.json"):
        assert name in str(refused(tmp_path / name))


def test_damaged_models_are_the_users_error(foreign_spm, tmp_path):
    """Bytes changed, dropped and put in: a damaged model either works or is named in one line."""
    whole, draw, refused = foreign_spm("plain").read_bytes(), random.Random(0), 0
    path = tmp_path / "a.model"
    for number in range(800):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            # Half of them near the end, where the settings are.
            at = draw.randrange(len(content) - 700 if number % 2 else 0, len(content))
            change = draw.randrange(3)
            content[at : at + (change != 1) * draw.randint(1, 5)] = draw.randbytes((change != 0) * draw.randint(1, 5))
        path.write_bytes(b"\x08\x01" if number == 0 else content)
        try:
            tokenizer = build_tokenizer(str(path))
            tokenizer.decode(tokenizer.encode("def f(x): \xe9\n"))
        except DataError as error:
            refused += 1
            assert "a.model" in str(error) and "\n" not in str(error)
    assert refused > 200


def test_lone_surrogates_are_named(trained):
    for tokenizer in (BYTES, trained):
        with pytest.raises(DataError, match=r"U\+D800, at character 2"):
            tokenizer.encode("ab\ud800c")


# sentencepiece


@pytest.mark.parametrize("text", TEXTS)
def test_trained_models_give_text_back(text, trained):
    ids = trained.encode(text)
    assert ids.dtype == np.int32 and trained.decode(ids) == text
    assert np.array_equal(trained.encode(text.encode()), ids)
    assert len(ids) == 0 or (ids.min() > 2 and ids.max() < trained.vocab_size)


@given(st.text())
@example("a\r\r\n \t ")
def test_any_text_comes_back(trained, text):
    assert trained.decode(trained.encode(text)) == text.replace("\u2581", " ")


@given(st.text(alphabet=" \n\t\rab(0-"))
def test_any_layout_comes_back(trained, text):
    assert trained.decode(trained.encode(text)) == text


@given(st.lists(st.one_of(st.binary(max_size=6), st.sampled_from([b"def f(", b"\n    ", "é中".encode()]))))
def test_bytes_that_are_not_utf8_are_kept(trained, parts):
    data = b"".join(parts)
    out = b""
    for i in trained.encode(data).tolist():
        piece = trained.model.pieces[i]
        out += bytes([int(piece.text[3:5], 16)]) if piece.kind == 6 else piece.text.replace("\u2581", " ").encode()
    assert out == data.replace("\u2581".encode(), b" ")


def test_bos_and_eos_are_the_models_and_stand_for_nothing(trained, foreign_spm):
    assert (trained.vocab_size, trained.bos_id, trained.eos_id) == (1500, 1, 2)
    ids = [1, *trained.encode("a b").tolist(), 2, 1500, 9999]
    assert trained.decode(ids) == trained.decode(np.array(ids)) == "a b"
    other = build_tokenizer(str(foreign_spm("ids", bos_id=5, eos_id=3)))
    assert (other.bos_id, other.eos_id) == (5, 3)


@pytest.mark.parametrize("prefix", [False, True])
def test_ids_are_sentencepieces_though_the_text_is_cut(prefix, trained, spm, foreign_spm, text_dir):
    path = foreign_spm("prefix", add_dummy_prefix=True) if prefix else spm
    tokenizer, raw = build_tokenizer(str(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))
    code = "".join(file.read_bytes().decode() for file in sorted(text_dir.rglob("*.py"))[:25])
    for text in (*TEXTS, code, code.replace(" ", "\u2581 "), " " * 9000 + "x" * 9000, code.replace("\n", "")):
        assert tokenizer.encode(text).tolist() == raw.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == raw.decode(raw.encode(text))


def test_a_dummy_prefix_is_put_before_bytes_too(foreign_spm):
    tokenizer = build_tokenizer(str(foreign_spm("prefix", add_dummy_prefix=True)))
    assert tokenizer.encode(b"the cat").tolist() == tokenizer.encode("the cat").tolist()
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert tokenizer.decode(tokenizer.encode(b" the\xff cat")) == " the\ufffd cat"


def test_without_byte_fallback_bytes_must_be_utf8(foreign_spm):
    tokenizer = build_tokenizer(str(foreign_spm("nobytes", byte_fallback=False, vocab_size=60)))
    assert tokenizer.decode(tokenizer.encode(b"the cat")) == "the cat"
    with pytest.raises(DataError, match="byte 0xff at offset 3") as caught:
        tokenizer.encode(b"the\xff")
    assert "bytes" in caught.value.hint


@pytest.mark.parametrize(
    "settings, reason",
    [
        (dict(eos_id=-1), "no EOS"),
        (dict(model_type="unigram"), "not a BPE model"),
        (dict(normalization_rule_name="nmt_nfkc"), "normalizes"),
        (dict(remove_extra_whitespaces=True), "normalizes"),
        (dict(user_defined_symbols=["<x>"]), "user-defined"),
        (dict(treat_whitespace_as_suffix=True), "spaces"),
    ],
)
def test_models_that_cannot_be_used(settings, reason, foreign_spm):
    error = refused(foreign_spm(f"bad-{'-'.join(settings)}", **settings))
    assert reason in str(error) and "lighthouse tokenizer train" in error.hint


def test_the_file_is_read_as_sentencepiece_reads_it(spm):
    raw = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    pieces = parse(spm.read_bytes()).pieces
    assert [piece.text for piece in pieces] == [raw.id_to_piece(i) for i in range(raw.get_piece_size())]
    assert [piece.score for piece in pieces] == [raw.get_score(i) for i in range(raw.get_piece_size())]


def test_renaming_touches_normal_pieces_alone(spm):
    content = spm.read_bytes()
    assert rename_pieces(content, lambda piece: piece) == content
    before, after = parse(content).pieces, parse(rename_pieces(content, lambda piece: piece + "é" * 100)).pieces
    assert [a.text == b.text + "é" * 100 for a, b in zip(after, before, strict=True)] == [
        b.kind == NORMAL for b in before
    ]
    assert [a[1:] for a in after] == [b[1:] for b in before]


def test_fingerprints(spm, trained, foreign_spm, hf, tmp_path):
    (tmp_path / "copy.model").write_bytes(spm.read_bytes())
    assert build_tokenizer(str(tmp_path / "copy.model")).fingerprint == trained.fingerprint
    (tmp_path / "other.model").write_bytes(rename_pieces(spm.read_bytes(), lambda piece: piece.replace("def", "dfe")))
    names = ["bytes", spm, tmp_path / "other.model", hf(), foreign_spm("ids", bos_id=5, eos_id=3), foreign_spm("plain")]
    found = [build_tokenizer(str(name)).fingerprint for name in names]
    assert len(set(found)) == len(names) and all(0 <= value < 2**63 for value in found)


def test_a_tokenizer_can_be_sent_to_another_process(trained, hf):
    for tokenizer in (trained, build_tokenizer(str(hf()))):
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.encode("def f(x):\n").tolist() == tokenizer.encode("def f(x):\n").tolist()


# tokenizer.json


def test_a_tokenizer_json(hf):
    tokenizer = build_tokenizer(str(hf()))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    for text in TEXTS[:-1]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and tokenizer.decode(ids) == text and not {256, 257} & set(ids.tolist())
    assert tokenizer.decode([256, *tokenizer.encode("a b"), 257, 400]) == "a b"
    with pytest.raises(DataError, match="byte 0xe9 at offset 1"):
        tokenizer.encode(b"a\xe9")


def test_truncation_and_padding_are_ignored(hf):
    path = hf(enable_truncation=dict(max_length=4), enable_padding=dict(length=50))
    assert len(build_tokenizer(str(path)).encode("0123456789")) == 10
    fingerprint = build_tokenizer(str(path)).fingerprint
    assert build_tokenizer(str(hf())).fingerprint == fingerprint


@pytest.mark.parametrize(
    "config",
    [{"bos_token": "<b>", "eos_token": "<e>"}, {"bos_token": {"content": "<b>"}, "eos_token": {"content": "<e>"}}],
)
def test_a_config_beside_it_names_bos_and_eos(config, hf):
    tokenizer = build_tokenizer(str(hf(added=("<s>", "</s>", "<b>", "<e>"), config=config)))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (258, 259)


def test_the_post_processor_names_bos_and_eos(hf):
    def template(tokenizer):
        ids = [("<b>", tokenizer.token_to_id("<b>")), ("<e>", tokenizer.token_to_id("<e>"))]
        return processors.TemplateProcessing(single="<b> $A <e>", special_tokens=ids)

    tokenizer = build_tokenizer(str(hf(added=("<s>", "</s>", "<b>", "<e>"), post=template)))
    assert (tokenizer.bos, tokenizer.eos) == ("<b>", "<e>")
    sequence = build_tokenizer(
        str(hf(added=("<b>", "<e>"), post=lambda t: processors.Sequence([processors.ByteLevel(), template(t)])))
    )
    assert (sequence.bos_id, sequence.eos_id) == (256, 257)
    bert = processors.BertProcessing(("<e>", 257), ("<b>", 256))
    assert build_tokenizer(str(hf(added=("<b>", "<e>"), post=lambda _: bert))).bos == "<b>"


def test_usual_names(hf):
    tokenizer = build_tokenizer(str(hf(added=("<|endoftext|>",))))
    assert tokenizer.bos_id == tokenizer.eos_id == 256


@pytest.mark.parametrize(
    "config, bos",
    [
        ({"bos_token": None, "eos_token": "<|endoftext|>"}, None),
        ({"bos_token": None}, None),
        ({"eos_token": "<|endoftext|>"}, None),
        ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, 256),
        ({}, 256),
    ],
)
def test_a_tokenizer_without_a_bos(config, bos, hf):
    """As Qwen's: the config says null, or names EOS alone. GPT-2's says nothing, and <|endoftext|> is both."""
    tokenizer = build_tokenizer(str(hf(added=("<|endoftext|>", "<|im_start|>"), config=config)))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos, 256)
    assert tokenizer.bos == (None if bos is None else "<|endoftext|>")
    assert tokenizer.decode([256, *tokenizer.encode("a b"), 256]) == "a b"


def test_null_is_no_bos_whatever_the_post_processor_says(hf):
    def template(tokenizer):
        return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])

    with_bos = build_tokenizer(str(hf(post=template, config={"eos_token": "</s>"})))
    without = build_tokenizer(str(hf(post=template, config={"bos_token": None, "eos_token": "</s>"})))
    assert (with_bos.bos_id, without.bos_id) == (256, None)
    assert with_bos.fingerprint != without.fingerprint


def test_bos_or_eos_that_cannot_be_told(hf):
    error = refused(hf(added=("<x>",)))
    assert "BOS and EOS" in str(error) and "tokenizer_config.json" in error.hint
    error = refused(hf(added=("<x>",), config={"bos_token": None}))
    assert "is EOS" in str(error)
    error = refused(hf(added=("<x>",), config={"bos_token": "<x>", "eos_token": 3}))
    assert "eos_token" in str(error)
    assert "<y>" in str(refused(hf(added=("<x>",), config={"bos_token": "<y>", "eos_token": "<x>"})))


def test_files_of_a_tokenizer(spm, hf):
    assert tokenizer_files("bytes") == {}
    assert tokenizer_files(str(spm)) == {"tokenizer.model": spm}
    path = hf(config={})
    assert tokenizer_files(str(path)) == {
        "tokenizer.json": path,
        "tokenizer_config.json": path.with_name("tokenizer_config.json"),
    }


def letters(kind: str):
    """A tokenizer of the letters a and b, and the pieces that text becomes in it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if kind == "words":
        made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "<s>": 3, "</s>": 4}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        return made, ["a", "b"]
    if kind == "byte-level":
        made = Tokenizer(
            models.BPE({"a": 0, "b": 1, "\u0120": 2, "\u0120a": 3, "\u010a": 4, "<s>": 5, "</s>": 6}, [("\u0120", "a")])
        )
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        return made, ["a", "\u0120", "\u0120a", "\u010a"]
    if kind == "pieces of words":
        made = Tokenizer(
            models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "##a": 3, "<s>": 4, "</s>": 5}, unk_token="[UNK]")
        )
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        return made, ["a", "##b", "##a"]
    made = Tokenizer(
        models.Unigram(
            [("<unk>", 0.0), ("\u2581", -3.0), ("a", -2.0), ("\u2581a", -2.5), ("<s>", 0.0), ("</s>", 0.0)], 0
        )
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made, ["a", "\u2581", "\u2581a"]


@pytest.mark.parametrize("key", ["bos_token", "eos_token"])
@pytest.mark.parametrize("kind", ["words", "byte-level", "pieces of words", "unigram"])
def test_a_piece_of_ordinary_text_ends_no_document(tmp_path, kind, key):
    made, pieces = letters(kind)
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(names))
    assert build_tokenizer(str(tmp_path / "tokenizer.json")).eos_id == made.token_to_id("</s>")
    for piece in pieces:
        config.write_text(json.dumps(names | {key: piece}))
        with pytest.raises(DataError, match=f"as its {key}, which ordinary text holds") as error:
            build_tokenizer(str(tmp_path / "tokenizer.json"))
        assert error.value.hint


def add_tokens(path, **tokens):
    """Add tokens to a tokenizer.json, special or not."""
    made = Tokenizer.from_file(str(path))
    for content, special in tokens.items():
        (made.add_special_tokens if special else made.add_tokens)([content])
    made.save(str(path))
    return path


@pytest.mark.parametrize(("eos", "special"), [(".", True), (".", False), ("</s>", False)])
def test_an_added_token_that_text_becomes_ends_no_document(hf, eos, special):
    path = hf(added=("<s>",), config={"bos_token": "<s>", "eos_token": eos})
    error = refused(add_tokens(path, **{eos: special}))
    assert f"{eos!r} as its eos_token, which ordinary text holds" in str(error) and error.hint


def test_a_special_token_of_its_own_is_never_what_a_text_becomes(hf):
    tokenizer = build_tokenizer(str(hf()))
    assert not {256, 257} & set(tokenizer.encode("a</s>b<s>").tolist())


@pytest.mark.parametrize("kind", ["words", "pieces of words", "unigram"])
def test_a_special_token_of_the_vocabulary_is_found_in_no_text(tmp_path, kind):
    made, _ = letters(kind)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if kind != "unigram" else made.pre_tokenizer
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer(str(tmp_path / "tokenizer.json"))
    ends = {tokenizer.bos_id, tokenizer.eos_id}
    assert ends == {made.token_to_id("<s>"), made.token_to_id("</s>")}
    assert not ends & set(tokenizer.encode("a </s> a<s> a").tolist())
    assert tokenizer.encode("a a").tolist() == made.encode("a a", add_special_tokens=False).ids
