"""A model that goes on with its own tokenizer: what training makes of it, and its files again in an export."""

import itertools
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from model_files import bpe_model
from test_families import made
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lighthouse_core.config import loads_recipe
from lighthouse_core.config.origin import TOKENIZER_FILES
from lighthouse_core.data.checks import check, checked_tokenizer
from lighthouse_core.data.loader import build_loader
from lighthouse_core.data.prepare import prepare
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError, ExportError, RecipeError
from lighthouse_core.export import strip
from lighthouse_core.export.tokenizer import given_files, write_tokenizer
from lighthouse_core.models import FAMILIES
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.run import Run
from lighthouse_core.seal import seal
from lighthouse_core.weights.origin import find_weights

pytestmark = pytest.mark.usefixtures("short_samples")

SEQ, ROWS = 256, 400
TEXTS = [
    "the quick  brown fox\n\n it's 12345 e\u0301 ü 中文\x00 👩\u200d👧",
    "<s> </s> [/INST] x\r\n\tdef f(x):\n    return x",
    "héllo wörld " * 12,
    "a",
]
WORDS = ["the quick brown fox jumps 12345 times; def f(x):\n    return x"] * 20 + TEXTS * 3
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def added(tokenizer):
    """added_tokens_decoder, as tokenizer_config.json has it."""
    return {str(i): token.__getstate__() for i, token in tokenizer.get_added_tokens_decoder().items()}


def byte_level(digits, special, normalizer=None):
    """Byte-level BPE; `special` stands above what was learnt."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=normalizer is None))
    tokenizer.normalizer = normalizer
    cut = pre_tokenizers.Split(Regex(SPLIT % digits), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    return tokenizer


def begins(tokenizer, bos):
    token = [(bos, tokenizer.token_to_id(bos))]
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=token)


def llama_3(folder):
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|eot_id|>"]
    tokenizer = byte_level("{1,3}", special)
    tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, begins(tokenizer, special[0])])
    config = {
        "added_tokens_decoder": added(tokenizer),
        "bos_token": special[0],
        "eos_token": special[3],
        "clean_up_tokenization_spaces": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{{ messages }}",
    }
    ends = [tokenizer.token_to_id(one) for one in (special[1], special[3])]
    return write(folder, tokenizer, config, ends)


def qwen(folder):
    tokenizer = byte_level("", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizers.NFC())
    tokenizer.add_tokens(["<tool_call>"])  # no special one
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added(tokenizer),
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab(with_added_tokens=False)))
    return write(folder, tokenizer, config, tokenizer.token_to_id("<|im_end|>"))


def smol(folder):
    """Names a BOS that its post-processor does not put before a text."""
    tokenizer = byte_level("", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"}
    return write(folder, tokenizer, config, tokenizer.token_to_id("<|im_end|>"))


def llama_2(folder, **changes):
    """Converted from sentencepiece: byte fallback, a space before every text, <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=110, show_progress=False))
    learnt = json.loads(tokenizer.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(learnt["vocab"], key=learnt["vocab"].get)
    tokenizer.model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in learnt["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in tokens[:3]])
    tokenizer.post_processor = begins(tokenizer, "<s>")
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    names = {
        key: {"content": one, **flags}
        for key, one in zip(("unk_token", "bos_token", "eos_token"), tokens, strict=False)
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    config = {key: {"__type": "AddedToken", **name} for key, name in names.items()}
    config |= {"add_bos_token": True, "add_eos_token": False, "legacy": False, "sp_model_kwargs": {}}
    return write(folder, tokenizer, config | {"pad_token": None, "tokenizer_class": "LlamaTokenizer"} | changes, 2)


def model_only(folder):
    """No tokenizer.json: a sentencepiece model, and the names beside it."""
    pieces = [("▁", -1e3), *((char, -1e3 - i) for i, char in enumerate("abcdeht", 1)), ("th", -1.0), ("the", -2.0)]
    (folder / "tokenizer.model").write_bytes(bpe_model(pieces, dummy_prefix=True))
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    return write(folder, None, config, 2)


def write(folder, tokenizer, config, ends):
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ends


SHAPES = [
    ("llama", llama_3),
    ("llama", llama_2),
    ("mistral", llama_3),
    ("mistral", llama_2),
    ("llama", smol),
    ("llama", model_only),
    ("qwen2", qwen),
    ("qwen3", qwen),
]
BEGIN = {llama_3: "<|begin_of_text|>", llama_2: "<s>", model_only: "<s>", smol: None, qwen: None}


def given(path, family, shape, rows=ROWS):
    """A model's directory with a tokenizer of that shape."""
    path.mkdir()
    made(path, family, vocab_size=rows)
    ends = shape(path)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(content | {"bos_token_id": 7, "eos_token_id": ends, "pad_token_id": None}))
    return path


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number}.txt").write_text(text, newline="")
    return tmp_path / "texts"


def recipe(origin, texts, *settings, **data):
    data = {"source": "files", "paths": [f"{texts}/*.txt"], "validation": 0.0, "packing": "concat"} | data
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in ({"shuffle": "documents"} | data).items())
    return loads_recipe(
        f"[model]\n{f'from = {json.dumps(str(origin))}' if origin else 'dim = 12'}\n"
        "[lighthouse]\npooling = 2\nlevels = 2\ntopk = 2\ntile_parents = 2\nwindow = 8\n"
        f"[training]\nseq_len = {SEQ}\nglobal_batch_size = 1\nsteps = 10\n"
        f"[optimizer]\nlr = 1e-3\n[recover]\nsteps = 5\n[data]\n{lines}\n",
        [f"output.dir='{texts.parent}/runs'", *settings],
    )


def begun(made_recipe, name="first"):
    """A run with the weights that it begins with as its checkpoint of step 0."""
    weights = find_weights(made_recipe.model)
    run = create_run(made_recipe, "tiny", name, weights=weights.facts)
    state = {entry.source: weights.read(entry.source) for entry in run.recipe.model.kind.entries(run.recipe.model)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=run.checkpoint_dir(0), no_dist=True)
    seal(run.checkpoint_dir(0))
    return Run(run.path)


def auto(path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(path)


def documents(made_recipe, count, eos):
    """The first documents of training, as ids with their EOS."""
    loader = build_loader(made_recipe.data, SEQ, 1, 0, 1, 0, prefetch=0, align=made_recipe.alignment)
    found, document = [], []
    for inputs, labels in loader:
        # Padding, where documents are kept apart, is what no label asks for.
        row = [*inputs["input"][0].tolist(), int(labels[0, -1])][:SEQ]
        for place, token in zip(inputs["positions"][0].tolist(), row, strict=True):
            if place == 0 and document:
                found.append(document)
                document = []
            document.append(token)
        if len(found) >= count:
            return [one[: one.index(eos) + 1] for one in found[:count]]


@pytest.mark.parametrize(
    ("family", "shape", "packing"), [(*one, ("concat", "documents")[i % 2]) for i, one in enumerate(SHAPES)]
)
def test_documents_are_what_transformers_makes_of_the_directory_and_eos(family, shape, packing, texts, tmp_path):
    path = given(tmp_path / "model", family, shape)
    theirs, live = auto(path), recipe(path, texts, packing=packing)
    assert live.data.tokenizer == str(path) and check(live) == []
    tokenizer = checked_tokenizer(live)
    assert tokenizer.eos_id == theirs.eos_token_id
    assert tokenizer.bos_id == (theirs.convert_tokens_to_ids(BEGIN[shape]) if BEGIN[shape] else None)
    assert theirs("").input_ids == [tokenizer.bos_id] * (tokenizer.bos_id is not None)
    # A text that spells a special token is its characters in training.
    spelt = [theirs(text, split_special_tokens=True).input_ids for text in TEXTS]
    seen = documents(live, len(TEXTS), tokenizer.eos_id)
    assert sorted(seen) == sorted([*ids, tokenizer.eos_id] for ids in spelt)

    prepare(live, tmp_path / "out", 1, lambda progress: None)
    ready = recipe(path, texts, source="tokens", paths=[str(tmp_path / "out")], packing=packing)
    assert documents(ready, len(TEXTS), tokenizer.eos_id) == seen
    # The run has the same tokenizer, and takes the same prepared tokens.
    run = begun(ready)
    shutil.rmtree(path)
    assert documents(run.recipe, len(TEXTS), tokenizer.eos_id) == seen


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_an_export_has_the_files_that_came(family, shape, texts, tmp_path):
    path = given(tmp_path / "model", family, shape)
    came = {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
    if family == "mistral":
        # What is written instead has the ids of config.json.
        (path / "generation_config.json").unlink()
    again = recipe(begun(recipe(path, texts)).path, texts)  # of a run, which passes on what it has
    run = begun(again, "second")
    ids = json.loads((path / "config.json").read_text())
    shutil.rmtree(path)
    report = strip(run.path, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    others = {"config.json", "generation_config.json", "lighthouse.json", "model.safetensors"}
    assert names == {*came, *others}
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in came.items())
    assert any("files of the tokenizer are those" in fact for fact in report.verified)
    # transformers 5 reads a Llama 2 by a class of its own, which takes a space at the beginning of a text away.
    told = [text for text in report.warnings if "AutoTokenizer disagrees" in text]
    assert len(report.warnings) == len(told) <= (shape in (llama_2, model_only))
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "out" / name).read_text())
        assert [written[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")] == [
            7,
            ids["eos_token_id"],
            None,
        ]


KINDS = ("bytes", "model", "json")
QUICK = {("llama", "model"), ("mistral", "json"), ("qwen3", "bytes"), *(("qwen2", kind) for kind in KINDS)}


@pytest.mark.parametrize(
    ("family", "kind"),
    [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in itertools.product(FAMILIES, KINDS)],
)
def test_another_tokenizer_is_exported_with_its_own_ids(family, kind, texts, foreign_spm, tmp_path):
    path = given(tmp_path / "model", family, qwen)
    name = kind
    if kind == "model":
        name = str(foreign_spm("prefix", add_dummy_prefix=True))
    if kind == "json":
        (tmp_path / "other").mkdir()
        llama_2(tmp_path / "other")
        name = str(tmp_path / "other")
    run = begun(recipe(path, texts, tokenizer=name))
    report = strip(run.path, tmp_path / "out")
    assert any("tokenizer gives the ids of training" in fact for fact in report.verified)
    ours, theirs = build_tokenizer(run.recipe.data.tokenizer), auto(tmp_path / "out")
    for text in ("", "e\u0301 1234", "  a\n", "the quick"):
        assert theirs(text).input_ids == [ours.bos_id, *ours.encode(text)]
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    for file in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "out" / file).read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (ours.bos_id, ours.eos_id)


def test_a_chat_template_of_the_users_is_exported(tmp_path):
    path = given(tmp_path / "model", "qwen3", qwen)
    other, out = shutil.copytree(path, tmp_path / "other"), tmp_path / "out"
    tokenizer = build_tokenizer(str(other))
    assert given_files(path, tokenizer, str(other))
    (other / "chat_template.jinja").write_text("mine")
    assert not given_files(path, tokenizer, str(other))
    out.mkdir()
    write_tokenizer(out, tokenizer, max_length=SEQ, rows=ROWS)
    assert (out / "chat_template.jinja").read_text() == "mine"


def test_a_models_tokenizer_is_the_same_in_a_run_that_begins_anew(texts, tmp_path):
    """Whether documents begin with a BOS is known in the run, too, which keeps no weights' files."""
    path = given(tmp_path / "model", "llama", smol)
    shape = ["model.dim=12", "model.layers=1", "model.heads=2", "model.ffn_dim=20", "model.vocab_size=400"]
    live = recipe(None, texts, *shape, tokenizer=str(path))
    run = create_run(live, "tiny", "anew")
    own, named = build_tokenizer(run.recipe.data.tokenizer), build_tokenizer(str(path))
    assert own.fingerprint == named.fingerprint and own.bos_id is None
    moved = run.path.rename(run.path.with_name("moved"))
    assert build_tokenizer(Run(moved).recipe.data.tokenizer).fingerprint == own.fingerprint
    # Apart from a model, what tokenizer_config.json names is BOS.
    (path / "config.json").unlink()
    assert build_tokenizer(str(path)).bos == "<|im_start|>"


@pytest.mark.parametrize(
    ("config", "generation", "said"),
    [
        ({"eos_token_id": 290}, None, "stops at 290"),
        ({"eos_token_id": None}, None, "has no eos_token_id"),
        ({"eos_token_id": [291, "eos"]}, {"eos_token_id": 290}, "stops at 290"),
        ({"eos_token_id": 290}, {"eos_token_id": ["eos"]}, None),
        ({"eos_token_id": 290}, {}, "stops at 290"),
        ({"eos_token_id": 290}, {"eos_token_id": "both"}, ""),
    ],
    ids=str,
)
def test_an_eos_at_which_the_model_does_not_stop_is_told(config, generation, said, texts, tmp_path):
    path = given(tmp_path / "model", "llama", llama_3)
    eos = build_tokenizer(str(path)).eos_id
    if said is None:
        for name, change in (("config.json", {"eos_token_id": 1}), ("generation_config.json", generation)):
            (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | change))
        with pytest.raises(RecipeError, match=r"generation_config\.json: eos_token_id"):
            check(recipe(path, texts))
        return
    config_json = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config_json | config))
    (path / "generation_config.json").unlink()
    if generation is not None:
        ends = [290, eos] if generation.get("eos_token_id") == "both" else generation.get("eos_token_id")
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends} if generation else {}))
    notes = check(recipe(path, texts))
    assert [f"token {eos}" in note and said in note for note in notes] == [True] * bool(said)
    assert check(recipe(path, texts, tokenizer="bytes")) == []


def test_more_ids_than_rows_are_refused_and_fewer_are_not(texts, tmp_path):
    path = given(tmp_path / "model", "llama", llama_3, rows=294)
    assert build_tokenizer(str(path)).vocab_size == 294
    assert check(recipe(path, texts)) == []
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save(str(path / "tokenizer.json"))
    with pytest.raises(DataError, match="294 is less than the 295 ids") as caught:
        check(recipe(path, texts))
    assert "no row" in caught.value.hint


def test_two_tokens_before_a_text_are_refused(tmp_path):
    path = given(tmp_path / "model", "llama", llama_3)
    content = json.loads((path / "tokenizer.json").read_text())
    template = content["post_processor"]["processors"][1]
    template["single"] = template["single"][:1] * 2 + template["single"][1:]
    (path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="more before a text than one token"):
        build_tokenizer(str(path))


def test_files_that_do_not_give_trainings_ids_are_not_published(texts, tmp_path, monkeypatch):
    path = given(tmp_path / "model", "llama", llama_3)
    run = begun(recipe(path, texts))
    copy = shutil.copyfile

    def damage(source, target):
        copy(source, target)
        if Path(target).name == "tokenizer.json":
            content = json.loads(Path(target).read_text())
            content["normalizer"] = {"type": "Lowercase"}
            Path(target).write_text(json.dumps(content))

    monkeypatch.setattr(shutil, "copyfile", damage)
    with pytest.raises(ExportError, match=r"tokenizer\.json disagrees"):
        strip(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
