"""The exported tokenizer files give the ids of the tokenizer that was trained with."""

import json
import os
import random
import re
import shutil
import sysconfig
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from lighthouse_core.data.documents import with_ends
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import ExportError
from lighthouse_core.export.tokenizer import Special, check_tokenizer, pad_token, write_tokenizer

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
    "<pad></s><unk>",
]
# Texts among which special tokens are spelled.
SPELLED = st.lists(st.sampled_from(["<s>", "</s>", "<pad>", "<unk>", "<", "s>", " ", "a"]) | st.text(max_size=3)).map(
    "".join
)


def split_ids(tokenizer, text, special):
    """Training's ids of what stands between the special tokens of a text, and their ids: {spelling: id}."""
    ids = []
    for part in re.split("(" + "|".join(map(re.escape, special)) + ")", text):
        if part:
            ids += [special[part]] if part in special else tokenizer.encode(part).tolist()
    return ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(out, build_tokenizer("bytes"), max_length=77, rows=320)
    return out


@pytest.fixture(scope="module")
def plain(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def auto(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def byte_ids(text):
    return split_ids(build_tokenizer("bytes"), text, {"<s>": 256, "</s>": 257, "<pad>": 258})


@pytest.mark.parametrize("text", MIXED)
def test_ids_are_bytes(text, plain, auto):
    ids = byte_ids(text)
    assert plain.encode(text, add_special_tokens=False).ids == ids
    assert plain.encode(text).ids == [256, *ids]
    assert auto(text, add_special_tokens=False).input_ids == ids
    assert auto(text).input_ids == auto.encode(text) == [256, *ids]


@pytest.mark.parametrize("text", MIXED)
def test_decoding_shows_bos_and_eos_or_leaves_them_out(text, plain, auto):
    ids = [256, *text.encode(), 257]
    assert plain.decode(ids) == auto.decode(ids, skip_special_tokens=True) == text
    assert plain.decode(ids, skip_special_tokens=False) == auto.decode(ids) == f"<s>{text}</s>"


def test_special_tokens_are_decoded_by_name(plain, auto):
    for i, name in ((256, "<s>"), (257, "</s>"), (258, "<pad>")):
        assert plain.decode([i], skip_special_tokens=False) == auto.decode([i]) == auto.decode(i) == name
        assert plain.decode([i]) == auto.decode([i], skip_special_tokens=True) == ""


@given(st.text() | SPELLED)
def test_any_text(plain, auto, text):
    ids = byte_ids(text)
    assert plain.encode(text, add_special_tokens=False).ids == ids == auto(text, add_special_tokens=False).input_ids
    assert plain.encode(text).ids == auto(text).input_ids == auto.encode(text) == [256, *ids]
    assert plain.decode(ids, skip_special_tokens=False) == text == auto.decode(ids)


def test_an_appended_eos_and_a_chat_token_are_one_id(folder, trained):
    """What a trainer does with them: it writes EOS behind an example, and adds tokens for the turns of a chat."""
    for out, ours in ((folder, build_tokenizer("bytes")), (trained.folder, trained.ours)):
        auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)
        assert auto.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]}) == 1
        chat = auto.convert_tokens_to_ids("<|im_start|>")
        ids = auto("<|im_start|>a b" + auto.eos_token).input_ids
        assert ids == [ours.bos_id, chat, *ours.encode("a b"), ours.eos_id]
        assert auto("<s>", split_special_tokens=True, add_special_tokens=False).input_ids == ours.encode("<s>").tolist()


def test_texts_of_different_length_make_a_batch(auto, trained):
    for tokenizer in (auto, trained.auto):
        batch = tokenizer(["a", "a b c"], padding=True)
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        short, long = batch.input_ids
        assert len(short) == len(long) and short[0] == tokenizer.pad_token_id and long[0] == tokenizer.bos_token_id
        assert batch.attention_mask[0] == [int(i != tokenizer.pad_token_id) for i in short]


def test_what_the_config_says_to_other_tools(folder, trained, prefixed):
    """llama.cpp puts a space before every text unless add_prefix_space is false."""
    for out, prefix in ((folder, False), (trained.folder, False), (prefixed.folder, True)):
        config = json.loads((out / "tokenizer_config.json").read_text())
        assert "split_special_tokens" not in config
        assert config.get("add_prefix_space", True) == prefix
        decoder = json.loads((out / "tokenizer.json").read_text())["decoder"]
        assert not any(part["type"] == "Replace" and not part["content"] for part in decoder.get("decoders", ()))


@given(st.binary())
def test_any_bytes_decode_as_in_training(plain, data):
    assert plain.decode(list(data)) == data.decode("utf-8", errors="replace")


def test_vocabulary(plain, auto):
    assert plain.get_vocab_size() == len(auto) == 259
    assert sorted(plain.get_vocab().values()) == list(range(259))
    assert (auto.bos_token, auto.bos_token_id, auto.eos_token, auto.eos_token_id) == ("<s>", 256, "</s>", 257)
    assert (auto.pad_token, auto.pad_token_id) == ("<pad>", 258)
    assert auto.model_max_length == 77
    assert auto.decode([97, 300, 98]) == "ab"


def test_saved_again_it_is_the_same(auto, tmp_path):
    auto.save_pretrained(tmp_path)
    text = "a <s> é"
    again = type(auto).from_pretrained(tmp_path)
    assert again(text).input_ids == [256, *byte_ids(text)]
    assert (again.pad_token_id, again.decode([256])) == (258, "<s>")


# sentencepiece


class Exported:
    """A sentencepiece model, and what was made of it."""

    def __init__(self, path, out):
        out.mkdir()
        self.ours = build_tokenizer(str(path))
        write_tokenizer(out, self.ours, max_length=77, rows=1600)
        self.folder = out
        self.special = {"<s>": self.ours.bos_id, "</s>": self.ours.eos_id, "<unk>": 0}
        self.raw = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
        self.plain = Tokenizer.from_file(str(out / "tokenizer.json"))
        self.auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)

    def check(self, text):
        """Fails unless all four give one answer, but for special tokens that the text spells."""
        assert self.ours.encode(text).tolist() == self.raw.encode(text)
        ids = split_ids(self.ours, text, self.special)
        assert self.plain.encode(text, add_special_tokens=False).ids == ids
        assert self.auto(text, add_special_tokens=False, verbose=False).input_ids == ids
        spelled = any(name in text for name in self.special)
        if not spelled:
            assert self.auto.decode(ids) == self.raw.decode(ids) == text.replace("\u2581", " ")
        elif not self.ours.model.dummy_prefix:  # which puts a space behind special tokens, too
            assert self.auto.decode(ids) == text.replace("\u2581", " ")


@pytest.fixture(scope="session")
def trained(spm, tmp_path_factory):
    return Exported(spm, tmp_path_factory.mktemp("exported") / "trained")


@pytest.fixture(scope="session")
def prefixed(foreign_spm, tmp_path_factory):
    path = foreign_spm("prefix", add_dummy_prefix=True)
    return Exported(path, tmp_path_factory.mktemp("exported") / "prefixed")


def test_a_sentencepiece_model_without_a_bos(foreign_spm, tmp_path):
    exported = Exported(foreign_spm("no-bos", bos_id=-1, add_dummy_prefix=False), tmp_path / "out")
    ids = exported.raw.encode("the cat")
    assert exported.ours.bos_id is None and exported.auto.bos_token is None
    assert with_ends(exported.ours, "the cat").tolist() == [*ids, exported.ours.eos_id]
    assert exported.plain.encode("the cat").ids == exported.auto("the cat").input_ids == ids
    assert check_tokenizer(exported.folder, exported.ours, transformers=True) > 300_000


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
    ids = [exported.ours.bos_id, *split_ids(exported.ours, text, exported.special)]
    assert exported.plain.encode(text).ids == exported.auto(text).input_ids == exported.auto.encode(text) == ids


@given(text=st.text() | SPELLED)
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
    assert trained.plain.decode([1, *trained.raw.encode("a b"), 2], skip_special_tokens=False) == "<s>a b</s>"
    assert (auto.pad_token, auto.pad_token_id) == ("<unk>", 0)


def test_control_pieces_are_special_tokens(foreign_spm, tmp_path):
    out = Exported(foreign_spm("control", control_symbols=["<turn>"], pad_id=3, pad_piece="<|pad|>"), tmp_path / "out")
    turn = out.raw.piece_to_id("<turn>")
    assert out.plain.encode("<turn>", add_special_tokens=False).ids == [turn] != out.raw.encode("<turn>")
    assert out.plain.decode([turn, 3]) == out.raw.decode([turn, 3]) == ""
    assert out.auto.pad_token_id == 3
    check_tokenizer(out.folder, out.ours, transformers=True, rows=1600)


def test_saved_again_a_sentencepiece_model_is_the_same(trained, tmp_path):
    trained.auto.save_pretrained(tmp_path)
    text = "  def f(<s>):\n\treturn é"
    ids = [1, *split_ids(trained.ours, text, trained.special)]
    assert type(trained.auto).from_pretrained(tmp_path)(text).input_ids == ids


def test_the_check_passes_and_says_how_much(trained, prefixed, folder):
    for out, tokenizer in ((trained.folder, trained.ours), (prefixed.folder, prefixed.ours)):
        assert check_tokenizer(out, tokenizer, transformers=True) > 300_000
    assert check_tokenizer(folder, build_tokenizer("bytes"), transformers=True) > 300_000


def damage_merge(content):
    merges = content["model"]["merges"]
    content["model"]["merges"] = [merge for merge in merges if "".join(merge) != "return"]


def damage_prefix(content):
    content["normalizer"]["normalizers"].insert(0, {"type": "Prepend", "prepend": "\u2581"})


def damage_template(content):
    content["post_processor"] = None


def damage_eos(content):
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "</s>"]


def damage_decoder(content):
    content["decoder"]["decoders"].insert(0, {"type": "Replace", "pattern": {"String": "<s>"}, "content": ""})


def damage_space(content):
    content["decoder"]["decoders"] = content["decoder"]["decoders"][1:]


@pytest.mark.parametrize(
    "damage, words",
    [
        (damage_merge, "at token"),
        (damage_prefix, "at token"),
        (damage_template, "given '<s>'"),
        (damage_eos, "</s>"),
        (damage_decoder, "'<s>' to ''"),
        (damage_space, "another text"),
    ],
)
def test_the_check_finds_a_difference(damage, words, trained, tmp_path):
    content = json.loads((trained.folder / "tokenizer.json").read_text())
    damage(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match=words):
        check_tokenizer(tmp_path, trained.ours, transformers=False)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"split_special_tokens": True}, "given '</?s>'"),
        ({"pad_token": None}, "pad"),
        ({"bos_token": None}, "bos_token"),
        ({"eos_token": "<s>"}, "eos_token"),
        ({"tokenizer_class": "NoSuchTokenizer", "auto_map": {"AutoTokenizer": ["a.B", "a.B"]}}, "cannot read"),
    ],
)
def test_the_check_finds_a_config_that_differs(change, words, trained, tmp_path):
    pytest.importorskip("transformers")
    shutil.copytree(trained.folder, tmp_path / "out")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = tmp_path / "out" / name
        content = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in (content | change).items() if value is not None}))
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ExportError, match=words):
        check_tokenizer(tmp_path / "out", trained.ours, transformers=True)


# tokenizer.json

AROUND = {
    "nothing": None,
    "offsets": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
    "bos": processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 256)]),
    "both": processors.BertProcessing(("</s>", 257), ("<s>", 256)),
    "eos": processors.TemplateProcessing(single="$A </s>", pair="$A $B", special_tokens=[("</s>", 257)]),
    "offsets and bos": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 256)]),
        ]
    ),
}


def give(folder, around="bos", special=("<s>", "</s>"), config=None, **more):
    """Write a tokenizer.json as another tool would, of bytes and some merges; returns its path."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= dict.fromkeys(special)
    vocab = {token: i for i, token in enumerate(vocab)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("e", "r"), ("Ġ", "the"), ("Ġ", "Ġ")]
    vocab |= {"".join(pair): len(vocab) + i for i, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    around = AROUND[around]
    if around is not None and not isinstance(around, dict):
        tokenizer.post_processor = around
    content = json.loads(tokenizer.to_str())
    if isinstance(around, dict):
        content["post_processor"] = around
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content | more))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def exported_json(path, rows=320, transformers=True):
    """(directory, tokenizer of training) of what becomes of a tokenizer.json."""
    out = path.parent.with_name(path.parent.name + "-out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    ours = build_tokenizer(str(path))
    write_tokenizer(out, ours, max_length=77, rows=rows, transformers=transformers)
    return out, ours


def load_auto(out):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)


NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
KEPT = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}", "pad_token": "</s>", "mine": 3}


def test_a_tokenizer_json_that_is_right_is_copied_with_its_files(tmp_path):
    path = give(tmp_path / "given", config=NAMES | KEPT)
    (path.parent / "special_tokens_map.json").write_text(json.dumps(NAMES))
    (path.parent / "chat_template.jinja").write_text("{{ messages }}")
    out, ours = exported_json(path)
    for file in path.parent.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    assert check_tokenizer(out, ours, transformers=True, rows=320) > 300_000


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("bos", ["<s>", None])
def test_a_copy_puts_before_a_text_what_training_puts_before_a_document(around, bos, tmp_path):
    path = give(tmp_path / "given", around, config=KEPT | NAMES | {"bos_token": bos})
    out, ours = exported_json(path)
    begin = [256] if bos else []
    assert ours.bos_id == (256 if bos else None)
    right = around in (("bos", "offsets and bos") if bos else ("nothing", "offsets"))
    assert ((out / "tokenizer.json").read_bytes() == path.read_bytes()) == right
    plain, auto = Tokenizer.from_file(str(out / "tokenizer.json")), load_auto(out)
    for text in ("", "the other", "  a\n é"):
        ids = [*begin, *ours.encode(text)]
        assert plain.encode(text).ids == auto(text).input_ids == auto.encode(text) == ids
    assert auto.bos_token == bos and auto.chat_template == KEPT["chat_template"]
    offsets = [plain.encode("a the").offsets, Tokenizer.from_file(str(path)).encode("a the").offsets]
    assert offsets[0][-1] == (1, 5) or around in ("both", "eos", "nothing", "bos"), offsets


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}, {}])
def test_what_a_tokenizer_json_lacks_is_added(config, tmp_path):
    out, ours = exported_json(give(tmp_path / "given", "both", config=config))
    auto = load_auto(out)
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token, auto.pad_token_id) == (256, 257, "<pad>", 264)
    assert auto("the").input_ids == [256, *ours.encode("the")]
    assert len(auto) == 265


def test_ends_that_are_words_of_the_vocabulary_become_special_tokens(tmp_path):
    path = give(tmp_path / "given", config=NAMES)
    content = json.loads(path.read_text())
    hidden = [{"type": "Replace", "pattern": {"String": name}, "content": ""} for name in ("<s>", "</s>")]
    decoder = {"type": "Sequence", "decoders": [*hidden, content["decoder"]]}
    path.write_text(json.dumps(content | {"added_tokens": [], "decoder": decoder}))
    out, ours = exported_json(path)
    plain, auto = Tokenizer.from_file(str(out / "tokenizer.json")), load_auto(out)
    assert plain.decode([256, 257], skip_special_tokens=False) == auto.decode([256, 257]) == "<s></s>"
    assert plain.encode("<s>the</s>").ids == [256, 256, *ours.encode("the"), 257]


@pytest.mark.parametrize("kind", ["trained", "prefixed"])
def test_the_tokenizer_json_of_a_sentencepiece_model(kind, request, tmp_path):
    """An export trained further, from its tokenizer.json: llama.cpp must not put a space before every text."""
    before = request.getfixturevalue(kind)
    (tmp_path / "given").mkdir()
    shutil.copyfile(before.folder / "tokenizer.json", tmp_path / "given" / "tokenizer.json")
    for config in (None, NAMES):
        if config:
            (tmp_path / "given" / "tokenizer_config.json").write_text(json.dumps(config))
        out, ours = exported_json(tmp_path / "given" / "tokenizer.json", rows=1600)
        assert (out / "tokenizer.json").read_bytes() == (before.folder / "tokenizer.json").read_bytes()
        written = json.loads((out / "tokenizer_config.json").read_text())
        assert written.get("add_prefix_space", True) == (kind == "prefixed")
        assert pad_token(ours, 1600) == Special("<unk>", 0)
        for text in ("def f", " a\n"):
            assert load_auto(out)(text).input_ids == [ours.bos_id, *ours.encode(text)]
            assert ours.encode(text).tolist() == before.ours.encode(text).tolist()


@given(
    bos=st.sampled_from(["<s>", None, {"content": "<s>", "__type": "AddedToken"}]),
    keys=st.fixed_dictionaries(
        {},
        optional={
            "add_bos_token": st.booleans(),
            "add_eos_token": st.booleans(),
            "split_special_tokens": st.booleans(),
            "add_prefix_space": st.booleans(),
            "legacy": st.booleans(),
            "clean_up_tokenization_spaces": st.booleans(),
            "pad_token": st.sampled_from(["</s>", "<pad>", "[PAD]", None]),
            "unk_token": st.sampled_from(["<unk>", None]),
            "padding_side": st.sampled_from(["left", "right"]),
            "auto_map": st.just({"AutoTokenizer": ["a.B", "a.B"]}),
            "tokenizer_class": st.sampled_from(
                ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "NoSuchTokenizer"]
            ),
        },
    ),
    around=st.sampled_from(sorted(AROUND)),
)
@settings(max_examples=25)
@example(bos="<s>", keys={"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, around="nothing")
@example(bos=None, keys={"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, around="bos")
@example(bos="<s>", keys={"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, around="offsets")
def test_whatever_the_config_says_ids_are_trainings(tmp_path_factory, bos, keys, around):
    path = give(tmp_path_factory.mktemp("any") / "given", around, config=keys | {"bos_token": bos, "eos_token": "</s>"})
    out, ours = exported_json(path)
    auto, begin = load_auto(out), [256] if bos else []
    for text in ("", "the other", " a  the\n"):
        ids = [*begin, *ours.encode(text)]
        assert auto(text).input_ids == auto.encode(text) == ids
    assert auto("the</s>").input_ids == [*begin, *ours.encode("the"), 257]
    assert (auto.bos_token_id, auto.eos_token_id) == (256 if bos else None, 257)
    assert auto.pad_token_id == pad_token(ours, 320).id and auto.pad_token_id < 320
    written = json.loads((out / "tokenizer_config.json").read_text())
    for key in ("padding_side", "clean_up_tokenization_spaces"):
        assert written.get(key) == keys.get(key)


def test_truncation_in_a_tokenizer_json_does_not_fail_the_check(tmp_path):
    path = give(tmp_path / "given", config=NAMES)
    other = Tokenizer.from_file(str(path))
    other.enable_truncation(3)
    other.save(str(path))
    out, ours = exported_json(path)
    check_tokenizer(out, ours, transformers=False)


def test_special_tokens_in_a_text_are_text(tmp_path):
    tokenizer = Tokenizer(models.BPE(vocab={"<": 0, "s": 1, ">": 2}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert build_tokenizer(str(tmp_path / "tokenizer.json")).encode("<s>s").tolist() == [0, 1, 2, 1]


# the pad token


def test_the_pad_token_is_one_that_training_never_produces(trained, prefixed, foreign_spm):
    assert pad_token(build_tokenizer("bytes"), 320) == Special("<pad>", 258)
    assert pad_token(build_tokenizer("bytes"), 258) == Special("</s>", 257)
    assert pad_token(trained.ours, 1500) == pad_token(prefixed.ours, 340) == Special("<unk>", 0)
    lossy = build_tokenizer(str(foreign_spm("nobytes", byte_fallback=False, vocab_size=60)))
    assert 0 in lossy.encode("中").tolist()  # the unknown piece is one of training's
    assert pad_token(lossy, 64) == Special("<pad>", lossy.vocab_size)
    assert pad_token(lossy, lossy.vocab_size) == Special("</s>", 2)


@pytest.mark.parametrize(
    "special, config, rows, pad",
    [
        (("<s>", "</s>"), NAMES, 320, ("<pad>", 264)),
        (("<s>", "</s>"), NAMES, 264, ("</s>", 257)),
        (("<s>", "</s>", "<|pad|>"), NAMES, 320, ("<|pad|>", 258)),
        (("<s>", "</s>", "<|reserved_special_token_0|>"), NAMES, 265, ("<|reserved_special_token_0|>", 258)),
        (("<s>", "</s>", "<padlock>"), NAMES | {"pad_token": "<s>"}, 320, ("<s>", 256)),
        (("<s>", "</s>"), NAMES | {"pad_token": "[PAD]"}, 320, ("[PAD]", 264)),
        (("<s>", "</s>"), NAMES | {"pad_token": "[PAD]"}, 264, ("</s>", 257)),
        (("<s>", "</s>"), NAMES | {"pad_token": {"content": "</s>"}}, 320, ("</s>", 257)),
        # Other tokens that are added take the first row.
        (("<s>", "</s>"), NAMES | {"additional_special_tokens": ["<x>"]}, 320, ("</s>", 257)),
    ],
)
def test_the_pad_token_of_a_tokenizer_json(special, config, rows, pad, tmp_path):
    out, ours = exported_json(give(tmp_path / "given", special=special, config=config), rows)
    assert pad_token(ours, rows) == Special(*pad)
    auto = load_auto(out)
    assert (auto.pad_token, auto.pad_token_id) == pad
    assert max(map(max, auto(["the", "a the other"], padding=True).input_ids)) < rows
