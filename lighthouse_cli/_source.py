"""How a source of text is shown, by `data inspect` and by a dry run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lighthouse_core.data.survey import Survey


def size_of_source(found: "Survey") -> tuple[str, str, str]:
    """How its bytes, tokens and epochs are shown; "?" is not known."""
    size = "?" if found.size is None else f"{found.size:,}"
    return (
        size + " compressed" * found.compressed,
        f"{found.tokens:,}" if found.complete else "?",
        "?" if found.epochs is None else f"{found.epochs:.2f}",
    )
