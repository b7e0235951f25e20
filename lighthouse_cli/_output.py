"""The only printer: data to stdout, words to stderr.

Names, keys and documents come from outside, so whatever is printed is escaped here: a terminal obeys none of it.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from lighthouse_core.shown import shortened, shown, shown_drawing, shown_lines

if TYPE_CHECKING:
    from rich.text import Text

_quiet = False
# Characters of an error, which may quote what it was given.
_LONGEST = 800


def set_quiet(quiet: bool) -> None:
    """Whether `say` and `warn` are silent from now on."""
    global _quiet
    _quiet = quiet


def data(text: str) -> None:
    """What a script would read; it may have several lines."""
    escape_on_stdout()
    print(shown_lines(text), flush=True)


def drawing(text: str) -> None:
    """A drawing of ours on stdout, whose colours stay."""
    escape_on_stdout()
    print(shown_drawing(text), flush=True)


def say(text: str) -> None:
    """What a person would read: one line."""
    if not _quiet:
        final(text)


def warn(text: str) -> None:
    say(f"warning: {text}")


def final(text: str) -> None:
    """The outcome, which --quiet leaves."""
    # A terminal that was closed takes no words, and the exit code matters more than they do.
    with contextlib.suppress(OSError, ValueError):
        print(shown(text), file=sys.stderr, flush=True)


def error(text: str, hint: str | None = None) -> None:
    final(f"error: {shortened(text, _LONGEST)}")
    if hint:
        final(f"hint: {shortened(hint, _LONGEST)}")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> None:
    """Rows of text on stdout, the first columns to the left and the others, numbers, to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    escape_on_stdout()
    # Away from a terminal rich assumes 80 columns and would cut cells off.
    console = Console(width=None if is_terminal(sys.stdout) else 200)
    name = Text(shown(title)) if title else None
    grid = Table(box=box.SIMPLE_HEAD, title=name, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(Text(shown(column)), justify="left" if number < text_columns else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(shown(cell)) for cell in row))
    console.print(grid)


def escape_on_stdout() -> None:
    """What the encoding of stdout lacks is written as an escape, as stderr does from the start."""
    # Python takes the second in the C locale.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def hold_streams() -> None:
    """Open what the process was started without of stdin, stdout and stderr on nothing: a file that is opened later
    would take its number, and whatever a library prints would be written into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is there, and is a terminal. One that was closed before Python began is None."""
    return stream is not None and stream.isatty()


def flush() -> None:
    """Have what was printed on stdout reach it.

    Raises:
        OSError: nobody takes it: a full disk, a closed pipe.
    """
    if sys.stdout is not None:
        sys.stdout.flush()


def give_up() -> None:
    """Drop what no stream takes: the interpreter would complain of it at its end, and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def can_redraw() -> bool:
    """Whether stderr is a terminal on which lines can be drawn over, and the user has nothing against it."""
    encoding = (getattr(sys.stderr, "encoding", None) or "").lower().replace("-", "")
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") in ("", "dumb", "unknown")
    return is_terminal(sys.stderr) and not plain and encoding == "utf8"


class Screen:
    """Lines at the end of stderr that are drawn over, with words above them.

    The cursor rests, visible, on the line below, and the terminal is put in no mode: whatever ends the process leaves
    nothing to repair. Lines must be narrower than the terminal.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, force_terminal=True, highlight=False)
        self._widths: list[int] = []
        self._columns = 0
        self.lost = False

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines of the terminal; of a usual one where it does not know."""
        try:
            size = os.get_terminal_size(sys.stderr.fileno())
        except OSError:
            return 80, 24
        return size.columns or 80, size.lines or 24

    def draw(self, lines: Sequence["Text"]) -> None:
        """Show these lines in place of the last ones."""
        with self._console.capture() as capture:
            for line in lines:
                self._console.print(line, end="\x1b[K\n", soft_wrap=True)
        columns, _ = self.size
        # Drawing over lines does not flicker; but a terminal may remember that it had wrapped them.
        erased = "\x1b[J" if columns != self._columns else ""
        self._write(self._home() + erased + capture.get() + "\x1b[J")
        self._widths, self._columns = [line.cell_len for line in lines], columns

    def words(self, text: str) -> None:
        """Print text, of whole lines, where the lines are; draw them again afterwards."""
        self._write(self._home() + "\x1b[J" + shown_lines(text))
        self._widths = []

    def clear(self) -> None:
        self.words("")

    def _home(self) -> str:
        """Back to the start of the lines, which a narrower terminal has wrapped since."""
        columns, _ = self.size
        rows = sum(max(1, -(-width // columns)) for width in self._widths)
        return "\r" + (f"\x1b[{rows}A" if rows else "")

    def _write(self, text: str) -> None:
        if not self.lost:
            try:
                sys.stderr.write(text)
                sys.stderr.flush()
            except OSError:
                self.lost = True
