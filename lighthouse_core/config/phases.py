"""[[lighthouse.phases]]: the parts of stage 1, one after another, and which step belongs to which. Imports no torch.

Training on short sequences first is Dataset Decomposition's (arXiv 2405.13226). Sparse attention first and dense
attention last is MoBA's (arXiv 2502.13189). Windows that grow are in `lighthouse_core.attention.growth`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer

from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.growth import Growth, grown, mean_window
from lighthouse_core.attention.settings import Settings
from lighthouse_core.config.section import MOST, Ints, PositiveFloat, PositiveTokens, Section
from lighthouse_core.errors import RecipeError


class _Keys(Section):
    """What a phase has beside the settings of [lighthouse]."""

    share: Annotated[float, Field(gt=0, le=MOST)] = 1.0
    enabled: bool = True
    window_end: PositiveTokens | None = None
    growth: Growth | None = None
    dense_layers: Ints | None = None
    rope_theta: PositiveFloat | None = None

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """TOML has no null."""
        return {key: value for key, value in handler(self).items() if value is not None}

    @property
    def given(self) -> dict[str, Any]:
        """The settings of [lighthouse] that it overrides."""
        found = {field.name: getattr(self, field.name) for field in fields(Settings)}
        return {name: value for name, value in found.items() if value is not None}


_SETTINGS: dict[str, Any] = {field.name: (field.type | None, None) for field in fields(Settings)}  # type: ignore[operator]
_WithSettings = create_model("_WithSettings", __base__=_Keys, **_SETTINGS)


class PhaseSection(_WithSettings):  # type: ignore[misc, valid-type]
    """One phase. Every field of `Settings` overrides the [lighthouse] key of that name.

    Attributes:
        share: of the steps of stage 1, relative to the other phases' shares.
        enabled: false makes every layer dense.
        window_end: window of the last step, in tokens. The window grows from `window`, that of the first step.
        growth: how it grows: "linear" (the default) adds as much in each step, "geometric" multiplies.
        dense_layers: indices of the layers that are dense in this phase; `model.dense_layers` by default.
        rope_theta: base of RoPE's frequencies in this phase; `model.rope_theta` by default, and in the last phase. A
            base that is raised for longer sequences is Xiong et al.'s (arXiv 2309.16039).
    """


@dataclass(frozen=True)
class Phase:
    """A phase of a stage 1 whose steps are known.

    Attributes:
        number: from 1.
        begin, end: its first and its last step; stage 1 begins with step 1.
        attention: the settings of its last step. Of a dense phase only `dense_backend` counts.
        first_window: the window of its first step, in tokens.
        growth: "linear", "geometric", or None where the window stays.
        dense: whether every layer is dense.
        dense_layers: the other dense layers, by index.
        rope_theta: base of RoPE's frequencies; None for the model's.
    """

    number: int
    begin: int
    end: int
    attention: LighthouseConfig
    first_window: int
    growth: Growth | None = None
    dense: bool = False
    dense_layers: tuple[int, ...] = ()
    rope_theta: float | None = None

    def window_at(self, step: int) -> int:
        """The window of one of its steps, in tokens; see `lighthouse_core.attention.growth`."""
        if self.growth is None:
            return self.attention.window
        windows = self.first_window, self.attention.window
        return grown(*windows, self.growth, step - self.begin, self.end - self.begin)

    @property
    def mean_window(self) -> int:
        """The mean of its steps' windows, in tokens, as if it had many steps."""
        if self.growth is None:
            return self.attention.window
        return mean_window(self.first_window, self.attention.window, self.growth)

    def settings(self, step: int) -> LighthouseConfig:
        """The settings of one of its steps."""
        return self.attention if self.growth is None else replace(self.attention, window=self.window_at(step))

    def sparse_layers(self, layers: int) -> int:
        """How many of a model's `layers` layers are not dense."""
        return 0 if self.dense else layers - len(self.dense_layers)

    @property
    def window_words(self) -> str:
        """Its window, or the two between which the window grows; "" without one."""
        if self.dense or not self.attention.window:
            return ""
        if self.growth is None:
            return f"{self.attention.window}"
        return f"{self.first_window} to {self.attention.window} ({self.growth})"

    def described(self) -> str:
        """Its attention in a few words: method, settings, window, and the base of RoPE where that is its own."""
        theta = "" if self.rope_theta is None else f", rope_theta {self.rope_theta:g}"
        if self.dense:
            return f"dense{theta}"
        window = f", window {self.window_words}" if self.window_words else ""
        return self.attention.rule.described(self.attention) + window + theta


def spans(shares: Sequence[float], steps: int) -> list[tuple[int, int]]:
    """The first and the last step of every phase; the last comes before the first where a phase has no step.

    Shares count as the decimal numbers that they are written as, so that three equal ones are exact thirds.

    Args:
        shares: of the phases, above 0.
        steps: of stage 1.
    """
    exact = [Fraction(repr(share)) for share in shares]
    total = sum(exact)
    begins = [-(-before * steps // total) + 1 for before in accumulate(exact[:-1], initial=Fraction(0))]
    return [(begin, after - 1) for begin, after in pairwise([*begins, steps + 1])]


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of a step; before the first step and after the last one the nearest phase."""
    return next((phase for phase in phases if step <= phase.end), phases[-1])


def overlaps(phases: Iterable[Phase], first: int, last: int) -> dict[Phase, int]:
    """How many of the steps `first` to `last` each phase has, of those that have any."""
    found = {phase: min(last, phase.end) - max(first, phase.begin) + 1 for phase in phases}
    return {phase: steps for phase, steps in found.items() if steps > 0}


def of_windows(windows: Iterable[int]) -> list[dict[str, Any]]:
    """The phases that take the place of `lighthouse.windows`, a key of earlier releases: equal parts of stage 1."""
    return [{"share": 1.0, "enabled": True, "window": window} for window in windows]


def of_older_run(table: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a run, which an earlier release may have begun, in today's words.

    Args:
        table: of recipe.toml.

    Raises:
        RecipeError: its stage 1 had single dense steps, which no phases can repeat.
    """
    section = table.get("lighthouse")
    if not isinstance(section, dict):
        return table
    section = dict(section)
    every, windows = section.pop("dense_every", 0), section.pop("windows", [])
    if every and section.get("enabled", True):
        raise RecipeError(
            f"lighthouse.dense_every = {every}: this run has single dense steps within stage 1, which this release "
            "does not train or read",
            hint="use the release that began the run; in new runs a dense phase takes their place",
        )
    if windows:
        section["phases"] = of_windows(windows)
    return table | {"lighthouse": section}
