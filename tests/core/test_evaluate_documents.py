"""Measures of text whose documents are kept apart: what each figure counts, and that no document changes another's."""

import json
import random
import warnings
from itertools import pairwise
from math import exp, log

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.nn.functional import cross_entropy

from lighthouse_core.attention import AttentionContext, Documents
from lighthouse_core.attention.context import selection_keys
from lighthouse_core.config import loads_recipe
from lighthouse_core.data.loader import build_loader
from lighthouse_core.data.tokenizer import BytesTokenizer
from lighthouse_core.errors import UserError
from lighthouse_core.evaluate import PackedSequence, Subject, Text, evaluate, leak_across
from lighthouse_core.evaluate.load import load_checkpoint, load_directory
from lighthouse_core.evaluate.loss import bits_per_byte, by_position, per_sequence, short_context_of_documents
from lighthouse_core.evaluate.report import held_out
from lighthouse_core.export.publish import strip
from lighthouse_core.models.decoder import build_dense_model, lighthouse_layers
from lighthouse_core.models.labels import IGNORED
from lighthouse_core.runs.create import create_run
from lighthouse_core.seal import seal

CPU, VOCABULARY = torch.device("cpu"), 258
BOS, EOS = BytesTokenizer.bos_id, BytesTokenizer.eos_id
RECIPE = """
[model]
dim = 16
layers = 2
heads = 2
kv_heads = 1
ffn_dim = 16
vocab_size = 264
embedding_std = 1.0
[lighthouse]
method = "sliding"
window = 16
[data]
source = "files"
validation = 0.7
packing = "documents"
[training]
seq_len = 256
global_batch_size = 1
steps = 10
dtype = "float32"
[optimizer]
lr = 1e-3
"""
PYRAMID = ["lighthouse.window=8", "lighthouse.pooling=2", "lighthouse.levels=3", "lighthouse.topk=16",
           "lighthouse.tile_parents=4", 'lighthouse.method="pyramid"', "lighthouse.score_block=8"]  # fmt: skip
KINDS = {
    "dense": ["lighthouse.enabled=false"],
    "sliding": [],
    "chunked": ['lighthouse.method="chunked"', "lighthouse.window=48"],
    "random": [*PYRAMID, 'lighthouse.scorer="random"'],
    "block": [*PYRAMID, 'lighthouse.scorer="block"'],
    "norm": [*PYRAMID, 'lighthouse.scorer="norm"'],
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a run with a checkpoint of initial weights, and text in documents of 3 to 900 tokens."""
    draw = random.Random(0)
    (tmp_path / "text").mkdir()
    for number in range(4):
        sizes = [draw.choice([1, 2, 5, 13, 40, 100, 250, 900]) for _ in range(60)]
        lines = ({"text": "".join(draw.choices("abcdef \u00e9", k=size))} for size in sizes)
        (tmp_path / f"text/{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)

    def make(*settings, step=10):
        recipe = loads_recipe(RECIPE, (f'data.paths=["{tmp_path}/text/*.jsonl"]', *settings))
        run = create_run(recipe, "tiny", "tiny")
        model = build_dense_model(recipe.model, recipe.training.seq_len)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            model.init_weights()
            for name, weight in model.named_parameters():
                if "attention.w" in name:
                    # Initial weights attend to all tokens alike.
                    weight *= 10
            dcp.save(dict(model.named_parameters()), checkpoint_id=run.checkpoint_dir(step), no_dist=True)
        seal(run.checkpoint_dir(step))
        return run

    return make


def pieces(row: torch.Tensor) -> list[tuple[int, int]]:
    """(first token, one behind the last) of the documents of a sequence [N], padding left out, by its tokens alone."""
    ids = row.tolist()
    bounds = sorted({0, len(ids), *(i for i, token in enumerate(ids) if token == BOS)})
    return [(a, ids.index(EOS, a, b) + 1 if EOS in ids[a:b] else b) for a, b in pairwise(bounds)]


@pytest.mark.parametrize("kind", ["dense", "sliding"])
@pytest.mark.parametrize("align", [1, 16])
def test_a_loss_is_that_of_its_document_alone(make, kind, align):
    subject, recipe = load_checkpoint(make(*KINDS[kind]).path, attention="trained", device=CPU)
    text = held_out(recipe.data, subject, 256, 5, align)
    lengths = {end - start for row in text.tokens for start, end in pieces(row)}
    assert min(lengths) <= 7 and max(lengths) == 256
    report = evaluate(subject, recipe.data, tokens=256, sequences=5, measures=("loss",), align=align)
    means, bits, bytes_, places = [], 0.0, 0, {}
    for row in text.tokens:
        found = []
        for start, end in pieces(row):
            assert start == 0 or (start % align == 0 and row[start] == BOS)
            ids = row[None, start:end]
            with torch.no_grad():
                losses = cross_entropy(subject.head(subject.hidden(ids))[0, :-1], ids[0, 1:], reduction="none")
            found += losses.tolist()
            bytes_ += int((ids[0, 1:] < 256).sum())
            for place, loss in enumerate(losses.tolist(), 1):
                places.setdefault(place.bit_length(), {}).setdefault(len(means), []).append(loss)
        means.append(sum(found) / len(found))
        bits += sum(found) / log(2)
    assert report["data"]["packing"] == "documents"
    assert report["loss"]["per_sequence"] == pytest.approx(means, rel=1e-5)
    assert report["loss"]["nats_per_token"]["mean"] == pytest.approx(sum(means) / 5, rel=1e-5)
    assert report["loss"]["bits_per_byte"]["mean"] == pytest.approx(bits / bytes_, rel=1e-5)
    assert report["data"]["counted"] == sum(len(x) for rows in places.values() for x in rows.values())
    bins = [(part["first"].bit_length(), part["loss"]) for part in report["by_position"]]
    assert [number for number, _ in bins] == sorted(places)
    for number, loss in bins:
        of_rows = [sum(x) / len(x) for x in places[number].values()]
        assert loss["mean"] == pytest.approx(sum(of_rows) / len(of_rows), rel=1e-5)
        assert loss["sequences"] == len(of_rows)


@pytest.mark.parametrize("kind", ["random", "chunked"])
def test_a_loss_is_that_of_training(make, kind):
    subject, recipe = load_checkpoint(make(*KINDS[kind]).path, attention="trained", device=CPU)
    loader = build_loader(recipe.data, 256, 1, 0, 1, 0, "validation", align=recipe.alignment, prefetch=0)
    key = selection_keys(recipe.training.seed, 0, 0, 2)
    for _, (inputs, labels) in zip(range(4), loader, strict=False):
        context = AttentionContext(key=key, documents=inputs["documents"], positions=inputs["positions"])
        with torch.no_grad():
            logits = subject.model(inputs["input"], context=context)[0, :-1]
        labels = labels[0, :-1]
        expected = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        sequence = PackedSequence.of(inputs, labels=torch.cat((labels, labels[:1]))[None])
        found = subject.losses(inputs["input"], packed=sequence)[0]
        counts = sequence.before > 0
        assert torch.equal(counts, labels != IGNORED) and counts.any()
        torch.testing.assert_close(found[counts], expected[counts])


def test_a_run_and_its_export_give_the_same_figures(make, tmp_path):
    pytest.importorskip("transformers")
    run = make(*KINDS["dense"])
    strip(run.path, tmp_path / "out", dtype="float32")
    own, recipe = load_checkpoint(run.path, attention="trained", device=CPU)
    exported = load_directory(tmp_path / "out", device=CPU)
    # Documents begin where those of a pyramid would.
    options = {"tokens": 256, "sequences": 4, "context": 32, "trials": 1, "align": 4}
    options |= {"measures": ("loss", "context", "needles", "leak")}
    one, other = (evaluate(subject, recipe.data, **options) for subject in (own, exported))
    one.pop("subject"), other.pop("subject")
    check_close(one, other)
    assert one["context"]["gain"]["mean"] != 0 and one["data"]["documents"] > 8
    assert {row["replaced"] for row in other["leak_across"]} == {"earlier", "later"}
    assert all(row["largest"] == 0 for row in one["leak_across"] + other["leak_across"])
    # Of concatenated text the losses are others.
    data = recipe.data.model_copy(update={"packing": "concat"})
    whole = evaluate(exported, data, tokens=256, sequences=4, measures=("loss",))
    assert whole["loss"]["nats_per_token"]["mean"] != pytest.approx(one["loss"]["nats_per_token"]["mean"], rel=1e-3)
    assert whole["data"]["packing"] == "concat" and "counted" not in whole["data"]


def check_close(one, other):
    """The same structure, with numbers that differ by no more than float32 makes them."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            check_close(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5, nan_ok=True)
    else:
        assert one == other


@pytest.mark.parametrize("kind", KINDS)
def test_the_leak_across_documents(make, kind):
    subject, recipe = load_checkpoint(make(*KINDS[kind]).path, attention="trained", device=CPU)
    options = {"tokens": 256, "sequences": 3, "measures": ("leak",), "align": recipe.alignment}
    report = evaluate(subject, recipe.data, **options)
    assert [row["replaced"] for row in report["leak_across"]] == ["earlier", "later"]
    assert all(row["pairs"] > 100 for row in report["leak_across"])
    leaks = [row["largest"] > 0 for row in report["leak_across"]]
    assert subject.leaky == (kind == "norm")
    # Which windows a tile keeps depends on all of its documents.
    assert leaks == [subject.leaky] * 2
    assert any(row["largest"] > 0 for row in report["leak"]) == subject.leaky


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "backend"), [("float32", "math"), ("bfloat16", "auto")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_leak_across_documents_on_a_gpu(make, kind, dtype, backend):
    """Exactly 0 with the kernels of training, too: nothing of a document depends on another one, not even rounding."""
    settings = ("model.dim=128", f'lighthouse.dense_backend="{backend}"', f'training.dtype="{dtype}"')
    subject, recipe = load_checkpoint(make(*KINDS[kind], *settings).path, attention="trained")
    assert subject.device.type == "cuda"
    text = held_out(recipe.data, subject, 256, 3, recipe.alignment)
    lines = text.packed_sequences

    def losses(tokens, targets):
        rows = zip(Text(tokens, lines), targets.split(1), strict=True)
        return torch.cat([subject.losses(row, target, packed) for (row, packed), target in rows])

    assert torch.equal(losses(text.tokens, text.tokens), losses(text.tokens, text.tokens)), "the kernel itself varies"
    rows = leak_across(losses, text.tokens, text.tokens.roll(1, 0), lines)
    assert [row.replaced for row in rows] == ["earlier", "later"] and all(row.pairs > 100 for row in rows)
    assert subject.leaky == (kind == "norm")
    if not subject.leaky:
        assert [row.largest for row in rows] == [0, 0]


def packed(*lengths: int, align: int = 1) -> PackedSequence:
    """Documents of these lengths, each padded to a multiple of `align`."""
    starts, before = [0], []
    for length in lengths:
        whole = length + -length % align
        starts.append(starts[-1] + whole)
        before += [*range(length), *[0] * (whole - length)]
    documents = Documents(torch.tensor(starts, dtype=torch.int32), starts[-1])
    return PackedSequence(documents, torch.arange(starts[-1], dtype=torch.int32)[None], torch.tensor(before[1:]))


def subject_of(hidden, **others) -> Subject:
    return Subject("it", hidden, lambda states: states, BytesTokenizer(), 512, CPU, **others)


def after_nine(tokens):
    """Expects a 1 once there was a 9."""
    logits = torch.zeros(*tokens.shape, VOCABULARY)
    logits[..., 1] = 10.0 * (tokens == 9).long().cumsum(1).clamp(max=1)
    return logits


def before_nine(tokens):
    """Expects a 1 as long as a 9 follows."""
    return after_nine(tokens.flip(1)).flip(1)


def test_the_leak_across_documents_is_measured_exactly():
    text = torch.ones(3, 24, dtype=torch.int64)
    packed_sequences = [packed(8, 8, 8), packed(3, 21), packed(24)]
    # What an expected 1 costs less than one of which nothing is known.
    gain = log(VOCABULARY) - log(1 + (VOCABULARY - 1) * exp(-10))

    def rows(hidden, mixes):
        subject = subject_of(hidden, packed=(lambda tokens, sequence: hidden(tokens)) if mixes else None)

        def losses(tokens, targets):
            lines = zip(Text(tokens, tuple(packed_sequences)), targets.split(1), strict=True)
            return torch.cat([subject.losses(row, target, sequence) for (row, sequence), target in lines])

        return leak_across(losses, text, torch.full_like(text, 9), packed_sequences)

    # Each of the first sequence's documents is before or behind one or two others of 7 targets.
    pairs = [("earlier", 3 * 7 + 20), ("later", 3 * 7 + 2)]
    for hidden, mixes, changed in ((after_nine, False, None), (after_nine, True, 0), (before_nine, True, 1)):
        found = rows(hidden, mixes)
        assert [(row.replaced, row.pairs) for row in found] == pairs
        for number, row in enumerate(found):
            expected = -gain if number == changed else 0
            assert row.mean == pytest.approx(expected, abs=1e-5)
            assert row.largest == (pytest.approx(gain, abs=1e-5) if number == changed else 0)


def test_of_one_document_there_is_no_leak_across():
    text = torch.zeros(2, 8, dtype=torch.int64)
    assert leak_across(lambda tokens, targets: torch.zeros(2, 7), text, text, [packed(8)] * 2) == []


def test_what_counts():
    sequence = packed(3, 6, 1, align=4)
    assert sequence.before.tolist() == [1, 2, 0, 0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0]
    assert sequence.spans == [(0, 4), (4, 12), (12, 16)]
    losses = torch.arange(15.0)[None]
    before = sequence.before[None]
    counted = [0, 1, 4, 5, 6, 7, 8]
    assert per_sequence(losses, before).tolist() == [sum(counted) / 7]
    bins = [(part.first, part.last, part.loss.mean) for part in by_position(losses, before)]
    assert bins == [(1, 1, 2.0), (2, 3, (1 + 5 + 6) / 3), (4, 5, 7.5)]
    tokens = torch.full((1, 16), 65)
    found = bits_per_byte(subject_of(after_nine), tokens, losses, before)
    assert found.mean == pytest.approx(sum(counted) / log(2) / 7)
    # A sequence without a token in a bin is none of its sequences.
    two = torch.stack((sequence.before, packed(16).before))
    assert [part.loss.sequences for part in by_position(losses.repeat(2, 1), two)] == [2, 2, 2, 1]


def repeats(tokens):
    """Predicts what came 20 tokens before the next one."""
    known = torch.full_like(tokens, 257)
    known[:, 19:] = tokens[:, : tokens.shape[1] - 19]
    return torch.nn.functional.one_hot(known, VOCABULARY) * 100.0 * (known < 257)[..., None]


@pytest.mark.parametrize("context", [8, 32])
def test_far_tokens_are_those_of_the_document(context):
    generator = torch.Generator().manual_seed(0)
    lengths = (90, 9, 70)
    texts = [torch.randint(256, (20,), generator=generator).repeat(5)[:length] for length in lengths]
    sequence = packed(*lengths)
    text = Text(torch.cat(texts)[None], (sequence,))
    model = subject_of(repeats)
    losses = model.losses(text.tokens, packed=sequence)
    found = short_context_of_documents(model, text.tokens, losses, context, text.packed_sequences)
    # Of each long document, the tokens with more than `context` before them; the first 20 cannot be known.
    beyond = 89 - context + 69 - context
    unknown, unseen = (2 * 11, beyond) if context == 8 else (0, 0)
    if context == 32:
        # Those that have fewer than 20 of a window before them.
        unseen = sum(16 + (place - 16) % 16 < 19 for n in (90, 70) for place in range(32, n - 1))
    assert found.full.mean == pytest.approx(log(VOCABULARY) * unknown / beyond, abs=1e-5)
    assert found.short.mean == pytest.approx(log(VOCABULARY) * unseen / beyond, abs=1e-5)
    assert short_context_of_documents(model, text.tokens, losses, 90, text.packed_sequences) is None


def test_documents_without_far_tokens(make):
    run = make()
    subject, recipe = load_checkpoint(run.path, attention="trained", device=CPU)
    for number in range(4):
        file = run.path.parents[1] / f"text/{number}.jsonl"
        file.write_text("".join(json.dumps({"text": "ab" * (1 + i % 5)}) + "\n" for i in range(500)))
    report = evaluate(subject, recipe.data, tokens=256, sequences=2, context=32, measures=("context",))
    assert "more than 33 tokens" in report["context"]["left_out"] and report["context"]["context"] == 32


def test_the_switch_keeps_documents_apart(make):
    run = make(*KINDS["chunked"])
    trained, recipe = load_checkpoint(run.path, attention="trained", device=CPU)
    dense, _ = load_checkpoint(run.path, attention="dense", device=CPU)
    options = {"tokens": 256, "sequences": 3}
    switch = evaluate(trained, recipe.data, measures=("switch",), **options)["switch"]
    loss = evaluate(dense, recipe.data, measures=("loss",), **options)["loss"]["nats_per_token"]
    assert switch["dense"]["mean"] == pytest.approx(loss["mean"], rel=1e-6)
    assert abs(switch["jump"]["mean"]) > 1e-4
    assert all(0 < error["relative_error"] < 1 for error in switch["attention_errors"])


@pytest.mark.parametrize(
    ("settings", "tokens", "words"),
    [
        ([*PYRAMID, "lighthouse.window=0", 'data.packing="concat"'], 256, "this attention keeps no documents apart"),
        (['lighthouse.dense_backend="math"', *PYRAMID], 254, "begin at multiples of 4"),
    ],
)
def test_what_cannot_be_kept_apart(make, settings, tokens, words):
    subject, recipe = load_checkpoint(make(*settings).path, attention="trained", device=CPU)
    data = recipe.data.model_copy(update={"packing": "documents"})
    with pytest.raises(UserError, match=words) as found:
        evaluate(subject, data, tokens=tokens, measures=("loss",))
    assert "252 or 256" in found.value.hint or 'packing="concat"' in found.value.hint


def test_documents_begin_where_the_model_needs_it(make):
    """Also in the text of a recipe that asks for less."""
    subject, recipe = load_checkpoint(make(*PYRAMID).path, attention="trained", device=CPU)
    assert (recipe.alignment, subject.alignment) == (4, 4)
    for align, expected in ((None, 4), (1, 4), (16, 16)):
        text = held_out(recipe.data, subject, 256, 3, align)
        assert all(start % expected == 0 for sequence in text.packed_sequences for start, _ in sequence.spans)


def test_a_run_is_measured_beyond_the_length_of_its_training(make):
    run = make(*KINDS["dense"])
    subject, recipe = load_checkpoint(run.path, attention="trained", device=CPU)
    with pytest.raises(UserError, match="more than the 256") as caught:
        evaluate(subject, recipe.data, tokens=600, sequences=2, measures=("loss",))
    assert "--extrapolate" in caught.value.hint
    longer, _ = load_checkpoint(run.path, attention="trained", device=CPU, tokens=600)
    assert longer.name == f"{subject.name}, trained at 256 tokens" and longer.tokens == 600
    tokens = torch.randint(256, (1, 600), generator=torch.Generator().manual_seed(0))
    states = longer.hidden(tokens)
    assert states.shape == (1, 600, recipe.model.dim)
    torch.testing.assert_close(states[:, :256], subject.hidden(tokens[:, :256]))
    report = evaluate(longer, recipe.data, tokens=600, sequences=2, measures=("loss",))
    assert report["by_position"][-1]["last"] >= 256


def test_the_weights_that_a_run_began_with_are_measured_by_its_first_steps_attention(make):
    settings = ['lighthouse.method="chunked"', "lighthouse.phases=[{window=32}, {window=64}]"]
    path = make(*settings, step=0).path / "checkpoints/step-0"
    subject, recipe = load_checkpoint(path, attention="trained", device=CPU)
    windows = {layer.cfg.window for layer in lighthouse_layers(subject.model).values()}
    assert windows == {32}
    evaluate(subject, recipe.data, tokens=256, sequences=2, measures=("loss",))
