"""What this project takes of other packages beyond their public interface, found in its sources.

Three kinds of use, each as "file: what":

- a name with a leading underscore that we do not define: imported, or as an attribute;
- an assignment to an attribute of an imported module or class of others, and `setattr` on anything;
- a method of a class of torchtitan or torch.distributed that a class of ours takes the place of.
"""

import ast
import functools
import importlib
import inspect
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("lighthouse_cli", "lighthouse_core", "kernels")
OURS = ("lighthouse_cli", "lighthouse_core", "lighthouse_kernels")
# Documented as public, whatever their first character: methods of named tuples, and os._exit.
PUBLIC = {"_replace", "_asdict", "_fields", "_exit"}
# Attributes without an underscore that libraries read from our objects, or that we set on theirs, as a patch does.
SET_ON_OBJECTS = {"found_inf"}
# Methods without an underscore that are as good as private: they are young, and no page of torch's speaks of them.
YOUNG = {"set_force_sum_reduction_for_comms"}
# Libraries in whose place our classes do something. Other bases are there to be inherited from: nn.Module, Formatter.
_REPLACED = ("torchtitan", "torch.distributed")


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != "" and name not in PUBLIC


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def own_names() -> frozenset[str]:
    """Every private name that we define somewhere: functions, classes, variables, fields and attributes of `self`."""
    found = set()
    for path in sources():
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _root(node) == "self":
                found.add(node.attr)
    return frozenset(filter(private, found))


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _imported(tree: ast.Module) -> dict[str, str]:
    """Names that imports of others bind, with what they stand for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: whole for name, whole in found.items() if whole.split(".")[0] not in OURS}


def used_in(tree: ast.Module) -> set[str]:
    """Private names of others, and assignments to what is theirs, in one file."""
    imported, found = _imported(tree), set()
    taken = set(imported.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                whole = f"{module}.{alias.name}" if module else alias.name
                if whole.split(".")[0] not in OURS and any(map(private, whole.split("."))):
                    found.add(whole)
        elif isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
            text = ".".join([imported.get(parts[0], parts[0]), *parts[1:]])
            stored = isinstance(node.ctx, ast.Store)
            if stored and (parts[0] in imported or node.attr in SET_ON_OBJECTS):
                found.add(f"{text} =")
            elif node.attr in YOUNG:
                found.add(node.attr)
            elif private(node.attr) and (node.attr not in own_names() or _root(node) in imported):
                found.add(text)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            found.add(f"setattr({ast.unparse(node.args[0])})")
    # Of torch._C._Name, the whole is enough; what is imported stands for itself.
    return found - {one for one in found if one not in taken and any(other.startswith(f"{one}.") for other in found)}


def replaced_in(path: Path) -> set[str]:
    """Methods of torchtitan and torch.distributed in whose place a file's classes have their own, as "Base.method"."""
    folder = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    found = set()
    classes = [node for node in _tree(path).body if isinstance(node, ast.ClassDef) and node.bases]
    if not any(_imported(_tree(path)).get(_root(base), "").startswith(_REPLACED) for c in classes for base in c.bases):
        return found
    module = importlib.import_module(".".join(path.relative_to(folder).with_suffix("").parts))
    for node in classes:
        kind = getattr(module, node.name)
        for name, value in vars(kind).items():
            if not inspect.isfunction(value) and not isinstance(value, staticmethod | property):
                continue
            if name.startswith("__"):
                continue
            for base in kind.__mro__[1:]:
                if base.__module__.startswith(_REPLACED) and name in vars(base):
                    found.add(f"{base.__name__}.{name}")
                    break
    return found


def uses() -> dict[str, set[str]]:
    """All of it, by file."""
    found = {}
    for path in sources():
        if here := used_in(_tree(path)) | replaced_in(path):
            found[str(path.relative_to(ROOT))] = here
    return found


if __name__ == "__main__":
    for file, names in uses().items():
        for name in sorted(names):
            print(f"{file}: {name}")
