"""All measures of one model as one report: plain numbers for JSON, and plots of them."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lighthouse_core import figures
from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.data.documents import Tokenizer
from lighthouse_core.data.loader import build_loader
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError, UserError
from lighthouse_core.evaluate.leak import leak
from lighthouse_core.evaluate.loss import bits_per_byte, by_position, mean_over, short_context
from lighthouse_core.evaluate.needle import DEPTHS, answer, retrieve
from lighthouse_core.evaluate.subject import Subject
from lighthouse_core.evaluate.switch import attention_errors
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
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a model on held-out text.

    Args:
        subject: the model.
        data: where the text comes from; its tokenizer is the subject's.
        tokens: length of a sequence, N.
        sequences: how many; the leak test takes two at least.
        context: what the short context is; it is left out where the sequences are no longer.
        trials: of a cell of needles.
        measures: which of MEASURES.
        say: told what is being measured.

    Returns:
        Numbers, lists and strings, of schema VERSION.

    Raises:
        DataError: nothing is held out.
        UserError: an argument is out of range, there is too little text, or the model has nothing of what is asked for.
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
            hint="measure shorter sequences",
        )
    if "switch" in measures and subject.model is None:
        raise UserError(
            "only a checkpoint of stage 1 has a switch before it",
            hint="leave switch out of --only, or name a checkpoint of stage 1",
        )
    text = held_out(data, subject, tokens, max(sequences, 2))
    try:
        return _measure(subject, data, text, sequences, context, trials, measures, say)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(f"{tokens} tokens do not fit: {reason}", hint="measure shorter sequences") from None


def _measure(
    subject: Subject,
    data: "DataSection",
    text: torch.Tensor,
    sequences: int,
    context: int,
    trials: int,
    measures: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    tokens = text.shape[1]
    report: dict[str, Any] = {
        "version": VERSION,
        "subject": subject.name,
        "leaky": subject.leaky,
        "tokens": tokens,
        "sequences": sequences,
        "data": {
            "source": data.source,
            "paths": list(data.paths),
            "validation": data.validation,
            "sha256": hashlib.sha256(text[:sequences].numpy().tobytes()).hexdigest(),
        },
    }
    losses = torch.empty(0)
    if {"loss", "context", "switch"} & set(measures):
        say(f"loss of {sequences} sequences of {tokens} tokens")
        losses = torch.cat([subject.losses(row[None]) for row in text[:sequences]])
    if "loss" in measures:
        per_byte = bits_per_byte(subject, text[:sequences], losses)
        report["loss"] = {
            "nats_per_token": asdict(mean_over(losses.double().mean(1))),
            "bits_per_byte": per_byte and asdict(per_byte),
            "per_sequence": losses.double().mean(1).tolist(),
        }
        report["by_position"] = [asdict(part) for part in by_position(losses)]
    if "context" in measures:
        say(f"the same with a context of {context}")
        report["context"] = asdict(short_context(subject, text[:sequences], losses, context))
    if "leak" in measures:
        say("leak")
        distances = [d for d in (0, 1, 4, 16, 64) if d < tokens // 4]
        # Spread over the sequence, and of no round number.
        cuts = [tokens * (2 * i + 2) // (2 * _CUTS + 2) + i for i in range(_CUTS)]
        cuts = sorted({cut for cut in cuts if max(distances) < cut < tokens})
        report["leak"] = [asdict(row) for row in leak(_one_by_one(subject), text, text.roll(1, 0), cuts, distances)]
    if "switch" in measures:
        say("dense attention in every layer")
        errors = attention_errors(subject, text[:1])
        switched = subject.within(AttentionContext(dense=True))
        dense = torch.cat([switched.losses(row[None]) for row in text[:sequences]])
        report["switch"] = {
            "dense": asdict(mean_over(dense.double().mean(1))),
            "jump": asdict(mean_over((dense - losses).double().mean(1))),
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


def _one_by_one(subject: Subject) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Losses of a batch, a sequence at a time: what fits is not known here."""

    def losses(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        pairs = zip(tokens.split(1), targets.split(1), strict=True)
        return torch.cat([subject.losses(row, target) for row, target in pairs])

    return losses


def held_out(data: "DataSection", subject: Subject, tokens: int, sequences: int) -> torch.Tensor:
    """[B, N] int64 of the validation split, none twice: every sixteenth sequence, or more of them where these are too
    few. The same for all models of a tokenizer."""
    if data.source == "tokens":
        _check_ids(subject, build_tokenizer(data.tokenizer), data)
    # Not every tokenizer's samples can be shuffled.
    change = {"shuffle": "documents"} | ({} if data.source == "tokens" else {"tokenizer": subject.tokenizer_name})
    data = data.model_copy(update=change)
    apart = _APART
    while True:
        loader = build_loader(data, tokens, 1, 0, apart, 0, split="validation", prefetch=0)
        text = torch.cat([inputs["input"] for inputs, _ in itertools.islice(loader, sequences)])
        if not loader.state_dict()["epoch"]:
            return text
        if apart == 1:
            raise UserError(
                f"the held-out text is shorter than {sequences} sequences of {tokens} tokens",
                hint="use fewer --sequences, or a larger data.validation",
            )
        apart //= 2


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
