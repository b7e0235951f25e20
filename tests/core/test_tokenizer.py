import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError

TOKENIZER = build_tokenizer("bytes")


def test_ids_are_the_bytes():
    assert TOKENIZER.encode(bytes(range(256))).tolist() == list(range(256))
    assert TOKENIZER.encode("é").tolist() == [0xC3, 0xA9]
    assert (TOKENIZER.vocab_size, TOKENIZER.bos_id, TOKENIZER.eos_id) == (258, 256, 257)


@settings(deadline=None)
@given(st.text())
def test_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_round_trip(data):
    assert TOKENIZER.decode_bytes(TOKENIZER.encode(data)) == data


def test_decode_marks_invalid_bytes_and_drops_what_is_not_text():
    assert TOKENIZER.decode([256, 0x61, 0xFF, 0x62, 257, 300]) == "a\ufffdb"
    assert TOKENIZER.decode(np.array([256, 257])) == ""
    assert TOKENIZER.decode([]) == ""


def test_unknown_tokenizer_is_the_users_error():
    with pytest.raises(DataError, match="wordpiece") as error:
        build_tokenizer("wordpiece")
    assert "bytes" in error.value.hint
