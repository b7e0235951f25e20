"""The source "hf": a data set of the Hugging Face hub, or one on this machine, through the `datasets` library."""

import os
import re
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lighthouse_core.data.documents import Keep, Place, Record, stable_hash
from lighthouse_core.data.forms import SUFFIXES
from lighthouse_core.data.rows import checked_text
from lighthouse_core.errors import DataError, LighthouseError

if TYPE_CHECKING:
    from lighthouse_core.config import Recipe
    from lighthouse_core.config.data import Origin


class HubSource:
    """A streamed data set. Its units are the data set's own shards (usually files), its records their examples.

    A hub name is pinned to the commit that its revision names now; a run keeps that commit as its revision (see
    `pinned`), so that every process and resumption reads the same. Seeking skips examples of one shard; the library
    reads past them, unless the data set was written by save_to_disk.

    Args:
        path: name on the hub, or a directory: of data files, or of save_to_disk.
        config, split, revision: of the data set; "" is its default.
        text_key: the column with the text.

    Attributes:
        nulls: as of `FilesSource`.
    """

    def __init__(self, path: str, config: str, split: str, revision: str, text_key: str):
        self.path = _placed(path)
        self.name = os.path.basename(os.path.realpath(self.path)) if os.path.exists(self.path) else path
        self.config, self.split, self.text_key = config, split, text_key
        self.revision, content = _pin(self.path, config, revision)
        self._dataset: Any = None
        self.nulls = 0
        columns = self._open().column_names
        if columns is not None and text_key not in columns:
            raise DataError(
                f'data set {path} has no column "{text_key}" (data.text_key); there are: {", ".join(sorted(columns))}',
                hint="set data.text_key to the column with the text",
            )
        count = self._open().num_shards
        self.identities = [f"{self.name}/{split}/{unit}" for unit in range(count)]
        self.sizes = [0] * count
        self.fingerprint = stable_hash("hf", self.name, config, split, count, text_key, content)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dataset": None}

    def records(self, unit: int, place: Place, keep: Keep, end: int | None = None) -> Iterator[Record]:
        examples = self._open().shard(num_shards=len(self.identities), index=unit)
        row = place.row
        iterator = iter(examples.skip(row) if row else examples)
        while True:
            where = f"data set {self.path}, shard {unit}, example {row + 1}"
            try:
                example = next(iterator, None)
            except Exception as error:
                raise LighthouseError(f"{where} cannot be read: {_first_line(error)}") from error
            if example is None:
                return
            identity = f"{self.identities[unit]}:{row}"
            if keep(identity):
                text = checked_text(example, self.text_key, partial(str, where))
                if text is None:
                    self.nulls += 1
                else:
                    yield Record(identity, text, Place(row), Place(row + 1))
            row += 1

    def cuts(self, unit: int, size: int) -> list[tuple[Place, int]]:
        return [(Place(), 0)]

    def local_files(self) -> list[str]:
        """The files on this machine that its split is read from; none of a data set of the hub."""
        if not os.path.isdir(self.path):
            return []
        if _is_saved(self.path):
            return [one["filename"] for one in _saved(self.path, self.config, self.split).cache_files]
        listed = _builder(self.path, self.config, self.revision).config.data_files or {}
        return [str(file) for split, files in listed.items() if str(split) == self.split for file in files]

    def _open(self) -> Any:
        if self._dataset is None:
            self._dataset = _load(self.path, self.config, self.split, self.revision)
        return self._dataset


def pinned(recipe: "Recipe") -> "Recipe":
    """The recipe with the commits that its data sets of the hub have now as their revisions.

    Raises:
        DataError: there is no such data set or revision, or the hub cannot be asked.
    """
    data = recipe.data
    if data.sources:
        data = data.model_copy(update={"sources": tuple(map(_pinned, data.sources))})
    return recipe.model_copy(update={"data": _pinned(data)})


_Origin = TypeVar("_Origin", bound="Origin")


def _pinned(data: _Origin) -> _Origin:
    if not is_remote(data):
        return data
    revision, _ = _pin(_placed(data.paths[0]), data.hf_config, data.hf_revision)
    return data.model_copy(update={"hf_revision": revision})


def is_remote(data: "Origin") -> bool:
    """Whether one source is a data set of the hub, which is not on this machine as files that can be told."""
    return data.source == "hf" and not os.path.exists(_placed(data.paths[0]))


def _placed(path: str) -> str:
    """A name of the hub as it is; what is there on this machine, in full.

    The library takes the names of its own formats ("text", "json") for these, also where a directory of that name lies,
    and then reads what it finds in the working directory.

    Raises:
        DataError: the name of a format, and no directory.
    """
    path = os.path.expanduser(path)
    if os.path.exists(path):
        return os.path.abspath(path)
    if path in _formats():
        raise DataError(
            f'data.paths: "{path}" is a format of the datasets library and no data set',
            hint='name a directory, or a data set of the hub as "owner/name"',
        )
    return path


def _formats() -> frozenset[str]:
    _datasets()
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return frozenset(_PACKAGED_DATASETS_MODULES)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError('data.source "hf" needs the datasets library', hint="pip install datasets") from None
    return datasets


def _pin(path: str, config: str, revision: str) -> tuple[str, str]:
    """(revision to load, what identifies the content)."""
    _datasets()
    if os.path.isdir(path):
        if revision:
            raise DataError(
                "data.hf_revision is for a data set of the hub, not for a directory", hint="leave data.hf_revision out"
            )
        listing = []
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(name for name in names if not name.startswith(".")):
                file = os.path.join(folder, name)
                listing.append((os.path.relpath(file, path), os.path.getsize(file)))
        return "", str(stable_hash(*listing))
    if os.path.exists(path):
        raise DataError(f"data.paths: {path} is not a directory", hint=_single_file(path))
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision, revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        commit = HfApi().dataset_info(path, revision=revision or None).sha
    except OfflineModeIsEnabled:
        commit = _builder(path, config, revision).hash
    except Exception as error:
        raise DataError(
            f"cannot find the data set {path}: {_first_line(error)}",
            hint="data.paths has a local directory, or a name of the Hugging Face hub (this needs the network; with "
            "HF_HUB_OFFLINE=1, the data set in the cache of `datasets`)",
        ) from None
    assert commit is not None
    return commit, commit


def _single_file(path: str) -> str:
    """What reads a file that is no directory of files."""
    if path.endswith(SUFFIXES):
        return 'data.source = "files" reads it'
    return f"a folder of files of one kind is read: data.paths = [{os.path.dirname(path)!r}]"


def _load(path: str, config: str, split: str, revision: str) -> Any:
    if _is_saved(path):
        data = _saved(path, config, split)
        # In as many shards as it has files; a shard holds a row at least.
        return data.to_iterable_dataset(num_shards=max(1, min(len(data.cache_files), len(data))))
    builder = _builder(path, config, revision)
    try:
        return builder.as_streaming_dataset(split=split)
    except Exception as error:
        raise _cannot_load(path, error) from error


def _is_saved(path: str) -> bool:
    """Whether save_to_disk wrote it."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))


def _saved(path: str, config: str, split: str) -> Any:
    """A split of what save_to_disk wrote."""
    try:
        data = _datasets().load_from_disk(path)
    except Exception as error:
        raise _cannot_load(path, error) from error
    if isinstance(data, dict):
        if split not in data:
            raise DataError(
                f'data set {path} has no split "{split}" (data.hf_split); there are: {", ".join(data)}',
                hint="set data.hf_split to one of these",
            )
        data = data[split]
    elif split not in ("train", str(data.split)):
        raise DataError(
            f'data set {path} has no split "{split}" (data.hf_split): it is one split', hint="leave data.hf_split out"
        )
    if config not in ("", data.info.config_name):
        raise DataError(
            f'data set {path} has no configuration "{config}" (data.hf_config)',
            hint="leave data.hf_config out, or name the one that it has",
        )
    return data


def _builder(path: str, config: str, revision: str) -> Any:
    """What reads the data set at a revision. Without the hub it reads the cache, which holds one version or another."""
    try:
        builder = _datasets().load_dataset_builder(path, config or None, revision=revision or None)
    except Exception as error:
        raise _cannot_load(path, error) from error
    if revision and builder.hash != revision:
        raise DataError(
            f"the hub cannot be asked for revision {revision} of the data set {path}, and the cache of `datasets` has "
            f"{builder.hash}",
            hint="ask with the network, or set data.hf_revision to the one in the cache",
        )
    return builder


def _cannot_load(path: str, error: Exception) -> DataError:
    return DataError(
        f"cannot load the data set {path}: {_first_line(error)}",
        hint="see data.hf_config, data.hf_split and data.hf_revision",
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")
