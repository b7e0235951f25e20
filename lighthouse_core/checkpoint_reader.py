"""A checkpoint's tensors and values for torch's distributed loading, without torch's unpickling.

torch's own reader opens `.metadata` with `pickle`, and its planner what is no tensor with `torch.load` and
`weights_only=False`: both run what a pickle asks for. Here both are read as data.
"""

import io
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as titles
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from lighthouse_core.checkpoint import DAMAGED_HINT, Contents, StoredTensor, quoted, read_contents, refused_checkpoint
from lighthouse_core.errors import CheckpointError
from lighthouse_core.unpickle import Refused, load_plain


def load(state: dict[str, Any], folder: Path, contents: Contents | None = None, *, alone: bool = False) -> None:
    """Load a checkpoint into `state`, in place.

    Args:
        state: nested dictionaries of what is wanted, and of what they hold now.
        folder: of the checkpoint.
        contents: of it, where they have been read.
        alone: whether this process loads without others.

    Raises:
        CheckpointError: something wanted is missing, of another kind, or cannot be read.
    """
    reader = Reader(folder, contents)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is wanted
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # what it holds is refused or read
            dcp.load(state, storage_reader=reader, planner=Planner(folder), no_dist=alone)
    except CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        for cause in causes:
            # torch wraps everything, also what a signal raises.
            if isinstance(cause, CheckpointError | SystemExit | KeyboardInterrupt):
                raise cause from None
        reason = (str(causes[0]).strip() or type(causes[0]).__name__).splitlines()[-1]
        raise CheckpointError(f"{folder} cannot be read: {reason}", hint=DAMAGED_HINT) from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise CheckpointError(f"{folder} cannot be read: {reason}", hint=DAMAGED_HINT) from error


class Reader(FileSystemReader):
    """torch's reader of one checkpoint, whose metadata is read as data; goes with `Planner`.

    Tensors are torch's part: `torch.load` with `weights_only=True`.

    Args:
        folder: of the checkpoint.
        contents: of it, where they have been read.

    Raises:
        CheckpointError: as `read_contents` does.
    """

    def __init__(self, folder: Path, contents: Contents | None = None):
        super().__init__(folder)
        self.folder = folder
        self.contents = contents or read_contents(folder)

    def read_metadata(self, *args: Any, **named: Any) -> titles.Metadata:
        # With arguments torch asks for the metadata of one process: what lies there belongs to no checkpoint of ours.
        return _for_torch(self.contents)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        # One by one, so that an error has a name.
        for item in plan.items:
            try:
                super().read_data(replace(plan, items=[item]), planner).wait()
            except (CheckpointError, OSError):
                raise
            except Exception as error:  # of any kind, for bytes that are no tensor
                # torch's own words advise to run it.
                name = quoted(item.storage_index.fqn)
                raise CheckpointError(
                    f"{self.folder} cannot be read: {name} is no tensor of its size",
                    hint=DAMAGED_HINT,
                ) from error
        done: Future[None] = Future()
        done.set_result(None)
        return done


class Planner(DefaultLoadPlanner):
    """torch's plan of a load, but what is no tensor must be plain, and of the kind of what it takes the place of."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            loaded, there = load_plain(value.getvalue()), self.state_dict[name]
            if not _takes_its_place(loaded, there):
                raise Refused(f"it is a {type(loaded).__name__}, where a {type(there).__name__} belongs")
        except Refused as refused:
            raise refused_checkpoint(self.folder, quoted(name), refused) from None
        set_element(self.original_state_dict, self.mappings[name], loaded)


def _takes_its_place(loaded: Any, there: Any) -> bool:
    if there is None:
        return True
    if isinstance(there, bool):
        # A switch of torch's optimizers that has not been decided.
        return loaded is None or isinstance(loaded, bool)
    if isinstance(there, float):
        return isinstance(loaded, int | float) and not isinstance(loaded, bool)
    if isinstance(there, list | tuple):
        same = type(loaded) is type(there) and len(loaded) == len(there)
        return same and all(map(_takes_its_place, loaded, there))
    return type(loaded) is type(there)


def _for_torch(contents: Contents) -> titles.Metadata:
    stored: dict[str, Any] = {name: titles.BytesStorageMetadata() for name in contents.values}
    stored.update((name, _title(tensor)) for name, tensor in contents.tensors.items())
    places = {
        titles.MetadataIndex(name, offsets): _StorageInfo(place.file, place.offset, place.length)
        for (name, offsets), place in contents.places.items()
    }
    return titles.Metadata(stored, planner_data=contents.paths or None, storage_data=places)


def _title(tensor: StoredTensor) -> titles.TensorStorageMetadata:
    chunks = [titles.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in tensor.chunks]
    properties = titles.TensorProperties(dtype=getattr(torch, tensor.dtype))
    return titles.TensorStorageMetadata(properties, torch.Size(tensor.size), chunks)
