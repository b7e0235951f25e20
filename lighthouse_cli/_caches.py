"""Where the compilers of a command, and of what it starts, keep what they compile."""

from lighthouse_cli import _output


def use_own() -> None:
    """Have them use folders of this user alone; to be called before torch is imported, which reads where they are."""
    from lighthouse_core.cache import use_own_caches

    if note := use_own_caches():
        _output.warn(note)
