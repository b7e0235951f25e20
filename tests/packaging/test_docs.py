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
from lighthouse_core.config.model import ModelSection
from lighthouse_core.models import FAMILIES
from lighthouse_core.models.decoder import build_dense_model
from lighthouse_core.models.family import to_interleaved

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/extending.md"
IDS = {"seq_len": 100, "bos_id": 0, "eos_id": 1, "pad_id": 2, "dtype": "float32"}
# A path of the page, and the block that follows it.
BLOCK = r"`(lighthouse_core/(?:attention|models)/[\w/]+\.py)`[^`]*:\n\n```{}\n(.*?)```"


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
    assert set(found) == {"keys", "products", "alone", "seed_oss"}
    lists = {path.split("/")[-2]: changed(path, diff) for path, diff in blocks("diff").items()}
    monkeypatch.setitem(selectors.SELECTORS, "keys", lists["selectors"]["SELECTORS"]["keys"])
    monkeypatch.setitem(methods.METHODS, "alone", lists["methods"]["METHODS"]["alone"])
    monkeypatch.setitem(dense.BACKENDS, "products", lists["dense"]["BACKENDS"]["products"])
    monkeypatch.setitem(KERNELS, "products", found["products"].KERNEL)
    monkeypatch.setitem(FAMILIES, "seed_oss", lists["models"]["FAMILIES"]["seed_oss"])
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


def test_the_family_is_that_of_transformers(examples):
    transformers = pytest.importorskip("transformers")
    if "seed_oss" not in transformers.CONFIG_MAPPING:
        pytest.skip("this release of transformers has no Seed-OSS")
    sizes = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("seed_oss", **sizes, **heads, **rope)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    family = FAMILIES["seed_oss"]
    settings = family.settings(theirs.config.to_dict())
    # A recipe knows the families of the list as it was imported. The decoder of Qwen2 has the same parts.
    section = ModelSection(**settings | {"family": "qwen2"})
    weights = theirs.state_dict()
    ours = build_dense_model(section, 100)
    ours.load_state_dict(
        {
            entry.source: to_interleaved(weights.pop(entry.target), entry.rotary_heads)
            if entry.rotary_heads
            else weights.pop(entry.target)
            for entry in family.entries(section)
        }
    )
    assert not weights
    tokens = torch.randint(300, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    assert ModelSection(**family.settings(family.config(section, **IDS)) | {"family": "qwen2"}) == section


def test_every_path_of_the_page_is_there():
    text = PAGE.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tests|lighthouse_core)/[\w/]+\.py)`", text):
        assert (ROOT / path).exists() or "NAME" in path or path in blocks("python"), path
