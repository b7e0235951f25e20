"""How the packages depend on each other, what the wheel holds, and what the README promises."""

import ast
import functools
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from lighthouse_core.config.sweep import load_sweep

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "lighthouse_kernels": ROOT / "kernels/lighthouse_kernels",
    "lighthouse_core": ROOT / "lighthouse_core",
    "lighthouse_cli": ROOT / "lighthouse_cli",
}


# Every room of the core imports those before it in this order, and none after it.
ROOMS = (
    *(
        "shown",
        "errors",
        "shelf",
        "reading",
        "text",
        "files",
        "figures",
        "python",
        "cache",
        "measures",
        "annotations",
        "vml",
    ),
    *("attention", "models", "config", "unpickle", "checkpoint", "checkpoint_reader", "seal", "data", "estimate"),
    *("runs", "weights", "export", "evaluate", "job", "titan", "profile", "sweep", "worker"),
)


@functools.cache
def modules() -> dict[str, Path]:
    """Every module by its name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, for_types: bool = True) -> set[str]:
    """Every module a file imports, wherever in it, and every name that may be one.

    Args:
        path: of the file.
        for_types: also what it imports for the checker of types alone.
    """
    found, known = set(), modules()

    def walk(node: ast.AST) -> None:
        for part in ast.iter_child_nodes(node):
            if not for_types and isinstance(part, ast.If) and ast.unparse(part.test) == "TYPE_CHECKING":
                continue
            if isinstance(part, ast.Import):
                found.update(alias.name for alias in part.names)
            elif isinstance(part, ast.ImportFrom):
                assert part.level == 0, f"{path}: relative import"
                names = {f"{part.module}.{alias.name}" for alias in part.names}
                # Of a package's modules, each is meant alone.
                found.update(names if names <= set(known) else names | {part.module})
            walk(part)

    walk(ast.parse(path.read_text(encoding="utf-8")))
    return found


def edges() -> dict[str, set[str]]:
    """Which of our modules each of them imports, in functions, too, but for types alone."""
    known = modules()
    return {name: imports(path, for_types=False) & set(known) for name, path in known.items()}


def importers(package: str, target: str) -> list[str]:
    """Files of `package` that import `target` or anything below it."""
    return sorted(
        str(path.relative_to(ROOT))
        for path in PACKAGES[package].rglob("*.py")
        if any(name == target or name.startswith(target + ".") for name in imports(path))
    )


def test_no_files_import_each_other():
    found, done = edges(), set()

    def follow(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " imports ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in found[name]:
                follow(other, (*above, name))
            done.add(name)

    for name in found:
        follow(name, ())


def test_no_import_runs_upward():
    for name, others in edges().items():
        parts = name.split(".")
        if parts[0] != "lighthouse_core" or len(parts) == 1:
            continue
        for other in (one.split(".") for one in others):
            if other[0] == "lighthouse_core" and len(other) > 1 and other[1] != parts[1]:
                assert ROOMS.index(other[1]) < ROOMS.index(parts[1]), f"{name} imports {'.'.join(other)}"


def test_the_list_of_rooms_is_whole():
    assert {name.split(".")[1] for name in modules() if name.startswith("lighthouse_core.")} == set(ROOMS)


@pytest.mark.parametrize(
    ("package", "target"),
    [
        ("lighthouse_kernels", "lighthouse_core"),
        ("lighthouse_kernels", "lighthouse_cli"),
        ("lighthouse_core", "lighthouse_cli"),
        ("lighthouse_cli", "lighthouse_kernels"),
        ("lighthouse_cli", "torchtitan"),
        ("lighthouse_cli", "torch"),
    ],
)
def test_data_flows_one_way(package, target):
    assert importers(package, target) == []


def test_one_place_imports_the_kernels():
    """But for the shape of a pyramid, which is arithmetic."""
    found = {
        (name, other)
        for name, others in edges().items()
        for other in others
        if name.startswith("lighthouse_core") and other.startswith("lighthouse_kernels.")
    }
    assert {name for name, other in found if other != "lighthouse_kernels.geometry"} == {
        "lighthouse_core.attention.backends"
    }


def test_one_place_imports_torchtitan():
    files = importers("lighthouse_core", "torchtitan")
    assert files and all(file.startswith("lighthouse_core/titan/") for file in files)


def test_a_hint_that_many_errors_of_a_file_have_is_written_once():
    written = Counter(
        (path.name, keyword.value.value)
        for path in modules().values()
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "hint" and isinstance(keyword.value, ast.Constant) and keyword.value.value
    )
    # Fewer lines that are alike read better than a name.
    assert len(written) > 100 and not {hint: count for hint, count in written.items() if count > 3}


def test_importing_the_core_and_what_prepares_data_does_not_import_torch():
    code = "import lighthouse_core, lighthouse_core.data.prepare, sys; "
    code += "lighthouse_core.gathered_length(98304, lighthouse_core.LighthouseConfig()); "
    code += "print(sorted(m for m in ('torch', 'torchtitan') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_wheel_holds_the_packages_and_recipes_alone(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    # A top-level `kernels` would overwrite the package of that name.
    assert top == set(PACKAGES)
    for recipe in (ROOT / "recipes").glob("*.toml"):
        assert f"lighthouse_core/_recipes/{recipe.name}" in names
    assert not any("test" in name for name in names)


def test_the_readme_names_every_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("recover", "strip", "profile", "runs", "recipes list", "data prepare", "tokenizer train"):
        assert f"\nlighthouse {command} " in readme.replace("\n    ", "\n")
    assert "pip install -e . && lighthouse pretrain recipes/quickstart.toml" in readme
    assert "pip install -e '.[test]' && pytest" in readme


def test_the_readme_has_a_sweep_that_loads(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.search(r'```toml\n(recipe = "base.toml".*?)```', readme, re.DOTALL)[1]
    (tmp_path / "sweep.toml").write_text(text)
    shutil.copy(ROOT / "recipes/evidence/base.toml", tmp_path)
    sweep = load_sweep(tmp_path / "sweep.toml")
    assert sweep.runs["random-longer"].at + sweep.runs["random-longer"].recover == 800
