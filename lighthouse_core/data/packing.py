"""Documents kept apart in a sample: what attention, RoPE and the loss are told of them."""

from typing import Any

import numpy as np

from lighthouse_core.attention.context import Documents
from lighthouse_core.models.labels import IGNORED

# Fewer documents than this are one shape: a new one may be compiled for.
_FEWEST = 16


def boundaries(positions: np.ndarray) -> np.ndarray:
    """Where documents begin in a batch whose rows lie one behind the other, as variable-length attention takes them.

    Args:
        positions: [B, N], any integers: 0 where a document begins. What goes on from the row before begins anew.

    Returns:
        int32 [2**j + 1], ascending, with the least j >= 4 that has room, so that few shapes occur: every index into
        [B * N] at which a document or a row begins, then B * N in all other entries, of which there is at least one.
    """
    begins = positions == 0
    begins[:, 0] = True
    found = np.flatnonzero(begins)
    bounds = np.full(max(_FEWEST, _power_of_two(len(found))) + 1, positions.size, dtype=np.int32)
    bounds[: len(found)] = found
    return bounds


def apart(ids: np.ndarray, places: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """A batch whose documents do not mix.

    Args:
        ids: int64 [B, N + 1], each row with the token after it.
        places: int32 [B, N + 1], their positions within their documents, `padding.PADDING` for padding.

    Returns:
        Inputs, and labels int64 [B, N], `IGNORED` where the next token is padding or begins a document. The inputs:
        "input": int64 [B, N].
        "positions": int32 [B, N], 0 to N - 1: within the document, on which the padding behind it goes on counting. Of
            a document that began in an earlier sample they are moved down together, where RoPE would not reach them.
        "documents": `Documents`, of which padding belongs to the one before it. Their number and the length of the
            longest are rounded up to powers of two, so that few occur: see `boundaries`.
    """
    # Not above: what looks at lengths alone needs no torch.
    import torch

    rows, tokens = ids.shape[0], ids.shape[1] - 1
    within = np.ascontiguousarray(places[:, :-1])
    bounds = boundaries(within)
    begins = bounds[: np.searchsorted(bounds, np.int32(within.size))]
    lengths = np.diff(begins, append=np.int32(within.size))
    # RoPE has N positions, and attention sees their differences alone.
    first = np.minimum(within.ravel()[begins], tokens - lengths)
    positions = np.arange(within.size, dtype=np.int32) - np.repeat(begins - first, lengths)
    inputs = {
        "input": np.ascontiguousarray(ids[:, :-1]),
        "positions": positions.reshape(rows, tokens),
        "documents": Documents(torch.from_numpy(bounds), _power_of_two(int(lengths.max()))),
    }
    return inputs, np.where(places[:, 1:] > 0, ids[:, 1:], IGNORED)


def _power_of_two(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length()
