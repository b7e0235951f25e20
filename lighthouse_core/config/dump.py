"""Writing TOML, which the standard library only reads."""

import json
import re
from datetime import date, datetime, time
from typing import Any

from lighthouse_core.config.recipe import Recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML, every key resolved, sections in their order; loading it gives an equal recipe."""
    return "\n".join(_table((name,), table) for name, table in recipe.model_dump().items() if name != "titan" or table)


def toml_value(value: Any) -> str:
    """One value in TOML's grammar."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(toml_value(item) for item in value) + "]"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


def _table(path: tuple[str, ...], table: dict[str, Any], *, many: bool = False) -> str:
    """A table with its header, its tables after its values: TOML has no way back to the outer one."""
    header = ".".join(map(_key, path))
    lines = [f"[[{header}]]" if many else f"[{header}]"]
    lines += [f"{_key(key)} = {toml_value(value)}" for key, value in table.items() if not _tables(value)]
    tables = [
        _table((*path, key), one, many=not isinstance(value, dict))
        for key, value in table.items()
        for one in _tables(value)
    ]
    return "\n".join([*lines, *tables]) + ("" if tables else "\n")


def _tables(value: Any) -> list[dict[str, Any]]:
    """The tables that a value is, or is a list of; none for any other value."""
    if isinstance(value, list | tuple) and all(isinstance(one, dict) for one in value):
        return list(value)
    return [value] if isinstance(value, dict) else []
