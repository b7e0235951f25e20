"""What `lighthouse eval` can measure."""

MEASURES = ("loss", "context", "leak", "switch", "needles")


def parse_measures(names: str) -> tuple[str, ...]:
    """Measures named with commas between; all of them for "".

    Raises:
        ValueError: there is no such measure.
    """
    chosen = tuple(name.strip() for name in names.split(",")) if names else MEASURES
    for name in chosen:
        if name not in MEASURES:
            raise ValueError(f"knows {', '.join(MEASURES)}, not {name!r}")
    return chosen
