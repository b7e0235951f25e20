"""The exported tokenizer files give the ids of the tokenizer that was trained with."""

import json
import os
import random
import sysconfig
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import ExportError
from lighthouse_core.export.tokenizer import check_tokenizer, write_tokenizer

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
    write_tokenizer(out, build_tokenizer("bytes"), max_length=77)
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


# sentencepiece


class Exported:
    """A sentencepiece model, and what was made of it."""

    def __init__(self, path, out):
        out.mkdir()
        self.ours = build_tokenizer(str(path))
        write_tokenizer(out, self.ours, max_length=77)
        self.folder = out
        self.raw = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
        self.plain = Tokenizer.from_file(str(out / "tokenizer.json"))
        self.auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)

    def check(self, text):
        """Fails unless all four give one answer."""
        ids = self.raw.encode(text)
        assert self.ours.encode(text).tolist() == ids
        assert self.plain.encode(text, add_special_tokens=False).ids == ids
        assert self.auto(text, add_special_tokens=False, verbose=False).input_ids == ids
        assert self.auto.decode(ids) == self.raw.decode(ids) == text.replace("\u2581", " ")


@pytest.fixture(scope="session")
def trained(spm, tmp_path_factory):
    return Exported(spm, tmp_path_factory.mktemp("exported") / "trained")


@pytest.fixture(scope="session")
def prefixed(foreign_spm, tmp_path_factory):
    path = foreign_spm("prefix", add_dummy_prefix=True)
    return Exported(path, tmp_path_factory.mktemp("exported") / "prefixed")


@pytest.fixture(params=["trained", "prefixed"])
def exported(request):
    return request.getfixturevalue(request.param)


def mixed_text(size):
    """About `size` bytes: code, prose, data and mark-up of this installation, names of characters, and noise."""
    draw = random.Random(0)
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    kinds = ("py", "rst", "json", "md", "txt", "pyi", "h", "html", "js", "csv")
    found = {kind: set() for kind in kinds}
    for folder, _, names in (entry for root in roots for entry in os.walk(root)):
        for name in names:
            found.get(name.rpartition(".")[2], set()).add(os.path.join(folder, name))
    for kind in kinds:
        left = size // (len(kinds) + 3)
        files = sorted(found[kind])
        draw.shuffle(files)
        for file in files:
            text = Path(file).read_bytes()[:200_000].decode("utf-8", errors="ignore")
            yield text
            left -= len(text.encode())
            if left <= 0:
                break
    names = [f"{chr(c)} {unicodedata.name(chr(c), '')}" for c in range(0x20, 0x20000) if not 0xD800 <= c < 0xE000]
    step = max(1, len(names) * 50 * len(kinds) // size)
    yield from (" ".join(names[i : i + 100]) for i in range(0, len(names), 100 * step))
    ranges = [(32, 127), (0, 0x250), (0x370, 0x600), (0x2000, 0x3100), (0x4E00, 0xA000), (0xE000, 0x110000), (9, 33)]
    for _ in range(size // (len(kinds) + 3) // 2000):
        yield "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(800))


@pytest.mark.parametrize("text", MIXED)
def test_ids_are_sentencepieces(text, exported):
    exported.check(text)
    bos = exported.ours.bos_id
    assert exported.plain.encode(text).ids == exported.auto(text).input_ids == [bos, *exported.raw.encode(text)]


@given(text=st.text())
def test_any_text_has_sentencepieces_ids(trained, prefixed, text):
    trained.check(text)
    prefixed.check(text)


@given(text=st.text(alphabet=" \n\tab=-(0\u2581"))
def test_any_layout_has_sentencepieces_ids(trained, prefixed, text):
    trained.check(text)
    prefixed.check(text)


@pytest.mark.parametrize("char", list(' \n\t=-#"a0\u2581'))
def test_runs_have_sentencepieces_ids(char, exported):
    """Where splits of one piece overlap, sentencepiece takes the leftmost, and merges can only have an order."""
    for n in range(1, 120):
        exported.check(char * n)
        exported.check("x" + char * n + "\n y")


def test_half_a_megabyte_of_mixed_text_has_sentencepieces_ids(trained):
    size = 0
    for text in mixed_text(500_000):
        trained.check(text)
        size += len(text.encode())
    assert size > 400_000


@pytest.mark.slow
def test_ten_megabytes_of_mixed_text_have_sentencepieces_ids(tmp_path, sources):
    from lighthouse_core.data.tokenizers.train import train_tokenizer

    data = sources.model_copy(update={"paths": ("stdlib", "site-packages")})
    train_tokenizer(data, tmp_path / "large.model", 32000, 20_000_000)
    exported = Exported(tmp_path / "large.model", tmp_path / "out")
    size = 0
    for text in mixed_text(14_000_000):
        exported.check(text)
        size += len(text.encode())
    assert size >= 10_000_000


def test_files_of_a_sentencepiece_model(trained, spm):
    assert (trained.folder / "tokenizer.model").read_bytes() == spm.read_bytes()
    auto = trained.auto
    assert len(auto) == 1500 and (auto.bos_token_id, auto.eos_token_id, auto.model_max_length) == (1, 2, 77)
    assert auto.decode([1, *trained.raw.encode("a b"), 2], skip_special_tokens=True) == "a b"
    assert trained.plain.decode([1, *trained.raw.encode("a b"), 2]) == "a b"


def test_saved_again_a_sentencepiece_model_is_the_same(trained, tmp_path):
    trained.auto.save_pretrained(tmp_path)
    text = "  def f(<s>):\n\treturn é"
    assert type(trained.auto).from_pretrained(tmp_path)(text).input_ids == [1, *trained.raw.encode(text)]


def test_the_check_passes_and_says_how_much(trained, prefixed, folder):
    for out, tokenizer in ((trained.folder, trained.ours), (prefixed.folder, prefixed.ours)):
        assert check_tokenizer(out, tokenizer, transformers=True) > 300_000
    assert check_tokenizer(folder, build_tokenizer("bytes"), transformers=True) > 300_000


@pytest.mark.parametrize("damage", ["merge", "prefix"])
def test_the_check_finds_a_difference(damage, trained, tmp_path):
    content = json.loads((trained.folder / "tokenizer.json").read_text())
    if damage == "merge":
        merges = content["model"]["merges"]
        content["model"]["merges"] = [merge for merge in merges if "".join(merge) != "return"]
    else:
        content["normalizer"]["normalizers"].insert(0, {"type": "Prepend", "prepend": "\u2581"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match="at token"):
        check_tokenizer(tmp_path, trained.ours, transformers=False)


# tokenizer.json


@pytest.fixture
def given_json(tmp_path):
    """A directory with a tokenizer.json as another tool would write it."""
    folder = tmp_path / "given"
    folder.mkdir()
    write_tokenizer(folder, build_tokenizer("bytes"), max_length=5)
    return folder


def test_a_tokenizer_json_is_copied_with_its_config(given_json, tmp_path):
    config = json.loads((given_json / "tokenizer_config.json").read_text()) | {"chat_template": "hello"}
    (given_json / "tokenizer_config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    out.mkdir()
    tokenizer = build_tokenizer(str(given_json / "tokenizer.json"))
    write_tokenizer(out, tokenizer, max_length=77)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (given_json / name).read_bytes()
    assert check_tokenizer(out, tokenizer, transformers=True) > 300_000


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}])
def test_what_a_tokenizer_json_lacks_is_added(config, given_json, tmp_path):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (given_json / name).unlink()
    if config:
        (given_json / "tokenizer_config.json").write_text(json.dumps(config))
    content = json.loads((given_json / "tokenizer.json").read_text())
    content["post_processor"] = {"type": "BertProcessing", "cls": ["<s>", 256], "sep": ["</s>", 257]}
    (given_json / "tokenizer.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(out, build_tokenizer(str(given_json / "tokenizer.json")), max_length=77)
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)
    assert (auto.bos_token_id, auto.eos_token_id) == (256, 257)


def test_truncation_in_a_tokenizer_json_does_not_fail_the_check(given_json):
    other = Tokenizer.from_file(str(given_json / "tokenizer.json"))
    other.enable_truncation(3)
    other.save(str(given_json / "tokenizer.json"))
    check_tokenizer(given_json, build_tokenizer(str(given_json / "tokenizer.json")), transformers=False)


def test_special_tokens_in_a_text_are_text(tmp_path):
    tokenizer = Tokenizer(models.BPE(vocab={"<": 0, "s": 1, ">": 2}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert build_tokenizer(str(tmp_path / "tokenizer.json")).encode("<s>s").tolist() == [0, 1, 2, 1]
