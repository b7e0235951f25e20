"""Elementwise functions on a CPU: their first call is made by one thread, whatever a process does."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lighthouse_core import vml
from lighthouse_core.evaluate.load import load_checkpoint, load_directory
from lighthouse_core.export import strip


def train(path: Path) -> None:
    from lighthouse_core.titan import train

    train(SimpleNamespace())  # type: ignore[arg-type]


class Seen(TorchDispatchMode):
    """Which operations are called, with the size of what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[tuple[str, torch.dtype, int]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            self.calls.add((func.overloadpacket.__name__, args[0].dtype, args[0].numel()))
        return func(*args, **kwargs or {})


def test_each_function_is_called_on_one_number():
    with Seen() as seen:
        vml.settle.__wrapped__()
    for dtype in (torch.float32, torch.float64):
        assert {(name, dtype, 1) for name in ("cos", "sin", "exp", "log", "sqrt", "tanh", "erf")} <= seen.calls
    assert {size for _, _, size in seen.calls} == {1}


@pytest.mark.parametrize(
    "begin",
    [
        train,
        lambda path: strip(path, path / "out"),
        lambda path: load_checkpoint(path, attention="dense"),
        load_directory,
    ],
    ids=["training", "strip", "eval of a run", "eval of a directory"],
)
def test_whatever_computes_on_a_cpu_calls_them_first(begin, monkeypatch, tmp_path):
    class SettledError(Exception):
        pass

    def settle() -> None:
        raise SettledError

    monkeypatch.setattr(vml, "settle", settle)
    with pytest.raises(SettledError):
        begin(tmp_path)
