"""[lighthouse]: the attention of stage 1."""

from dataclasses import fields

from pydantic import model_validator

from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.settings import SettingError, Settings
from lighthouse_core.config.section import Ints, NonNegative, Section, conflict


# pydantic's hints make every model a dataclass that can be changed, whatever `frozen` says.
class LighthouseSection(Section, Settings):  # type: ignore[misc]
    """`enabled = false` trains a dense baseline. Every `dense_every`-th step of stage 1 is dense in all layers, 0 for
    none; a `metrics.every` that it divides keeps the ledger's medians fair. `windows`, shortest first, take turns as
    `window` over equal parts of stage 1. The other keys are those of `Settings`, with their defaults.
    """

    enabled: bool = True
    dense_every: NonNegative = 0
    windows: Ints = ()

    def attention(self, window: int | None = None) -> LighthouseConfig:
        """The same settings as the attention call takes them, with this window, or else the last one of stage 1."""
        if window is None:
            window = self.windows[-1] if self.windows else self.window
        settings = {field.name: getattr(self, field.name) for field in fields(Settings)}
        return LighthouseConfig(**settings | {"window": window})

    def described(self) -> str:
        """The attention of stage 1 in a few words: method, settings, windows, dense steps."""
        cfg = self.attention()
        windows = [window for window in self.windows or (self.window,) if window]
        said = [cfg.rule.described(cfg), *([f"window {', then '.join(map(str, windows))}"] if windows else [])]
        if self.dense_every:
            said.append(f"one step in {self.dense_every} dense")
        return ", ".join(said)

    def turns(self, steps: int) -> dict[int, int]:
        """Every window of a stage 1 of so many steps, with the step that its turn begins with."""
        windows = self.windows or (self.window,)
        return {window: -(-number * steps // len(windows)) + 1 for number, window in enumerate(windows)}

    def window_at(self, step: int, steps: int) -> int:
        """The window of a step, 1 to `steps`, of a stage 1 of so many."""
        return max((begin, window) for window, begin in self.turns(steps).items() if begin <= step)[1]

    @model_validator(mode="after")
    def _check(self) -> "LighthouseSection":
        if self.windows and self.window:
            raise conflict("window", "lighthouse.windows take the place of lighthouse.window")
        if list(self.windows) != sorted(set(self.windows)):
            raise conflict("windows", f"lighthouse.windows must grow: {list(self.windows)}")
        try:
            for window in self.windows or (self.window,):
                self.attention(window)
        except SettingError as error:
            if error.field == "window" and self.windows:
                raise conflict("windows", f"lighthouse.windows: {error}") from None
            raise conflict(error.field, f"lighthouse.{error}") from None
        return self
