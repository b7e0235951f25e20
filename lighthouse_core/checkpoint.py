"""What a checkpoint holds, read from its metadata alone."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lighthouse_core.errors import CheckpointError

_MODEL_KEY = re.compile(r"(tok_embeddings|layers|norm|output)\.")


def check_model(path: Path, shapes: Mapping[str, tuple[int, ...]], recipe_path: Path) -> None:
    """Raise CheckpointError unless the checkpoint holds exactly these model tensors.

    Args:
        path: the checkpoint's directory.
        shapes: of every tensor of the model, by its name in the checkpoint.
        recipe_path: the recipe that the shapes come from, for the hint.
    """
    try:
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error

    def fail(reason: str) -> None:
        raise CheckpointError(
            f"{path} is a checkpoint of another model: {reason}", hint=f"compare [model] in {recipe_path}"
        )

    for name, shape in shapes.items():
        metadata = stored.get(name)
        if not isinstance(metadata, TensorStorageMetadata):
            fail(f"{name} is missing")
        elif tuple(metadata.size) != shape:
            fail(f"{name} has shape {list(metadata.size)}, the recipe says {list(shape)}")
    extra = {key for key in stored if _MODEL_KEY.match(key)} - shapes.keys()
    if extra:
        fail(f"{min(extra)} is not in the recipe's model")
