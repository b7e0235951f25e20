"""Reading recipes. Every error is one RecipeError that names the place: `file:line` or `--set key`."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from lighthouse_core.config.budget import BudgetSection
from lighthouse_core.config.data import DataSection, SourceSection
from lighthouse_core.config.dump import toml_value
from lighthouse_core.config.lengths import IN_STEPS
from lighthouse_core.config.model import ModelSection
from lighthouse_core.config.origin import Unfit, filled
from lighthouse_core.config.phases import PhaseSection, of_older_run
from lighthouse_core.config.positions import KeyPath, flatten, line_numbers, spelled
from lighthouse_core.config.recipe import TRAINS, Recipe
from lighthouse_core.config.rope import RopeScaling
from lighthouse_core.config.section import Section
from lighthouse_core.errors import RecipeError, did_you_mean, nearest, refusal
from lighthouse_core.reading import RECIPE_BYTES, parse_toml, read_regular
from lighthouse_core.shelf import shipped_recipes
from lighthouse_core.shown import shortened
from lighthouse_core.text import decoded, why_not_utf8

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}
_TYPES = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a string",
    "array": "a list",
    "object": "a table",
}
# Keys without a default that follow from others.
_DERIVED = {("model", "kv_heads"), ("model", "head_dim")}
# The table of several kinds, and its key that says which.
_SCALING, _TAG = ("model", "rope_scaling"), "rope_type"


def _of_windows(windows: Any) -> str:
    listed = windows if isinstance(windows, list) and windows else [2048, 8192]
    return "write lighthouse.phases = " + toml_value([{"window": window} for window in listed])


# Keys of earlier releases, and what to write in their place.
_REMOVED: dict[KeyPath, Callable[[Any], str]] = {
    ("lighthouse", "windows"): _of_windows,
    ("lighthouse", "dense_every"): lambda every: (
        "dense phases took its place: write lighthouse.phases = [{share = 0.75}, {share = 0.25, enabled = false}]"
    ),
}


def find_recipe(spec: str | Path) -> Path:
    """The file a user means: a path, or the bare name of a recipe that comes with the package.

    Raises:
        RecipeError: no such file.
    """
    path = Path(spec)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(spec).removesuffix(".toml") in shipped:
        return shipped[path.name.removesuffix(".toml")]
    if path.is_dir():
        inside = path / "recipe.toml"
        hint = f"its recipe is {inside}; pretrain --resume {spec} goes on with the run"
        hint = hint if inside.is_file() else "give a file in it"
        raise RecipeError(f"{spec} is a directory, not a recipe", hint=hint)
    meant = did_you_mean(path.name.removesuffix(".toml"), shipped)
    raise RecipeError(f"no recipe {spec}{meant}", hint=f"give a path, or one of {', '.join(sorted(shipped))}")


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), *, trains: bool = True, of_run: bool = False
) -> Recipe:
    """The recipe in a file, with `a.b=value` overrides in TOML's grammar.

    Args:
        path: of the file.
        overrides: of its keys.
        trains: whether the recipe is to be trained. If it is not, its attention need not go with its `data.packing`:
            what only reads text, or measures a model on it, needs no such attention.
        of_run: whether it is the file of a run, which an earlier release may have written.

    Raises:
        RecipeError: unreadable, invalid, or asking for something impossible.
    """
    return loads_recipe(read_toml(path), overrides, source=str(path), trains=trains, of_run=of_run)


def read_toml(path: Path | str) -> str:
    """The text of a recipe or a sweep, without a byte-order mark.

    Raises:
        RecipeError: it cannot be read, or is not UTF-8.
    """
    try:
        content = read_regular(path, RECIPE_BYTES)
        return decoded(content)
    except OSError as error:
        raise refusal(error, f"cannot read {path}", kind=RecipeError) from None
    except UnicodeDecodeError as error:
        problem, hint = why_not_utf8(content, f"byte {error.start}")
        raise RecipeError(f"{path}: {problem}", hint=hint) from None


def loads_recipe(
    text: str,
    overrides: Sequence[str] = (),
    source: str = "<recipe>",
    *,
    trains: bool = True,
    of_run: bool = False,
) -> Recipe:
    """As load_recipe, from text; `source` stands for the file in errors.

    Raises:
        RecipeError: as load_recipe.
    """
    text = text.removeprefix("\ufeff")
    try:
        table = parse_toml(text)
    except ValueError as error:
        raise RecipeError(_syntax_error(source, text, str(error))) from None
    if of_run:
        table = of_older_run(table)
    flags: dict[KeyPath, str] = {}
    headers: dict[KeyPath, str] = {}
    for override in overrides:
        addition = parse_override(override)
        _merge(table, addition)
        label = f"--set {override.split('=', 1)[0].strip()}"
        for path, value in flatten(addition).items():
            (headers if isinstance(value, dict) else flags)[path] = label
    origin = None
    try:
        whole, origin = filled(table)
        return Recipe.model_validate(whole, context={TRAINS: trains})
    except (ValidationError, Unfit) as error:
        if isinstance(error, ValidationError) and _without_a_shape(error):
            raise RecipeError(
                f"{source} has no shape in [model]: it continues a model that exists",
                hint="name it: lighthouse pretrain RECIPE --from DIR; other commands take --set 'model.from=\"DIR\"'",
            ) from None
        lines = {
            path: f"{source}:{line}"
            for path, line in line_numbers(text).items()
            if not any(path[:n] in flags for n in range(1, len(path)))
        }
        if isinstance(error, Unfit):
            places = headers | lines | flags
            place = next((places[path] for path in (error.path, error.path[:1]) if path in places), source)
            raise RecipeError(f"{place}: {error}", hint=error.hint) from None
        if origin is not None:
            # What the recipe leaves out is what is said there.
            lines |= {("model", key): str(origin.file) for key in origin.model if key not in table["model"]}
        # A flag replaces the file's value, but a table that both write to begins in the file.
        problem, hint = _first_problem(error, headers | lines, flags, source)
        raise RecipeError(problem, hint=hint) from None


def parse_override(override: str) -> dict[str, Any]:
    """`a.b=value` as nested tables.

    Raises:
        RecipeError: not of that form, or the value is not TOML.
    """
    key, equals, value = (part.strip() for part in override.partition("="))
    label = f"--set {key}"
    if not equals or not key:
        raise RecipeError(f"--set {override}: expected key=value", hint="for example --set training.steps=100")
    try:
        # A line break could bring further keys along.
        if "\n" in override:
            raise ValueError
        return parse_toml(f"{key} = {value}")
    except ValueError:
        wanted = _wanted(key)
        if "[" in key:
            whole = key.partition("[")[0]
            raise RecipeError(
                f"{label} names an entry of a list", hint=f"a list is set as a whole: {whole}=[...]"
            ) from None
        if value.endswith("tokens"):
            hint = f"write --set '{key}={toml_value(value)}'"
        elif key == "lighthouse.phases":
            hint = "phases are written [{share = 0.25, window = 2048}, {share = 0.75, window = 8192}]"
        elif value[:1] in ("[", "{") or wanted == "a list":
            hint = 'a list is written ["a", "b"]'
        elif wanted == "a string" or value.lower() in ("true", "false"):
            suggestion = value.lower() if value.lower() in ("true", "false") else toml_value(value.strip("\"'"))
            hint = f"write --set '{key}={suggestion}'"
        else:
            of_training = tuple(key.split(".")) in IN_STEPS
            hint = f"{key} takes {wanted}" + (f", or tokens: --set '{key}=\"2.5B tokens\"'" if of_training else "")
        value = value.replace("\n", "\\n")
        raise RecipeError(f"{label}: {value or 'nothing'} is not a TOML value", hint=hint) from None


def _wanted(key: str) -> str:
    """What type a key takes, in words; of a key that is not known, a string."""
    *sections, name = key.split(".")
    kind: Any = Recipe if sections else None
    for section in sections:
        known = kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else {}
        kind = known[section].annotation if section in known else None
    if isinstance(kind, type) and issubclass(kind, Section) and name in kind.names_of_keys():
        return _TYPES[kind.model_json_schema()["properties"][name].get("type", "object")]
    return "a string"


def known_keys() -> dict[str, list[str]]:
    """The keys of every section, sections in order. `titan` has none of its own."""
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {
        name: kind.names_of_keys() if isinstance(kind, type) and issubclass(kind, Section) else []
        for name, kind in sections.items()
    }


def _merge(table: dict[str, Any], addition: dict[str, Any]) -> None:
    for key, value in addition.items():
        if isinstance(value, dict) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def _syntax_error(source: str, text: str, message: str) -> str:
    found = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    if found:
        return f"{source}:{found[1]}: not valid TOML: {message[: found.start()]} (column {found[2]})"
    last = text.rstrip().count("\n") + 1
    return f"{source}:{last}: not valid TOML: {message.removesuffix(' (at end of document)')} (at the end of the file)"


def _without_a_shape(error: ValidationError) -> bool:
    """Whether nothing is wrong with a recipe but that its [model] says no size."""
    shape = {("model", name) for name, field in ModelSection.model_fields.items() if field.is_required()} - _DERIVED
    problems = error.errors(include_url=False)
    places = {problem["loc"] for problem in problems}
    return all(problem["type"] == "missing" for problem in problems) and shape <= places


def _first_problem(
    error: ValidationError, places: dict[KeyPath, str], flags: dict[KeyPath, str], source: str
) -> tuple[str, str | None]:
    """One line for the problem to solve first, and a hint, if any: a misspelt key explains a missing one.

    Of keys that conflict, one that a flag set is to blame: the file was right without it.
    """
    rank = {"extra_forbidden": 0, "missing": 2}
    problem = min(error.errors(include_url=False), key=lambda problem: rank.get(problem["type"], 1))
    path: KeyPath = problem["loc"]
    if path[:2] == _SCALING:
        # Pydantic's own place of a table of several kinds, the kind among it.
        path = (*path[:2], *path[3:])
    if problem["type"] == "union_tag_invalid":
        path += (_TAG,)
    if problem["type"] == "conflict":
        path += problem["ctx"]["path"]
        words = re.findall(r"[\w.]*\w", problem["ctx"]["message"])
        involved = [flag for flag in flags if spelled(flag) in words or (flag[0] == path[0] and flag[-1] in words)]
        if involved and path not in flags:
            path = involved[0]
    places = places | flags
    known = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), source)
    if problem["type"] == "extra_forbidden" and path in _REMOVED:
        return f"{known}: {spelled(path)} is no key any more", _REMOVED[path](problem["input"])
    return f"{known}: {_describe(problem, path)}", None


def _describe(problem: Any, path: KeyPath) -> str:
    key = spelled(path)
    kind, context, given = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden":
        return _unknown(path, given)
    if kind == "missing":
        return f"section [{key}] is missing" if len(path) == 1 else f"{key} is missing"
    if kind == "conflict":
        return context["message"]
    if kind in _EXPECTED:
        return f"{key} must be {_EXPECTED[kind]}, not {_given(given)}"
    if kind == "union_tag_not_found":
        older = f"; did you mean {key}.{_TAG} by type?" if isinstance(given, dict) and "type" in given else ""
        return f"{key}.{_TAG} is missing{older}"
    if kind == "union_tag_invalid":
        *names, last = (toml_value(name) for name in ["default", *re.findall(r"'([^']*)'", context["expected_tags"])])
        return f"{key} must be {', '.join(names)} or {last}, not {_value(given[_TAG])}"
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        expected = context["expected"].replace("'", '"')
        return f"{key} must be {expected}, not {_value(given)}{did_you_mean(given, names)}"
    limits = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in limits:
        words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}[limits[kind]]
        limit = context[limits[kind]]
        # As TOML has it: 1 for 1.0, but every digit of an integer.
        return f"{key} must be {words} {f'{limit:g}' if isinstance(limit, float) else limit}, not {_value(given)}"
    if kind in ("too_short", "string_too_short"):
        return f"{key} must not be empty"
    return f"{key}: {problem['msg']}"


def _given(value: Any) -> str:
    names = {str: "the string ", int: "the integer ", float: "the float ", list: "the list ", dict: "the table "}
    return names.get(type(value), "") + _value(value)


def _value(value: Any) -> str:
    """A value in an error: one line, not too long."""
    return "null" if value is None else shortened(toml_value(value), 100)


def _unknown_of_source(key: str) -> str:
    if key in DataSection.model_fields:
        return f"data.{key} is for all sources together: set it in [data], not in [[data.sources]]"
    near = nearest(key, SourceSection.model_fields, cutoff=0)
    return f"unknown key data.sources.{key}; did you mean data.sources.{near}?"


def _unknown(path: KeyPath, given: Any) -> str:
    sections, section, last = known_keys(), str(path[0]), str(path[-1])
    if len(path) == 1:
        if isinstance(given, dict):
            return f"unknown section [{section}]; did you mean [{nearest(section, sections, cutoff=0)}]?"
        places = {key: f"{name}.{key}" for name, keys in reversed(sections.items()) for key in keys}
        near = nearest(section, places)
        return f"unknown key {section} outside of any section" + (f"; did you mean {places[near]}?" if near else "")
    key = str(path[1])
    if path[:2] == ("data", "sources"):
        return _unknown_of_source(last)
    if path[:2] == ("lighthouse", "phases") and last in sections["lighthouse"]:
        return f"lighthouse.{last} is for all phases together: set it in [lighthouse], not in [[lighthouse.phases]]"
    if path[:2] == ("lighthouse", "phases"):
        return f"unknown key {spelled(path)}{did_you_mean(last, PhaseSection.names_of_keys())}"
    if path[:2] == ("lighthouse", "budget"):
        return f"unknown key {spelled(path)}{did_you_mean(last, BudgetSection.names_of_keys())}"
    if path[:2] == _SCALING and len(path) > 2:
        if last == "type":
            return f"unknown key {spelled(path)}; did you mean {spelled(_SCALING)}.{_TAG}?"
        names = {name for kind in get_args(get_args(RopeScaling)[0]) for name in kind.model_fields}
        return f"unknown key {spelled(path)} of such a rope_type{did_you_mean(last, names)}"
    near = nearest(key, sections[section])
    if near:
        return f"unknown key {section}.{key}; did you mean {section}.{near}?"
    elsewhere = [f"{name}.{key}" for name, keys in sections.items() if key in keys]
    everywhere = elsewhere or [f"{name}.{other}" for name, keys in sections.items() for other in keys]
    return f"unknown key {section}.{key}; did you mean {nearest(f'{section}.{key}', everywhere, cutoff=0)}?"
