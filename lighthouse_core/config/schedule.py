"""[schedule]: the learning rate of stage 1, or of a dense run."""

from typing import Annotated, Literal

from pydantic import Field

from lighthouse_core.config.section import NonNegative, Section

# Of the rate over a decay; `lighthouse_core.runs.schedule` has the formulas.
DecayShape = Literal["linear", "cosine", "1-sqrt"]


class ScheduleSection(Section):
    """Linear warm-up, a constant rate, and over the last `decay_steps` a decay to `min_lr_factor` times optimizer.lr.

    Warm-up counts from step 0 of stage 1. A recovery has no second one: it begins with the rate that stage 1 ends with,
    and has `recover.decay`. So stage 1 of a Lighthouse run cannot end at 0.
    """

    warmup_steps: NonNegative = 0
    decay_steps: NonNegative = 0
    decay: DecayShape = "linear"
    min_lr_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def ends_at_zero(self) -> bool:
        """Whether the last step leaves no rate to go on with."""
        return self.decay_steps > 0 and not self.min_lr_factor
