"""Sealed directories: every file's SHA-256 in a manifest, and published under their name as a whole or not at all.

A directory is written under a temporary name. `seal` brings its files to the disk and writes the manifest; `publish`
renames it. What has its name and a manifest was therefore complete once, and `damage` tells what has changed since.
Nothing here imports torch.
"""

import atexit
import errno
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lighthouse_core.files import write_atomically
from lighthouse_core.python import run_module

MANIFEST = "manifest.json"
# Parts of a file have digests of their own, so that all cores can work on a large one.
PART_BYTES = 64 << 20
_READ_BYTES = 4 << 20
# To read so much takes less than to start a process.
_LITTLE_BYTES = 8 << 20
_MOST_BYTES = 1 << 62
_DIGEST = re.compile(r"[0-9a-f]{64}")


def seal(folder: Path, name: str = "") -> None:
    """Bring every file of `folder` to the disk and write its manifest.

    Args:
        folder: to seal.
        name: that it is about to have, if it is another.

    Raises:
        OSError: the disk is full, or fails.
    """
    digests: dict[str, list[str]] = {}
    with ThreadPoolExecutor() as pool:
        found = _files(folder)
        synced = [pool.submit(sync, folder / file) for file in found]
        hashed = {
            file: [pool.submit(_digest, folder / file, i, PART_BYTES) for i in _parts(folder / file)] for file in found
        }
        for file, parts in hashed.items():
            digests[file] = [part.result() for part in parts]
        for done in synced:
            done.result()
    files = {file: {"bytes": (folder / file).stat().st_size, "sha256": digests[file]} for file in found}
    path = folder / MANIFEST
    write_atomically(path, _text({"version": 1, "name": name or folder.name, "part_bytes": PART_BYTES, "files": files}))
    sync(folder)


def publish(folder: Path, name: Path) -> None:
    """Rename a sealed folder, once and for all.

    Raises:
        OSError: the name is taken, or is a link that somebody put there.
    """
    if name.is_symlink():
        raise FileExistsError(errno.EEXIST, "a link is in its place", str(name))
    os.rename(folder, name)
    sync(name.parent)


def damage(folder: Path, threads: int | None = None) -> str | None:
    """What is wrong with a sealed directory, naming the file; None if every byte is as it was sealed.

    Args:
        folder: a sealed directory.
        threads: that read it; as many as there are cores, and some, if not given.
    """
    try:
        return _damage(folder, threads)
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"


def _damage(folder: Path, threads: int | None) -> str | None:
    manifest = read_manifest(folder)
    if isinstance(manifest, str):
        return manifest
    # A copy may have any name, but not that of another one.
    if folder.name != manifest["name"] and re.fullmatch(r"step-[0-9]+", folder.name):
        return f"{MANIFEST} is that of {manifest['name']}"
    files = manifest["files"]
    found = _files(folder)
    for name in sorted(files.keys() - set(found)):
        return f"{name} is missing"
    for name in sorted(set(found) - files.keys()):
        return f"{name} does not belong to it"
    for name in found:
        # A link may lead anywhere, and reading a pipe does not end.
        if not stat.S_ISREG((folder / name).lstat().st_mode):
            return f"{name} is no file of its own"
    for name, entry in files.items():
        size = (folder / name).stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes, not {entry['bytes']}"
    with ThreadPoolExecutor(threads) as pool:
        hashed = [
            (name, digest, pool.submit(_digest, folder / name, i, manifest["part_bytes"]))
            for name, entry in files.items()
            for i, digest in enumerate(entry["sha256"])
        ]
        for name, digest, part in hashed:
            try:
                if part.result() != digest:
                    return f"{name} is damaged: its SHA-256 is another"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
    return None


class Verification:
    """`damage` of a folder in a process of its own, begun now: this one may hold the interpreter's lock meanwhile. What
    is small is read when it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._process = None
        size = sealed_bytes(folder)
        if size is None or size <= _LITTLE_BYTES:
            return
        command = [*run_module("lighthouse_core.seal"), str(folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        atexit.register(self._process.kill)

    def result(self) -> str | None:
        """What `damage` returns."""
        if self._process is None:
            return damage(self.folder)
        answer, _ = self._process.communicate()
        # A process that did not come to its end proves nothing.
        return json.loads(answer) if self._process.returncode == 0 else damage(self.folder)


def read_manifest(folder: Path) -> dict[str, Any] | str:
    """The manifest of a sealed directory, or what is wrong with it. Reads no other file."""
    path = folder / MANIFEST
    try:
        # Reading a pipe would not end.
        if not stat.S_ISREG(path.lstat().st_mode):
            return f"{MANIFEST} is no file of its own"
        text = path.read_bytes()
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    try:
        manifest = json.loads(text)
        version = manifest["version"]
        del manifest["seal"]
        intact = _text(manifest).encode() == text
    except (ValueError, LookupError, TypeError, RecursionError):
        return f"{MANIFEST} is damaged"
    if not intact or type(version) is not int:
        return f"{MANIFEST} is damaged"
    if version != 1:
        return f"{MANIFEST} is of version {version}, which this release does not read"
    return manifest if _well_formed(manifest) else f"{MANIFEST} is damaged: it has another form than every manifest"


def _well_formed(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has the form that `seal` gives it. Its digest does not tell: anybody can make one."""
    part_bytes, files = manifest.get("part_bytes"), manifest.get("files")
    if type(manifest.get("name")) is not str or type(files) is not dict:
        return False
    if type(part_bytes) is not int or not 0 < part_bytes <= _MOST_BYTES:
        return False
    return all(_is_inside(name) and _is_entry(entry, part_bytes) for name, entry in files.items())


def _is_inside(name: str) -> bool:
    return "\0" not in name and name != MANIFEST and all(part not in ("", ".", "..") for part in name.split("/"))


def _is_entry(entry: Any, part_bytes: int) -> bool:
    if type(entry) is not dict or entry.keys() != {"bytes", "sha256"}:
        return False
    size, digests = entry["bytes"], entry["sha256"]
    if type(size) is not int or not 0 <= size <= _MOST_BYTES or type(digests) is not list:
        return False
    # Without a digest of each part, some bytes could be anything.
    whole = len(digests) == max(1, -(-size // part_bytes))
    return whole and all(type(digest) is str and _DIGEST.fullmatch(digest) for digest in digests)


def sealed_bytes(folder: Path) -> int | None:
    """What the files of a sealed directory take, as its manifest says; None where it has none."""
    manifest = read_manifest(folder)
    return None if isinstance(manifest, str) else sum(entry["bytes"] for entry in manifest["files"].values())


def _text(manifest: dict[str, Any]) -> str:
    """The only text that this manifest has: with its own digest, so that no byte of it can change unseen."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "seal": digest}, indent=1, sort_keys=True) + "\n"


def _files(folder: Path) -> list[str]:
    found = (
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    return sorted(name for name in found if name != MANIFEST)


def _parts(path: Path) -> range:
    return range(max(1, -(-path.stat().st_size // PART_BYTES)))


def _digest(path: Path, part: int, part_bytes: int) -> str:
    digest = hashlib.sha256()
    left = part_bytes
    with path.open("rb", buffering=0) as file:
        file.seek(part * part_bytes)
        while left and (chunk := file.read(min(left, _READ_BYTES))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    # Beside a process that has other things to do, which it is not to hold up.
    os.nice(10)
    print(json.dumps(damage(Path(sys.argv[1]), threads=max(1, (os.cpu_count() or 2) // 2))))
