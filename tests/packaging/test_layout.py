"""How the packages depend on each other, what the wheel holds, and what the README promises."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lighthouse_core.config.sweep import load_sweep

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "lighthouse_kernels": ROOT / "kernels/lighthouse_kernels",
    "lighthouse_core": ROOT / "lighthouse_core",
    "lighthouse_cli": ROOT / "lighthouse_cli",
}


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def importers(package: str, target: str) -> list[str]:
    """Files of `package` that import `target` or anything below it."""
    return sorted(
        str(path.relative_to(ROOT))
        for path in PACKAGES[package].rglob("*.py")
        if any(name == target or name.startswith(target + ".") for name in imports(path))
    )


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
    assert importers("lighthouse_core", "lighthouse_kernels") == ["lighthouse_core/backends.py"]


def test_one_place_imports_torchtitan():
    files = importers("lighthouse_core", "torchtitan")
    assert files and all(file.startswith("lighthouse_core/titan/") for file in files)


def test_importing_the_core_does_not_import_torch():
    code = "import lighthouse_core, sys; lighthouse_core.gathered_length(98304, lighthouse_core.LighthouseConfig()); "
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
