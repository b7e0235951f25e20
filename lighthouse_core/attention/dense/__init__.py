"""The stock kernels of causal attention: one file a kernel, and this list. Imports no torch."""

from typing import NamedTuple


class Facts(NamedTuple):
    """What has to be known of a kernel before torch is imported.

    Attributes:
        lse: whether it gives the log-sum-exp of its scores, and takes its gradient.
        window: whether it attends over the last tokens alone.
    """

    lse: bool
    window: bool


# By the names of recipes; "auto" chooses.
BACKENDS: dict[str, Facts] = {
    "auto": Facts(lse=True, window=True),
    "fa4": Facts(lse=True, window=True),
    "fa3": Facts(lse=False, window=True),
    "fa2": Facts(lse=False, window=True),
    "varlen": Facts(lse=True, window=True),
    "cudnn": Facts(lse=False, window=False),
    "flash": Facts(lse=False, window=False),
    "math": Facts(lse=True, window=True),
}
