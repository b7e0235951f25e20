"""Pickles of checkpoints read as data: nothing in them is imported or called. Nothing here imports torch.

A pickle is a program for a small stack machine. Python's machine imports what the program names, and calls it. Here a
name of the caller's list becomes a class of its own under `Made`, a call of it makes an instance that keeps the
arguments, and any other name is refused.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Collection
from typing import Any, ClassVar

_ERRORS = (
    pickle.UnpicklingError, LookupError, ValueError, TypeError, AttributeError, EOFError, OverflowError, MemoryError,
    ImportError, NotImplementedError, RuntimeError, struct.error, zipfile.BadZipFile, zipfile.LargeZipFile,
)  # fmt: skip


class Refused(ValueError):
    """Bytes that are no pickle of plain values and of the listed names."""


class Made:
    """What a pickle would make by a call of a name; the name alone is a class under this one.

    Attributes:
        called: (module, name) of what would be called.
        args: of the call.
        state: that the object would be given; None without.
    """

    called: ClassVar[tuple[str, str]]
    args: tuple[Any, ...]
    state: Any

    # Some operations make an object without its __init__.
    def __new__(cls, *args: Any) -> "Made":
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        if self.state is not None:
            raise Refused("it changes what is no new object")
        self.state = state


def named(value: Any) -> tuple[str, str] | None:
    """(module, name) where a value is a bare name."""
    return value.called if isinstance(value, type) and issubclass(value, Made) else None


# What the pickles of checkpoints hold: no sets, no bytes, no registered extensions, no numbers as text.
_OPERATIONS = {
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.SHORT_BINUNICODE, pickle.BINUNICODE,
    pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE, pickle.MARK,
    pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS,
    pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.MEMOIZE,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET,
}  # fmt: skip


def _once(get: Callable[[Any], None]) -> Callable[[Any], None]:
    """An operation that takes something a second time, but nothing that could hold itself, or itself twice, twice..."""

    def take(machine: Any) -> None:
        get(machine)
        value = machine.stack[-1]
        flat = not isinstance(value, tuple) or not any(isinstance(part, tuple | list | dict) for part in value)
        if isinstance(value, list | dict) or not flat:
            raise Refused(f"a {type(value).__name__} of it is in two places")

    return take


_DISPATCH = {code: each for code, each in pickle._Unpickler.dispatch.items() if bytes([code]) in _OPERATIONS}
_DISPATCH |= {code[0]: _once(_DISPATCH[code[0]]) for code in (pickle.BINGET, pickle.LONG_BINGET)}


# Python's own in Python: the one in C takes as much memory as a number in the file says.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar = _DISPATCH

    def __init__(self, file: io.BytesIO, names: Collection[tuple[str, str]]):
        super().__init__(file)
        self._names = {name: type(name[1], (Made,), {"called": name}) for name in names}

    def find_class(self, module: str, name: str) -> type[Made]:
        found = self._names.get((module, name))
        if found is None:
            raise Refused(f"it names {f'{module}.{name}'[:80]!r}, which no checkpoint of Lighthouse does")
        return found


def loads(data: bytes, names: Collection[tuple[str, str]] = ()) -> Any:
    """What a pickle holds: plain values, tuples, lists, dictionaries, and `Made` of the names.

    Args:
        data: one whole pickle.
        names: (module, name) pairs that it may name.

    Raises:
        Refused: it is none, or it names something else.
    """
    file = io.BytesIO(data)
    try:
        value = _Unpickler(file, names).load()
    except Refused:
        raise
    except _ERRORS as error:
        raise Refused(f"it is no pickle: {_line(error)}") from None
    if file.read(1):
        raise Refused("it is not one value")
    return value


def load_plain(data: bytes) -> Any:
    """The plain value that `torch.save` wrote.

    Raises:
        Refused: it is no archive of `torch.save`, or holds anything but plain values.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = [record for record in archive.infolist() if record.filename.partition("/")[2] == "data.pkl"]
            # torch.save compresses nothing: what is small here is small when it is read.
            if len(found) != 1 or found[0].compress_type != zipfile.ZIP_STORED:
                raise Refused("it is no archive of torch.save")
            content = archive.read(found[0])
    except Refused:
        raise
    except _ERRORS as error:
        raise Refused(f"it is no archive of torch.save: {_line(error)}") from None
    return loads(content)


def _line(error: Exception) -> str:
    return " ".join(ascii(str(error))[1:-1].split())[:200]
