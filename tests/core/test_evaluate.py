"""Measures of models whose answers are known."""

import dataclasses
import itertools
import json
import re
import string
from math import log, log2
from types import SimpleNamespace

import pytest
import torch

from lighthouse_core import LighthouseConfig
from lighthouse_core.attention import AttentionContext
from lighthouse_core.config import load_recipe
from lighthouse_core.config.data import DataSection
from lighthouse_core.data.loader import build_loader
from lighthouse_core.data.tokenizer import BytesTokenizer
from lighthouse_core.errors import UserError
from lighthouse_core.evaluate import (
    Subject,
    bits_per_byte,
    by_position,
    evaluate,
    interval,
    mean_over,
    plot,
    retrieve,
    short_context,
)
from lighthouse_core.evaluate.load import _in_two
from lighthouse_core.evaluate.needle import answer, prompt
from lighthouse_core.evaluate.switch import attention_errors
from lighthouse_core.models.decoder import build_dense_model, use_dense, use_lighthouse

VOCABULARY = 258
CPU = torch.device("cpu")


def subject(logits, tokens=512) -> Subject:
    return Subject("it", logits, lambda hidden: hidden, BytesTokenizer(), tokens, CPU)


def uniform(tokens):
    return torch.zeros(*tokens.shape, VOCABULARY)


def certain(tokens, known):
    """Logits that know the next token where `known` [B, N], which it is, is not negative."""
    return torch.nn.functional.one_hot(known.clamp(min=0), VOCABULARY) * 100.0 * (known >= 0)[..., None]


def repeats(period):
    """Predicts what came `period` tokens before the next one."""

    def logits(tokens):
        known = torch.full_like(tokens, -1)
        known[:, period - 1 :] = tokens[:, : tokens.shape[1] - period + 1]
        return certain(tokens, known)

    return logits


def copies(tokens):
    """Predicts what followed the last eight tokens where they stood before."""
    known = torch.full_like(tokens, -1)
    for row, text in enumerate(tokens.tolist()):
        end = text[-8:]
        for at in range(len(text) - 9, -1, -1):
            if text[at : at + 8] == end:
                known[row, -1] = text[at + 8]
                break
    return certain(tokens, known)


def scattered(tokens):
    """Any answer, by the tokens alone."""
    seed = int((tokens * torch.arange(1, tokens.shape[1] + 1)).sum()) % (1 << 31)
    return torch.randn(*tokens.shape, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def periodic(period, length=256, batch=3):
    text = torch.randint(256, (batch, period), generator=torch.Generator().manual_seed(0))
    return text.repeat(1, length // period + 1)[:, :length]


def test_losses_are_of_the_next_token():
    text = periodic(20)
    losses = subject(repeats(20)).losses(text)
    assert losses.shape == (3, 255)
    torch.testing.assert_close(losses[:, :19], torch.full((3, 19), log(VOCABULARY)))
    assert losses[:, 19:].max() < 1e-6
    other = (text + 1) % 256
    assert subject(repeats(20)).losses(text, other)[:, 19:].min() > 99


def test_means_are_over_sequences():
    found = mean_over(torch.tensor([1.0, 2.0, 6.0]))
    assert (found.mean, found.sequences) == (3.0, 3)
    assert found.standard_error == pytest.approx((7.0 / 3) ** 0.5)
    assert mean_over(torch.tensor([1.0])).standard_error != mean_over(torch.tensor([1.0])).standard_error


def test_bits_per_byte_count_bytes_alone():
    text = periodic(20)
    losses = subject(uniform).losses(text)
    assert bits_per_byte(subject(uniform), text, losses).mean == pytest.approx(log2(VOCABULARY))
    # Half of the tokens stand for nothing.
    text[:, 1::2] = BytesTokenizer.eos_id
    found = bits_per_byte(subject(uniform), text, losses)
    assert found.mean == pytest.approx(log2(VOCABULARY) * 255 / 127)


def test_bins_double():
    losses = torch.arange(1, 12, dtype=torch.float32).repeat(2, 1)
    bins = by_position(losses)
    assert [(part.first, part.last) for part in bins] == [(1, 1), (2, 3), (4, 7), (8, 11)]
    assert [part.loss.mean for part in bins] == [1.0, 2.5, 5.5, 9.5]


@pytest.mark.parametrize(("context", "unknown", "unseen"), [(8, 11, 247), (64, 0, 0)])
def test_far_tokens_are_worth_what_they_tell(context, unknown, unseen):
    """Of the tokens beyond the context, `unknown` come before the text repeats, and `unseen` with a short context."""
    text = periodic(20)
    model = subject(repeats(20))
    found = short_context(model, text, model.losses(text), context)
    beyond = 255 - context
    full, short = (log(VOCABULARY) * count / beyond for count in (unknown, unseen))
    assert found.full.mean == pytest.approx(full, abs=1e-6)
    assert found.short.mean == pytest.approx(short, abs=1e-6)
    assert (found.gain.mean, found.gain.sequences) == (pytest.approx(short - full, abs=1e-6), 3)


@pytest.mark.parametrize("length", [64, 65, 97, 200, 255, 256])
def test_every_token_beyond_the_context_has_a_window(length):
    text = periodic(20, length)
    seen = []

    def counts(tokens):
        seen.append(tokens.shape[1])
        return uniform(tokens)

    found = short_context(subject(counts), text, subject(uniform).losses(text), 32)
    assert max(seen) <= 33
    assert found.short.mean == pytest.approx(log(VOCABULARY))


@pytest.mark.parametrize("context", [0, 7, 256, 300])
def test_a_context_must_fit(context):
    text = periodic(20)
    with pytest.raises(ValueError, match="context"):
        short_context(subject(uniform), text, subject(uniform).losses(text), context)


def test_wilsons_interval():
    for right, expected in ((10, (0.7225, 1.0)), (0, (0.0, 0.2775)), (5, (0.2366, 0.7634))):
        assert interval(right, 10) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("length", [60, 61, 300])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_prompt_has_its_length_and_one_needle(length, depth):
    import numpy as np

    question, _ = answer(subject(uniform))
    ids = prompt(subject(uniform), question, length, depth, 7, np.random.default_rng(0))
    text = BytesTokenizer().decode(ids)
    assert len(ids) == length and ids[0] == BytesTokenizer.bos_id
    assert text.count("The hidden digit is ") == 2 and text.endswith("The hidden digit is ")
    assert text.count("The hidden digit is 7.") == 1
    if depth == 0.0:
        assert text.startswith("\nThe hidden digit is 7.")


def test_a_model_that_copies_finds_every_needle():
    cells = retrieve(subject(copies), [80, 300])
    assert [(cell.tokens, cell.depth) for cell in cells[:5]] == [(80, depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all(cell.right == cell.trials == 10 for cell in cells) and len(cells) == 10


def test_a_model_that_guesses_finds_a_tenth():
    cells = retrieve(subject(scattered), [80, 81], trials=40)
    share = sum(cell.right for cell in cells) / sum(cell.trials for cell in cells)
    assert 0.06 < share < 0.14
    assert retrieve(subject(scattered), [80, 81], trials=40) == cells


def test_a_model_that_always_says_the_same_finds_a_tenth():
    def five(tokens):
        return certain(tokens, torch.full_like(tokens, ord("5")))

    for trials in (1, 10, 15):
        cells = retrieve(subject(five), [80, 81], trials=trials)
        assert sum(cell.right for cell in cells) == trials


class Merging:
    """A tokenizer that has " 0" to " 9" as tokens of their own."""

    bos_id = 0

    def encode(self, text):
        parts = re.findall(r" \d|.|\n", text)
        return [1000 + int(part) if re.fullmatch(r" \d", part) else ord(part) for part in parts]


def test_answers_that_begin_with_their_space():
    it = dataclasses.replace(subject(uniform), tokenizer=Merging())
    question, answers = answer(it)
    assert "".join(map(chr, question)) == "\nThe hidden digit is" and answers.tolist() == list(range(1000, 1010))
    assert answer(subject(uniform))[1].tolist() == [ord(digit) for digit in "0123456789"]


def test_digits_without_a_token_are_left_out(data):
    class Digits(Merging):
        def encode(self, text):
            return [7 if part > 1000 else part for part in super().encode(text)]

    it = dataclasses.replace(subject(uniform), tokenizer=Digits())
    with pytest.raises(ValueError, match="no token of its own"):
        answer(it)
    assert "no token" in evaluate(it, data, tokens=64, measures=("needles",))["needles"]["left_out"]


def test_a_needle_needs_room():
    with pytest.raises(ValueError, match="at least 46 tokens"):
        retrieve(subject(uniform), [45])


@pytest.fixture
def data(tmp_path):
    for letter in string.ascii_letters:
        (tmp_path / f"{letter}.txt").write_text(letter * 3000)
    return DataSection(source="files", paths=[str(tmp_path / "*.txt")], validation=0.5, packing="concat")


def test_a_report_holds_all_of_it(data, tmp_path):
    said = []
    measures = ("loss", "context", "leak", "needles")
    options = {"sequences": 3, "context": 32, "trials": 2}
    report = evaluate(subject(uniform), data, tokens=128, measures=measures, say=said.append, **options)
    assert json.loads(json.dumps(report)) == report
    assert report["loss"]["nats_per_token"]["mean"] == pytest.approx(log(VOCABULARY))
    assert report["context"]["gain"]["mean"] == pytest.approx(0, abs=1e-6)
    assert [row["distance"] for row in report["leak"]] == [0, 1, 4, 16]
    assert all(row["mean"] == 0 and row["largest"] == 0 for row in report["leak"])
    assert [cell["tokens"] for cell in report["needles"]["cells"]] == [128] * 5
    assert len(said) == 4
    pytest.importorskip("matplotlib")
    drawn = plot(report, tmp_path)
    assert {path.name for path in drawn} == {f"{n}.{s}" for n in ("by_position", "needles") for s in ("png", "svg")}
    assert all(path.stat().st_size > 1000 for path in drawn)


def test_a_report_of_some_of_it(data):
    report = evaluate(subject(uniform), data, tokens=64, sequences=1, measures=("leak",))
    assert "leak" in report and not {"loss", "by_position", "context", "needles"} & report.keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 3}, "too few"),
        ({"tokens": 64, "sequences": 0}, "too few"),
        ({"tokens": 64, "trials": 0}, "too few"),
        ({"tokens": 1024}, "more than the 512"),
        ({"tokens": 64, "measures": ("context",), "context": 64}, "below the length"),
        ({"tokens": 64, "measures": ("context",), "context": 33}, "must be even"),
        ({"tokens": 64, "measures": ("switch",)}, "only a checkpoint of stage 1"),
    ],
)
def test_what_cannot_be_measured(data, options, words):
    with pytest.raises(UserError, match=words):
        evaluate(subject(uniform), data, **{"measures": ("loss",), **options})


def test_only_text_that_is_held_out(data):
    loader = build_loader(data, 64, 1, 0, 1, 0, split="train", prefetch=0)
    seen = {chr(x) for inputs, _ in itertools.islice(loader, 4000) for x in set(inputs["input"][0].tolist())}
    shown = []
    it = dataclasses.replace(subject(uniform), hidden=lambda tokens: shown.append(tokens) or uniform(tokens))
    evaluate(it, data, tokens=64, sequences=8, measures=("loss",))
    letters = [{chr(x) for x in tokens[0].tolist() if x < 256} for tokens in shown]
    assert len(letters) == 8 and not seen & set().union(*letters)
    # They are of more than one document.
    assert len(set().union(*letters)) > 1


def test_no_text_is_measured_twice(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(48 + i // 40) + chr(48 + i % 40) for i in range(1600)))
    held_out = DataSection(source="files", paths=[str(tmp_path / "*.txt")], validation=0.999)
    shown = []
    it = dataclasses.replace(subject(uniform), hidden=lambda tokens: shown.append(tokens) or uniform(tokens))
    for sequences in (2, 20, 47):
        shown.clear()
        evaluate(it, held_out, tokens=64, sequences=sequences, measures=("loss",))
        assert len({tuple(tokens[0].tolist()) for tokens in shown}) == sequences
    with pytest.raises(UserError, match="shorter than 60 sequences of 64 tokens"):
        evaluate(it, held_out, tokens=64, sequences=60, measures=("loss",))


def test_the_text_does_not_depend_on_how_training_shuffles():
    texts = []
    for shuffle in ("documents", "samples"):
        it = dataclasses.replace(subject(uniform), hidden=lambda tokens: texts.append(tokens) or uniform(tokens))
        evaluate(it, DataSection(validation=0.05, shuffle=shuffle), tokens=64, sequences=4, measures=("loss",))
    assert torch.equal(torch.stack(texts[:4]), torch.stack(texts[4:]))


def test_the_text_is_told_in_the_models_own_tokens(data, monkeypatch):
    asked = []

    def build(data, *arguments, **others):
        asked.append(data.tokenizer)
        return build_loader(data.model_copy(update={"tokenizer": "bytes"}), *arguments, **others)

    monkeypatch.setattr("lighthouse_core.evaluate.report.build_loader", build)
    evaluate(dataclasses.replace(subject(uniform), tokenizer_name="mine.json"), data, tokens=64, measures=("loss",))
    assert asked == ["mine.json"]


def test_a_model_that_looks_ahead_is_caught(data):
    def ahead(tokens):
        return certain(tokens, tokens.roll(-2, 1))

    rows = evaluate(subject(ahead), data, tokens=128, sequences=4, measures=("leak",))["leak"]
    # It says of each token the one after it, so up to the token before the cut its predictions change.
    assert [row["largest"] > 1 for row in rows] == [True, True, False, False]


def test_a_model_that_changes_its_logits_is_asked_for_them():
    class Model:
        def __init__(self, factor):
            self.factor = factor

        def get_decoder(self):
            return lambda input_ids, use_cache: SimpleNamespace(last_hidden_state=input_ids[..., None].float())

        def get_output_embeddings(self):
            return lambda hidden: hidden * torch.ones(5)

        def __call__(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.factor * input_ids[..., None].float() * torch.ones(5))

    tokens = torch.arange(7)[None]
    for factor, width in ((1.0, 1), (0.25, 5)):
        hidden, head = _in_two(Model(factor), CPU)
        assert hidden(tokens).shape[-1] == width
        assert torch.equal(head(hidden(tokens)), Model(factor)(tokens, False).logits)


def small(cfg, *settings):
    recipe = load_recipe("recipes/quickstart.toml", settings)
    model = build_dense_model(recipe.model, 256)
    with torch.no_grad():
        model.init_weights()
    use_dense(model, "auto")
    use_lighthouse(model, cfg, recipe.model.dense_layers)
    return Subject("it", model.hidden, model.head, BytesTokenizer(), 256, CPU, model=model), recipe


def test_errors_of_a_call_that_is_dense_are_none():
    whole, recipe = small(LighthouseConfig(method="chunked", window=256))
    part, _ = small(LighthouseConfig(method="sliding", window=16))
    text = torch.randint(256, (1, 256), generator=torch.Generator().manual_seed(0))
    layers = sorted(set(range(recipe.model.layers)) - set(recipe.model.dense_layers))
    errors = attention_errors(whole, text)
    assert sorted(errors) == layers and max(errors.values()) < 1e-5
    assert all(0.01 < error < 10 for error in attention_errors(part, text).values())


def test_errors_of_a_model_that_norms_its_heads():
    qwen = ('model.family="qwen3"', "model.tied_embeddings=true")
    cfg = LighthouseConfig(pooling=2, levels=2, topk=4, tile_parents=4, backend="reference")
    part, recipe = small(cfg, *qwen)
    text = torch.randint(256, (1, 256), generator=torch.Generator().manual_seed(0))
    errors = attention_errors(part, text)
    assert len(errors) == recipe.model.layers - len(recipe.model.dense_layers)
    assert all(0.01 < error < 10 for error in errors.values())


def test_dense_for_a_while():
    part, _ = small(LighthouseConfig(method="sliding", window=16))
    whole, _ = small(LighthouseConfig(method="chunked", window=256))
    text = torch.randint(256, (1, 256), generator=torch.Generator().manual_seed(0))
    before = part.losses(text)
    torch.testing.assert_close(part.within(AttentionContext(dense=True)).losses(text), whole.losses(text))
    assert torch.equal(part.losses(text), before) and not torch.allclose(before, whole.losses(text), atol=1e-4)


def test_a_report_of_the_switch(data):
    part, _ = small(LighthouseConfig(method="sliding", window=16))
    report = evaluate(part, data, tokens=64, sequences=2, measures=("switch",))
    switch = report["switch"]
    dense = switch["dense"]["mean"] - switch["jump"]["mean"]
    losses = evaluate(part, data, tokens=64, sequences=2, measures=("loss",))["loss"]["nats_per_token"]["mean"]
    assert dense == pytest.approx(losses, abs=1e-6)
    assert {"layer", "relative_error"} == set(switch["attention_errors"][0])
