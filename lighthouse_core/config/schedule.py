"""[schedule]: linear warm-up, then a constant rate."""

from lighthouse_core.config.section import NonNegative, Section


class ScheduleSection(Section):
    """`warmup_steps` counts from step 0 of stage 1; a recovery has no second warm-up."""

    warmup_steps: NonNegative = 0
