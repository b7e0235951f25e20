"""Whether text that is to be measured was trained on: by what the files are and hold, not by how a recipe names them.

A text is a file of Python, a file that is a document, or a row. Where one side is prepared tokens, a text is a document
and is compared by its ids. Texts are the same where all bytes, or all ids, are. A part of a text is not found in a
longer one.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from lighthouse_core.data.build import build_source, build_streams, open_tokens
from lighthouse_core.data.documents import (
    Keep,
    Place,
    Record,
    Source,
    Split,
    TimeIsUp,
    Tokenizer,
    keeper,
    timely,
    until,
    with_ends,
    without_end,
)
from lighthouse_core.data.files import FilesSource
from lighthouse_core.data.hub import is_remote, pinned
from lighthouse_core.data.shards import PreparedTokens
from lighthouse_core.data.sources import Document, PythonSource
from lighthouse_core.data.stream import Reader
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import LighthouseError

if TYPE_CHECKING:
    from lighthouse_core.config import Recipe
    from lighthouse_core.config.data import DataSection

SECONDS = 60.0
# Of the text to be measured: from so much on, it is no held-out text.
MOST_SHARED = 0.5
# Somebody else's run may name the root of a file system.
_ENDLESS = "listing the run's training text took too long"
_Node = tuple[int, int]


class Overlap(NamedTuple):
    """What of the text to be measured is in the training text of a run.

    Attributes:
        texts: how many were looked at; None where the split alone keeps both apart, or nothing could be read.
        shared: how many of these are in the training text.
        share: of the bytes, or ids, of those looked at.
        same_files: whether one of these is a file, or a row of a file, that the run was trained on, rather than a copy.
            A row that stands twice in a file, on either side of a split, is a copy.
        unknown: why more could be in it; None where all is known.
        source: name of the source that this is of, rather than of all of a mixture.
    """

    texts: int | None
    shared: int
    share: float
    same_files: bool
    unknown: str | None
    source: str = ""

    @property
    def trained_on(self) -> bool:
        """Whether this is no held-out text: some of the very files or rows, or most of the text by whatever name."""
        return self.same_files or (self.shared > 0 and self.share >= MOST_SHARED)

    def __str__(self) -> str:
        return (f"source {self.source}: " if self.source else "") + self._words()

    def _words(self) -> str:
        found = f"{self.shared} of {self.texts} texts, {self.share:.2%} of their length, are in the run's training text"
        if self.texts is None:
            found = f"{self.share:.2%} of the documents are in the run's training text"
        if self.unknown and self.shared:
            return f"{found}; whether the rest is, too, is not known: {self.unknown}"
        if self.unknown:
            return f"whether the run was trained on this text is not known: {self.unknown}"
        if self.shared:
            return found
        if self.texts is None:
            return "held out by the run's own split"
        return f"held out: none of the {self.texts} texts is in the run's training text"


def overlap(own: "Recipe", other: "Recipe", trained: str | None, *, seconds: float = SECONDS) -> Overlap:
    """Compare what a recipe holds out with what a run was trained on.

    Args:
        own: the run's recipe.
        other: whose held-out text is to be measured; its tokenizer is the run's.
        trained: fingerprint of the data that the run was trained on, of its ledger; None where that is not known.
        seconds: the most that each of three things takes: listing the run's training text, looking at the text to be
            measured, looking at the training text. What was not looked at by then is not known.

    Raises:
        DataError: the text to be measured is not there.
    """
    check = until(time.monotonic() + seconds)
    changed = _changed(own, trained, check)
    data = pinned(other).data
    found = []
    for name, theirs in zip(data.names, data.parts, strict=True):
        seen = _of_source(own.data, theirs, changed, seconds, check)
        found.append(seen._replace(source=name) if data.sources else seen)
    return _together(found, data.shares)


def _of_source(
    own: "DataSection", theirs: "DataSection", changed: str | None, seconds: float, check: Callable[[], None]
) -> Overlap:
    """What of the text of one source is in the training text of any source of a run."""
    found = []
    apart: dict[bool, list[tuple[Source | PreparedTokens, DataSection]]] = {False: [], True: []}
    tokenizer = None if is_remote(theirs) else build_tokenizer(own.tokenizer)
    measured = None if tokenizer is None else _open(theirs, tokenizer)
    for ours in own.parts:
        if is_remote(ours) or tokenizer is None or measured is None:
            if _same_dataset(ours, theirs):
                found.append(_by_split(ours, theirs, changed))
            else:
                found.append(Overlap(None, 0, 0.0, False, "data sets of the hub are not read to be compared"))
            continue
        try:
            known = _open(ours, tokenizer, check)
        except TimeIsUp:
            found.append(Overlap(None, 0, 0.0, False, changed or _ENDLESS))
            continue
        except LighthouseError as error:
            found.append(Overlap(None, 0, 0.0, False, f"the run's training text is not there: {error}"))
            continue
        if _same_listing(known, measured):
            if isinstance(known, PreparedTokens) and known.validation is None:
                # Whatever the recipes hold out: the files were split already.
                theirs = theirs.model_copy(update={"validation": ours.validation})
            found.append(_by_split(ours, theirs, changed))
        else:
            apart[PreparedTokens in (type(known), type(measured))].append((known, ours))
    for ids, sides in apart.items():
        if sides and measured is not None:
            found.append(_Look(tokenizer if ids else None, seconds).compare(sides, measured, theirs, changed))
    worst = max(found, key=lambda seen: (seen.trained_on, seen.share, seen.texts is not None))
    return worst._replace(unknown=next((seen.unknown for seen in found if seen.unknown), None))


def _together(found: Sequence[Overlap], shares: Sequence[float]) -> Overlap:
    """Of all sources of a mixture: the one that is no held-out text, else what is in the training text of any."""
    if len(found) == 1 or any(seen.trained_on for seen in found):
        return max(found, key=lambda seen: seen.trained_on)
    counts = [seen.texts for seen in found if seen.texts is not None]
    unknown = next((f"source {seen.source}: {seen.unknown}" for seen in found if seen.unknown), None)
    return Overlap(
        sum(counts) if counts else None,
        sum(seen.shared for seen in found),
        sum(share * seen.share for share, seen in zip(shares, found, strict=True)),
        False,
        unknown,
    )


def own_split(own: "Recipe", trained: str | None, *, seconds: float = SECONDS) -> Overlap:
    """What is known of the text that a run holds out itself; listing its files takes at most so many seconds."""
    return Overlap(None, 0, 0.0, False, _changed(own, trained, until(time.monotonic() + seconds)))


def _changed(own: "Recipe", trained: str | None, check: Callable[[], None]) -> str | None:
    """Why the data that the run's recipe names may not be what it was trained on; None where it is."""
    if trained is None:
        return "the run's ledger does not say which data it was trained on"
    if not own.data.sources and is_remote(own.data):
        # Its name has the commit.
        return None
    if any(map(is_remote, own.data.parts)):
        return "the run's data has a data set of the hub, and the rest of it is not compared with what it was"
    try:
        tokenizer = build_tokenizer(own.data.tokenizer)
        _, found = build_streams(own.data, tokenizer, own.training.seed, "train", check, align=own.alignment)
    except TimeIsUp:
        return _ENDLESS
    except LighthouseError as error:
        return f"the run's training text is not there: {error}"
    if f"{found:016x}" != trained:
        return "the data that the run's recipe names is not what it was trained on: files or sizes differ"
    return None


def _by_split(ours: "DataSection", theirs: "DataSection", changed: str | None) -> Overlap:
    """Of the same documents: those that one split holds out and the other does not."""
    if theirs.validation <= ours.validation:
        return Overlap(None, 0, 0.0, False, changed)
    return Overlap(None, 1, 1 - ours.validation / theirs.validation, True, changed)


def _same_dataset(ours: "DataSection", theirs: "DataSection") -> bool:
    return all(
        getattr(ours, key) == getattr(theirs, key)
        for key in ("source", "paths", "text_key", "hf_config", "hf_split", "hf_revision")
    )


def _open(
    data: "DataSection", tokenizer: Tokenizer, check: Callable[[], None] = without_end
) -> Source | PreparedTokens:
    return open_tokens(data, tokenizer) if data.source == "tokens" else build_source(data, check)


def _same_listing(one: Source | PreparedTokens, other: Source | PreparedTokens) -> bool:
    """Whether both are the same files, and call every document the same, so that a split of one is one of the other."""
    if isinstance(one, PreparedTokens) and isinstance(other, PreparedTokens):
        return os.path.samefile(one.path, other.path)
    if isinstance(one, PythonSource) and isinstance(other, PythonSource):
        folders = ([document.folder for document in source.documents] for source in (one, other))
        return one.documents == other.documents and next(folders) == next(folders)
    if isinstance(one, FilesSource) and isinstance(other, FilesSource):
        paths = ([file.path for file in source.files] for source in (one, other))
        return one.fingerprint == other.fingerprint and next(paths) == next(paths)
    return False


class _Text(NamedTuple):
    """A text: its size and digest, the latter worked out only where it is asked for, the file that it lies in, and
    which row of it; 0 where the file is one text."""

    size: int
    digest: Callable[[], bytes]
    node: _Node | None
    row: int = 0


class _Look:
    """One comparison.

    Args:
        tokenizer: of ids; None where texts are compared.
        seconds: for each of the two sides.
    """

    def __init__(self, tokenizer: Tokenizer | None, seconds: float):
        self.tokenizer = tokenizer
        self.seconds = seconds
        self.deadline = 0.0

    def compare(
        self,
        known: "Sequence[tuple[Source | PreparedTokens, DataSection]]",
        measured: Source | PreparedTokens,
        theirs: "DataSection",
        unknown: str | None,
    ) -> Overlap:
        # How many texts of a digest are measured; 0 once they are found. And their sizes, and their rows by file.
        wanted: dict[bytes, int] = {}
        sizes: set[int] = set()
        rows: dict[_Node, set[int]] = {}
        texts = size = shared = bytes_shared = 0
        same_files = False
        self.deadline = time.monotonic() + self.seconds
        try:
            for text in self._texts(measured, "validation", theirs.validation, set()):
                digest = text.digest()
                wanted[digest] = wanted.get(digest, 0) + 1
                sizes.add(text.size)
                if text.node:
                    rows.setdefault(text.node, set()).add(text.row)
                texts, size = texts + 1, size + text.size
        except TimeIsUp:
            unknown = unknown or "it is too much text to compare"
        except LighthouseError as error:
            unknown = unknown or str(error)
        # What has been seen is looked for in any case.
        self.deadline = time.monotonic() + self.seconds
        try:
            trained = (self._texts(one, "train", ours.validation, set(rows)) for one, ours in known)
            for text in chain.from_iterable(trained):
                # Of another size, it need not be read.
                if text.size not in sizes or (count := wanted.get(text.digest())) is None:
                    continue
                same_files |= text.node is not None and text.row in rows.get(text.node, ())
                wanted[text.digest()] = 0
                shared, bytes_shared = shared + count, bytes_shared + count * text.size
        except TimeIsUp:
            unknown = unknown or "the training text is too much to compare"
        except LighthouseError as error:
            unknown = unknown or str(error)
        return Overlap(texts, shared, bytes_shared / size if size else 0.0, same_files, unknown)

    def _texts(
        self, source: Source | PreparedTokens, split: Split, validation: float, first: set[_Node]
    ) -> Iterator[_Text]:
        """The texts of a split; those in the files `first` come first."""
        if isinstance(source, PreparedTokens):
            yield from self._prepared(source, split)
            return
        keep = timely(keeper(split, validation), self.deadline)
        if isinstance(source, PythonSource) and self.tokenizer is None:
            yield from self._python(source, keep)
            return
        paths = [file.path for file in source.files] if isinstance(source, FilesSource) else [None] * len(source.sizes)
        nodes = list(map(_node, paths))
        for unit in sorted(range(len(nodes)), key=lambda unit: nodes[unit] not in first):
            if isinstance(source, FilesSource) and self.tokenizer is None and source.files[unit].is_document:
                if keep(source.identities[unit]):
                    file = source.files[unit]
                    yield _Text(file.size - file.skip, _once(partial(self._whole, source, unit, keep)), nodes[unit])
            else:
                yield from self._rows(source, unit, keep, nodes[unit])

    def _python(self, source: PythonSource, keep: Keep) -> Iterator[_Text]:
        for document in source.documents:
            if not keep(document.identity):
                continue
            start = 0
            for file in document.files:
                digest = _once(partial(_digest_of_bytes, document, start, file.size))
                yield _Text(file.size, digest, _node(os.path.join(document.folder, file.name)))
                start += file.size

    def _whole(self, source: FilesSource, unit: int, keep: Keep) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for record in source.records(unit, Place(), keep):
            digest.update(self._content(record))
        return digest.digest()

    def _rows(self, source: Source, unit: int, keep: Keep, node: _Node | None) -> Iterator[_Text]:
        digest, size = hashlib.blake2b(digest_size=16), 0
        for record in source.records(unit, Place(), keep):
            if record.first:
                digest, size = hashlib.blake2b(digest_size=16), 0
            content = self._content(record)
            digest.update(content)
            size += len(content)
            if record.last:
                yield _Text(size, digest.digest, node, record.start.row)

    def _content(self, record: Record) -> bytes:
        if self.tokenizer is not None:
            return with_ends(self.tokenizer, record.content, first=record.first, last=record.last).tobytes()
        return record.content.encode() if isinstance(record.content, str) else record.content

    def _prepared(self, prepared: PreparedTokens, split: Split) -> Iterator[_Text]:
        for unit in prepared.units(split):
            read, offset = unit.open(), 0
            for length in map(int, unit.document_lengths()):
                if time.monotonic() > self.deadline:
                    raise TimeIsUp
                digest = _once(partial(_digest_of_ids, read, offset, length))
                # The splits of one folder are apart, and of another folder it is a copy.
                yield _Text(4 * length, digest, None)
                offset += length


def _digest_of_bytes(document: Document, start: int, size: int) -> bytes:
    return _digest(document.read(start, size))


def _digest_of_ids(read: Reader, start: int, count: int) -> bytes:
    return _digest(read(start, count)[0].astype("i4").tobytes())


def _once(work: Callable[[], bytes]) -> Callable[[], bytes]:
    """`work`, done at the first call alone."""
    done: list[bytes] = []

    def result() -> bytes:
        if not done:
            done.append(work())
        return done[0]

    return result


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _node(path: str | None) -> _Node | None:
    """What a file is, by whatever path; None for none."""
    try:
        state = os.stat(path) if path is not None else None
    except OSError:
        return None
    return state and (state.st_dev, state.st_ino)
