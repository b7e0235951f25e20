"""A tokenizer without a BOS: documents begin with their first token, and end with EOS."""

import dataclasses
import itertools
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lighthouse_core.config import loads_recipe
from lighthouse_core.data import files
from lighthouse_core.data.documents import with_ends
from lighthouse_core.data.loader import build_loader
from lighthouse_core.data.prepare import prepare
from lighthouse_core.data.survey import survey
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError
from lighthouse_core.evaluate.needle import answer, prompt
from lighthouse_core.evaluate.subject import Subject
from lighthouse_core.export import strip
from lighthouse_core.runs.create import create_run
from lighthouse_core.seal import seal

pytestmark = pytest.mark.usefixtures("short_samples")

SEQ, EOS = 40, 256
DOCUMENTS = {f"{i}.txt": f"{i}{'é鍵' * i}" + "\n" * (i % 3) + "x" * (90 * (i % 4 == 3)) for i in range(9)}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tokenizer.json of bytes and <|endoftext|>, whose config says that there is no BOS."""
    folder = tmp_path_factory.mktemp("qwen")
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": None, "eos_token": "<|endoftext|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in DOCUMENTS.items():
        (folder / name).write_text(text)
    return folder


def recipe(qwen, texts, **data):
    data = {"source": "files", "paths": [f"{texts}/*.txt"], "tokenizer": str(qwen), "shuffle": "documents"} | data
    data = {"packing": "concat"} | data
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in ({"validation": 0.0} | data).items())
    return loads_recipe(
        "[model]\ndim = 16\nlayers = 1\nheads = 2\nffn_dim = 24\nvocab_size = 300\n"
        "[lighthouse]\npooling = 2\nlevels = 2\ntopk = 2\ntile_parents = 2\n"
        f"[training]\nseq_len = {SEQ}\nglobal_batch_size = 1\nsteps = 10\n"
        f"[optimizer]\nlr = 1e-3\n[recover]\nsteps = 5\n[data]\n{lines}\n"
    )


def load(recipe, rank=0, ranks=1):
    return build_loader(recipe.data, SEQ, 1, rank, ranks, 0, prefetch=0)


def rows(loader, count):
    """(tokens and the one after them, places) of the next samples."""
    return [
        ([*inputs["input"][0].tolist(), int(labels[0, -1])], inputs["positions"][0].tolist())
        for inputs, labels in itertools.islice(loader, count)
    ]


@given(st.text(min_size=1, max_size=20), st.booleans(), st.booleans())
def test_a_document_is_its_ids_and_eos(qwen, text, first, last):
    tokenizer = build_tokenizer(str(qwen))
    tokens = with_ends(tokenizer, text, first=first, last=last).tolist()
    assert tokens == [*tokenizer.encode(text), *([EOS] if last else [])]


@pytest.mark.parametrize("part", [17, 1 << 22])
def test_the_stream_is_documents_with_eos_between(part, qwen, texts, tmp_path, monkeypatch):
    """Live, on one rank and on two, resumed at every batch, and prepared: the same tokens and places."""
    monkeypatch.setattr(files, "_PART", part)
    tokenizer, made = build_tokenizer(str(qwen)), recipe(qwen, texts)
    count = sum(len(text.encode()) + 1 for text in DOCUMENTS.values()) * 2 // SEQ
    live = rows(load(made), count)
    tokens, places = ([i for row in live for i in row[part][:SEQ]] for part in (0, 1))
    documents, begin = [], 0
    for end in (i for i, token in enumerate(tokens) if token == EOS):
        documents.append(tokenizer.decode(tokens[begin:end]))
        assert places[begin : end + 1] == list(range(end + 1 - begin))
        begin = end + 1
    assert sorted(documents[: len(DOCUMENTS)]) == sorted(DOCUMENTS.values()) and len(documents) > len(DOCUMENTS)
    assert all(ids[-1] == following[0][0] for (ids, _), following in itertools.pairwise(live))

    one, again = load(made), []
    for _ in range(count):
        state, one = one.state_dict(), load(made)
        one.load_state_dict(state)
        again += rows(one, 1)
    assert again == live
    pairs = zip(*(rows(load(made, rank, 2), count // 2) for rank in range(2)), strict=True)
    assert [row for pair in pairs for row in pair] == live[: count // 2 * 2]

    prepare(made, tmp_path / "out", 1, lambda progress: None)
    ready = recipe(qwen, texts, source="tokens", paths=[str(tmp_path / "out")])
    assert rows(load(ready), count) == live


def test_prepared_tokens_are_of_one_kind_of_document(qwen, texts, tmp_path):
    """Tokens that were prepared with a BOS are not those of the same tokenizer without one."""
    shutil.copytree(qwen.parent, tmp_path / "other")
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(config))
    prepare(recipe(qwen, texts), tmp_path / "out", 1, lambda progress: None)
    change = {"source": "tokens", "paths": [str(tmp_path / "out")]}
    assert load(recipe(qwen, texts, **change))
    with pytest.raises(DataError, match="tokenizer"):
        load(recipe(tmp_path / "other" / "tokenizer.json", texts, **change))


@pytest.mark.parametrize("ready", [False, True])
def test_a_survey_shows_the_first_character(ready, qwen, texts, tmp_path):
    made = recipe(qwen, texts)
    if ready:
        prepare(made, tmp_path / "out", 1, lambda progress: None)
        made = recipe(qwen, texts, source="tokens", paths=[str(tmp_path / "out")])
    [found] = survey(made, "train", seconds=60, samples=len(DOCUMENTS), sample_tokens=30)
    assert sorted(found.lengths) == sorted(len(text.encode()) + 1 for text in DOCUMENTS.values())
    shown = sorted(sample.rstrip("\ufffd") for sample in found.samples)
    assert shown == sorted(text.encode()[:30].decode(errors="ignore") for text in DOCUMENTS.values())


@pytest.mark.parametrize("length", [60, 301])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needles_prompt_has_its_length_without_a_bos(length, depth, qwen):
    tokenizer = build_tokenizer(str(qwen))
    subject = Subject("", None, None, tokenizer, 512, torch.device("cpu"))
    question, _ = answer(subject)
    ids = prompt(subject, question, length, depth, 7, np.random.default_rng(0))
    assert len(ids) == length and EOS not in ids
    with_bos = dataclasses.replace(subject, tokenizer=build_tokenizer("bytes"))
    question, _ = answer(with_bos)
    assert prompt(with_bos, question, length, depth, 7, np.random.default_rng(0))[0] == 256
    assert tokenizer.decode(ids).count("digit is 7.") == 1


def test_strip_says_that_there_is_no_bos(qwen, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = create_run(recipe(qwen, texts), "tiny", "first")
    state = {entry.source: torch.full(entry.shape, 0.01) for entry in run.recipe.model.kind.entries(run.recipe.model)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=run.checkpoint_dir(10), no_dist=True)
    seal(run.checkpoint_dir(10))
    report = strip(run.path, tmp_path / "out", allow_unrecovered=True)
    assert any("tokenizer gives the ids" in fact for fact in report.verified)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "out" / name).read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, EOS, 257)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == qwen.read_bytes()
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (auto.bos_token, auto.bos_token_id) == (None, None)
    assert auto("ab").input_ids == build_tokenizer(str(qwen)).encode("ab").tolist()
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").bos_token_id is None
