"""What a user sees of a job while it trains: lines, JSON, a live view, or nothing. Each is a launch.Watcher."""

import time
from typing import TYPE_CHECKING, Any, Protocol

from lighthouse_cli import _output, _view

if TYPE_CHECKING:
    from lighthouse_core.job.plan import Plan
    from lighthouse_core.runs.run import Run

# The clock of the view goes on between two rows; a checkpoint is looked for as often.
_REDRAW_SECONDS = 1.0


class Watcher(Protocol):
    """A launch.Watcher that is told of the end."""

    takes_words: bool
    quiet: bool

    def tick(self, stopping: bool) -> None: ...

    def words(self, chunk: bytes) -> None: ...

    def end(self, outcome: str) -> None:
        """The job has ended: "done", "stopped" or "failed"."""


def watcher(run: "Run", plan: "Plan", *, quiet: bool, as_json: bool) -> Watcher:
    """The one for this job and this terminal; make it before the job starts."""
    if as_json:
        return Rows(run, plan, quiet=quiet)
    if quiet:
        return Silence(quiet)
    return Live(run, plan) if _output.can_redraw() else Lines(run, plan)


class Silence:
    """Nothing but what the processes say themselves: if quiet, errors."""

    takes_words = False

    def __init__(self, quiet: bool):
        self.quiet = quiet

    def tick(self, stopping: bool) -> None:
        pass

    def words(self, chunk: bytes) -> None:
        pass

    def end(self, outcome: str) -> None:
        pass


class Lines:
    """A plain line on stderr for every row."""

    takes_words = False
    quiet = False

    def __init__(self, run: "Run", plan: "Plan"):
        from lighthouse_core.runs.rows import Progress, Tail

        self.run = run
        steps = run.checkpoint_steps()
        self.tail = Tail(run.path / "metrics.jsonl")
        self.told = False
        self.progress = Progress(
            run.name,
            run.stage,
            run.start,
            run.end,
            begin=steps[-1] if steps else 0,
            processes=plan.world_size,
            started=time.monotonic(),
            recovery=run.recovering,
            checkpoint=steps[-1] if steps else None,
        )

    def tick(self, stopping: bool) -> None:
        from lighthouse_core.runs.rows import can_be_shown

        now = time.monotonic()
        if stopping and not self.told:
            self.told = True
            self.tell_of_stopping()
        for text, row in self.tail.read():
            if can_be_shown(row) and self.progress.add(row, now):
                self.show(text, row, now)

    def tell_of_stopping(self) -> None:
        """A signal has come."""
        _output.say("stopping; a second signal ends everything at once")

    def show(self, text: str, row: dict[str, Any], now: float) -> None:
        """A row of this launch: its text in the file, its values, and when it was seen."""
        from lighthouse_core.runs.rows import progress_line, validation_line

        if "val_loss" in row:
            _output.say(validation_line(row))
        if "loss" in row:
            left = self.progress.seconds_left(now) or 0.0
            _output.say(progress_line(row["step"], self.progress.end, row["stage"], row, left, row["leaky"]))

    def words(self, chunk: bytes) -> None:
        pass

    def end(self, outcome: str) -> None:
        self.tick(False)


class Rows(Lines):
    """Every row on stdout, as in metrics.jsonl."""

    def __init__(self, run: "Run", plan: "Plan", *, quiet: bool):
        super().__init__(run, plan)
        self.quiet = quiet

    def show(self, text: str, row: dict[str, Any], now: float) -> None:
        _output.data(text)


class Live(Lines):
    """A view that is redrawn, below whatever the processes say."""

    takes_words = True

    def __init__(self, run: "Run", plan: "Plan"):
        super().__init__(run, plan)
        self.screen = _output.Screen()
        self.rest = b""
        self.drawn: tuple[Any, ...] | None = None
        self.due = 0.0

    def tick(self, stopping: bool) -> None:
        super().tick(stopping)
        now = time.monotonic()
        # What calls for another look at once; the clock does so every second.
        state = (self.screen.size, len(self.progress.points), self.progress.validation, stopping)
        if state != self.drawn or now >= self.due:
            self.drawn, self.due = state, now + _REDRAW_SECONDS
            self.draw(now, "stopping: saves after this step" if stopping else "")

    def tell_of_stopping(self) -> None:
        # The view says so.
        pass

    def draw(self, now: float, note: str) -> None:
        self.progress.checkpoint = next(reversed(self.run.checkpoint_steps()), None)
        self.screen.draw(_view.render(self.progress, now, *self.screen.size, note=note))

    def show(self, text: str, row: dict[str, Any], now: float) -> None:
        pass

    def words(self, chunk: bytes) -> None:
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        if lines:
            text = (line.decode("utf-8", errors="replace").rstrip("\r") for line in lines)
            # Of a line that was written over, as progress bars are, what it came to.
            self.screen.words("".join(line.rpartition("\r")[2] + "\n" for line in text))
            self.drawn = None

    def end(self, outcome: str) -> None:
        if self.rest:
            self.words(b"\n")
        super().tick(False)
        now = time.monotonic()
        if outcome == "failed":
            # What went wrong stays last on the screen.
            self.screen.clear()
            if self.progress.row is not None:
                Lines.show(self, "", self.progress.row, now)
        else:
            from lighthouse_core.runs.rows import clock

            self.draw(now, f"{outcome} after {clock(now - self.progress.started)}")
