"""The padding behind a document that is kept apart: apart from `packing`, as preparing data needs no torch."""

from typing import TypeVar

import numpy as np

# The position of padding within its document.
PADDING = -1
_Count = TypeVar("_Count", int, np.ndarray)


def padded(tokens: _Count, align: int) -> _Count:
    """Tokens that documents of these lengths take, each a whole multiple of `align`."""
    return tokens + -tokens % align
