"""Sealed directories: any change of any byte is found, and named."""

import os
import shutil
from pathlib import Path

import pytest

from lighthouse_core import seal


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(seal, "PART_BYTES", 100)
    written = tmp_path / ".new"
    (written / "more").mkdir(parents=True)
    (written / "a.bin").write_bytes(os.urandom(250))
    (written / "more/b.bin").write_bytes(os.urandom(100))
    (written / "empty").touch()
    seal.seal(written)
    seal.publish(written, tmp_path / "done")
    return tmp_path / "done"


def test_an_untouched_folder_is_sound(folder):
    assert not folder.with_name(".new").exists()
    assert seal.damage(folder) is None
    assert seal.sealed_bytes(folder) == 350


def test_every_flipped_bit_is_found_and_named(folder):
    for name in ("a.bin", "more/b.bin", seal.MANIFEST):
        whole = (folder / name).read_bytes()
        for at in range(len(whole)):
            changed = bytearray(whole)
            changed[at] ^= 1 << at % 8
            (folder / name).write_bytes(changed)
            assert name in (seal.damage(folder) or ""), (name, at)
        (folder / name).write_bytes(whole)
    assert seal.damage(folder) is None


@pytest.mark.parametrize("name", ["a.bin", "more/b.bin", "empty", seal.MANIFEST])
def test_what_happens_to_files_is_found_and_named(folder, name):
    whole = (folder / name).read_bytes()

    def found(content: bytes | None) -> bool:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        result = seal.damage(folder)
        (folder / name).write_bytes(whole)
        return result is not None and name in result

    assert found(None)
    assert found(whole + b"\n")
    if whole:
        assert found(b"") and found(whole[:-1]) and found(whole[len(whole) // 2 :])


def test_swapped_and_foreign_files_are_found(folder):
    (folder / "c.bin").touch()
    assert seal.damage(folder) == "c.bin does not belong to it"
    (folder / "c.bin").unlink()
    same = os.urandom(64), os.urandom(64)
    for name, content in zip("xy", same, strict=True):
        (folder / name).write_bytes(content)
    seal.seal(folder)
    for name, content in zip("yx", same, strict=True):
        (folder / name).write_bytes(content)
    assert "x is damaged" in seal.damage(folder)


def test_a_manifest_of_another_folder_does_not_fit(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "a.bin").write_bytes(os.urandom(250))
    seal.seal(other)
    shutil.copy(other / seal.MANIFEST, folder / seal.MANIFEST)
    assert "a.bin is damaged" in seal.damage(folder)


def test_a_digest_is_that_of_the_file_where_it_is_one_part(tmp_path):
    import hashlib

    (tmp_path / "a").write_bytes(b"abc" * 30)
    seal.seal(tmp_path)
    entry = seal.read_manifest(tmp_path)["files"]["a"]
    assert entry == {"bytes": 90, "sha256": [hashlib.sha256(b"abc" * 30).hexdigest()]}


@pytest.fixture
def apart(monkeypatch):
    """A process for a folder of any size."""
    monkeypatch.setattr(seal, "_LITTLE_BYTES", 0)


def test_what_is_small_is_read_without_a_process(folder):
    ahead = seal.Verification(folder)
    (folder / "a.bin").write_bytes(b"")
    assert ahead._process is None and ahead.result() == seal.damage(folder) == "a.bin has 0 bytes, not 250"


@pytest.mark.usefixtures("apart")
def test_a_process_of_its_own_finds_the_same(folder):
    assert seal.Verification(folder).result() is None
    content = bytearray((folder / "a.bin").read_bytes())
    content[120] ^= 1
    (folder / "a.bin").write_bytes(content)
    assert seal.Verification(folder).result() == seal.damage(folder) == "a.bin is damaged: its SHA-256 is another"


@pytest.mark.usefixtures("apart")
def test_a_process_that_was_killed_proves_nothing(folder):
    (folder / "a.bin").write_bytes(b"")
    ahead = seal.Verification(folder)
    ahead._process.kill()
    assert ahead.result() == "a.bin has 0 bytes, not 250"


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_nothing_is_published_through_a_link(tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "written").mkdir()
    seal.seal(tmp_path / "written", "done")
    (tmp_path / "done").symlink_to(target)
    with pytest.raises(OSError, match="a link is in its place"):
        seal.publish(tmp_path / "written", tmp_path / "done")
    assert not any((tmp_path / "elsewhere").iterdir()) and (tmp_path / "written").is_dir()
