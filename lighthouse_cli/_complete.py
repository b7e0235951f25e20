"""What the shell offers for an argument. Nothing heavy here: every press of the tab key waits for it."""

from collections.abc import Callable, Iterable
from pathlib import Path

from lighthouse_core.shown import shown

_RUNS = Path("runs")


def _quiet(offer: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completion by prefix. A directory that cannot be read offers nothing."""

    def complete(incomplete: str) -> list[str]:
        try:
            # A shell would obey the line break of a name.
            return [text for text in offer() if text.startswith(incomplete) and text == shown(text)]
        except OSError:
            return []

    return complete


@_quiet
def runs() -> Iterable[str]:
    from lighthouse_core.runs.listing import run_dirs

    return (path.name for path in run_dirs(_RUNS))


@_quiet
def resumable() -> Iterable[str]:
    from lighthouse_core.runs.listing import run_dirs

    return ["latest", *(path.name for path in run_dirs(_RUNS))]


@_quiet
def shipped() -> Iterable[str]:
    from lighthouse_core.shelf import shipped_recipes

    return sorted(shipped_recipes())


@_quiet
def recipes() -> Iterable[str]:
    """Names, and files of the working directory; for a path elsewhere the shell completes file names itself."""
    from lighthouse_core.shelf import shipped_recipes

    return sorted({*shipped_recipes(), *(path.name for path in Path().glob("*.toml"))})


@_quiet
def checkpoints() -> Iterable[str]:
    """Runs by name, and each one's checkpoints by path, newest first."""
    from lighthouse_core.runs.listing import checkpoint_steps, run_dirs

    found = run_dirs(_RUNS)
    paths = [f"{run}/checkpoints/step-{step}" for run in found for step in reversed(checkpoint_steps(run))]
    return [*(run.name for run in found), *paths]
