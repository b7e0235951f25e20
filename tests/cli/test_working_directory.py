"""No command runs a module that lies in the working directory; what PYTHONPATH names is imported as ever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from children import LIGHTHOUSE

import lighthouse_core
from lighthouse_core.seal import Verification, seal

RECIPE = Path(__file__).parents[2] / "recipes/quickstart.toml"


@pytest.fixture
def trapped(tmp_path, monkeypatch):
    """A working directory in which every name that Python knows is a module; yields where those that ran say so."""
    ran = tmp_path / "ran"
    ran.mkdir()
    for name in {*sys.stdlib_module_names, "torch", "numpy", "lighthouse_cli", "sitecustomize"} - {"__future__"}:
        (tmp_path / f"{name}.py").write_text(f"open({str(ran / name)!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    return ran


def test_the_trap_works(trapped):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    subprocess.run([sys.executable, "-c", "import tokenize"], env=variables)
    assert [path.name for path in trapped.iterdir()] == ["tokenize"]


def test_a_verification_in_a_process_of_its_own(trapped, tmp_path):
    (tmp_path / "sealed").mkdir()
    # Of what is small there is none.
    with (tmp_path / "sealed/a").open("wb") as file:
        file.truncate(16 << 20)
    seal(tmp_path / "sealed")
    verification = Verification(tmp_path / "sealed")
    assert verification.result() is None and verification._process.returncode == 0
    assert not list(trapped.iterdir())


def test_the_processes_of_prepare(trapped, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 1000)
    settings = ["--set", 'data.source="files"', "--set", 'data.paths=["a.jsonl"]', "--set", "data.validation=0"]
    command = [*LIGHTHOUSE, "data", "prepare", str(RECIPE), "out", "--workers", "2", *settings]
    # As the installed command: its own path is safe, and it is told nothing of that of others.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    script = f"import sys; del sys.path[0]; sys.argv = {command[3:]!r}; from lighthouse_cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and (tmp_path / "out/tokens.json").exists(), done.stderr
    assert not list(trapped.iterdir())


def test_what_pythonpath_names_is_imported(tmp_path, monkeypatch):
    from lighthouse_core.job.launch import launch
    from lighthouse_core.job.plan import Plan

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/my_module.py").write_text("found = 'yes'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"))
    code = f"import my_module, pathlib; pathlib.Path({str(tmp_path / 'found')!r}).write_text(my_module.found)"
    monkeypatch.setattr("lighthouse_core.job.launch.command", lambda run_dir: [sys.executable, "-P", "-c", code])
    assert launch(tmp_path, Plan(1)) == 0 and (tmp_path / "found").read_text() == "yes"


def test_python_is_started_in_one_place():
    """Where it is told to leave the working directory out."""
    package = Path(lighthouse_core.__file__).parent
    users = [
        path.relative_to(package.parent).as_posix()
        for folder in (package, package.parent / "lighthouse_cli", package.parent / "kernels/lighthouse_kernels")
        for path in folder.rglob("*.py")
        if "sys.executable" in path.read_text(encoding="utf-8")
    ]
    assert users == ["lighthouse_core/python.py"]
