"""docs/patches.md lists every private name and patch of other libraries that the sources use, and no other."""

import ast
import re
import tomllib

import foreign
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PAGE = foreign.ROOT / "docs/patches.md"


def listed() -> dict[str, set[str]]:
    """What the page lists, by file."""
    found: dict[str, set[str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = line.split("|")
        if len(cells) != 6 or "`" not in cells[1]:
            continue
        for file in re.findall(r"`([^`]+)`", cells[2]):
            found.setdefault(file, set()).update(re.findall(r"`([^`]+)`", cells[1]))
    return found


def test_the_page_lists_what_the_sources_use():
    used, there = foreign.uses(), listed()
    missing = {file: names - there.get(file, set()) for file, names in used.items()}
    assert {file: names for file, names in missing.items() if names} == {}, "not on docs/patches.md"


def test_the_page_lists_nothing_that_is_gone():
    used, there = foreign.uses(), listed()
    gone = {file: names - used.get(file, set()) for file, names in there.items()}
    assert {file: names for file, names in gone.items() if names} == {}, "on docs/patches.md, but in no source"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch._C._thing()", {"torch._C._thing"}),
        ("import torch\ntorch.compile = print", {"torch.compile ="}),
        ("import torch._utils\ntorch._utils._ask", {"torch._utils._ask"}),
        ("from torch._ops import OpOverload", {"torch._ops.OpOverload"}),
        ("from torchtitan import train as t\nt.dist_utils = 1", {"torchtitan.train.dist_utils ="}),
        ("from torch import cuda\nclass A:\n    def f(self):\n        cuda.limit += 1", {"torch.cuda.limit ="}),
        ("optimizer.found_inf = 1", {"optimizer.found_inf ="}),
        ("scheduler._last_lr_of_all", {"scheduler._last_lr_of_all"}),
        ("setattr(module, name, 1)", {"setattr(module)"}),
        ("import os\nrow._replace(a=1)\nos._exit(1)", set()),
        ("from lighthouse_core.titan.guard import _traces\n_traces(1)", set()),
        ("import torch\ntorch.nn.Linear(1, 1).weight", set()),
    ],
)
def test_the_search_finds(source, found):
    assert foreign.used_in(ast.parse(source)) == found


def required() -> dict[str, SpecifierSet]:
    """The versions that pyproject.toml asks for."""
    project = tomllib.loads((foreign.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["flash"]]
    found = {line.name: line.specifier for line in map(Requirement, lines)}
    return found | {"Python": SpecifierSet(project["requires-python"])}


def test_the_page_names_the_versions_of_pyproject():
    headings = re.findall(r"^## (\S+) `([^`]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name, _ in headings} >= {"torch", "torchtitan", "flash-attn-4"}
    wanted = required()
    assert {name: SpecifierSet(versions) for name, versions in headings} == {name: wanted[name] for name, _ in headings}


def test_the_bound_of_flash_attention_lets_in_the_beta_that_was_tested_and_no_later_one():
    bound = required()["flash-attn-4"]
    assert "4.0.0b36" in bound
    assert not any(version in bound for version in ("4.0.0b35", "4.0.0b37", "4.0.0rc1", "4.0.0", "4.1", "5.0"))
