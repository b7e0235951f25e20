"""From a recipe's `[data]` section to the stream of one split."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lighthouse_core.data.documents import Source, Split, Tokenizer, checked, keeper, stable_hash, without_end
from lighthouse_core.data.files import FilesSource
from lighthouse_core.data.hub import HubSource, is_remote
from lighthouse_core.data.shards import PreparedTokens, UnfitTokens, origin
from lighthouse_core.data.sources import PythonSource
from lighthouse_core.data.stream import BytesUnit, TokenStream, WalkingStream, no_documents
from lighthouse_core.data.tokenizer import BytesTokenizer
from lighthouse_core.errors import DataError
from lighthouse_core.reading import home_expanded

if TYPE_CHECKING:
    from lighthouse_core.config.data import DataSection

Stream = TokenStream | WalkingStream


def build_source(data: "DataSection", check: Callable[[], None] = without_end) -> Source:
    """The text that `[data]` names; not for prepared tokens, nor for several sources.

    Args:
        data: the section.
        check: called again and again while files are listed; what it raises ends the listing.

    Raises:
        DataError: an unknown source, or nothing there.
    """
    if data.source == "python-sources":
        return PythonSource(data.paths, check)
    if data.source == "files":
        return FilesSource(data.paths, data.text_key, check)
    if data.source == "hf":
        return HubSource(data.paths[0], data.hf_config, data.hf_split, data.hf_revision, data.text_key)
    raise DataError(
        f'unknown data source "{data.source}"',
        hint='[data] source can be "python-sources", "files", "hf" or "tokens"',
    )


def build_stream(
    data: "DataSection",
    tokenizer: Tokenizer,
    seed: int,
    split: Split,
    check: Callable[[], None] = without_end,
    *,
    align: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> tuple[Stream, int]:
    """The stream of a split of one source, and a fingerprint of it: 63 bits of the listing, the split, the tokenizer,
    and `align`.

    The validation order does not depend on `seed`, so runs with different seeds are measured on the same tokens.

    Args:
        data: the section.
        tokenizer: its tokenizer.
        seed: of the order of training.
        split: which.
        check: that of `build_source`.
        align: `Recipe.alignment`: tokens of which every document takes a whole multiple. None for documents that are
            not kept apart, and not padded.
        sizes: the fingerprint is the one with these sizes of files, by their identities, in place of their own.

    Raises:
        DataError: as `build_source`; prepared tokens that do not fit; no documents in this split, where that is known
            without reading; samples cannot be shuffled.
    """
    assert split in ("train", "validation")
    seed = seed if split == "train" else 0
    stream: Stream
    if data.source == "tokens":
        prepared = open_tokens(data, tokenizer)
        # The listing has sizes alone; the checksums tell the content.
        units, listing = prepared.units(split, align or 1), stable_hash(prepared.fingerprint, *prepared.checksums)
        if not units:
            raise no_documents(split, data.validation)
        stream = TokenStream(units, seed, align or 1)
    else:
        source = build_source(data, check)
        listing = source.fingerprint_with(sizes or {}) if isinstance(source, FilesSource) else source.fingerprint
        if isinstance(source, PythonSource):
            # Its documents are its units, so the split is known without reading.
            keep = keeper(split, data.validation)
            documents = [document for document in source.documents if keep(document.identity)]
            if not documents:
                raise no_documents(split, data.validation)
        if isinstance(source, PythonSource) and isinstance(tokenizer, BytesTokenizer):
            stream = TokenStream([BytesUnit(one, tokenizer, align or 1) for one in documents], seed, align or 1)
        else:
            stream = WalkingStream(source, tokenizer, seed, split, data.validation, align or 1)
    if data.shuffle == "samples" and not shuffles(data, stream):
        raise DataError(
            f'data.shuffle = "samples" needs token counts, which data.source "{data.source}" with the tokenizer '
            f"{data.tokenizer} does not have beforehand",
            hint="prepare the tokens with lighthouse data prepare, or leave data.shuffle out",
        )
    kind = data.source == "tokens"
    parts = kind, listing, tokenizer.fingerprint, split, float(data.validation), shuffles(data, stream)
    return stream, stable_hash("stream", *parts, *(() if align is None else ("documents", align)))


def build_streams(
    data: "DataSection",
    tokenizer: Tokenizer,
    seed: int,
    split: Split,
    check: Callable[[], None] = without_end,
    *,
    align: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> tuple[list[Stream], int]:
    """The stream of a split of each source, and a fingerprint of them all: that of `build_stream` for one source.

    The arguments are those of `build_stream`.

    Raises:
        DataError: as `build_stream`, with the name of the source; two sources that read the same text.
    """
    if not data.sources:
        stream, fingerprint = build_stream(data, tokenizer, seed, split, check, align=align, sizes=sizes)
        return [stream], fingerprint
    if split == "train":
        check_apart(data, check)
    streams, fingerprints = [], []
    for name, part in zip(data.names, data.parts, strict=True):
        with of_source(data, name):
            stream, fingerprint = build_stream(part, tokenizer, seed, split, check, align=align, sizes=sizes)
        streams.append(stream)
        fingerprints.append(fingerprint)
    return streams, stable_hash("mixture", *data.weights, *fingerprints)


@contextmanager
def of_source(data: "DataSection", name: str) -> Iterator[None]:
    """Have a DataError say of which source of a mixture it is."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"source {name}: {error}" if data.sources else str(error), hint=error.hint) from None


def check_apart(data: "DataSection", check: Callable[[], None] = without_end) -> None:
    """Raise DataError where two sources of a mixture read the same file, data set or prepared directory, or one was
    prepared from all that another one reads; or where one cannot be listed.

    `check` is that of `build_source`.
    """
    if not data.sources:
        return
    readers: dict[object, str] = {}
    prepared = any(part.source == "tokens" for part in data.parts)
    for name, part in zip(data.names, data.parts, strict=True):
        with of_source(data, name):
            places = _places(part, prepared, check)
        for place, what in places.items():
            if other := readers.get(place):
                raise DataError(
                    f"the sources {other} and {name} both read {what}",
                    hint="name each text once, and raise its weight to see more of it: a copy of a held-out document "
                    "could be trained on",
                )
        readers |= dict.fromkeys(places, name)


def _places(data: "DataSection", prepared: bool, check: Callable[[], None]) -> dict[object, str]:
    """What a source reads, whatever its kind, and in words: files and prepared directories by their paths on this
    machine, data sets of the hub by all that names them. With `prepared`, also its listing, by which prepared tokens
    name what they are of."""
    if data.source == "tokens":
        path = home_expanded(data.paths[0])
        text_of, shards = origin(path)
        text = f"the text that {path} was prepared from"
        return {os.path.realpath(path): str(path), text_of: text, shards: f"the tokens of {path}"}
    places: dict[object, str] = {}
    if is_remote(data):
        places[data.paths[0], data.hf_config, data.hf_split] = data.paths[0]
        if not prepared:
            return places
    source = build_source(data, check)
    if prepared:
        places[source.fingerprint] = f"the text of {', '.join(data.paths)}"
    if isinstance(source, FilesSource):
        files = [file.path for file in source.files]
    elif isinstance(source, PythonSource):
        files = [os.path.join(one.folder, file.name) for one in source.documents for file in one.files]
    else:
        files = source.local_files() if isinstance(source, HubSource) else []
    for file in checked(files, check):
        places[os.path.realpath(file)] = file
    return places


def shuffles(data: "DataSection", stream: Stream) -> bool:
    """Whether samples of a stream are shuffled."""
    return data.shuffle != "documents" and isinstance(stream, TokenStream)


def open_tokens(data: "DataSection", tokenizer: Tokenizer) -> PreparedTokens:
    """The prepared directory of `source = "tokens"`.

    Raises:
        DataError: it does not fit the recipe, or is damaged.
    """
    prepared = PreparedTokens(data.paths[0], tokenizer)
    if prepared.validation is None:
        return prepared
    # With none held out by chance, they are what 0 gives.
    if data.validation != prepared.validation and (data.validation or prepared.units("validation")):
        raise UnfitTokens(
            f"{prepared.path} was prepared with data.validation = {prepared.validation}, not {data.validation}",
            hint=f"set data.validation = {prepared.validation}",
        )
    return prepared
