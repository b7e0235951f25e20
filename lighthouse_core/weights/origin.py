"""The weights that a run begins with, where they exist: which they are, whether they fit, and each by its name.

A directory's are read one tensor at a time from its safetensors, a run's from one of its checkpoints.
"""

from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighthouse_core.checkpoint import check_model
from lighthouse_core.checkpoint_reader import load
from lighthouse_core.config.model import ModelSection
from lighthouse_core.config.origin import read_origin
from lighthouse_core.errors import UserError
from lighthouse_core.models.family import EMBEDDING, HEAD, WORKED_OUT, Entry, to_interleaved
from lighthouse_core.weights.checkpoint import Source, find_source
from lighthouse_core.weights.directory import COPY_ANEW, Stored, read_config, read_headers, words

_COMPARE = "compare config.json with the weights"
# That are compared at once.
_ROWS = 4096
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Weights(ABC):
    """The initial weights of a model.

    Attributes:
        path: of the directory, or of the checkpoint.
        dtype: that most tensors are exported in: that of the directory's.
        others: that of the other tensors, by their names in transformers' class.
        stored: type of most tensors in the files.
        about: what they are, in a few words.
        recovered: whether they were last trained with every layer dense.
        files: that they are read from.
    """

    path: Path
    dtype: str
    others: dict[str, str]
    stored: str
    about: str
    recovered = True
    files: list[Path]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A whole tensor by its name in the trainer, float32 on the CPU.

        Raises:
            UserError: it cannot be read, or is not finite.
        """

    @abstractmethod
    def check(self) -> None:
        """Raise UserError unless every tensor can be read and is what it should be. One is in memory at a time."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the ledger of a run keeps of them."""
        return {
            "path": str(self.path),
            "dtype": self.dtype,
            "others": self.others,
            "recovered": self.recovered,
            "files": {str(file): _mark(file) for file in self.files},
        }


def _mark(file: Path) -> list[int] | None:
    """What a file has another one of once it was written to; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def check_unchanged(facts: dict[str, Any]) -> None:
    """Raise UserError where a file is not the one that `facts` of a ledger were taken of."""
    for file, mark in facts.get("files", {}).items():
        if _mark(Path(file)) != mark:
            raise UserError(f"{file} has changed since the run began to read it", hint="start again")


def find_weights(model: ModelSection, *, verify: bool = False) -> Weights:
    """What `from` of [model] stands for. Only descriptions are read.

    Args:
        model: the recipe's [model] section.
        verify: also read every weight, and compare every byte of a run's checkpoint with its seal.

    Raises:
        UserError, CheckpointError: there are no such weights, they are damaged, or they are not those of the model.
    """
    origin = read_origin(model.origin)
    if origin.run:
        step = "" if origin.step is None else f"checkpoints/step-{origin.step}"
        weights: Weights = _OfRun(find_source(origin.path / step, verify=verify), model)
    else:
        weights = _OfDirectory(origin.path, model)
    if verify:
        weights.check()
    return weights


class _OfDirectory(Weights):
    def __init__(self, path: Path, model: ModelSection):
        self.path = path
        read_config(path)
        stored = read_headers(path)
        self._places: dict[str, tuple[Entry, Stored]] = {}
        for entry in model.kind.entries(model):
            found = stored.pop(entry.target, None)
            if found is None:
                # As AutoModel saves one.
                headless = entry.target.removeprefix("model.") in stored
                hint = "save the whole causal language model, not its body" if headless else _COMPARE
                raise UserError(f"{path} has no tensor {entry.target}", hint=hint)
            if found.shape != entry.shape:
                raise UserError(
                    f"{entry.target} in {found.file} has shape {list(found.shape)}, and config.json says "
                    f"{list(entry.shape)}",
                    hint=_COMPARE,
                )
            if found.dtype not in _DTYPES:
                raise UserError(
                    f"{entry.target} in {found.file} is stored as {found.dtype}, not as one of {', '.join(_DTYPES)}",
                    hint="begin from weights that are not quantized",
                )
            self._places[entry.source] = entry, found
        # Of tied embeddings, some files hold the table twice.
        self._twin = stored.pop(HEAD.target, None) if model.tied_embeddings else None
        if left := sorted(name for name in stored if not WORKED_OUT.fullmatch(name)):
            raise UserError(
                f"{path} has a tensor that no model of the family {model.family} has: {words(left[0])}",
                hint=_COMPARE,
            )
        kinds = {entry.target: _DTYPES[found.dtype] for entry, found in self._places.values()}
        self.dtype = self.stored = Counter(kinds.values()).most_common(1)[0][0]
        self.others = {name: kind for name, kind in kinds.items() if kind != self.dtype}
        files = sorted({found.file for _, found in self._places.values()})
        self.files = [path / "config.json", *files]
        some = f" and {', '.join(sorted(set(self.others.values())))}" if self.others else ""
        self.about = f"{model.kind.architecture}, {self.dtype}{some}, {len(files)} file{'s' * (len(files) > 1)}"

    def check(self) -> None:
        for name in self._places:
            self._stored(name)

    def read(self, name: str) -> Tensor:
        heads, weight = self._places[name][0].rotary_heads, self._stored(name)
        # In the type of the file, which may be half as large.
        return (to_interleaved(weight, heads) if heads else weight).float()

    def _stored(self, name: str) -> Tensor:
        """A tensor as its file has it."""
        entry, stored = self._places[name]
        weight = _tensor(stored, entry.target)
        if name == EMBEDDING.source and self._twin is not None:
            twin = _tensor(self._twin, HEAD.target)
            rows = zip(twin.split(_ROWS), weight.split(_ROWS), strict=False)
            if twin.shape != weight.shape or not all(torch.equal(a.float(), b.float()) for a, b in rows):
                raise UserError(
                    f"{HEAD.target} and {entry.target} of {self.path} differ, and config.json has tie_word_embeddings",
                    hint="set tie_word_embeddings to false in a copy of config.json, if the head is one of its own",
                )
        if not weight.isfinite().all():
            raise UserError(f"{entry.target} in {stored.file} holds NaN or infinity", hint=COPY_ANEW)
        return weight


def _tensor(stored: Stored, name: str) -> Tensor:
    from safetensors import safe_open

    try:
        with safe_open(stored.file, framework="pt") as file:
            weight = file.get_tensor(name)
        if tuple(weight.shape) != stored.shape:
            raise ValueError(f"{name} has another shape than a moment ago")
        return weight
    except Exception as error:  # the library's own, of several kinds
        raise UserError(f"{stored.file} cannot be read: {words(error)}", hint=COPY_ANEW) from None


class _OfRun(Weights):
    def __init__(self, source: Source, model: ModelSection):
        self.path, self.recovered = source.path, source.recovered
        # An export of the new run is as one of this run would be.
        self.dtype, self.others, self.stored = source.dtype, source.others, "float32"
        self.files = sorted(path for path in source.path.iterdir() if path.is_file())
        self.about = f"step {source.step} of run {source.run.name}"
        if not source.recovered:
            self.about += ", which was never trained with every layer dense"
        self._shapes = {entry.source: entry.shape for entry in model.kind.entries(model)}
        self._contents = check_model(source.path, self._shapes, source.run.recipe_path)

    def check(self) -> None:
        for name in self._shapes:
            self.read(name)

    def read(self, name: str) -> Tensor:
        weight = torch.empty(self._shapes[name], dtype=torch.float32)
        load({name: weight}, self.path, self._contents, alone=True)
        if not weight.isfinite().all():
            raise UserError(f"{name} of {self.path} holds NaN or infinity", hint="begin from an earlier checkpoint")
        return weight
