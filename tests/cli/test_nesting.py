"""What is nested too deeply, or has too long a number: every reader of JSON and TOML refuses it."""

import ast
from pathlib import Path

import pytest

import lighthouse_core
from lighthouse_core.reading import parse_json, parse_toml

CORE = Path(lighthouse_core.__file__).parent
# Readers other than parse_json and parse_toml, with what makes them safe.
KNOWN = {
    "reading.py": "it bounds them",
    "config/positions.py": "of a text that parse_toml has read",
    "data/rows.py": "it takes a RecursionError for a bad line",
    "data/tokenizers/huggingface.py": "what a library wrote of its own state",
    "export/tokenizer.py": "what a library wrote of its own state",
    "job/machines.py": "of launchers that one person has started",
    "profile/step.py": "of a run that this command has just made",
    "profile/trace.py": "of a trace that this command has just made",
    "seal.py": "a damaged manifest; and the words of a process of ours",
}


def parses(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if found and node.value.id in ("json", "tomllib") and node.attr in ("load", "loads"):
            return True
    return False


def test_nothing_parses_by_itself_but_what_is_known():
    folders = (CORE, CORE.parent / "lighthouse_cli")
    found = {str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.py") if parses(path)}
    assert found == set(KNOWN)


@pytest.mark.parametrize("depth", [66, 500, 5000, 100_000])
def test_both_parsers_refuse_it(depth):
    for parser, text in (
        (parse_json, "[" * depth + "]" * depth),
        (parse_json, '{"a":' * depth + "1" + "}" * depth),
        (parse_toml, "x = " + "[" * depth + "]" * depth),
        (parse_json, "9" * max(depth, 5000)),
        (parse_toml, "x = " + "9" * max(depth, 5000)),
    ):
        with pytest.raises(ValueError, match=r"nested too deeply|too many digits"):
            parser(text)
