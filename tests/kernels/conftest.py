"""What the tests of the kernels share."""

import pytest
import torch

from lighthouse_kernels.gather import triton as gather
from lighthouse_kernels.scatter import triton as scatter


@pytest.fixture(autouse=True)
def wider_tiles(monkeypatch):
    """Triton's interpreter runs one program at a time: fewer and wider ones. A GPU runs the sizes that users run."""
    if not torch.cuda.is_available():
        for module in (gather, scatter):
            monkeypatch.setattr(module, "BLOCK_ENTRIES", 64)
            monkeypatch.setattr(module, "BLOCK_TOKENS", 64)
