"""An unknown name raises wherever it is read: it never stands for another one."""

from pathlib import Path

import pytest
import torch

from lighthouse_core import LighthouseConfig, dense_attention, lighthouse_attention, select_indices
from lighthouse_core.attention.backends import kernels
from lighthouse_core.attention.call import check_backends, log_choices
from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.attention.methods import method_of
from lighthouse_core.attention.parts import far, near, parts_kernel, windowed, windowed_kernel
from lighthouse_core.attention.selectors import selector_of
from lighthouse_core.attention.stages import selected
from lighthouse_core.config import load_recipe
from lighthouse_core.errors import RecipeError

KEY = torch.tensor([1, 2, 3])
PYRAMID = {"pooling": 2, "levels": 2, "topk": 2, "tile_parents": 2, "backend": "reference"}
METHODS = [
    PYRAMID,
    {**PYRAMID, "scorer": "random"},
    {**PYRAMID, "scorer": "block"},
    {**PYRAMID, "levels": 1},
    {**PYRAMID, "window": 4},
    {"method": "chunked", "window": 8},
    {"method": "sliding", "window": 8},
    {"method": "blocks", "window": 8, "tile": 4, "block_size": 4, "blocks": 2},
    {"method": "compressed", "window": 8, "compression": 4},
    {"method": "compressed", "window": 8, "compression": 4, "keep": 2, "score_block": 4},
]
# Near to a name, of another kind, and no string.
UNKNOWN = ["", "Norm", "norms", "norm ", "sliding-window", "triton2", "fa5", "glas", None, 0, True]


def draw(heads, tokens=37):
    return torch.randn(1, tokens, heads, 4, generator=torch.Generator().manual_seed(heads))


def forced(settings, **fields):
    """A configuration that holds what its check refuses, as one that was pickled elsewhere may."""
    cfg = LighthouseConfig(**settings)
    for name, value in fields.items():
        object.__setattr__(cfg, name, value)
    return cfg


@pytest.mark.parametrize("field", ["method", "scorer", "backend", "dense_backend"])
@pytest.mark.parametrize("settings", METHODS, ids=lambda x: "-".join(map(str, x.values())))
def test_the_call_refuses_unknown_names(settings, field):
    q, k, v = draw(2), draw(1), draw(1)
    for name in UNKNOWN:
        with pytest.raises(ValueError, match=field):
            LighthouseConfig(**settings | {field: name})
        cfg = forced(settings, **{field: name})
        with pytest.raises(ValueError, match=f"{field} must be one of .*, not {name!r}"):
            lighthouse_attention(q, k, v, cfg, key=KEY)
        if cfg.method == "pyramid" or field == "method":
            with pytest.raises(ValueError, match=field):
                select_indices(q, k, cfg, key=KEY)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_the_call_is_made_of_refuses_them_too(name):
    q, k, v = draw(2), draw(1), draw(1)
    kept = forced(METHODS[-1], scorer=name)
    with pytest.raises(ValueError, match="scorer"):
        kept.rule.run(q, k, v, kept, AttentionContext(KEY), scale=None)
    cfg = forced(PYRAMID, scorer=name)
    with pytest.raises(ValueError, match="scorer"):
        selected(q, k, v, cfg, AttentionContext(KEY), cfg.geometry(37), kernels("reference", "cpu"))
    for call in (
        lambda: method_of(name),
        lambda: selector_of(name),
        lambda: dense_attention(q, k, v, backend=name),
        lambda: near(q, k, v, 4, backend=name),
        lambda: far(q, k, v, 2, 1, backend=name),
        lambda: windowed(q, k, v, 4, backend=name),
        lambda: parts_kernel(name, "cpu", q.dtype, 4),
        lambda: windowed_kernel(name, "cpu", q.dtype, 4),
        lambda: kernels(name, "cpu"),
        lambda: kernels(name, "cuda"),
        lambda: check_backends(forced(PYRAMID, backend=name), "cpu"),
        lambda: check_backends(forced(PYRAMID, dense_backend=name), "cpu"),
        lambda: log_choices(forced(METHODS[-1], dense_backend=name), "cpu", q.dtype, 4, pooled=True),
        lambda: forced(PYRAMID, method=name).keys(100),
    ):
        with pytest.raises(ValueError, match=r"must be one of|selects nothing"):
            call()


@pytest.mark.parametrize(
    ("name", "near"),
    [("nrom", "norm"), ("NORM", "norm"), ("diluted", "dilated"), ("", None), ("zzz", None), (None, None), (0, None)],
)
def test_the_nearest_name_is_asked_for(name, near):
    with pytest.raises(ValueError, match="must be one of") as refused:
        selector_of(name)
    assert str(refused.value).endswith(f"not {name!r}; did you mean {near}?" if near else f"not {name!r}")


def test_only_one_place_looks_for_the_nearest_name():
    users = [path for folder in ("lighthouse_cli", "lighthouse_core") for path in Path(folder).rglob("*.py")]
    assert [path.name for path in users if "difflib" in path.read_text(encoding="utf-8")] == ["errors.py"]


@pytest.mark.parametrize("key", ["method", "scorer", "backend", "dense_backend"])
@pytest.mark.parametrize("name", [name for name in UNKNOWN if isinstance(name, str)])
def test_a_recipe_refuses_them(key, name):
    with pytest.raises(RecipeError, match=f"lighthouse.{key} must be one of"):
        load_recipe("recipes/quickstart.toml", [f'lighthouse.{key}="{name}"'])
