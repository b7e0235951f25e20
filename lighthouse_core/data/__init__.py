"""Training data: sources give documents, the stream orders and tokenizes them, the loader cuts samples for one rank."""

from lighthouse_core.data.checks import check

__all__ = ["check"]
