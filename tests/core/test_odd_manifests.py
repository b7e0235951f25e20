"""Manifests that somebody wrote and sealed: they are of the form of every manifest, or called damaged."""

import copy
import json
import os
import random

import pytest

from lighthouse_core import seal
from lighthouse_core.runs.find import split_checkpoint
from lighthouse_core.runs.listing import checkpoint_steps, summarize


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "step-4"
    (folder / "more").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"abc" * 50)
    (folder / "more/b.bin").write_bytes(b"")
    seal.seal(folder)
    return folder


def reseal(folder, manifest) -> None:
    """As anybody can, for the seal is a checksum."""
    text = seal._text(manifest) if isinstance(manifest, dict) else json.dumps(manifest)
    (folder / seal.MANIFEST).write_text(text)


ODD = [None, True, -1, 0, 1, 1.5, 10**400, 1 << 70, "", "x", "../a.bin", "/etc/passwd", "a\0b", [], [1], [[]], {},
       {"a.bin": 1}, {"bytes": 1}, ["0" * 64], ["z" * 64], "1" * 64]  # fmt: skip
PLACES = [("name",), ("version",), ("part_bytes",), ("files",), ("files", "a.bin"), ("files", "a.bin", "bytes"),
          ("files", "a.bin", "sha256"), ("files", "more/b.bin", "sha256"), ("files", "../c"), ("files", "/c"),
          ("files", ""), ("files", "a.bin", "more"), ("files", "manifest.json"),
          ("files", "more/../a.bin")]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids="/".join)
def test_any_value_anywhere(folder, place):
    whole = seal.read_manifest(folder)
    assert isinstance(whole, dict) and seal.damage(folder) is None
    for value in ODD:
        manifest = copy.deepcopy(whole)
        target = manifest
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = value
        reseal(folder, manifest)
        found = seal.damage(folder)
        # Another name of the folder is that of another one, and 1 is the version there is.
        assert isinstance(found, str) or (place, value) in [(("version",), 1), (("version",), True)], (place, value)
        assert isinstance(seal.sealed_bytes(folder), int | None)
        if place[0] in target and len(place) == 1:
            del manifest[place[0]]
            reseal(folder, manifest)
            assert isinstance(seal.damage(folder), str)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "null", "{}", "[" * 100_000, '{"a":' * 100_000, "\ufeff{}", "\x00", '{"version": 1, "seal": 0}'],
)
def test_what_is_no_manifest(folder, text):
    (folder / seal.MANIFEST).write_text(text)
    assert seal.MANIFEST in seal.damage(folder) and seal.sealed_bytes(folder) is None


def test_every_part_has_a_digest(folder):
    """With one digest for the first part alone, the rest could be anything."""
    manifest = seal.read_manifest(folder)
    manifest["part_bytes"] = 3
    reseal(folder, manifest)
    assert "form" in seal.damage(folder)


@pytest.mark.parametrize("name", ["a.bin", seal.MANIFEST])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device"])
def test_what_is_no_file_of_its_own(folder, tmp_path, name, kind):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        (folder / name).symlink_to(tmp_path / "elsewhere")
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(folder / name)
    assert name in seal.damage(folder)


def test_random_manifests(folder):
    """Values moved and replaced at random: no error but the words of `damage`."""
    whole, chance = seal.read_manifest(folder), random.Random(0)
    for _ in range(150):
        manifest = copy.deepcopy(whole)
        for _ in range(chance.choice((1, 2, 5))):
            target = manifest
            while isinstance(target, dict) and target and chance.random() < 0.7:
                inner = [value for value in target.values() if isinstance(value, dict) and value]
                if not inner:
                    break
                target = chance.choice(inner)
            key = chance.choice([*target, "x", "../x"])
            target[key] = copy.deepcopy(chance.choice(ODD))
        reseal(folder, manifest)
        assert isinstance(seal.damage(folder), str | None)


@pytest.mark.parametrize(
    "name",
    ["step-009", "step-٣", "step-", "step--1", "step-1.5", "step-" + "9" * 200, "step-4.damaged", "step-4 ", "Step-4"],
)
def test_a_copy_by_hand_is_no_checkpoint(tmp_path, name):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints/step-9").mkdir()
    assert checkpoint_steps(tmp_path) == [9]
    assert summarize(tmp_path).saved == 9
    path = tmp_path / "checkpoints" / name
    assert split_checkpoint(path) == (path, None)
