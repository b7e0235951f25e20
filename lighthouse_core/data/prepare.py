"""Tokenizing a source once, in parallel, into a directory of shards.

The work is cut into pieces that depend on the source alone. Each piece becomes one shard a split and then a small
record of itself; work that has its record is done, whatever happens to the process and however many workers go on with
it. The index is written last.
"""

import fcntl
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lighthouse_core.config.data import DataSection
from lighthouse_core.data.build import build_source, open_tokens
from lighthouse_core.data.checks import checked_tokenizer
from lighthouse_core.data.documents import Place, Source, Split, Tokenizer, held_out, with_ends
from lighthouse_core.data.imported import AsIds, Format, TokenFiles
from lighthouse_core.data.shards import INDEX, ShardWriter, UnfitTokens, write_index, writing
from lighthouse_core.data.stream import NoDocuments, no_documents
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError, LighthouseError, refusal
from lighthouse_core.files import check_output, refuse_links, remove_empty, replaced_by, write_atomically
from lighthouse_core.reading import is_count, plain_name, read_json

if TYPE_CHECKING:
    from lighthouse_core.config import Recipe

_PLAN = "plan.json"
_FORMAT = "lighthouse plan"
# In a plan: the call ended with an error in its data or settings, so that one with others may begin anew.
_FAILED = "failed"
# Every name that this program gives before it is finished: in OUT, and in OUT/progress.
_SHARD = re.compile(r"(?:train|validation)-\d{5,}\.tokens")
_RECORD = re.compile(r"(?:plan|\d{5,})\.json")
# What a file was called while an earlier release wrote it: its name, the process, and this.
_EARLIER = re.compile(r"(.+)\.\d+\.partial", re.DOTALL)
_SPLITS: tuple[Split, ...] = ("train", "validation")
# A shard is made from about this many bytes of text, or from a 64th of less: enough pieces to share and to time.
_LARGEST, _SMALLEST, _PIECES = 64 << 20, 1 << 20, 64
_REPORT_SECONDS = 1.0
# What asks a process to end.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Progress(NamedTuple):
    """How far it is. `left` is in seconds, None until it can be told."""

    done: float
    tokens: int
    documents: int
    left: float | None


class Piece(NamedTuple):
    """Records of one unit from a place up to a row (None: its end), of about `size` bytes."""

    unit: int
    row: int
    byte: int
    end: int | None
    size: int


class Prepared(NamedTuple):
    """What is in a prepared directory, by split; `nulls` rows of the source had no text."""

    documents: dict[Split, int]
    tokens: dict[Split, int]
    nulls: int = 0


def prepare(
    recipe: "Recipe",
    out: Path,
    workers: int,
    progress: Callable[[Progress], None],
    say: Callable[[str], None] | None = None,
) -> Prepared:
    """Tokenize the source of a recipe into the directory `out`; the same call again finishes what was interrupted.

    Args:
        recipe: its [data] names the source, the tokenizer and the share held out.
        out: a directory that is missing, empty, or holds this very work.
        workers: processes.
        progress: called every second; what is done counts pieces, tokens and documents go on within one.
        say: called with a line every few seconds while a finished `out` is verified.

    Raises:
        DataError: the data cannot be read; `out` holds something else, or is in use.
    """
    data = recipe.data
    if data.sources:
        raise DataError(
            "a mixture is not prepared as a whole",
            hint='prepare each source by a recipe of its own, then mix the directories: source = "tokens" in each '
            "[[data.sources]]",
        )
    if data.source == "tokens":
        raise DataError(
            'data.source "tokens" is prepared already',
            hint="give the recipe of the text that the tokens are to be made of",
        )
    return prepare_source(build_source(data), data, checked_tokenizer(recipe), out, workers, progress, say)


def prepare_source(
    source: Source,
    data: DataSection,
    tokenizer: Tokenizer,
    out: Path,
    workers: int,
    progress: Callable[[Progress], None],
    say: Callable[[str], None] | None = None,
) -> Prepared:
    """As `prepare`, of a source that is there.

    Args:
        source: what to read; `TokenFiles` has ids, which are kept as they are.
        data: its tokenizer, by name, and the share held out.
        tokenizer: the same.
        out, workers, progress, say: of `prepare`.
    """
    validation = None if isinstance(source, TokenFiles) and source.split_by_names else data.validation
    work = {
        "listing": source.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "validation": validation,
        "units": len(source.identities),
    }
    check_output(out)
    with _hold(out):
        refuse_links(out, "progress")
        if (out / INDEX).is_file():
            _check_same(out, data, source, tokenizer, say, validation)
        else:
            state = out / "progress"
            _check_ours(out)
            with writing(out):
                _remove_partials(out)
                _remove_failed(out, work)
                state.mkdir(exist_ok=True)
            tasks = _plan(state / _PLAN, work, source)
            try:
                _run(tasks, source, data.tokenizer, data.validation, out, workers, progress)
                index: dict[str, Any] = {
                    "fingerprint": source.fingerprint,
                    "tokenizer": tokenizer.fingerprint,
                    "vocab_size": tokenizer.vocab_size,
                    "validation": validation,
                    "nulls": sum(_nulls(_read_record(out, number)) for number in range(len(tasks))),
                    "splits": _merge(source, state, len(tasks)),
                }
                if not index["splits"]["train"]["units"]:
                    raise no_documents("train", data.validation)
            except DataError:
                with writing(out):
                    _note_failure(state / _PLAN)
                raise
            write_index(out, index)
        with writing(out):
            _remove_progress(out)
    index = read_json(out / INDEX)
    splits = index["splits"]
    return Prepared(
        {split: sum(one[2] for one in splits[split]["shards"]) for split in _SPLITS},
        {split: sum(one[1] for one in splits[split]["shards"]) for split in _SPLITS},
        _nulls(index),
    )


def import_tokens(
    path: str,
    out: Path,
    tokenizer: str,
    *,
    format: Format | None,
    validation: float | None,
    workers: int,
    progress: Callable[[Progress], None],
    say: Callable[[str], None] | None = None,
) -> Prepared:
    """Write token files as a prepared directory; the same call again finishes what was interrupted.

    Args:
        path: a file, or a folder, of which all files of these kinds are taken.
        out: as of `prepare`, and workers and progress.
        tokenizer: as [data] tokenizer names it: the one that the files were made with.
        format: of the files; None where names and contents tell it.
        validation: share of documents held out by chance. None: the files that their names say are of
            validation, or 0.05 where none is.
        say: as of `prepare`; called first with the formats, the widths, the number of tokens and the splits by names.

    Raises:
        DataError: as of `TokenFiles` and `prepare`.
    """
    made = build_tokenizer(tokenizer)
    source = TokenFiles(path, made, format, by_names=validation is None)
    if say is not None:
        say(str(source))
    # Not validated as a recipe's: what is wrong with a path is said where it is used.
    share = DataSection.model_fields["validation"].default if validation is None else validation
    data = DataSection.model_construct(paths=(str(out),), tokenizer=tokenizer, validation=share)
    try:
        return prepare_source(source, data, made, out, workers, progress, say)
    except NoDocuments as error:
        raise NoDocuments(
            str(error),
            hint="--validation 0 holds nothing out; where the files have many documents, check --tokenizer: its EOS "
            "ends each of them",
        ) from None


@contextmanager
def _hold(out: Path) -> Iterator[None]:
    made = [path for path in (out / "progress", out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        directory = os.open(out, os.O_RDONLY)
    except OSError as error:
        remove_empty(made)
        raise refusal(error, f"cannot write {out}", "choose another OUT", DataError) from None
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out} is being prepared by another process", hint="wait until it ends") from None
        yield
    finally:
        os.close(directory)
        # What was made and has stayed empty, as on a full disk.
        remove_empty(made)


def _check_same(
    out: Path,
    data: DataSection,
    source: Source,
    tokenizer: Tokenizer,
    say: Callable[[str], None] | None,
    validation: float | None,
) -> None:
    """A finished directory is left as it is if it is what was asked for, and whole.

    Raises:
        DataError: it is damaged, or made of other data; files of other content and the same size are not told apart.
    """
    hint = "choose another OUT, or remove it"
    try:
        finished = open_tokens(data.model_copy(update={"source": "tokens", "paths": (str(out),)}), tokenizer)
    except UnfitTokens as error:
        raise DataError(str(error), hint=hint) from None
    if finished.fingerprint != source.fingerprint or (finished.validation is None) != (validation is None):
        raise DataError(f"{out} was prepared from other data", hint=hint)
    finished.verify(say)


def _check_ours(out: Path) -> None:
    """Raise DataError unless `out` is empty, or holds a plan of this program and nothing but what comes of one."""
    names = sorted(path.name for path in out.iterdir())
    state = out / "progress"
    if not names or (names == ["progress"] and not _read_plan(state) and all(map(_is_partial, _names(state)))):
        return
    if not _read_plan(state):
        odd = os.path.lexists(state / _PLAN)
        what = f"{state / _PLAN} is no plan that can be read" if odd else f"it holds {names[0]}"
        raise DataError(f"{out} is not empty: {what}", hint="choose a new directory for OUT")
    foreign = [out / name for name in names if name != "progress" and not _is_ours(name)]
    foreign += [state / name for name in _names(state) if not _is_ours(name)]
    if foreign:
        raise DataError(f"{foreign[0]} is not of lighthouse data prepare", hint="move it, or choose another OUT")


def _names(state: Path) -> list[str]:
    return sorted(path.name for path in state.iterdir()) if state.is_dir() else []


def _is_ours(name: str) -> bool:
    return bool(_SHARD.fullmatch(name) or _RECORD.fullmatch(name) or _is_partial(name))


def _is_partial(name: str) -> bool:
    """Whether a name is of a file that an earlier call was writing when it was killed."""
    earlier = _EARLIER.fullmatch(name)
    whole = earlier[1] if earlier else replaced_by(name)
    return whole is not None and bool(whole == INDEX or _SHARD.fullmatch(whole) or _RECORD.fullmatch(whole))


def _remove_partials(out: Path) -> None:
    for folder in (out, out / "progress"):
        for name in filter(_is_partial, _names(folder)):
            (folder / name).unlink()


def _note_failure(path: Path) -> None:
    if plan := _read_plan(path.parent):
        write_atomically(path, json.dumps(plan | {_FAILED: True}))


def _remove_failed(out: Path, work: dict[str, Any]) -> None:
    """What a call left behind that ended with an error, unless this is the same work. The corrected call could make no
    use of it, and begins anew."""
    plan = _read_plan(out / "progress")
    if plan and plan.get(_FAILED) and plan.get("work") != work:
        for name in filter(_SHARD.fullmatch, _names(out)):
            (out / name).unlink()
        _remove_progress(out)


def _remove_progress(out: Path) -> None:
    """Its records, and the folder if nothing else is in it."""
    state = out / "progress"
    if _read_plan(state):
        for name in filter(_is_ours, _names(state)):
            (state / name).unlink()
        with suppress(OSError):
            state.rmdir()


def _read_plan(state: Path) -> dict[str, Any] | None:
    """The plan in a folder, None if there is none of this program."""
    try:
        plan = read_json(state / _PLAN)
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) and plan.get("format") == _FORMAT else None


def _plan(path: Path, work: dict[str, Any], source: Source) -> list[list[Piece]]:
    """The pieces of every task; those of an earlier, interrupted call if there are any."""
    if plan := _read_plan(path.parent):
        if plan.get("work") != work:
            raise DataError(
                f"{path.parents[1]} was begun with other data or settings",
                hint="restore the files, tokenizer and data.validation that it was begun with, choose another OUT, or "
                f"remove {path.parents[1]}",
            )
        return _tasks(path, plan.get("tasks"), len(source.sizes))
    target = min(max(sum(source.sizes) // _PIECES, _SMALLEST), _LARGEST)
    tasks: list[list[Piece]] = [[]]
    filled = 0
    for unit, unit_size in enumerate(source.sizes):
        cuts = source.cuts(unit, target)
        ends = [place.row for place, _ in cuts[1:]]
        for (place, size), end in zip(cuts, [*ends, None], strict=True):
            # A unit of unknown size is a task of its own.
            if tasks[-1] and (not unit_size or filled + size > target):
                tasks.append([])
                filled = 0
            filled += size
            tasks[-1].append(Piece(unit, *place, end, size))
    with writing(path.parents[1]):
        write_atomically(path, json.dumps({"format": _FORMAT, "work": work, "tasks": tasks}))
    return tasks


def _tasks(path: Path, tasks: Any, units: int) -> list[list[Piece]]:
    """The tasks of a plan.

    Raises:
        DataError: they are not what this program writes.
    """
    with suppress(TypeError, ValueError):
        found = [[Piece(*piece) for piece in task] for task in tasks]
        pieces = [piece for task in found for piece in task]
        if all(map(_is_piece, pieces)) and {piece.unit for piece in pieces} == set(range(units)):
            return found
    raise DataError(f"{path} is damaged", hint=f"remove {path.parents[1]} and prepare it again, or choose another OUT")


def _is_piece(piece: Piece) -> bool:
    numbers = (piece.unit, piece.row, piece.byte, piece.size, piece.row if piece.end is None else piece.end)
    return all(map(is_count, numbers))


def _run(
    tasks: list[list[Piece]],
    source: Source,
    tokenizer: str,
    validation: float,
    out: Path,
    workers: int,
    progress: Callable[[Progress], None],
) -> None:
    weights = [sum(piece.size for piece in task) or 1 for task in tasks]
    begun = time.monotonic()
    done = here = tokens = documents = 0
    missing = []
    for number in range(len(tasks)):
        record = _read_record(out, number)
        if record is None:
            missing.append(number)
        else:
            done += weights[number]
            tokens, documents = tokens + _total(record, "tokens"), documents + _total(record, "documents")

    def report(more_documents: int = 0, more_tokens: int = 0) -> None:
        seconds = time.monotonic() - begun
        left = seconds / here * (sum(weights) - done) if here else None
        progress(Progress(done / sum(weights), tokens + more_tokens, documents + more_documents, left))

    report()
    if not missing:
        return
    # Not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    counts = context.Array("q", 2)
    pool = ProcessPoolExecutor(
        min(workers, len(missing)), context, _begin_worker, (source, tokenizer, validation, str(out), stop, counts)
    )
    waiting: dict[Future[None], int] = {}
    queue = iter(missing)
    others = set(multiprocessing.active_children())
    told = False
    try:
        while True:
            while len(waiting) < 2 * workers and (following := next(queue, None)) is not None:
                with _unbroken():
                    waiting[pool.submit(_run_task, following, tasks[following])] = following
            if not waiting:
                break
            for future in wait(waiting, _REPORT_SECONDS, return_when=FIRST_COMPLETED).done:
                future.result()
                number = waiting.pop(future)
                done, here = done + weights[number], here + weights[number]
            report(counts[0], counts[1])
    except BrokenProcessPool:
        raise LighthouseError(
            "a worker process ended without an error of its own, perhaps for lack of memory",
            hint="the same command goes on where it stopped; use fewer --workers",
        ) from None
    except (KeyboardInterrupt, SystemExit):
        # Before any worker is killed: one may hold the event's lock, and then it can never be taken again.
        stop.set()
        told = True
        # A worker that still imports would look at the event seconds later. The next call makes again what is cut off.
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
            worker.join()
        with suppress(OSError):
            _remove_partials(out)
        raise
    finally:
        if not told:
            stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _unbroken() -> Iterator[None]:
    """Within, a signal that would raise an exception waits.

    A pool whose thread has not begun cannot be ended, and a worker that is cut off before it has its work says so with
    a traceback. The workers that begin within have these signals blocked: Ctrl-C reaches the whole group.
    """
    waited: list[int] = []
    ours = threading.current_thread() is threading.main_thread()
    found = {number: signal.getsignal(number) for number in _ENDING if ours}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    try:
        # A signal to another thread has its handler run here, whatever is blocked here.
        for number in handlers:
            signal.signal(number, lambda number, frame: waited.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        # It comes with the others that have waited.
        if waited:
            signal.raise_signal(waited[0])
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _total(record: dict[str, Any], what: str) -> int:
    field = {"tokens": 1, "documents": 2}[what]
    return sum(record[split]["shard"][field] for split in _SPLITS if record[split]["shard"])


def _nulls(found: dict[str, Any] | None) -> int:
    """Rows without text, of a record or an index; earlier releases counted none."""
    count = (found or {}).get("nulls", 0)
    return count if is_count(count) else 0


def _record_path(out: Path, number: int) -> Path:
    return out / "progress" / f"{number:05d}.json"


def _read_record(out: Path, number: int) -> dict[str, Any] | None:
    path = _record_path(out, number)
    try:
        record = read_json(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise refusal(error, f"cannot read {path}", kind=DataError) from None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not all(_is_record(record.get(split)) for split in _SPLITS):
        raise DataError(f"{path} is damaged", hint=f"remove {path}: the same command makes it and its shards again")
    return record


def _is_record(split: Any) -> bool:
    """Whether a split of a record has the shape that this program gives it."""
    with suppress(TypeError, ValueError, KeyError):
        units = [(unit, documents, tokens) for unit, documents, tokens in split["units"]]
        sound = all(map(is_count, sum(units, ())))
        if split["shard"] is None:
            return sound and not units
        name, tokens, documents, checksum = split["shard"]
        return sound and plain_name(name) and is_count(tokens) and is_count(documents) and isinstance(checksum, str)
    return False


def _merge(source: Source, state: Path, count: int) -> dict[Split, dict[str, Any]]:
    """The shards and units of each split, in the order of the listing."""
    splits: dict[Split, dict[str, Any]] = {split: {"shards": [], "units": []} for split in _SPLITS}
    for number in range(count):
        record = _read_record(state.parent, number)
        assert record is not None
        for split in _SPLITS:
            shards, units = splits[split]["shards"], splits[split]["units"]
            if record[split]["shard"] is None:
                continue
            for unit, documents, tokens in record[split]["units"]:
                if unit >= len(source.identities):
                    raise DataError(f"{_record_path(state.parent, number)} is damaged: it has a unit {unit}")
                identity = source.identities[unit]
                if not units or units[-1][0] != identity:
                    units.append([identity, []])
                units[-1][1].append([len(shards), documents, tokens])
            shards.append(record[split]["shard"])
    return splits


class _Job(NamedTuple):
    source: Source
    tokenizer: Any
    validation: float
    out: Path
    stop: Any
    counts: Any


_job: _Job | None = None


def _begin_worker(source: Source, tokenizer: str, validation: float, out: str, stop: Any, counts: Any) -> None:
    global _job
    # Ctrl-C reaches the whole group; the parent ends the work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    made = build_tokenizer(tokenizer)
    if isinstance(source, TokenFiles):
        made = AsIds(made)
    _job = _Job(source, made, validation, Path(out), stop, counts)


def _end_with_parent() -> None:
    """A killed parent closes no queue, on which a worker would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_task(number: int, pieces: list[Piece]) -> None:
    """Tokenize pieces into one shard a split, and write their record, {split: {"shard", "units"}}."""
    job = _job
    assert job is not None
    writers: dict[Split, ShardWriter] = {}
    units: dict[Split, list[list[int]]] = {split: [] for split in _SPLITS}
    told, time_told = (0, 0), time.monotonic()
    nulls = job.source.nulls

    def tell() -> None:
        nonlocal told, time_told
        now = tuple(sum(getattr(writer, what) for writer in writers.values()) for what in ("documents", "tokens"))
        with job.counts.get_lock():
            for i in range(2):
                job.counts[i] += now[i] - told[i]
        told, time_told = now, time.monotonic()

    try:
        for split in _SPLITS:
            writers[split] = ShardWriter(job.out / f"{split}-{number:05d}.tokens", job.tokenizer)
        for piece in pieces:
            counts = {split: [0, 0] for split in _SPLITS}
            named = job.source.files[piece.unit].split if isinstance(job.source, TokenFiles) else None
            for record in job.source.records(
                piece.unit, Place(piece.row, piece.byte), lambda identity: True, piece.end
            ):
                if job.stop.is_set():
                    raise LighthouseError("stopped")
                split = named or ("validation" if held_out(record.identity, job.validation) else "train")
                tokens = with_ends(job.tokenizer, record.content, first=record.first, last=record.last)
                writers[split].add(tokens, first=record.first)
                counts[split][0] += record.first
                counts[split][1] += len(tokens)
                if time.monotonic() - time_told > _REPORT_SECONDS:
                    tell()
            for split, (documents, total) in counts.items():
                if documents:
                    units[split].append([piece.unit, documents, total])
        result: dict[str, Any] = {"nulls": job.source.nulls - nulls}
        for split, writer in writers.items():
            shard = list(writer.publish()) if writer.documents else None
            result[split] = {"shard": shard, "units": units[split]}
    finally:
        for writer in writers.values():
            writer.discard()
    with writing(job.out):
        write_atomically(_record_path(job.out, number), json.dumps(result))
    tell()
