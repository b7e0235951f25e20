"""How a source of a mixture is shown, by `data inspect` and by a dry run."""


def size_of_source(
    share: float, size: int | None, tokens: int | None, epochs: float | None
) -> tuple[str, str, str, str]:
    """How its share, bytes, tokens and epochs are shown; "?" is not known."""
    return (
        f"{share:.2%}",
        "?" if size is None else f"{size:,}",
        "?" if tokens is None else f"{tokens:,}",
        "?" if epochs is None else f"{epochs:.2f}",
    )
