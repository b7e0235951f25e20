"""Every argument and option of every command and group, as the command line itself declares them."""

import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lighthouse_cli.app import app


@dataclass(frozen=True)
class Parameter:
    """One argument or option.

    Attributes:
        command: words of the command, as "data prepare"; none for `lighthouse` itself.
        name: of the function's parameter.
        kind: its type, without None.
        flag: as "--seq"; empty for an argument.
    """

    command: str
    name: str
    kind: Any
    flag: str

    @property
    def id(self) -> str:
        return f"{self.command} {self.flag or self.name}".strip()


def parameters() -> list[Parameter]:
    """Of all commands, in their order."""
    return list(_parameters(app, ()))


def _parameters(group: Any, above: tuple[str, ...]) -> Iterator[Parameter]:
    functions = [
        (" ".join((*above, command.name or command.callback.__name__)), command.callback)
        for command in group.registered_commands
    ]
    if group.registered_callback is not None:
        functions.insert(0, (" ".join(above), group.registered_callback.callback))
    for words, function in functions:
        hints = typing.get_type_hints(function, include_extras=True)
        for name in inspect.signature(function).parameters:
            if typing.get_origin(hints[name]) is not typing.Annotated:
                continue  # the context, which is no parameter
            kind, info = typing.get_args(hints[name])[:2]
            if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
                kind = next(part for part in typing.get_args(kind) if part is not type(None))
            declared = [flag for flag in getattr(info, "param_decls", None) or () if flag.startswith("--")]
            # With Annotated, the first name is kept as the default.
            if isinstance(getattr(info, "default", None), str) and info.default.startswith("--"):
                declared.insert(0, info.default)
            yield Parameter(words, name, kind, declared[0] if declared else "")
    for inner in group.registered_groups:
        yield from _parameters(inner.typer_instance, (*above, inner.name))
