"""lighthouse data: prepare a source as token shards; look at what is in it."""

import json
import os
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lighthouse_cli import _complete, _options, _output
from lighthouse_cli._source import size_of_source

if TYPE_CHECKING:
    from lighthouse_core.data.prepare import Prepared, Progress
    from lighthouse_core.data.survey import Survey

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Prepare and inspect training data.")

_Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A TOML file, or the name of a shipped recipe.", autocompletion=_complete.recipes
    ),
]


@app.command()
def prepare(
    recipe: _Recipe,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")],
    settings: _options.Settings = None,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", min=0, max=4096, help="Processes; one a CPU core by default.")
    ] = 0,
) -> None:
    """Tokenize a recipe's data once, into shards that training reads.

    Interrupted, the same command goes on where it stopped.
    """
    from lighthouse_core.config import find_recipe, load_recipe
    from lighthouse_core.data.prepare import prepare as run

    resolved = load_recipe(find_recipe(recipe), settings or (), trains=False)
    _write(
        lambda workers: run(resolved, out, workers, _progress(), _output.say), workers, resolved.data.validation, out
    )


def _write(
    work: Callable[[int], "Prepared"], workers: int, validation: float | None, out: Path, tokenizer: str | None = None
) -> None:
    """Make a prepared directory; say what is in it and how to train on it. `tokenizer` where no recipe names it;
    `validation` is None where a recipe's default fits."""
    from lighthouse_core.runs.rows import clock

    cores = len(os.sched_getaffinity(0))
    begun = time.monotonic()
    try:
        prepared = work(workers or cores)
    except (KeyboardInterrupt, SystemExit) as end:
        _output.say("interrupted; the same command goes on where this one stopped")
        # Of SIGTERM and SIGHUP, which have exit codes of their own.
        raise end if isinstance(end, SystemExit) else typer.Exit(130) from None
    seconds = time.monotonic() - begun
    for split, documents in prepared.documents.items():
        _output.say(f"{split}: {documents:,} documents, {prepared.tokens[split]:,} tokens")
        if not documents and (split == "train" or validation != 0):
            _output.warn(
                f"no document fell to {split}: training on this needs another --set data.validation, perhaps 0"
            )
    if prepared.nulls:
        _output.say(f"passed over, as their text is null or empty: {prepared.nulls:,} rows")
    _output.say(f"prepared in {clock(seconds)}; train on it with:")
    also = f" --set 'data.tokenizer={json.dumps(tokenizer)}'" if tokenizer else ""
    also += f" --set data.validation={validation}" if tokenizer and validation is not None else ""
    _output.say(f"""  --set 'data.source="tokens"' --set 'data.paths=[{json.dumps(str(out))}]'{also}""")
    _output.data(str(out))


class _Format(StrEnum):
    auto = "auto"
    megatron = "megatron"
    olmo = "olmo"
    nanogpt = "nanogpt"
    llmc = "llmc"


@app.command("import")
def import_(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")],
    source: Annotated[str, typer.Option("--from", metavar="PATH", help="A token file, or a folder of them.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="NAME", help="What made the ids, as data.tokenizer names it.")
    ],
    format: Annotated[
        _Format, typer.Option("--format", help="Of the files; auto: by their names and contents.")
    ] = _Format.auto,
    validation: Annotated[
        float | None,
        typer.Option(
            "--validation",
            metavar="SHARE",
            min=0.0,
            max=0.99,
            callback=_options.finite,
            help="Of documents held out by chance. By default files named val are, and 0.05 where none is.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", min=0, max=4096, help="Processes; one a CPU core by default.")
    ] = 0,
) -> None:
    """Turn token files of Megatron, OLMo, nanoGPT or llm.c into shards that training reads.

    Interrupted, the same command goes on where it stopped.
    """
    from lighthouse_core.data.imported import FORMATS
    from lighthouse_core.data.prepare import import_tokens

    chosen = next((one for one in FORMATS if one == format.value), None)

    def work(workers: int) -> "Prepared":
        prepared = import_tokens(
            source,
            out,
            tokenizer,
            format=chosen,
            validation=validation,
            workers=workers,
            progress=_progress(),
            say=_output.say,
        )
        if sum(prepared.documents.values()) == 1:
            _output.warn(
                "the whole text is one document: no id before its end is the EOS of the tokenizer "
                f"{tokenizer}. Was the text made with another one?"
            )
        return prepared

    _write(work, workers, validation, out, tokenizer)


@app.command()
def inspect(
    recipe: _Recipe,
    settings: _options.Settings = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", metavar="S", min=0.1, max=1e7, callback=_options.finite, help="Time to read for, a split."
        ),
    ] = 10.0,
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", min=0, max=10**6, help="Documents to show the start of.")
    ] = 3,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare all of a prepared directory with its checksums.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show a recipe's documents: how many, how long, and how they look as tokens; those of each source of a mixture."""
    from lighthouse_core.config import find_recipe, load_recipe
    from lighthouse_core.data.build import open_tokens
    from lighthouse_core.data.checks import checked_tokenizer
    from lighthouse_core.data.stream import no_documents
    from lighthouse_core.data.survey import survey
    from lighthouse_core.errors import UserError

    resolved = load_recipe(find_recipe(recipe), settings or (), trains=False)
    if verify:
        prepared = [part for part in resolved.data.parts if part.source == "tokens"]
        if not prepared:
            raise UserError('--verify is for data.source "tokens"')
        for part in prepared:
            open_tokens(part, checked_tokenizer(resolved)).verify(_output.say)
        _output.say("every checksum agrees")
    train = survey(resolved, "train", seconds=seconds, samples=samples)
    found = list(train)
    if resolved.data.validation:
        found += survey(resolved, "validation", seconds=seconds, samples=0)
    mixed = bool(resolved.data.sources)
    for one in found:
        if one.complete and not len(one.lengths):
            fault = no_documents(one.split, resolved.data.validation)
            _output.warn(f"{_of(one, mixed)}{fault}, so training will not start; {fault.hint}")
    if as_json:
        _output.data(json.dumps([_as_dict(one, mixed) for one in found], indent=1))
        return
    columns: tuple[str, ...] = ("split", "documents", "tokens", "median", "90%", "99%", "longest", "in long documents")
    title = f"tokens of documents; long: more than training.seq_len = {resolved.training.seq_len}"
    rows = [_row(one) for one in found]
    packing = [_packing_row(one) for one in found]
    names: tuple[str, ...] = ("split", "mean tokens", "longer than a sequence", "padding", "ignored labels")
    if mixed:
        columns, names = ("source", *columns), ("source", *names)
        rows = [(one.source, *row) for one, row in zip(found, rows, strict=True)]
        packing = [(one.source, *row) for one, row in zip(found, packing, strict=True)]
    _output.table(title, columns, rows)
    if resolved.alignment is not None:
        padded = f", each padded to a multiple of {resolved.alignment} tokens" if resolved.alignment > 1 else ""
        _output.table(f"documents kept apart{padded}", names, packing)
    steps = resolved.training.steps + resolved.recover.steps
    if mixed:
        facts = [(one.source, f"{one.share:.2%}", *size_of_source(one)) for one in train]
        _output.table(f"the mixture; epochs in {steps} steps", ("source", "share", "size", "tokens", "epochs"), facts)
    elif train[0].epochs is not None:
        _output.say(f"{steps} steps are {train[0].epochs:.2f} epochs of train")
    for one in found:
        what = f"{_of(one, mixed)}{one.split}"
        if not one.complete:
            _output.say(f"{what}: the documents of the first {seconds:g} seconds of reading, not all")
        if one.nulls:
            _output.say(f"{what}: passed over, as their text is null or empty: {one.nulls:,} rows")
    for one in train:
        for number, text in enumerate(one.samples, 1):
            _output.data(f"--- {_of(one, mixed)}document {number}\n{text}")


def _of(found: "Survey", mixed: bool) -> str:
    """Of which source, where there are several."""
    return f"source {found.source}: " if mixed else ""


def _row(found: "Survey") -> tuple[str, ...]:
    from lighthouse_core.data.survey import quantiles

    documents = f"{'' if found.complete else 'more than '}{len(found.lengths):,}"
    if not len(found.lengths):
        return (found.split, documents, *["-"] * 6)
    return (
        found.split,
        documents,
        f"{found.tokens:,}",
        *(f"{length:,}" for length in quantiles(found.lengths)),
        f"{found.share_in_long:.1%}",
    )


def _packing_row(found: "Survey") -> tuple[str, ...]:
    if not len(found.lengths):
        return (found.split, *["-"] * 4)
    mean = f"{found.lengths.mean():,.0f}"
    return found.split, mean, f"{found.longer:,}", f"{found.padding:.2%}", f"{found.ignored:.2%}"


def _as_dict(found: "Survey", mixed: bool) -> dict[str, Any]:
    from lighthouse_core.data.survey import quantiles

    packing = {
        "align": found.align,
        "mean": found.tokens / max(1, len(found.lengths)),
        "longer": found.longer,
        "padding": found.padding,
        "ignored_labels": found.ignored,
    }
    source = {"source": found.source, "share": found.share, "bytes": found.size} if mixed else {}
    return {
        **source,
        "split": found.split,
        "complete": found.complete,
        "documents": len(found.lengths),
        "tokens": found.tokens,
        "nulls": found.nulls,
        **quantiles(found.lengths)._asdict(),
        "seq_len": found.seq_len,
        "share_in_long": found.share_in_long,
        "epochs": found.epochs,
        "samples": list(found.samples),
        **({} if found.align is None else packing),
    }


def _progress() -> Callable[["Progress"], None]:
    """Prints a line at once, then at most one in five seconds, and the last."""
    from lighthouse_core.runs.rows import clock

    last = float("-inf")

    def show(progress: "Progress") -> None:
        nonlocal last
        if time.monotonic() - last < 5 and progress.done < 1:
            return
        last = time.monotonic()
        left = "" if progress.left is None else f"  {clock(progress.left)} left"
        _output.say(f"{progress.done:6.1%}  {progress.documents:,} documents  {progress.tokens:,} tokens{left}")

    return show
