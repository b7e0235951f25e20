"""What the tests of the kernels share."""

import pytest
import torch

from lighthouse_kernels.gather import triton as gather
from lighthouse_kernels.merge import triton as merge
from lighthouse_kernels.scatter import triton as scatter


@pytest.fixture(autouse=True)
def wider_tiles(monkeypatch):
    """Triton's interpreter runs one program at a time: fewer and wider ones. A GPU runs the sizes that users run."""
    if not torch.cuda.is_available():
        for module in (gather, scatter, merge):
            monkeypatch.setattr(module, "BLOCK_ENTRIES", 64)
            monkeypatch.setattr(module, "BLOCK_TOKENS", 64)


@pytest.fixture
def poison(monkeypatch):
    """Every empty tensor begins as NaN (integers as -12345), so that an element nobody writes fails a comparison."""
    original = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        x = original(self, *size, **options)
        return x.fill_(float("nan") if x.is_floating_point() else -12345)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
