"""The stock kernels of causal attention: one file a kernel, and this list. Imports no torch."""

from typing import NamedTuple


class Facts(NamedTuple):
    """What has to be known of a kernel before torch is imported.

    Attributes:
        lse: whether it gives the log-sum-exp of its scores, and takes its gradient.
        window: whether it attends over the last tokens alone.
        documents: whether it attends within documents of any length.
        blocks: whether it attends to a window and to chosen blocks of keys.
    """

    lse: bool
    window: bool
    documents: bool
    blocks: bool = False


# By the names of recipes; "auto" chooses.
BACKENDS: dict[str, Facts] = {
    "auto": Facts(lse=True, window=True, documents=True, blocks=True),
    "fa4": Facts(lse=True, window=True, documents=True, blocks=True),
    "fa3": Facts(lse=False, window=True, documents=True),
    "fa2": Facts(lse=False, window=True, documents=True),
    "varlen": Facts(lse=True, window=True, documents=True),
    "cudnn": Facts(lse=False, window=False, documents=False),
    "flash": Facts(lse=False, window=False, documents=True),
    "flex": Facts(lse=False, window=False, documents=False, blocks=True),
    "math": Facts(lse=True, window=True, documents=True, blocks=True),
}
