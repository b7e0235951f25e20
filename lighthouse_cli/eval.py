"""lighthouse eval: what a trained model has learnt."""

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lighthouse_cli import _caches, _complete, _options, _output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lighthouse_core.config import Recipe
    from lighthouse_core.data.overlap import Overlap
    from lighthouse_core.runs.run import Run


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|HF_DIR",
            help="A run, one of its checkpoints/step-N, or a directory that transformers loads.",
            autocompletion=_complete.checkpoints,
        ),
    ],
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="RECIPE|RUN", help="Whose held-out text; a run's own by default.")
    ] = "",
    settings: _options.Settings = None,
    attention: Annotated[
        Literal["trained", "dense"],
        typer.Option("--attention", help="Of a checkpoint of stage 1: as it was trained, or dense in every layer."),
    ] = "trained",
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            metavar="N",
            min=4,
            max=_options.MOST_TOKENS,
            help="Length of a sequence; that of training by default.",
        ),
    ] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Of a run, let --tokens be more than it was trained at.")
    ] = False,
    sequences: Annotated[int, typer.Option("--sequences", metavar="B", min=1, max=10**6, help="How many.")] = 8,
    context: Annotated[
        int,
        typer.Option("--context", metavar="C", min=2, max=_options.MOST_TOKENS, help="Tokens of the short context."),
    ] = 2048,
    trials: Annotated[
        int, typer.Option("--trials", metavar="T", min=1, max=10**6, help="Needles of one length and depth.")
    ] = 10,
    only: Annotated[
        str,
        typer.Option(
            "--only", metavar="A,B", help="Of loss, context, leak, switch, needles; leak and switch are of stage 1."
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the report goes; eval/ in the run by default.")
    ] = None,
    quiet: _options.Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure a model: loss by position, use of long context, leak, needles."""
    from lighthouse_core.errors import UserError, refusal
    from lighthouse_core.files import (
        check_output,
        check_replaceable,
        check_writable,
        refuse_links,
        together,
        write_atomically,
    )
    from lighthouse_core.measures import check_numbers, parse_measures
    from lighthouse_core.runs.find import find_checkpoint, split_checkpoint
    from lighthouse_core.runs.rows import finite

    _output.set_quiet(quiet)
    try:
        measures = parse_measures(only)
    except ValueError as error:
        raise UserError(f"--only {error}") from None
    path = Path(os.path.realpath(target))
    exported = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    if (path / "adapter_config.json").is_file():
        from lighthouse_core.weights.directory import read_config

        read_config(path)  # which says what an adapter is
    if exported and not recipe:
        raise UserError(
            f"{target} says nothing of held-out text", hint="--recipe names a recipe, or a run, that has some"
        )
    if exported and attention != "trained":
        raise UserError("--attention is for checkpoints of runs")
    if extrapolate and (exported or tokens is None):
        raise UserError("--extrapolate is for runs, and needs --tokens N, the length to measure at")
    if not exported:
        path = find_checkpoint(target)
    if settings and not recipe:
        raise UserError("--set changes the recipe that --recipe names")
    other, run = _recipe(recipe, settings or ()) if recipe else (None, None)
    # Loading a model takes minutes, and measuring one hours: what can be known before is looked at before.
    try:
        check_numbers(tokens, sequences, context, trials, measures if only else ())
    except ValueError as error:
        raise UserError(str(error)) from None
    if out is not None:
        check_output(out)
        check_writable(out)

    _caches.use_own()
    from lighthouse_core.evaluate import evaluate as measure
    from lighthouse_core.evaluate import plot
    from lighthouse_core.evaluate.load import load_checkpoint, load_directory
    from lighthouse_core.evaluate.report import FIGURES, is_report

    seen: Overlap | None
    if exported:
        assert other is not None
        seen = _held_out_of_export(path, other, recipe, run)
        subject = load_directory(path, say=_output.say)
        home = path.with_name(f"{path.name}-eval")
    else:
        seen = _held_out(path, other, recipe)
        subject, own = load_checkpoint(path, attention=attention, tokens=tokens or 0 if extrapolate else 0)
        other = other or own
        home = split_checkpoint(path)[0] / "eval" / re.sub(r"\W+", "-", subject.name)
    assert other is not None
    _output.say(f"evaluating {subject.name}")
    length = min(subject.tokens, other.training.seq_len) if tokens is None else tokens
    if tokens is None and other.alignment:
        length -= length % other.alignment
    if not only:
        # Dense attention cannot leak; --only leak measures it all the same.
        absent = {"leak", "switch"} if subject.model is None else set()
        if context >= length - 1:
            _output.say(f"a short context of {context} tokens is left out: the sequences have {length}")
            absent |= {"context"}
        measures = tuple(name for name in measures if name not in absent)
    # What is a part leaves the whole as it is.
    folder = out or home.with_name("-".join([home.name, *measures] if only else [home.name]))
    if out is None:
        if not exported:
            refuse_links(home.parents[1], f"eval/{folder.name}")
        check_writable(folder)
    check_replaceable(folder, "results.json", is_report, FIGURES)
    report = measure(
        subject,
        other.data,
        tokens=length,
        sequences=sequences,
        context=context,
        trials=trials,
        measures=measures,
        align=other.alignment,
        say=_output.say,
    )
    report["held_out"] = _as_report(seen)
    text = json.dumps(finite(report), indent=1, allow_nan=False)
    drawn, fault = None, None
    try:
        with together(folder) as place:
            write_atomically(place / "results.json", text + "\n")
            drawn = plot(report, place)
    except OSError as error:
        fault = refusal(error, f"cannot write {folder}", "choose another --out; the results are above")
    if as_json:
        _output.data(text)
    else:
        _show(report)
    if fault is not None:
        raise fault
    _output.say(
        f"written to {folder}" + ("" if drawn is not None else "; plots need matplotlib: pip install -e '.[plot]'")
    )


def _recipe(spec: str, settings: "Sequence[str]") -> "tuple[Recipe, Run | None]":
    """The recipe that --recipe names by its file, its name or the directory of its run, and the run that it lies in."""
    from lighthouse_core.config import find_recipe, load_recipe
    from lighthouse_core.errors import RunError
    from lighthouse_core.runs.run import Run, with_own_tokenizer

    inside = Path(spec, "recipe.toml")
    named = Path("runs", spec, "recipe.toml")
    path = inside if inside.is_file() else named if named.is_file() else find_recipe(spec)
    recipe, run = load_recipe(path, settings, trains=False), None
    if path.name in ("recipe.toml", "recover.toml"):
        with contextlib.suppress(RunError):
            run = Run(path.parent)
            recipe = with_own_tokenizer(recipe, path.parent)
    return recipe, run


def _held_out_of_export(path: Path, other: "Recipe", name: str, run: "Run | None") -> "Overlap | None":
    """As `_held_out`, of a directory that transformers loads; None where nothing says what it was trained on.

    Args:
        path: of the directory.
        other: whose held-out text is measured.
        name: by which the user knows `other`.
        run: that `other` is of, where it is of one.

    Raises:
        UserError: as `_held_out`.
    """
    from lighthouse_core.data.hub import is_remote
    from lighthouse_core.data.overlap import Overlap, own_split
    from lighthouse_core.evaluate.directory import training_data

    known = training_data(path)
    if known is None:
        _output.warn("whether this text is held out is not known: nothing says what the model was trained on")
        return None
    origin, trained = known
    if run is not None and run.ledger["stages"][0].get("data") == trained:
        return _compared(run.recipe, other, name, trained)
    # The name of a data set of the hub says nothing of what its run was trained on.
    if other.data.validation and not any(map(is_remote, other.data.parts)):
        seen = own_split(other, trained)
        if not seen.unknown:
            _output.say(str(seen))
            return seen
    problem = f"the model is of the run {origin}, and this recipe is not; --recipe RUN names that run"
    seen = Overlap(None, 0, 0.0, False, problem)
    _output.warn(str(seen))
    return seen


def _held_out(path: Path, other: "Recipe | None", name: str) -> "Overlap":
    """What is known of whether a run was trained on the text that it is to be measured on; says what is not as usual.

    Args:
        path: of a checkpoint.
        other: whose held-out text is measured; None for the run's own.
        name: by which the user knows `other`.

    Raises:
        UserError: it was, or nothing is held out.
    """
    from lighthouse_core.runs.find import split_checkpoint
    from lighthouse_core.runs.run import Run

    run = Run(split_checkpoint(path)[0])
    return _compared(run.recipe, other, name, run.ledger["stages"][0].get("data"))


def _compared(own: "Recipe", other: "Recipe | None", name: str, trained: str | None) -> "Overlap":
    """As `_held_out`; `own` is the run's recipe, `trained` the fingerprint of the data that it was trained on."""
    from lighthouse_core.data.overlap import SECONDS, overlap, own_split
    from lighthouse_core.errors import UserError

    if other and not other.data.validation:
        raise UserError(f"{name} holds no text out", hint="--set data.validation=0.05 holds some out")
    if not (other or own).data.validation:
        raise UserError("the run held no text out", hint="--recipe RECIPE with other paths and a data.validation")
    if other:
        _output.say(f"comparing the text with the run's training text, for up to {3 * SECONDS / 60:.0f} minutes")
    seen = overlap(own, other, trained) if other else own_split(own, trained)
    if other is not None and seen.trained_on and seen.texts is None:
        seen_of_it = f"all but {own.data.validation:.2%}" if own.data.validation else "all"
        raise UserError(
            f"the run was trained on this text, on {seen_of_it} of its documents, and {other.data.validation:.2%} of "
            "them were to be measured",
            hint="--recipe RECIPE with other paths",
        )
    if seen.trained_on:
        raise UserError(f"the text to be measured is not held out: {seen}", hint="--recipe RECIPE with other paths")
    (_output.warn if seen.unknown or seen.shared else _output.say)(str(seen))
    return seen


def _as_report(seen: "Overlap | None") -> dict[str, Any]:
    if seen is None:
        return {"known": False, "words": "what the model was trained on is not known"}
    counts = {"texts": seen.texts, "shared": seen.shared, "share": seen.share}
    return {"known": seen.unknown is None, "words": str(seen), **counts}


def _show(report: dict[str, Any]) -> None:
    alone = False

    def of(mean: dict[str, Any], sign: str = "") -> str:
        """The mean, and its standard error where it is of several sequences."""
        nonlocal alone
        text, error = f"{mean['mean']:{sign}.4f}", mean["standard_error"]
        alone |= math.isnan(error)
        return text if math.isnan(error) else f"{text} ± {error:.4f}"

    note = " (leaky)" if report["leaky"] else ""
    if "loss" in report:
        loss = report["loss"]
        per_byte = loss["bits_per_byte"]
        _output.data(
            f"loss{note}: {of(loss['nats_per_token'])} nats per token"
            + (f", {of(per_byte)} bits per byte" if per_byte else "")
        )
        if not per_byte:
            _output.warn("bits per byte are unknown: the tokenizer does not tell which bytes its tokens stand for")
        bins = report["by_position"]
        spans = (f"{p['first']}-{p['last']}" if p["first"] < p["last"] else str(p["first"]) for p in bins)
        rows: list[tuple[str, ...]] = [(span, of(p["loss"])) for span, p in zip(spans, bins, strict=True)]
        _output.table("", ("tokens before", f"nats per token{note}"), rows)
    if "left_out" in report.get("context", {}):
        _output.warn(f"the short context is left out: {report['context']['left_out']}")
    elif "context" in report:
        context = report["context"]
        _output.data(
            f"beyond {context['context']} tokens: {of(context['full'])} with all of them, {of(context['short'])} with "
            f"no more than {context['context']}; the far ones are worth {of(context['gain'])}"
        )
    if "leak" in report:
        rows = [(str(r["distance"]), of(r, "+"), f"{r['largest']:.4f}") for r in report["leak"]]
        _output.table("", ("leak: tokens before the cut", "nats", "largest"), rows)
    if across := report.get("leak_across"):
        rows = [(r["replaced"], of(r, "+"), f"{r['largest']:.4f}") for r in across]
        _output.table("", ("leak across documents: the one replaced is", "nats", "largest"), rows)
    elif across is not None:
        _output.warn("the leak across documents is left out: no sequence has two")
    if "switch" in report:
        switch = report["switch"]
        errors = [e["relative_error"] for e in switch["attention_errors"]]
        _output.data(
            f"dense in every layer: {of(switch['dense'])}, {switch['jump']['mean']:+.4f} more; one call differs by "
            f"{min(errors):.1%} to {max(errors):.1%}"
        )
    needles = report.get("needles", {})
    if "left_out" in needles:
        _output.warn(f"needles are left out: {needles['left_out']}")
    if cells := needles.get("cells"):
        depths = sorted({c["depth"] for c in cells})
        found = {(c["tokens"], c["depth"]): f"{c['right']}/{c['trials']}" for c in cells}
        lengths = sorted({c["tokens"] for c in cells})
        rows = [(str(n), *(found[n, depth] for depth in depths)) for n in lengths]
        _output.table("", ("needles found: tokens", *(f"depth {depth:.0%}" for depth in depths)), rows)
    if alone:
        _output.say("a figure without ± is of one sequence, which gives no standard error; use more --sequences")
