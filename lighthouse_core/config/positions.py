"""Where each key of a TOML text stands. tomllib tells no positions, so it is asked about growing pieces of the text."""

import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

# Entries of a list have their index.
KeyPath = tuple[str | int, ...]
_MOST_LINES = 1000


def flatten(table: Mapping[Any, Any], above: KeyPath = ()) -> dict[KeyPath, Any]:
    """Every key of a nested table with its value, tables and their keys alike; tables in a list have their index."""
    found: dict[KeyPath, Any] = {}
    for key, value in table.items():
        found[(*above, key)] = value
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            found |= flatten(value, (*above, key))
    return found


def spelled(path: Iterable[str | int]) -> str:
    """A key as people read it. Entries of lists count from 1, as phases do: the window of the second phase is
    `lighthouse.phases[2].window`."""
    return "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def line_numbers(text: str) -> dict[KeyPath, int]:
    """The line (from 1) on which the statement that brings each key begins. `text` must be valid TOML.

    A statement is complete exactly when the text up to its last line parses, so no second grammar is needed here.
    Quadratic in the number of lines, which a recipe has few of; called for errors only. Of a longer text nothing is
    known.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if len(lines) > _MOST_LINES:
        return {}
    known: dict[KeyPath, int] = {}
    begin = 1
    for end in range(1, len(lines) + 1):
        try:
            table = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue
        for path in flatten(table):
            known.setdefault(path, begin)
        begin = end + 1
    return known
