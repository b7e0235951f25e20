"""What docs/extending.md shows works as it stands."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lighthouse_core import LighthouseConfig, dense_attention, lighthouse_attention
from lighthouse_core.attention import Documents, config, dense, methods, selectors
from lighthouse_core.attention.dense.call import KERNELS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/extending.md"
# A path of the page, and the block that follows it.
BLOCK = r"`(lighthouse_core/attention/[\w/]+\.py)`[^`]*:\n\n```{}\n(.*?)```"


def blocks(kind: str) -> dict[str, str]:
    """The page's blocks of a kind, by the file that the words before each name."""
    return dict(re.findall(BLOCK.format(kind), PAGE.read_text(encoding="utf-8"), re.DOTALL))


def changed(path: str, diff: str) -> dict:
    """What a list's module holds once the page's lines are in it; its other lines are as the page shows them."""
    text = (ROOT / path).read_text(encoding="utf-8")
    # An import has no line of the file beside it.
    added = re.findall(r"^\+(from .*)\n", diff, re.MULTILINE)
    rest = re.sub(r"^\+from .*\n", "", diff, flags=re.MULTILINE)
    old, new = ("".join(f"{line[1:]}\n" for line in rest.splitlines() if line[0] in signs) for signs in (" -", " +"))
    assert old and text.count(old) == 1, f"{path} has not: {old}"
    found = {"__name__": "changed"}
    exec("\n".join(added) + "\n" + text.replace(old, new), found)
    return found


@pytest.fixture
def examples(monkeypatch):
    """The page's files, in the lists, by the lines that the page adds to these."""
    found = {}
    for path, text in blocks("python").items():
        name = path.removesuffix(".py").replace("/", ".")
        module = ModuleType(name)
        exec(text, module.__dict__)
        monkeypatch.setitem(sys.modules, name, module)
        found[module.__name__.rpartition(".")[2]] = module
    assert set(found) == {"keys", "products", "alone"}
    lists = {path.split("/")[-2]: changed(path, diff) for path, diff in blocks("diff").items()}
    monkeypatch.setitem(selectors.SELECTORS, "keys", lists["selectors"]["SELECTORS"]["keys"])
    monkeypatch.setitem(methods.METHODS, "alone", lists["methods"]["METHODS"]["alone"])
    monkeypatch.setitem(dense.BACKENDS, "products", lists["dense"]["BACKENDS"]["products"])
    monkeypatch.setitem(KERNELS, "products", found["products"].KERNEL)
    names = {"scorer": selectors.SELECTORS, "method": methods.METHODS, "dense_backend": dense.BACKENDS}
    for kind, variants in names.items():
        monkeypatch.setitem(config.NAMES, kind, tuple(variants))


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
    alone = LighthouseConfig(method="alone")
    assert alone.keys(200) == 1
    # A chunk of one token is the same thing.
    chunks = lighthouse_attention(q, k, v, LighthouseConfig(method="chunked", window=1))
    torch.testing.assert_close(lighthouse_attention(q, k, v, alone), chunks)
    documents = Documents(torch.tensor([0, 70, 200], dtype=torch.int32), 130)
    torch.testing.assert_close(lighthouse_attention(q, k, v, alone, documents=documents), chunks)
    with pytest.raises(ValueError, match="products"):
        dense_attention(q, k, v, backend="products", documents=documents)


def test_every_path_of_the_page_is_there():
    text = PAGE.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tests|lighthouse_core)/[\w/]+\.py)`", text):
        assert (ROOT / path).exists() or "NAME" in path or path in blocks("python"), path
