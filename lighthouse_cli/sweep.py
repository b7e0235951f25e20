"""lighthouse sweep: several runs of one recipe, side by side on the GPUs of this machine."""

import contextlib
import json
import shlex
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lighthouse_cli import _output

if TYPE_CHECKING:
    from lighthouse_core.sweep import Runner

# 19 years.
_MOST_MINUTES = 1e7


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="A TOML file: recipe, set, evaluate, runs.NAME.")],
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="M", help="Stop after that long, saved; go on by repeating.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the runs live.")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what is next of each run, and stop.")] = False,
) -> None:
    """Train, recover and evaluate the runs of a sweep on the GPUs; repeated, it goes on where it stopped.

    DIR/SWEEP.json has what was measured so far. It is written after each command.
    """
    from lighthouse_core.config.sweep import load_sweep
    from lighthouse_core.errors import UserError
    from lighthouse_core.files import check_output, check_replaceable, write_atomically
    from lighthouse_core.job.launch import stop_signals
    from lighthouse_core.runs.rows import clock
    from lighthouse_core.sweep import Runner, check, collect, left_over, lock, next_command, places, waits

    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes must be above 0, not {minutes:g}")
    if minutes is not None and minutes > _MOST_MINUTES:
        raise UserError(
            f"--minutes must be at most {_MOST_MINUTES:g}, not {minutes:g}", hint="without it there is no end"
        )
    plan = load_sweep(file)
    base = file.parent / plan.recipe
    check_output(output)
    check(plan, base, output)
    check_replaceable(output, f"{file.stem}.json", lambda found: found.get("sweep") == file.stem and "runs" in found)
    if dry_run:
        for name in plan.runs:
            if waits(plan, name, output):
                _output.data(f"{name}: waits for {plan.runs[name].stage_1}")
            else:
                # The sweep itself refuses to write over what lies there.
                left_over(output / name)
                arguments = next_command(plan, base, name, output)
                _output.data(f"{name}: " + (shlex.join(["lighthouse", *arguments]) if arguments else "done"))
        return
    with lock(output, file.stem):
        begun = time.monotonic()

        def say(text: str) -> None:
            _output.say(f"{clock(time.monotonic() - begun)}  {text}")

        results = output / f"{file.stem}.json"

        def write() -> bool:
            whole = collect(plan, file.stem, output)
            if whole["runs"]:
                write_atomically(results, json.dumps(whole, allow_nan=False) + "\n")
            return bool(whole["runs"])

        def write_so_far() -> None:
            # A full disk is no reason to end what trains.
            with contextlib.suppress(OSError):
                write()

        runner = Runner(plan, base, output, places(plan.per_gpu), say, ended=write_so_far)
        _output.say(f"what the commands print is in {output}, a .log for each run")
        with stop_signals(runner.interrupt):
            runner.run(None if minutes is None else 60 * minutes)
        code = _outcome(runner)
        if write():
            _output.data(str(results))
    if code:
        raise typer.Exit(code)


def _outcome(runner: "Runner") -> int:
    """Say how it ended. Returns the exit code."""
    if not runner.left:
        _output.final(f"done: {', '.join(runner.sweep.runs)}")
        return 0
    words = [f"failed: {', '.join(runner.failed)}"] if runner.failed else []
    words += [f"{name} waits for the first stage of {runner.sweep.runs[name].stage_1}" for name in runner.stuck]
    left = f"left: {', '.join(runner.left)}"
    if words and not runner.asked:
        _output.error("; ".join([*words, left]))
        return 1
    _output.final("; ".join([*words, "stopped" if runner.asked else "time is up", left]))
    return 128 + (signal.SIGINT if runner.asked == signal.SIGINT else signal.SIGTERM)
