"""lighthouse tokenizer: making one."""

from pathlib import Path
from typing import Annotated

import typer

from lighthouse_cli import _complete, _options, _output, _signals

app = typer.Typer(no_args_is_help=True, help="Make a tokenizer.")


@app.callback()
def _tokenizer() -> None:
    """Make a tokenizer."""


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A TOML file, or a name of `lighthouse recipes list`; its [data] is the text.",
            autocompletion=_complete.recipes,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.model", help="The file to write.")],
    vocab: Annotated[
        int, typer.Option("--vocab", metavar="N", min=1, max=2**24, help="Pieces in the vocabulary.")
    ] = 32000,
    size: Annotated[
        int,
        typer.Option("--bytes", metavar="N", min=1, max=10**13, help="Text to train on; a sample where there is more."),
    ] = 100_000_000,
    settings: _options.Settings = None,
) -> None:
    """Train a sentencepiece model (BPE, byte fallback, lossless) on a recipe's training text."""
    from lighthouse_core.config import find_recipe, load_recipe
    from lighthouse_core.data.tokenizers.train import train_tokenizer

    resolved = load_recipe(find_recipe(recipe), settings or (), trains=False)
    _output.say(f"training a vocabulary of {vocab} on up to {size / 1e6:g} MB")
    with _signals.as_exits():
        report = train_tokenizer(resolved.data, out, vocab, size)
    _output.say(f"{report.vocab_size} pieces from {report.training_bytes / 1e6:.1f} MB in {report.seconds:.1f} s")
    what = "held-out text" if report.held_out else "training text (data.validation holds nothing out)"
    _output.say(f"{report.bytes_per_token:.2f} bytes per token on {report.measured_bytes / 1e6:.2f} MB of {what}")
    _output.say(f"use it with: --set 'data.tokenizer=\"{out}\"' and model.vocab_size of at least {report.vocab_size}")
    _output.data(str(out))
