"""Where compilers keep what they have compiled for us: folders that no other user of the machine can write to.

By default torch and CUTLASS keep theirs in the system's folder for temporary files, under a name that anyone can guess,
and run whatever they find there. Nothing here imports torch.
"""

import atexit
import functools
import grp
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

# torch keeps these elsewhere, whatever it is told. Without them a kernel for CPUs takes longer to compile, once.
_WITHOUT = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
# Environment variables, and the folder in ours that each is to name.
_FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUTE_DSL_CACHE_DIR": "cute",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash-attention",
}


def compile_caches(environment: Mapping[str, str]) -> tuple[dict[str, str], str | None]:
    """The compilers' settings that an environment does not have, as environment variables: above all their folders.

    They lie in ~/.cache/lighthouse/compiled (of XDG_CACHE_HOME, if set), where the next launch finds them. Where that
    cannot be used they lie in a folder that is removed when this process ends.

    Returns:
        The variables, and in the second case a line that says why.
    """
    # Once torch has compiled something its own choice stands in the environment, too.
    theirs = os.path.join(tempfile.gettempdir(), "torchinductor_")
    named = {name for name in _FOLDERS if environment.get(name) and not environment[name].startswith(theirs)}
    left = {name: folder for name, folder in _FOLDERS.items() if name not in named}
    without = {name: value for name, value in _WITHOUT.items() if name not in environment}
    if not left:
        return without, None
    home, base = environment.get("HOME"), environment.get("XDG_CACHE_HOME")
    root, note = _root(base or (os.path.join(home, ".cache") if home else ""))
    return without | {name: str(root / folder) for name, folder in left.items()}, note


def use_own_caches() -> str | None:
    """Put the compilers' settings into the environment of this process; see `compile_caches`. Returns its line."""
    variables, note = compile_caches(os.environ)
    os.environ.update(variables)
    return note


@functools.cache
def _root(base: str) -> tuple[Path, str | None]:
    folder = Path(base, "lighthouse/compiled")
    why: str | None
    if not base:
        why = "there is no HOME"
    elif not folder.is_absolute():
        why = f"{base} is not an absolute path"
    else:
        why = _open(folder)
    if why is None:
        return folder, None
    temporary = Path(tempfile.mkdtemp(prefix="lighthouse-compiled-"))
    atexit.register(_remove, temporary, os.getpid())
    return temporary, f"{why}; what is compiled now is not kept for the next launch"


def _remove(folder: Path, pid: int) -> None:
    # Not by a process that was forked.
    if pid == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)


def _has_others(group: int) -> bool:
    """Whether a group has members beside this user: many systems give each user one of their own."""
    try:
        own, members = pwd.getpwuid(os.geteuid()), grp.getgrgid(group).gr_mem
    except KeyError:
        return True
    return group != own.pw_gid or bool(set(members) - {own.pw_name})


def _open(folder: Path) -> str | None:
    """Make the folder, for this user alone. Returns why it cannot be used, if so."""
    try:
        for parent in reversed([parent for parent in folder.parents if not parent.exists()]):
            # Whatever the umask is.
            parent.mkdir(mode=0o755, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        own = folder.lstat()
        if not stat.S_ISDIR(own.st_mode):
            return f"{folder} is not a folder"
        if own.st_uid != os.geteuid():
            return f"{folder} belongs to another user"
        if own.st_mode & 0o022:
            return f"{folder} can be written by other users, so its contents may be theirs"
        # A home that is a link to another disk is its owner's decision; whoever can change a folder on the way could
        # put another one in the place of this one.
        for parent in folder.parent.resolve().joinpath("_").parents:
            found = parent.stat()
            if found.st_uid not in (0, os.geteuid()):
                return f"{parent}, in which {folder} lies, belongs to another user"
            if not found.st_mode & stat.S_ISVTX and (
                found.st_mode & 0o002 or (found.st_mode & 0o020 and _has_others(found.st_gid))
            ):
                return f"{parent}, in which {folder} lies, can be written by other users"
        if own.st_mode & 0o077:
            folder.chmod(0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"{folder} cannot be written"
    except OSError as error:
        return f"{error.filename or folder} cannot be used: {error.strerror}"
    return None
