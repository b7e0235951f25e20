"""The only printer: data to stdout, words to stderr."""

import sys
from collections.abc import Iterable, Sequence


def data(text: str) -> None:
    """What a script would read."""
    print(text)


def say(text: str) -> None:
    """What a person would read."""
    print(text, file=sys.stderr)


def warn(text: str) -> None:
    say(f"warning: {text}")


def error(text: str, hint: str | None = None) -> None:
    say(f"error: {text}")
    if hint:
        say(f"hint: {hint}")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows of text on stdout, the first column to the left and the others, numbers, to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Away from a terminal rich assumes 80 columns and would cut cells off.
    console = Console(width=None if sys.stdout.isatty() else 200)
    grid = Table(box=box.SIMPLE_HEAD, title=Text(title), title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(Text(column), justify="right" if number else "left")
    for row in rows:
        grid.add_row(*map(Text, row))
    console.print(grid)
