"""From a recipe's `[data]` section to the stream of one split."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from lighthouse_core.data.documents import Source, Split, Tokenizer, keeper, stable_hash, without_end
from lighthouse_core.data.files import FilesSource
from lighthouse_core.data.hub import HubSource
from lighthouse_core.data.shards import PreparedTokens
from lighthouse_core.data.sources import PythonSource
from lighthouse_core.data.stream import BytesUnit, TokenStream, WalkingStream, no_documents
from lighthouse_core.data.tokenizer import BytesTokenizer
from lighthouse_core.errors import DataError

if TYPE_CHECKING:
    from lighthouse_core.config.data import DataSection

Stream = TokenStream | WalkingStream


def build_source(data: "DataSection", check: Callable[[], None] = without_end) -> Source:
    """The text that `[data]` names; not for prepared tokens.

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
    data: "DataSection", tokenizer: Tokenizer, seed: int, split: Split, check: Callable[[], None] = without_end
) -> tuple[Stream, int]:
    """The stream of a split, and a fingerprint of it: 63 bits of the listing, the split and the tokenizer.

    The validation order does not depend on `seed`, so runs with different seeds are measured on the same tokens.
    `check` is that of `build_source`.

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
        units, listing = prepared.units(split), stable_hash(prepared.fingerprint, *prepared.checksums)
        if not units:
            raise no_documents(split, data.validation)
        stream = TokenStream(units, seed)
    else:
        source = build_source(data, check)
        listing = source.fingerprint
        if isinstance(source, PythonSource):
            # Its documents are its units, so the split is known without reading.
            keep = keeper(split, data.validation)
            documents = [document for document in source.documents if keep(document.identity)]
            if not documents:
                raise no_documents(split, data.validation)
        if isinstance(source, PythonSource) and isinstance(tokenizer, BytesTokenizer):
            stream = TokenStream([BytesUnit(document, tokenizer) for document in documents], seed)
        else:
            stream = WalkingStream(source, tokenizer, seed, split, data.validation)
    if data.shuffle == "samples" and not shuffles(data, stream):
        raise DataError(
            f'data.shuffle = "samples" needs token counts, which data.source "{data.source}" with the tokenizer '
            f"{data.tokenizer} does not have beforehand",
            hint="prepare the tokens with lighthouse data prepare, or leave data.shuffle out",
        )
    kind = data.source == "tokens"
    parts = kind, listing, tokenizer.fingerprint, split, float(data.validation), shuffles(data, stream)
    return stream, stable_hash("stream", *parts)


def shuffles(data: "DataSection", stream: Stream) -> bool:
    """Whether samples of a stream are shuffled."""
    return data.shuffle != "documents" and isinstance(stream, TokenStream)


def open_tokens(data: "DataSection", tokenizer: Tokenizer) -> PreparedTokens:
    """The prepared directory of `source = "tokens"`.

    Raises:
        DataError: it does not fit the recipe, or is damaged.
    """
    prepared = PreparedTokens(data.paths[0], tokenizer)
    # With none held out by chance, they are what 0 gives.
    if data.validation != prepared.validation and (data.validation or prepared.units("validation")):
        raise DataError(
            f"{prepared.path} was prepared with data.validation = {prepared.validation}, not {data.validation}",
            hint=f"set data.validation = {prepared.validation}",
        )
    return prepared
