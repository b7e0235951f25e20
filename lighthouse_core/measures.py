"""What `lighthouse eval` can measure."""

from collections.abc import Sequence

from lighthouse_core.errors import did_you_mean

MEASURES = ("loss", "context", "leak", "switch", "needles")


def check_numbers(tokens: int | None, sequences: int, context: int, trials: int, measures: Sequence[str]) -> None:
    """Check what a measurement is asked for, as far as that does not depend on the model.

    Args:
        tokens: length of a sequence; None for the model's.
        sequences: how many.
        context: tokens of the short context.
        trials: needles of a cell.
        measures: what is asked for by name.

    Raises:
        ValueError: a number is out of range.
    """
    length = 4 if tokens is None else tokens
    if length < 4 or min(sequences, trials) < 1:
        what = f"{sequences} sequences of {length} tokens" if tokens is not None else f"{sequences} sequences"
        raise ValueError(f"{what} and {trials} trials are too few")
    if "context" in measures and (context < 2 or context % 2 or (tokens is not None and context >= tokens - 1)):
        below = "" if tokens is None else f" and below the length of {tokens}"
        raise ValueError(f"a context of {context} tokens must be even{below}")


def parse_measures(names: str) -> tuple[str, ...]:
    """Measures named with commas between; all of them for "".

    Raises:
        ValueError: there is no such measure.
    """
    chosen = tuple(name.strip() for name in names.split(",")) if names else MEASURES
    for name in chosen:
        if name not in MEASURES:
            raise ValueError(f"knows {', '.join(MEASURES)}, not {name!r}{did_you_mean(name, MEASURES)}")
    return chosen
