"""Writing files where somebody else may have put something: links are not followed, and only what is ours is replaced.

Standard library only.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lighthouse_core.errors import UserError, refusal
from lighthouse_core.reading import read_json

# What training writes into below a run.
RUN_FOLDERS = ("checkpoints", "logs", "tb", "wandb")
# Begins the name of a folder of `together`, after a dot.
STAGING = "writing-"
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}", re.DOTALL)
_STAGED = re.compile(rf"\.{STAGING}[0-9a-f]{{16}}")
_CHECKPOINT = re.compile(r"\.?step-[0-9]+(\..*)?")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block succeeds, also of a link, and goes when it fails. It is
    there as a whole or not at all, also after a crash.

    Raises:
        OSError: of the system.
    """
    file, temporary = new_beside(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            # Of a write the system names no file, and nobody knows the temporary one.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def together(folder: Path) -> Iterator[Path]:
    """A new folder for files that belong together. When the block succeeds, they take their places in `folder`, which
    is made if it is not there. When the block fails, or one file cannot take its place, `folder` has the files that it
    had before. If these cannot be put back either, the error names the folder that holds them.

    A write that succeeds also removes what killed writes left in `folder`.

    Raises:
        OSError: of the system.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    staging = folder / f".{STAGING}{secrets.token_hex(8)}"
    earlier = staging / ".earlier"
    added: list[Path] = []
    replaced: dict[Path, Path] = {}
    lock, kept = None, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        lock = _lock_folder(staging)
        yield staging
        paths = sorted(staging.iterdir())
        earlier.mkdir()
        for path in paths:
            place = folder / path.name
            if not os.path.lexists(place):
                os.replace(path, place)
                added.append(place)
                continue
            # A folder is no file of ours: replacing it fails.
            if place.is_symlink() or not place.is_dir():
                replaced[place] = earlier / path.name
                _keep(place, replaced[place])
            os.replace(path, place)
    except BaseException as error:
        for place in added:
            with contextlib.suppress(OSError):
                place.unlink()
        kept = not _put_back(replaced)
        if kept and isinstance(error, OSError):
            words = f"{error.strerror}; the earlier files are in {earlier}"
            raise OSError(error.errno, words, error.filename) from error
        raise
    else:
        _remove_left(folder)
    finally:
        if lock is not None:
            os.close(lock)
        if not kept:
            shutil.rmtree(staging, ignore_errors=True)
        remove_empty(made)


def _keep(path: Path, copy: Path) -> None:
    """Give a file a second name. Where the file system has no links, its only one."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except OSError:
        os.replace(path, copy)


def _put_back(replaced: dict[Path, Path]) -> bool:
    """Give files, by their places, the names that they had; returns whether all have them."""
    done = True
    for place, kept in replaced.items():
        if os.path.lexists(kept):
            try:
                os.replace(kept, place)
            except OSError:
                # The system says the same of a file that was not replaced.
                done &= os.path.lexists(place) and os.path.samestat(kept.lstat(), place.lstat())
    return done


def _remove_left(folder: Path) -> None:
    """Remove folders of `together` that no process writes into any more."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _STAGED.fullmatch(path.name) and (lock := _lock_folder(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _lock_folder(folder: Path) -> int | None:
    """A descriptor that holds a folder; None where another process holds it, or the file system has no locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def new_beside(path: Path, buffering: int = -1) -> tuple[BinaryIO, Path]:
    """An empty file in the folder of `path`, open for writing, and its name, which `replaced_by` knows again.

    Raises:
        OSError: of the system.
    """
    while True:
        # A name that nobody can have laid a link under.
        temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        return open(descriptor, "wb", buffering=buffering), temporary


def replaced_by(name: str) -> str | None:
    """The name of the file that a file of this name was to become, by `new_beside`; None for any other."""
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found else None


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there as a whole or as it was, also after a crash; a link there is replaced."""
    with replacing(path) as file:
        file.write(text.encode())


def open_to_append(path: Path) -> BinaryIO:
    """A file to add to, unbuffered, made if it is not there.

    Raises:
        UserError: it is a link, or no ordinary file.
        OSError: of the system.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        # Opening a pipe would wait for a reader.
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _not_ours(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_ours(path)
    return open(descriptor, "ab", buffering=0)


def _not_ours(path: Path) -> UserError:
    return UserError(f"{path} is a link or no ordinary file, and is not written to", hint="move it out of the way")


def refuse_links(folder: Path, *names: str) -> None:
    """Raise UserError where a name in a folder, or one on the way to it, is a link: what is written, or deleted, there
    would be elsewhere.

    Args:
        folder: whose own path may have links.
        names: relative paths of what is about to be written.
    """
    for name in names:
        path = folder
        for part in Path(name).parts:
            path = path / part
            if path.is_symlink():
                raise UserError(
                    f"{path} is a link to {os.readlink(path)!r}, and what is written there would be elsewhere",
                    hint="move the files to where the link is; output.dir says where runs are made",
                )


def check_output(path: Path) -> None:
    """Raise UserError for a place of results that is in a checkpoint, or has the name of one.

    Args:
        path: where they are about to go.
    """
    path = Path(os.path.realpath(path))
    if _CHECKPOINT.fullmatch(path.name):
        raise UserError(f"{path} has the name of a checkpoint", hint="choose another name")
    for folder in (path, *path.parents):
        if folder.name == "checkpoints" and (folder.parent / "recipe.toml").is_file():
            raise UserError(f"{path} is among the checkpoints of a run", hint="choose another place")
        if _sealed(folder):
            raise UserError(
                f"{path} is in a sealed folder, {folder}, which it would damage", hint="choose another place"
            )


def _sealed(folder: Path) -> bool:
    found = read_object(folder / "manifest.json")
    return found is not None and {"seal", "files", "name"} <= found.keys()


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in an ordinary JSON file; None where there is none."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def check_replaceable(
    folder: Path, name: str, ours: Callable[[dict[str, Any]], bool], others: Collection[str] = ()
) -> None:
    """Raise UserError where writing a report would replace what this program did not write.

    Args:
        folder: of the report.
        name: of its JSON file, which bears the mark.
        ours: whether what a file of that name holds is such a report.
        others: names of what is written beside it.
    """
    found = read_object(folder / name)
    if found is not None and ours(found):
        return
    for there in (name, *others):
        if os.path.lexists(folder / there):
            raise UserError(
                f"{folder / there} is there and is no report of this kind", hint="move it, or choose another place"
            )


def check_writable(folder: Path, hint: str = "choose another --out") -> None:
    """Find out whether files can be written in a folder that is there or can be made; leaves nothing behind.

    Raises:
        UserError: they cannot.
        SystemFault: the disk is full, or fails.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b" " * 4096)
    except OSError as error:
        raise refusal(error, f"cannot write {folder}", hint) from None
    finally:
        remove_empty(made)


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, unless somebody else has put something into one."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def same_paths(one: Any, other: Any) -> bool:
    """Whether two lists of paths or globs, of recipes or of files that say what a recipe was, lead to the same places.

    Their order counts: it tells folders of one name apart.
    """
    if not all(isinstance(paths, list | tuple) and all(isinstance(p, str) for p in paths) for paths in (one, other)):
        return False
    try:
        first, second = ([os.path.realpath(os.path.expanduser(path)) for path in paths] for paths in (one, other))
    except (OSError, ValueError):
        return False
    return first == second
