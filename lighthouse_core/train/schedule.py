"""The learning rate as a function of the step."""


def lr_factor(step: int, *, warmup: int, switch: int | None = None, end: int | None = None) -> float:
    """Factor on the base learning rate for the update that follows `step` finished steps.

    Linear warm-up, then constant. With `switch` and `end`, a linear decay to zero between them: the update after
    `switch` finished steps has the full rate, and the one after `end` would have none.

    Args:
        step: finished steps.
        warmup: steps of warm-up; the first update uses 1/warmup.
        switch: step at which the decay begins.
        end: step at which the rate would be zero.

    Returns:
        A factor in [0, 1].
    """
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if switch is not None and step > switch:
        factor *= max(0.0, (end - step) / (end - switch))
    return factor
