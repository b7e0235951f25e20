"""The `lighthouse` command: its subcommands, and how errors leave it."""

import os
import signal
import sys
from typing import Annotated, Any

import typer

from lighthouse_cli import _output, _signals, data, profile, recipes, tokenizer
from lighthouse_cli.compare import compare
from lighthouse_cli.eval import evaluate
from lighthouse_cli.pretrain import pretrain
from lighthouse_cli.recover import recover
from lighthouse_cli.runs import runs
from lighthouse_cli.strip import strip
from lighthouse_cli.sweep import sweep
from lighthouse_core.errors import LighthouseError, UserError, memory_fault, refusal
from lighthouse_core.python import SAFE_PATH
from lighthouse_core.shown import shortened

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
for command in (pretrain, recover, strip, runs, compare, sweep):
    app.command()(command)
app.command("eval")(evaluate)
for group in (profile, data, tokenizer, recipes):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2])

# The parser's errors: of click, or of typer's own copy of it.
_Misuse: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


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
    _output.hold_streams()
    # Not for this process, whose path is set, but for all that come from it, multiprocessing's among them.
    os.environ.update(SAFE_PATH)
    _output.escape_on_stdout()
    try:
        # Libraries fail in ways of their own where it has been deleted.
        os.getcwd()
        with _signals.as_exits():
            code = app(prog_name="lighthouse", standalone_mode=False) or 0
        _output.flush()
    except LighthouseError as error:
        _output.error(str(error), error.hint)
        code = error.exit_code
    except _Misuse as error:
        code = _explain(error)
    except typer.Abort as error:
        # The parser's, for Ctrl-C.
        code = 128 + signal.SIGINT if isinstance(error.__cause__, KeyboardInterrupt) else LighthouseError.exit_code
    except BrokenPipeError:
        # Whoever read the output has had enough of it, as `head` has.
        code = LighthouseError.exit_code
    except UnicodeEncodeError as error:
        # The name of a file, for which the locale's encoding has no characters.
        _output.error(
            f"the locale has no characters for {error.object[error.start : error.end]!a}, and so no file is named with "
            "them",
            hint="PYTHONUTF8=1 reads all names as UTF-8, whatever the locale",
        )
        code = UserError.exit_code
    except (MemoryError, RuntimeError) as error:
        fault = memory_fault(error)
        if fault is None:
            raise
        _output.error(str(fault), fault.hint)
        code = fault.exit_code
    except OSError as error:
        # Any path that a user gives may lie where they cannot look, or be none; any disk may be full.
        known = refusal(error)
        _output.error(str(known), known.hint)
        code = known.exit_code
    _output.give_up()
    sys.exit(code)


def _explain(error: Any) -> int:
    """Say what is wrong with the command line itself. Returns the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else " ".join(["lighthouse", *sys.argv[1:2]])
        hint = f"{shortened(command, 60)} --help lists what it takes"
        if context is not None:
            hint = _hint(error, context) or hint
        _output.error(shortened(error.format_message(), 500).rstrip("."), hint)
    return error.exit_code


# Commands that a hint names; more of them would say nothing.
_FEW = 3


def _hint(error: Any, context: "typer.Context") -> str | None:
    """Which command takes the option that this one has not, or which commands a group has; None where neither helps."""
    option = getattr(error, "option_name", None)
    unknown_command = option is None and error.message.startswith("No such command")
    if option is None and not unknown_command:
        return None
    path, command, own = context.command_path, context.command, _commands(context.command)
    if option is not None and option.lstrip("-") in own:
        usage = _usage(option.lstrip("-"), own[option.lstrip("-")])
        return f"{option.lstrip('-')} is a command: {path} {usage}"
    if option is not None and context.parent is not None:
        group, above = (context.parent.command, context.parent.command_path) if not own else (command, path)
        near = {above: group} | {f"{above} {name}": one for name, one in _commands(group).items()}
        takers = [name for name, one in near.items() if any(option in parameter.opts for parameter in one.params)]
        if 0 < len(takers) <= _FEW:
            return f"{option} is an option of {_listed(takers)}; {path} --help lists what it takes"
    if own and context.parent is not None:
        # Those of `lighthouse` itself fill more than a line.
        usages = [_usage(name, one) for name, one in own.items()]
        return f"commands of {path}: {_listed(usages)}; --help lists what each takes"
    return None


def _commands(command: Any) -> dict[str, Any]:
    """Of a group; none of a command."""
    return getattr(command, "commands", {})


def _usage(name: str, command: Any) -> str:
    """A command with its arguments, as "copy NAME [DEST]"."""
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    return " ".join([name, *(argument.metavar or argument.name.upper() for argument in arguments)])


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
