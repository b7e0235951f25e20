"""Bits per byte: what each token stands for, and one figure for a run and its export."""

import json
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_files import CONTROL, bpe_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.evaluate import Subject, bits_per_byte
from lighthouse_core.export.tokenizer import write_tokenizer

SPACE = "\u2581"


def figure(tokenizer, tokens, losses):
    subject = Subject("it", lambda x: x, lambda x: x, tokenizer, 512, torch.device("cpu"))
    return bits_per_byte(subject, tokens, losses)


@pytest.fixture(scope="module")
def pairs(spm, foreign_spm, tmp_path_factory):
    """(tokenizer of a run, tokenizer of its export) by name."""
    folder = tmp_path_factory.mktemp("by hand")
    (folder / "a.model").write_bytes(bpe_model([(SPACE, -2.0), ("a", -3.0), ("<x>", 0.0, CONTROL)]))
    names = {
        "bytes": "bytes",
        "trained": spm,
        "prefix": foreign_spm("prefix", add_dummy_prefix=True),
        "nobytes": foreign_spm("nobytes", byte_fallback=False, vocab_size=60),
        "by hand": folder / "a.model",
    }
    found = {}
    for name, path in names.items():
        out = tmp_path_factory.mktemp("export")
        run = build_tokenizer(str(path))
        write_tokenizer(out, run, max_length=77)
        found[name] = run, build_tokenizer(str(out / "tokenizer.json"))
    return found


@pytest.fixture(scope="module")
def stands_for(pairs):
    """(run, what its tokens stand for, what those of its export stand for) by name."""
    return {name: (run, run.token_bytes(), export.token_bytes()) for name, (run, export) in pairs.items()}


@pytest.mark.parametrize("name", ["bytes", "trained", "prefix", "nobytes", "by hand"])
def test_an_export_has_the_figure_of_its_run_to_the_last_digit(name, pairs, generator):
    run, export = pairs[name]
    # Every token, in any order: characters are cut everywhere, and most bytes are not UTF-8. And rows above the
    # vocabulary. Control pieces but for BOS and EOS occur in no text.
    control = [i for i, piece in enumerate(run.model.pieces) if piece.kind == CONTROL][2:] if name != "bytes" else []
    tokens = torch.randint(run.vocab_size + 20, (6, 301), generator=generator)
    tokens[torch.isin(tokens, torch.tensor(control))] = run.eos_id
    losses = torch.rand(6, 300, generator=generator) * 9
    assert figure(run, tokens, losses) == figure(export, tokens, losses)
    sizes = [[len(token) for token in tokenizer.token_bytes()] for tokenizer in (run, export)]
    for i in control:
        sizes[0][i] = sizes[1][i] = 0
    assert sizes[0] == sizes[1] and len(sizes[0]) == run.vocab_size


@given(text=st.text(min_size=1) | st.text(alphabet=" a\u2581é\n", min_size=1))
def test_tokens_of_a_text_stand_for_its_bytes(stands_for, text):
    for name in ("bytes", "trained", "prefix"):
        run, *meanings = stands_for[name]
        expected = text if name == "bytes" else text.replace(SPACE, " ")
        for found in meanings:
            # The space that is put before a text counts.
            expected_bytes = (" " * (name == "prefix") + expected).encode()
            assert b"".join(found[i] for i in run.encode(text)) == expected_bytes


@given(data=st.binary(min_size=1))
def test_tokens_of_any_bytes_stand_for_them(stands_for, data):
    for name in ("bytes", "trained"):
        run, *meanings = stands_for[name]
        expected = data if name == "bytes" else data.replace(SPACE.encode(), b" ")
        for found in meanings:
            assert b"".join(found[i] for i in run.encode(data)) == expected


def test_a_cut_character_and_raw_bytes_count_as_they_are(pairs):
    """Six tokens of one bit: the last two bytes of 中, the first of 文, a raw byte, a BOS and an unused row."""
    run, export = pairs["bytes"]
    cut = [*"中".encode(), "文".encode()[0], 0xFF, run.bos_id, run.vocab_size + 5]
    for tokenizer, shift in ((run, 0), (export, 0), (pairs["by hand"][0], 3), (pairs["by hand"][1], 3)):
        tokens = torch.tensor([[i + shift if i < 256 else 1 if shift else i for i in cut[:-1]] + [600]])
        found = figure(tokenizer, tokens, torch.full((1, 6), log(2)))
        assert found.mean == pytest.approx(6 / 4, rel=1e-6)


def test_without_any_byte_there_is_no_figure(pairs):
    tokens = torch.full((2, 5), 257)
    assert figure(pairs["bytes"][0], tokens, torch.ones(2, 4)) is None


def test_a_long_sequence_is_the_sum_of_its_bytes(pairs, text_dir):
    code = b"".join(file.read_bytes() for file in sorted(text_dir.rglob("*.py"))[:10])
    for name in ("bytes", "trained"):
        for tokenizer in pairs[name]:
            tokens = torch.from_numpy(np.append(tokenizer.eos_id, tokenizer.encode(code)).astype(np.int64))[None]
            found = figure(tokenizer, tokens, torch.full((1, tokens.shape[1] - 1), log(2), dtype=torch.float64))
            assert found.mean == pytest.approx((tokens.shape[1] - 1) / len(code))


# tokenizer.json of other tools


@pytest.fixture
def meanings(tmp_path):
    """token -> bytes of a tokenizer.json that is made of parts."""

    def of(vocab, *, added=(), model=models.BPE, settings=None, **parts):
        ids = {token: i for i, token in enumerate(["<s>", "</s>", *vocab])}
        tokenizer = Tokenizer(model(vocab=ids, **({"merges": []} if model is models.BPE else {}), **settings or {}))
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.add_tokens(list(added))
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        built = build_tokenizer(str(tmp_path / "tokenizer.json"))
        found = built.token_bytes()
        if found is None:
            return None
        assert found[built.bos_id] == found[built.eos_id] == b"" and len(found) == built.vocab_size
        names = json.loads((tmp_path / "tokenizer.json").read_text())
        ids |= {token["content"]: token["id"] for token in names["added_tokens"]}
        return {token: found[i] for token, i in ids.items() if i > 1}

    return of


LLAMA = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def test_byte_level(meanings):
    found = meanings(["Ġa", "Ã", "ÃĤ", "中", "Ċ"], decoder=decoders.ByteLevel())
    # 中 is not of the alphabet: the decoder takes such a token as it is.
    assert found == {"Ġa": b" a", "Ã": b"\xc3", "ÃĤ": b"\xc3\x82", "中": "中".encode(), "Ċ": b"\n"}
    assert meanings(["Ġa"], pre_tokenizer=pre_tokenizers.ByteLevel()) == {"Ġa": b" a"}
    split = pre_tokenizers.Split(Regex(r"\s+"), "isolated")
    sequence = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel()])
    assert meanings(["Ġa"], pre_tokenizer=sequence) == {"Ġa": b" a"}


def test_byte_fallback(meanings):
    vocab = ["<0x0A>", "<0xE4>", SPACE, f"{SPACE}the", "é"]
    expected = {"<0x0A>": b"\n", "<0xE4>": b"\xe4", SPACE: b" ", f"{SPACE}the": b" the", "é": "é".encode()}
    assert meanings(vocab, decoder=decoders.Sequence(LLAMA)) == expected
    assert meanings(vocab, decoder=decoders.Sequence([decoders.Sequence(LLAMA[:2]), *LLAMA[2:]])) == expected
    # Without it, a token that is spelled like a byte is its characters.
    assert meanings(["<0x0A>"], decoder=decoders.Metaspace()) == {"<0x0A>": b"<0x0A>"}


def test_spaces_in_other_ways(meanings):
    assert meanings([f"{SPACE}a"], decoder=decoders.Metaspace()) == {f"{SPACE}a": b" a"}
    assert meanings(["_a"], decoder=decoders.Metaspace(replacement="_")) == {"_a": b" a"}
    assert meanings(["_a_"], decoder=decoders.Replace(Regex("^_"), " ")) == {"_a_": b" a_"}
    assert meanings(["a", "é "]) == {"a": b"a", "é ": "é ".encode()}


def test_added_tokens(meanings):
    added = ["  ", "é", AddedToken("<pad>", special=True), AddedToken("<think>", special=False)]
    expected = {"  ": b"  ", "é": "é".encode(), "<pad>": b"", "<think>": b"<think>"}
    for decoder in (decoders.ByteLevel(), decoders.Sequence(LLAMA)):
        assert meanings([], added=added, decoder=decoder) == expected


def test_the_unknown_token_stands_for_nothing(meanings):
    decoder = decoders.Sequence(LLAMA)
    assert meanings(["<unk>"], settings={"unk_token": "<unk>"}, decoder=decoder) == {"<unk>": b""}
    found = meanings(["<unk>"], model=models.WordLevel, settings={"unk_token": "<unk>"}, decoder=decoder)
    assert found == {"<unk>": b""}


@pytest.mark.parametrize(
    "parts",
    [
        dict(decoder=decoders.WordPiece()),
        dict(decoder=decoders.BPEDecoder()),
        dict(decoder=decoders.CTC()),
        dict(decoder=decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()])),
        dict(decoder=decoders.Sequence([decoders.Fuse(), decoders.Replace("a ", "a")])),
        dict(decoder=decoders.ByteLevel(), settings={"end_of_word_suffix": "</w>"}),
        dict(pre_tokenizer=pre_tokenizers.Whitespace()),
        dict(normalizer=normalizers.Replace(" ", SPACE)),
    ],
)
def test_what_rules_do_not_tell_has_no_figure(parts, meanings, tmp_path):
    assert meanings(["a", "##b", "c</w>"], **parts) is None
    tokenizer = build_tokenizer(str(tmp_path / "tokenizer.json"))
    assert figure(tokenizer, torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 4)) is None
