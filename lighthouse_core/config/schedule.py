"""[schedule]: linear warm-up, then a constant rate, and for dense runs a linear decay."""

from lighthouse_core.config.section import NonNegative, Section


class ScheduleSection(Section):
    """`warmup_steps` counts from step 0 of stage 1; a recovery has no second warm-up.

    Over the last `decay_steps` of a run that is dense from the start the rate goes to zero; others have
    `recover.decay`, and so has a dense run whose end is not known yet.
    """

    warmup_steps: NonNegative = 0
    decay_steps: NonNegative = 0
