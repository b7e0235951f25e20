"""Comparing files with their checksums, in threads; a file that agreed is not read again until it changes."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lighthouse_core.errors import DataError, refusal
from lighthouse_core.files import write_atomically
from lighthouse_core.reading import open_regular, read_json

_BLOCK = 1 << 22
# More threads than this wait for the disk.
_THREADS = 16
_REPORT_SECONDS = 3.0


class Ids(NamedTuple):
    """Token ids: `number` of them, of `size` bytes each, all below `limit`."""

    number: int
    size: int
    limit: int


class Sealed(NamedTuple):
    """A file, the blake2b of all that follows its first `skip` bytes, hexadecimal, and the ids that begin there.

    Whoever changes a file can write its checksum anew, so what else must hold of the ids is looked at, too.
    """

    path: Path
    skip: int
    checksum: str
    ids: Ids | None = None


def verify_files(
    files: Sequence[Sealed], hint: str, say: Callable[[str], None] | None = None, *, remember: bool
) -> None:
    """Compare files with their checksums.

    Args:
        files: what to compare.
        hint: of the error.
        say: called with a line on how far it is, every few seconds.
        remember: pass over files that agreed before and are the same ones since: by size, inode, and the times of the
            last change of their content and of anything about them, of which copying preserves the first alone.

    Raises:
        DataError: a file differs, or cannot be read.
    """
    known = _load() if remember else {}
    try:
        stats = {file.path: os.stat(file.path) for file in files}
    except OSError as error:
        raise refusal(error, f"cannot read {error.filename}", hint, DataError) from None
    files = [file for file in files if not known or known.get(_key(file)) != _state(file, stats[file.path])]
    total = sum(stats[file.path].st_size for file in files)
    done = [0] * len(files)
    found: dict[str, list[Any]] = {}

    def verify(number: int) -> None:
        file = files[number]
        checksum = hashlib.blake2b(digest_size=32)
        try:
            with open_regular(file.path, buffering=0) as f:
                state = _state(file, os.fstat(f.fileno()))
                f.seek(file.skip)
                # Hashing and reading let other threads run.
                while block := f.read(_BLOCK):
                    checksum.update(block)
                    if file.ids is not None and (found_id := _beyond(file.ids, done[number], block)) is not None:
                        raise DataError(
                            f"{file.path} has the id {found_id}, and its tokenizer has {file.ids.limit}", hint=hint
                        )
                    done[number] += len(block)
        except OSError as error:
            raise refusal(error, f"cannot read {file.path}", hint, DataError) from None
        if checksum.hexdigest() != file.checksum:
            raise DataError(f"{file.path} is damaged: its checksum differs", hint=hint)
        found[_key(file)] = state

    pool = ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0))))
    try:
        waiting = {pool.submit(verify, number) for number in range(len(files))}
        while waiting:
            ended, waiting = wait(waiting, _REPORT_SECONDS, return_when="FIRST_EXCEPTION")
            for future in ended:
                future.result()
            if say is not None and waiting:
                say(f"verifying checksums: {sum(done) / 2**30:.1f} of {total / 2**30:.1f} GiB")
    finally:
        pool.shutdown(cancel_futures=True)
        if found:
            _save(found)


def _beyond(ids: Ids, offset: int, block: bytes) -> int | None:
    """An id that is not below the limit, of a block that begins so many bytes after the first id; None for none."""
    begin, end = -offset % ids.size, min(len(block), ids.number * ids.size - offset)
    if end - begin < ids.size or ids.limit >= 1 << 8 * ids.size:
        return None
    part = np.frombuffer(block, dtype=f"<u{ids.size}", count=(end - begin) // ids.size, offset=begin)
    return int(part.max()) if part.max() >= ids.limit else None


def _key(file: Sealed) -> str:
    return os.path.realpath(file.path)


def _state(file: Sealed, stat: os.stat_result) -> list[Any]:
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, file.checksum, file.ids and list(file.ids)]


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    # Where nobody has a home directory, "~" would be one in the working directory: there is no cache then.
    return Path(os.devnull if base.startswith("~") else base, "lighthouse", "verified.json")


def _load() -> dict[str, list[Any]]:
    try:
        known = read_json(_cache())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _save(found: dict[str, list[Any]]) -> None:
    """A cache that cannot be written is no error: the files are read again."""
    path = _cache()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(_load() | found))
