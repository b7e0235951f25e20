"""What docs/extending.md shows works as it stands."""

import re
from pathlib import Path

import pytest
import torch

from lighthouse_core import LighthouseConfig, dense_attention, lighthouse_attention
from lighthouse_core.attention import config, dense, selectors
from lighthouse_core.attention.dense.call import KERNELS

PAGE = Path(__file__).parents[2] / "docs/extending.md"


@pytest.fixture
def examples(monkeypatch):
    """The page's two files, in the lists."""
    found = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, found)
    monkeypatch.setitem(selectors.SELECTORS, "keys", found["Keys"]())
    monkeypatch.setitem(dense.BACKENDS, "products", dense.Facts(lse=False, window=False))
    monkeypatch.setitem(KERNELS, "products", found["KERNEL"])
    monkeypatch.setitem(config.NAMES, "scorer", tuple(selectors.SELECTORS))
    monkeypatch.setitem(config.NAMES, "dense_backend", tuple(dense.BACKENDS))


def test_the_examples_work(examples):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 200, heads, 8, generator=generator) for heads in (4, 2, 2))
    settings = {"pooling": 2, "levels": 2, "topk": 8, "tile_parents": 4, "dense_backend": "products"}
    by_keys = LighthouseConfig(**settings, scorer="keys")
    assert by_keys.leaks and not by_keys.draws
    scores = k.norm(dim=-1).repeat_interleave(2, 2), k.norm(dim=-1)
    expected = lighthouse_attention(q, k, v, LighthouseConfig(**settings), scores=scores)
    assert torch.equal(lighthouse_attention(q, k, v, by_keys), expected)
    torch.testing.assert_close(dense_attention(q, k, v, backend="products"), dense_attention(q, k, v))


def test_every_path_of_the_page_is_there():
    text = PAGE.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tests|lighthouse_core)/[\w/]+\.py)`", text):
        assert (PAGE.parents[1] / path).exists() or "NAME" in path, path
