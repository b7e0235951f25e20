"""The exported tokenizer files equal the `bytes` tokenizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lighthouse_core.export.tokenizer import write_bytes_tokenizer

MIXED = [
    "",
    " ",
    "  leading and trailing  ",
    "it's 12.5 isn't\tit\r\n\n",
    "é ß 中文 עברית \u202e 👩‍👩‍👧 🇳🇱 e\u0301",
    "".join(map(chr, range(0x180))),
    "\x00\x7f\x80\xad\ufeff\ufffd\U0010ffff",
    "<s>",
    "</s> a <s>b</s><s",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    write_bytes_tokenizer(out, max_length=77)
    return out


@pytest.fixture(scope="module")
def plain(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def auto(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", MIXED)
def test_ids_are_bytes(text, plain, auto):
    ids = list(text.encode())
    assert plain.encode(text, add_special_tokens=False).ids == ids
    assert plain.encode(text).ids == [256, *ids]
    assert auto(text, add_special_tokens=False).input_ids == ids
    assert auto(text).input_ids == auto.encode(text) == [256, *ids]


@pytest.mark.parametrize("text", MIXED)
def test_decoding_gives_the_text_back_without_bos_and_eos(text, plain, auto):
    ids = [256, *text.encode(), 257]
    assert plain.decode(ids) == text
    assert auto.decode(ids, skip_special_tokens=True) == text


@given(st.text())
def test_any_text(plain, auto, text):
    ids = list(text.encode())
    assert plain.encode(text, add_special_tokens=False).ids == ids == auto(text, add_special_tokens=False).input_ids
    assert plain.decode(ids) == text == auto.decode(ids)


@given(st.binary())
def test_any_bytes_decode_as_in_training(plain, data):
    assert plain.decode(list(data)) == data.decode("utf-8", errors="replace")


def test_vocabulary(plain, auto):
    assert plain.get_vocab_size() == len(auto) == 258
    assert sorted(plain.get_vocab().values()) == list(range(258))
    assert (auto.bos_token, auto.bos_token_id, auto.eos_token, auto.eos_token_id) == ("<s>", 256, "</s>", 257)
    assert auto.model_max_length == 77
    assert auto.decode([97, 300, 98]) == "ab"


def test_saved_again_it_is_the_same(auto, tmp_path):
    auto.save_pretrained(tmp_path)
    text = "a <s> é"
    assert type(auto).from_pretrained(tmp_path)(text).input_ids == [256, *text.encode()]
