"""Lengths of training that a recipe states in tokens: "2.5B tokens" in place of a number of steps."""

import re
from decimal import Decimal
from math import prod
from typing import Any

from lighthouse_core.config.positions import spelled
from lighthouse_core.config.section import conflict

# The keys that count steps of training.
IN_STEPS = (
    ("training", "steps"),
    ("schedule", "warmup_steps"),
    ("schedule", "decay_steps"),
    ("recover", "steps"),
    ("checkpoint", "interval"),
    ("metrics", "validation_every"),
)
_TOKENS = re.compile(r"(\d[\d_]{0,20}(?:\.\d{1,20})?)(?:e(\d{1,2}))? ?([KMBT]?) tokens")
_UNITS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}


def with_steps(table: Any) -> Any:
    """The table of a recipe with every length of IN_STEPS in steps, rounded up. What else is wrong stays as it is.

    A step has training.global_batch_size sequences of training.seq_len tokens.

    Raises:
        PydanticCustomError: a text that states no number of tokens.
    """
    found: dict[tuple[str, str], int] = {}
    for section, key in IN_STEPS:
        given = _section(table, section).get(key)
        if isinstance(given, str):
            tokens = _tokens(given)
            if tokens is None:
                name = spelled((section, key))
                raise conflict(name, f'{name} must be a number of steps, or of tokens as "2.5B tokens", not {given!r}')
            found[section, key] = tokens
    if not found:
        return table
    sizes: list[Any] = [_section(table, "training").get(key) for key in ("seq_len", "global_batch_size")]
    # What is missing or wrong is said of these two. Any number will do for the others.
    step = prod(sizes) if all(type(size) is int and size > 0 for size in sizes) else 1
    changed = dict(table)
    for (section, key), tokens in found.items():
        changed[section] = {**changed[section], key: -(-tokens // step)}
    return changed


def _section(table: Any, name: str) -> dict[str, Any]:
    """Of a table as it was written; empty where there is no such section, or it is none."""
    found = table.get(name) if isinstance(table, dict) else None
    return found if isinstance(found, dict) else {}


def _tokens(text: str) -> int | None:
    match = _TOKENS.fullmatch(text.strip())
    if match is None:
        return None
    number, power, unit = match.groups()
    return int(Decimal(number.replace("_", "")).scaleb(int(power or 0) + _UNITS[unit]))
