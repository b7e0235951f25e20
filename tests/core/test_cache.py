"""Where compilers keep what they run again: never where another user can have put it."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lighthouse_core import cache
from lighthouse_core.cache import compile_caches
from lighthouse_core.job.environment import environment
from lighthouse_core.job.plan import Plan

HEADERS = "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"
NAMES = {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUTE_DSL_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"}
OTHER_USER = 54321


@pytest.fixture(autouse=True)
def _asked_for_the_first_time():
    cache._root.cache_clear()
    yield
    cache._root.cache_clear()


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def used(home: Path, **more: str) -> tuple[set[Path], str | None]:
    """The folders in which all caches lie, and the line."""
    variables, note = compile_caches({"HOME": str(home), HEADERS: "1", **more})
    assert variables.keys() == NAMES
    return {Path(path).parent for path in variables.values()}, note


def private(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700 and found.st_uid == os.geteuid()


def test_it_is_the_users_own_whatever_the_umask_and_tmpdir_say(home, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = os.umask(0)
    try:
        (folder,), note = used(home)
    finally:
        os.umask(before)
    assert folder == home / ".cache/lighthouse/compiled" and note is None and private(folder)
    # The next launch finds it.
    cache._root.cache_clear()
    assert used(home) == ({folder}, None)
    cache._root.cache_clear()
    assert used(home, XDG_CACHE_HOME=str(tmp_path / "xdg"))[0] == {tmp_path / "xdg/lighthouse/compiled"}


def test_what_the_environment_names_is_left(home):
    named = {name: "/scratch/mine" for name in NAMES}
    assert compile_caches({"HOME": str(home), **named}) == ({HEADERS: "0"}, None)
    one, _ = compile_caches({"HOME": str(home), "TRITON_CACHE_DIR": "/scratch/mine"})
    assert one.keys() == (NAMES | {HEADERS}) - {"TRITON_CACHE_DIR"}
    # torch's own choice is not the user's.
    guessable = os.path.join(tempfile.gettempdir(), "torchinductor_someone")
    for base in ({"TORCHINDUCTOR_CACHE_DIR": guessable}, {}):
        found = environment(Plan(1), {"HOME": str(home), **base}, Path("/e"))
        assert found["TORCHINDUCTOR_CACHE_DIR"] == str(home / ".cache/lighthouse/compiled/inductor")


def world_writable(folder):
    folder.chmod(0o777)


def group_writable(folder):
    folder.chmod(0o770)


def foreign(folder):
    os.chown(folder, OTHER_USER, -1)


def parent_is_foreign(folder):
    os.chown(folder.parent, OTHER_USER, -1)


def home_is_foreign(folder):
    os.chown(folder.parents[2], OTHER_USER, -1)


def parent_is_world_writable(folder):
    folder.parent.chmod(0o777)


def parent_is_writable_by_a_shared_group(folder):
    os.chown(folder.parent, -1, OTHER_USER)
    folder.parent.chmod(0o770)


def link(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def broken_link(folder):
    folder.rmdir()
    folder.symlink_to("nowhere")


def file(folder):
    folder.rmdir()
    folder.touch()


def parent_is_a_file(folder):
    folder.rmdir()
    folder.parent.rmdir()
    folder.parent.touch()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (world_writable, "can be written by other users"),
        (group_writable, "can be written by other users"),
        (foreign, "belongs to another user"),
        (parent_is_foreign, "belongs to another user"),
        (home_is_foreign, "belongs to another user"),
        (parent_is_world_writable, "can be written by other users"),
        (parent_is_writable_by_a_shared_group, "can be written by other users"),
        (link, "is not a folder"),
        (broken_link, "cannot be used"),
        (file, "cannot be used"),
        (parent_is_a_file, "cannot be used"),
    ],
)
def test_a_folder_that_others_could_have_filled_is_not_used(home, change, words):
    if os.geteuid() and ("foreign" in change.__name__ or "group" in change.__name__):
        pytest.skip("only root can give folders away")
    folder = home / ".cache/lighthouse/compiled"
    folder.mkdir(parents=True, mode=0o700)
    change(folder)
    (found,), note = used(home)
    assert words in note and "not kept for the next launch" in note
    assert found != folder and private(found)
    # And says so each time, but makes one folder a process.
    assert used(home) == ({found}, note)


def test_a_folder_that_others_could_only_read_is_closed(home):
    folder = home / ".cache/lighthouse/compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    assert used(home) == ({folder}, None) and private(folder)


def test_a_home_that_is_a_link_to_another_disk_is_used(home, tmp_path):
    (tmp_path / "disk").mkdir()
    (home / ".cache").symlink_to(tmp_path / "disk")
    assert used(home)[1] is None and private(tmp_path / "disk/lighthouse/compiled")


@pytest.mark.parametrize("environment", [{}, {"HOME": ""}, {"HOME": "/proc/nowhere"}, {"XDG_CACHE_HOME": "relative"}])
def test_without_a_home_it_is_a_folder_of_this_process(environment):
    command = "import os; from lighthouse_core.cache import *; print(use_own_caches(), os.environ['TRITON_CACHE_DIR'])"
    path = {"PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-P", "-c", command], env=path | environment, capture_output=True, text=True)
    note, _, folder = done.stdout.strip().rpartition(" ")
    assert note.endswith("not kept for the next launch"), done
    assert Path(folder).parent.name.startswith("lighthouse-compiled-") and not Path(folder).parent.exists()


def test_torch_takes_what_is_named():
    command = """
import os, sys
from pathlib import Path
from lighthouse_core.cache import use_own_caches
assert use_own_caches() is None
from torch._inductor.runtime.cache_dir_utils import cache_dir
print(cache_dir())
from torch._inductor import config
assert not config.cpp_cache_precompile_headers
sys.stdout.flush()
os._exit(0)  # torch takes seconds to be torn down
"""
    with tempfile.TemporaryDirectory() as home:
        variables = {name: value for name, value in os.environ.items() if name not in {*NAMES, HEADERS}}
        variables |= {"XDG_CACHE_HOME": home}
        done = subprocess.run([sys.executable, "-P", "-c", command], env=variables, capture_output=True, text=True)
        assert done.stdout.strip() == f"{home}/lighthouse/compiled/inductor", done.stderr
