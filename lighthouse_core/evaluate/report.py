"""All measures of one model as one report: plain numbers for JSON, and plots of them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lighthouse_core import figures
from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.data.documents import Tokenizer
from lighthouse_core.data.loader import build_loader
from lighthouse_core.data.mixture import next_source
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError, UserError
from lighthouse_core.evaluate.leak import leak, leak_across
from lighthouse_core.evaluate.loss import (
    bits_per_byte,
    by_position,
    mean_over,
    per_sequence,
    short_context,
    short_context_of_documents,
)
from lighthouse_core.evaluate.needle import DEPTHS, answer, retrieve
from lighthouse_core.evaluate.subject import Subject
from lighthouse_core.evaluate.switch import attention_errors
from lighthouse_core.evaluate.text import PackedSequence, Text
from lighthouse_core.measures import MEASURES, check_numbers

if TYPE_CHECKING:
    from lighthouse_core.config.data import DataSection

VERSION = 1
_CUTS = 8
# What `plot` draws.
FIGURES = [f"{name}.{suffix}" for name in ("by_position", "needles") for suffix in ("png", "svg")]
# Sequences that lie this far apart in the held-out text are of different documents more often than neighbours.
_APART = 16


def evaluate(
    subject: Subject,
    data: "DataSection",
    *,
    tokens: int,
    sequences: int = 8,
    context: int = 2048,
    trials: int = 10,
    measures: Sequence[str] = MEASURES,
    align: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a model on held-out text.

    Args:
        subject: the model.
        data: where the text comes from; its tokenizer is the subject's. Its packing decides whether the model sees
            documents apart.
        tokens: length of a sequence, N.
        sequences: how many; the leak test takes two at least.
        context: what the short context is; it is left out where the sequences are no longer.
        trials: of a cell of needles.
        measures: which of MEASURES.
        align: `Recipe.alignment` of the recipe with `data`, where documents are kept apart; the text is then packed as
            training packs it. A model whose attention needs wider windows has it packed to these.
        say: told what is being measured.

    Returns:
        Numbers, lists and strings, of schema VERSION.

    Raises:
        DataError: nothing is held out.
        UserError: an argument is out of range, there is too little text, the model has nothing of what is asked for, or
            keeps no documents apart.
    """
    if not data.validation:
        raise DataError("data.validation holds no text out")
    try:
        check_numbers(tokens, sequences, context, trials, measures)
    except ValueError as error:
        raise UserError(str(error)) from None
    if tokens > subject.tokens:
        raise UserError(
            f"{tokens} tokens are more than the {subject.tokens} that the model was trained on",
            hint="measure shorter sequences, or a run with --extrapolate",
        )
    if "switch" in measures and subject.model is None:
        raise UserError(
            "only a checkpoint of stage 1 has a switch before it",
            hint="leave switch out of --only, or name a checkpoint of stage 1",
        )
    text = held_out(data, subject, tokens, max(sequences, 2), align)
    try:
        return _measure(subject, data, text, sequences, context, trials, measures, say)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(f"{tokens} tokens do not fit: {reason}", hint="measure shorter sequences") from None


def _measure(
    subject: Subject,
    data: "DataSection",
    text: Text,
    sequences: int,
    context: int,
    trials: int,
    measures: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    measured, tokens = text[:sequences], text.tokens.shape[1]
    before = measured.before
    report: dict[str, Any] = {
        "version": VERSION,
        "subject": subject.name,
        "leaky": subject.leaky,
        "tokens": tokens,
        "sequences": sequences,
        "data": {
            **data.origin,
            "packing": data.packing,
            "sha256": hashlib.sha256(measured.tokens.numpy().tobytes()).hexdigest(),
        },
    }
    if before is not None:
        count = sum(len(packed.spans) for packed in measured.packed_sequences)
        report["data"] |= {"documents": count, "counted": int((before > 0).sum())}
    losses = torch.empty(0)
    if {"loss", "context", "switch"} & set(measures):
        apart = ", documents apart" if text.packed_sequences else ""
        say(f"loss of {sequences} sequences of {tokens} tokens{apart}")
        losses = _losses(subject, measured)
    if "loss" in measures:
        per_byte = bits_per_byte(subject, measured.tokens, losses, before)
        report["loss"] = {
            "nats_per_token": asdict(mean_over(per_sequence(losses, before))),
            "bits_per_byte": per_byte and asdict(per_byte),
            "per_sequence": per_sequence(losses, before).tolist(),
        }
        report["by_position"] = [asdict(part) for part in by_position(losses, before)]
    if "context" in measures:
        say(f"the same with a context of {context}")
        if before is None:
            report["context"] = asdict(short_context(subject, measured.tokens, losses, context))
        elif found := short_context_of_documents(subject, measured.tokens, losses, context, measured.packed_sequences):
            report["context"] = asdict(found)
        else:
            report["context"] = {"context": context, "left_out": f"no document has more than {context + 1} tokens"}
    if "leak" in measures:
        say("leak")
        distances = [d for d in (0, 1, 4, 16, 64) if d < tokens // 4]
        # Spread over the sequence, and of no round number.
        cuts = [tokens * (2 * i + 2) // (2 * _CUTS + 2) + i for i in range(_CUTS)]
        cuts = sorted({cut for cut in cuts if max(distances) < cut < tokens})
        losses_of, other = _one_by_one(subject, text.packed_sequences), text.tokens.roll(1, 0)
        report["leak"] = [asdict(row) for row in leak(losses_of, text.tokens, other, cuts, distances, text.before)]
        if text.packed_sequences:
            say("leak across documents")
            report["leak_across"] = [
                asdict(row) for row in leak_across(losses_of, text.tokens, other, text.packed_sequences)
            ]
    if "switch" in measures:
        say("dense attention in every layer")
        errors = attention_errors(subject, *next(iter(text)))
        dense = _dense_losses(subject, measured)
        report["switch"] = {
            "dense": asdict(mean_over(per_sequence(dense, before))),
            "jump": asdict(mean_over(per_sequence(dense - losses, before))),
            "attention_errors": [{"layer": layer, "relative_error": error} for layer, error in errors.items()],
        }
    if "needles" in measures:
        lengths = [n for n in (256, 1024, 4096, 16384, 65536, 262144) if n < tokens] + [tokens]
        say(f"needles at {', '.join(map(str, lengths))} tokens")
        try:
            answer(subject)
        except ValueError as error:
            report["needles"] = {"left_out": str(error)}
        else:
            report["needles"] = {"cells": [asdict(cell) for cell in retrieve(subject, lengths, DEPTHS, trials)]}
    return report


def _losses(subject: Subject, text: Text) -> torch.Tensor:
    """[B, N - 1] nats, a sequence at a time: what fits is not known here."""
    return torch.cat([subject.losses(row, packed=packed) for row, packed in text])


def _dense_losses(subject: Subject, text: Text) -> torch.Tensor:
    """Those of a model of stage 1 after the switch: every layer is dense, and RoPE has the base of the model, not
    that of the phase."""
    model = subject.model
    assert model is not None
    angles = model.freqs_cis
    model.freqs_cis = model.rotary_table().to(angles.device)
    try:
        return _losses(subject.within(AttentionContext(dense=True)), text)
    finally:
        model.freqs_cis = angles


def _one_by_one(
    subject: Subject, packed_sequences: tuple[PackedSequence, ...]
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Losses of a batch whose documents lie where those of `packed_sequences` do, a sequence at a time."""

    def losses(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = zip(Text(tokens, packed_sequences), targets.split(1), strict=True)
        return torch.cat([subject.losses(row, target, packed) for (row, packed), target in rows])

    return losses


def held_out(data: "DataSection", subject: Subject, tokens: int, sequences: int, align: int | None) -> Text:
    """Sequences of the validation split, none twice: every sixteenth, or more of them where these are too few. The same
    for all models of a tokenizer, and of an alignment where documents are kept apart; see `evaluate`. Of a mixture each
    source gives its share."""
    align = _alignment(subject, tokens, align or 1) if data.packing == "documents" else None
    counts = [0] * len(data.parts)
    turns = []
    for _ in range(sequences):
        turns.append(next_source(counts, data.weights, 0))
        counts[turns[-1]] += 1
    texts = [
        iter(_held_out(part, name if data.sources else "", subject, tokens, count, align))
        for part, name, count in zip(data.parts, data.names, counts, strict=True)
        if count
    ]
    used = [source for source, count in enumerate(counts) if count]
    rows = [next(texts[used.index(source)]) for source in turns]
    packed_sequences = tuple(packed for _, packed in rows if packed is not None)
    return Text(torch.cat([row for row, _ in rows]), packed_sequences)


def _held_out(data: "DataSection", name: str, subject: Subject, tokens: int, sequences: int, align: int | None) -> Text:
    """Those of one source, which has a name within a mixture."""
    if data.source == "tokens":
        _check_ids(subject, build_tokenizer(data.tokenizer), data)
    # Not every tokenizer's samples can be shuffled.
    change = {"shuffle": "documents"} | ({} if data.source == "tokens" else {"tokenizer": subject.tokenizer_name})
    data = data.model_copy(update=change)
    apart = _APART
    while True:
        loader = build_loader(data, tokens, 1, 0, apart, 0, split="validation", align=align, prefetch=0)
        rows, packed_sequences = [], []
        for inputs, labels in loader:
            if align is not None:
                packed = PackedSequence.of(inputs, labels)
                if not packed.before.any() and not loader.state_dict()["epoch"]:
                    continue
                packed_sequences.append(packed)
            rows.append(inputs["input"])
            if len(rows) == sequences:
                break
        if not loader.state_dict()["epoch"]:
            return Text(torch.cat(rows), tuple(packed_sequences))
        if apart == 1:
            raise UserError(
                f"the held-out text{name and f' of source {name}'} is shorter than {sequences} sequences of {tokens} "
                "tokens",
                hint="use fewer --sequences, or a larger data.validation",
            )
        apart //= 2


def _alignment(subject: Subject, tokens: int, align: int) -> int:
    """Tokens at whose multiples documents begin, for the recipe of the text and for the model's attention."""
    if subject.alignment is None:
        raise UserError(
            f"{subject.name}: this attention keeps no documents apart",
            hint='measure concatenated text: --recipe RECIPE --set data.packing="concat"',
        )
    align = lcm(align, subject.alignment)
    if tokens % align:
        near = [str(n) for n in (tokens // align * align, tokens // align * align + align) if n]
        raise UserError(
            f"sequences of {tokens} tokens do not hold documents that begin at multiples of {align}",
            hint=f"use --tokens {' or '.join(near)}",
        )
    return align


def _check_ids(subject: Subject, tokenizer: Tokenizer, data: "DataSection") -> None:
    """Raise UserError where ids of prepared tokens are known not to stand for what they do in the model."""
    own = subject.tokenizer
    if own.fingerprint == tokenizer.fingerprint:
        return
    # A tokenizer.model and the tokenizer.json made of it have the same ids, and other rules.
    meanings = own.token_bytes(), tokenizer.token_bytes()
    if own.vocab_size != tokenizer.vocab_size or (None not in meanings and meanings[0] != meanings[1]):
        raise UserError(
            f"the tokens in {data.paths[0]} are of another tokenizer ({tokenizer.vocab_size} ids) than the model's "
            f"({own.vocab_size} ids)",
            hint="prepare the text with the model's tokenizer, or name the text itself in --recipe RECIPE",
        )


def is_report(content: dict[str, Any]) -> bool:
    """Whether that is what `evaluate` gives, rather than a profile or somebody's own results."""
    return {"subject", "leaky"} <= content.keys() and "kind" not in content


def plot(report: dict[str, Any], folder: Path) -> list[Path] | None:
    """Draw what there is to draw, as PNG and SVG.

    Returns:
        The files; None where matplotlib is missing.
    """
    pyplot = figures.pyplot()
    if pyplot is None:
        return None
    drawn = []
    if "by_position" in report:
        figure, axes = pyplot.subplots(figsize=(6, 4))
        parts = report["by_position"]
        places = [(part["first"] * part["last"]) ** 0.5 for part in parts]
        means, errors = zip(*((part["loss"]["mean"], part["loss"]["standard_error"]) for part in parts), strict=True)
        axes.errorbar(places, means, errors, marker="o", capsize=3)
        axes.set(xscale="log", xlabel="tokens before", ylabel="nats per token", title=figures.label(report["subject"]))
        drawn += figures.save(figure, folder / "by_position")
    if cells := report.get("needles", {}).get("cells"):
        lengths = sorted({cell["tokens"] for cell in cells})
        depths = sorted({cell["depth"] for cell in cells})
        share = {(cell["tokens"], cell["depth"]): cell["right"] / cell["trials"] for cell in cells}
        figure, axes = pyplot.subplots(figsize=(6, 4))
        image = axes.imshow([[share[n, d] for n in lengths] for d in depths], vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        axes.set(xlabel="tokens", ylabel="depth of the needle", title=figures.label(report["subject"]))
        figure.colorbar(image, label="found")
        drawn += figures.save(figure, folder / "needles")
    return drawn
