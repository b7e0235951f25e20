"""The learning rate as a function of the step."""


def lr_factor(step: int, *, warmup: int, decay: tuple[int, int] | None = None) -> float:
    """Factor on the base learning rate for the update that follows `step` finished steps.

    Linear warm-up, then constant. With a `decay`, from there linearly to zero: the update after its first step has the
    full rate, and the one after its last would have none.

    Args:
        step: finished steps.
        warmup: steps of warm-up; the first update uses 1/warmup.
        decay: finished steps at which it begins and ends.

    Returns:
        A factor in [0, 1].
    """
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if decay is not None and step > decay[0]:
        factor *= max(0.0, (decay[1] - step) / (decay[1] - decay[0]))
    return factor
