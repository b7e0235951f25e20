"""[lighthouse]: the attention of stage 1."""

from dataclasses import fields
from typing import Annotated, Any

from pydantic import Field, model_validator

from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.dense import BACKENDS as DENSE_BACKENDS
from lighthouse_core.attention.methods import METHODS
from lighthouse_core.attention.settings import SettingError, Settings
from lighthouse_core.config.budget import BudgetSection
from lighthouse_core.config.phases import Phase, PhaseSection, spans
from lighthouse_core.config.positions import spelled
from lighthouse_core.config.section import Section, conflict


# pydantic's hints make every model a dataclass that can be changed, whatever `frozen` says.
class LighthouseSection(Section, Settings):  # type: ignore[misc]
    """`enabled = false` trains a dense baseline, whatever the other keys say. `phases` follow each other in stage 1,
    and override the keys here; without them stage 1 is one phase. `budget` shares out blocks among KV heads. The other
    keys are those of `Settings`, with their defaults.
    """

    enabled: bool = True
    phases: Annotated[tuple[PhaseSection, ...], Field(strict=False)] = ()
    budget: BudgetSection = Field(default_factory=BudgetSection)

    def resolved(self, steps: int, dense_layers: tuple[int, ...]) -> tuple[Phase, ...]:
        """The phases of a stage 1, first to last; of a dense baseline one that is dense.

        Args:
            steps: of stage 1.
            dense_layers: of the model, for phases without a list of their own.
        """
        if not self.enabled or not self.phases:
            attention = self._last(self.phases[-1]) if self.phases else self._config({})
            return (Phase(1, 1, steps, attention, attention.window, None, not self.enabled, dense_layers),)
        return tuple(
            Phase(
                number,
                *span,
                self._last(phase),
                self._first(phase).window,
                (phase.growth or "linear") if phase.window_end else None,
                not phase.enabled,
                dense_layers if phase.dense_layers is None else phase.dense_layers,
                phase.rope_theta,
            )
            for number, (phase, span) in enumerate(
                zip(self.phases, spans([phase.share for phase in self.phases], steps), strict=True), 1
            )
        )

    @property
    def without_effect(self) -> dict[str, str]:
        """Keys that are given and that nothing reads, and why: those of a phase that its method does not read, and a
        budget where no method chooses blocks."""
        if not self.enabled:
            return {}
        found = {
            spelled(("lighthouse", "phases", index, key)): f"the method {rule.name} does not read it"
            for index, phase in enumerate(self.phases)
            for rule in [self._first(phase).rule]
            for key in phase.given
            if phase.enabled and key not in rule.reads
        }
        if self.budget.every and not any(map(self._chooses, self.phases or [None])):
            others = " or ".join(name for name, method in METHODS.items() if method.chooses_blocks)
            found["lighthouse.budget.every"] = f"no phase has the method {others}, whose heads choose blocks"
        return found

    @property
    def dense_attention(self) -> LighthouseConfig:
        """Settings of the dense stage, which belongs to no phase. Only `dense_backend` counts."""
        return self._of_dense({})

    def _config(self, given: dict[str, Any]) -> LighthouseConfig:
        return LighthouseConfig(**{field.name: getattr(self, field.name) for field in fields(Settings)} | given)

    def _of_dense(self, given: dict[str, Any]) -> LighthouseConfig:
        """Settings of dense attention, which reads no other key."""
        return LighthouseConfig(dense_backend=given.get("dense_backend", self.dense_backend))

    def _first(self, phase: PhaseSection) -> LighthouseConfig:
        return self._config(phase.given) if phase.enabled else self._of_dense(phase.given)

    def _last(self, phase: PhaseSection) -> LighthouseConfig:
        """The settings of a phase's last step."""
        grown = {"window": phase.window_end} if phase.window_end else {}
        return self._config(phase.given | grown) if phase.enabled else self._first(phase)

    @model_validator(mode="after")
    def _check(self) -> "LighthouseSection":
        for index, phase in enumerate(self.phases):
            try:
                self._check_phase(phase)
            except SettingError as error:
                path = "phases", index, error.field
                raise conflict(path, f"{spelled(('lighthouse', *path))} {error.problem}") from None
        try:
            if not self.phases:
                self._config({})
        except SettingError as error:
            raise conflict(error.field, f"lighthouse.{error}") from None
        return self

    def _chooses(self, phase: PhaseSection | None) -> bool:
        """Whether the heads of a phase choose blocks; None stands for the keys of [lighthouse]."""
        if phase is None:
            return self._config({}).rule.chooses_blocks
        return phase.enabled and self._first(phase).rule.chooses_blocks

    def _check_phase(self, phase: PhaseSection) -> None:
        """Raise SettingError for keys that do not go together."""
        if not phase.enabled:
            growth = {"window_end": phase.window_end, "growth": phase.growth, "dense_layers": phase.dense_layers}
            for key, value in (phase.given | growth).items():
                if value is not None and key != "dense_backend":
                    raise SettingError(key, "is not for a phase with enabled = false: every layer is dense")
        if phase.growth and not phase.window_end:
            raise SettingError("growth", "needs a window_end to grow to")
        first = self._first(phase)
        if not phase.window_end:
            return
        if first.rule.window_is_a_shape:
            others = ", ".join(name for name, method in METHODS.items() if not method.window_is_a_shape)
            problem = f"is not for the method {first.method}, which compiles anew for each window; use one of {others}"
            raise SettingError("window_end", problem)
        if not DENSE_BACKENDS[first.dense_backend].documents:
            others = ", ".join(name for name, facts in DENSE_BACKENDS.items() if facts.documents)
            problem = (
                f"{first.dense_backend!r} compiles anew for each window, which then cannot grow; use one of {others}"
            )
            raise SettingError("dense_backend", problem)
        if not 0 < first.window <= phase.window_end:
            raise SettingError("window_end", f"must be at least the phase's window, above 0 ({first.window})")
        try:
            self._last(phase)
        except SettingError as error:
            raise SettingError("window_end" if error.field == "window" else error.field, error.problem) from None
