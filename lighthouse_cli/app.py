"""The `lighthouse` command: its subcommands, and how errors leave it."""

import sys
from typing import Annotated

import typer

from lighthouse_cli import _output, data, recipes, tokenizer
from lighthouse_cli.compare import compare
from lighthouse_cli.eval import evaluate
from lighthouse_cli.pretrain import pretrain
from lighthouse_cli.profile import profile
from lighthouse_cli.recover import recover
from lighthouse_cli.runs import runs
from lighthouse_cli.strip import strip
from lighthouse_cli.sweep import sweep
from lighthouse_core.errors import LighthouseError, UserError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
for command in (pretrain, recover, strip, profile, runs, compare, sweep):
    app.command()(command)
app.command("eval")(evaluate)
for group in (data, tokenizer, recipes):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2])


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        try:
            version = metadata.version("lighthouse-pretrain")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        _output.data(f"lighthouse {version}")
        raise typer.Exit


@app.callback()
def _lighthouse(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Long-context pre-training with Lighthouse Attention."""


def main() -> None:
    """Run the command line: an expected error is one line and an exit code, any other keeps its traceback."""
    try:
        app(prog_name="lighthouse")
    except LighthouseError as error:
        _output.error(str(error), error.hint)
        sys.exit(error.exit_code)
    except PermissionError as error:
        # Any path that a user gives may lie where they cannot look.
        _output.error(f"{error.filename}: {error.strerror}")
        sys.exit(UserError.exit_code)
