"""lighthouse data: prepare a source as token shards; look at what is in it."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lighthouse_cli import _complete, _options, _output

if TYPE_CHECKING:
    from lighthouse_core.data.prepare import Progress
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
    from lighthouse_core.runs.rows import clock

    resolved = load_recipe(find_recipe(recipe), settings or ())
    cores = len(os.sched_getaffinity(0))
    begun = time.monotonic()
    try:
        prepared = run(resolved, out, workers or cores, _progress(), _output.say)
    except (KeyboardInterrupt, SystemExit) as end:
        _output.say("interrupted; the same command goes on where this one stopped")
        # Of SIGTERM and SIGHUP, which have exit codes of their own.
        raise end if isinstance(end, SystemExit) else typer.Exit(130) from None
    seconds = time.monotonic() - begun
    for split, documents in prepared.documents.items():
        _output.say(f"{split}: {documents:,} documents, {prepared.tokens[split]:,} tokens")
        if not documents and (split == "train" or resolved.data.validation):
            _output.warn(
                f"no document fell to {split}: training on this needs another --set data.validation, perhaps 0"
            )
    _output.say(f"prepared in {clock(seconds)}; train on it with:")
    _output.say(f"""  --set 'data.source="tokens"' --set 'data.paths=[{json.dumps(str(out))}]'""")
    _output.data(str(out))


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
    """Show a recipe's documents: how many, how long, and how they look as tokens."""
    from lighthouse_core.config import find_recipe, load_recipe
    from lighthouse_core.data.build import open_tokens
    from lighthouse_core.data.checks import checked_tokenizer
    from lighthouse_core.data.stream import no_documents
    from lighthouse_core.data.survey import survey
    from lighthouse_core.errors import UserError

    resolved = load_recipe(find_recipe(recipe), settings or ())
    if verify:
        if resolved.data.source != "tokens":
            raise UserError('--verify is for data.source "tokens"')
        open_tokens(resolved.data, checked_tokenizer(resolved)).verify(_output.say)
        _output.say("every checksum agrees")
    found = [survey(resolved, "train", seconds=seconds, samples=samples)]
    if resolved.data.validation:
        found.append(survey(resolved, "validation", seconds=seconds, samples=0))
    for one in found:
        if one.complete and not len(one.lengths):
            fault = no_documents(one.split, resolved.data.validation)
            _output.warn(f"{fault}, so training will not start; {fault.hint}")
    if as_json:
        _output.data(json.dumps([_as_dict(one) for one in found], indent=1))
        return
    columns = ("split", "documents", "tokens", "median", "90%", "99%", "longest", "in long documents")
    title = f"tokens of documents; long: more than training.seq_len = {resolved.training.seq_len}"
    _output.table(title, columns, [_row(one) for one in found])
    for one in found:
        if not one.complete:
            _output.say(f"{one.split}: the documents of the first {seconds:g} seconds of reading, not all")
    for number, text in enumerate(found[0].samples, 1):
        _output.data(f"--- document {number}\n{text}")


def _row(found: "Survey") -> tuple[str, ...]:
    import numpy as np

    documents = f"{'' if found.complete else 'more than '}{len(found.lengths):,}"
    if not len(found.lengths):
        return (found.split, documents, *["-"] * 6)
    quantiles = np.quantile(found.lengths, (0.5, 0.9, 0.99, 1.0), method="higher")
    return (
        found.split,
        documents,
        f"{found.tokens:,}",
        *(f"{int(length):,}" for length in quantiles),
        f"{found.share_in_long:.1%}",
    )


def _as_dict(found: "Survey") -> dict[str, Any]:
    import numpy as np

    names = ("median", "p90", "p99", "longest")
    quantiles = (
        np.quantile(found.lengths, (0.5, 0.9, 0.99, 1.0), method="higher").tolist() if len(found.lengths) else [0] * 4
    )
    return {
        "split": found.split,
        "complete": found.complete,
        "documents": len(found.lengths),
        "tokens": found.tokens,
        **dict(zip(names, quantiles, strict=True)),
        "seq_len": found.seq_len,
        "share_in_long": found.share_in_long,
        "samples": list(found.samples),
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
