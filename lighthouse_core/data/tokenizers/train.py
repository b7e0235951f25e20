"""Training a sentencepiece model on the text of a recipe."""

import contextlib
import io
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lighthouse_core.data.build import build_source
from lighthouse_core.data.documents import Place, Split, epoch_order, keeper
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.data.tokenizers.model_file import add_pieces, parse, rename_pieces
from lighthouse_core.data.tokenizers.sentencepiece import SPACE
from lighthouse_core.errors import DataError, LighthouseError, UserError, refusal
from lighthouse_core.files import check_output

if TYPE_CHECKING:
    from lighthouse_core.config.data import DataSection

TRAINING_BYTES = 100_000_000
_HELD_OUT_BYTES = 1_000_000
_WHOLE_DOCUMENT = 1_000_000
_BLOCK = 2000
# The trainer takes line ends off its input and lets no piece hold a tab. It sees these unassigned characters instead,
# and the finished pieces get the real ones back.
_STAND_INS = {"\n": "\U0010fff0", "\r": "\U0010fff1", "\t": "\U0010fff2"}
# Of no account in training: the stand-ins, what sentencepiece reserves for itself, and NUL.
_LEFT_OUT = dict.fromkeys([*_STAND_INS.values(), "\u2581", "\u2585", "\0"])
_TO_TRAINER = str.maketrans(_STAND_INS | _LEFT_OUT)
# In every vocabulary, whatever the text: without a piece for the space it would come back as U+2581. The trainer has an
# option of this kind, but it leaves characters out where those before them make up nearly all of the text.
_REQUIRED = (SPACE, *_STAND_INS)
# The required characters, 256 bytes, <unk>, <s> and </s>.
_FIXED_PIECES = 259 + len(_REQUIRED)
# The largest that sentencepiece can be told.
_MAX_PIECES = 2**31 - 1
_FROM_TRAINER = str.maketrans({stand_in: char for char, stand_in in _STAND_INS.items()})


@dataclass(frozen=True)
class TrainingReport:
    """A tokenizer that was trained.

    Attributes:
        vocab_size: its pieces.
        training_bytes: of text it was trained on, UTF-8.
        bytes_per_token: on text held out from training, or on training text where the recipe holds none out.
        measured_bytes: of the text that was measured on.
        held_out: whether that text was held out.
        seconds: all of it took.
    """

    vocab_size: int
    training_bytes: int
    bytes_per_token: float
    measured_bytes: int
    held_out: bool
    seconds: float


def texts_of(data: "DataSection", split: Split, limit: int) -> Iterator[str]:
    """Text of one split of a recipe's `[data]` section, about `limit` bytes if there is as much: the same every time.

    Files, folders or parts of a data set come in a shuffled order; one that holds more than its share of the text gives
    documents from its beginning on, and a long document its beginning. Bytes that are not UTF-8 are left out. Of a
    mixture each source gives its share.

    Raises:
        DataError: it cannot be read, or the source has ids instead of text.
    """
    if any(part.source == "tokens" for part in data.parts):
        raise DataError("prepared tokens hold no text", hint="give the recipe that they were prepared from")
    for part, weight in zip(data.parts, data.weights, strict=True):
        yield from _texts_of_source(part, split, limit * weight // sum(data.weights))


def _texts_of_source(data: "DataSection", split: Split, limit: int) -> Iterator[str]:
    source, keep = build_source(data), keeper(split, data.validation)
    weights = source.sizes if all(source.sizes) else [1] * len(source.sizes)
    weight_left = sum(weights)
    for unit in epoch_order(source.identities, 0, 0):
        share = limit * weights[unit] // weight_left
        weight_left -= weights[unit]
        for record in source.records(unit, Place(), keep):
            content = record.content.encode() if isinstance(record.content, str) else record.content
            content = content[: max(share, min(limit, _WHOLE_DOCUMENT))]
            yield content.decode("utf-8", errors="ignore")
            share -= len(content)
            limit -= len(content)
            if share <= 0:
                break
        if limit <= 0:
            return


def train_tokenizer(
    data: "DataSection", out: Path, vocab_size: int, training_bytes: int = TRAINING_BYTES
) -> TrainingReport:
    """Train BPE with byte fallback on a recipe's training text, and write it to `out`.

    Its pieces are <unk>, <s>, </s>, the 256 bytes, then what was learnt, with the space, tab, newline and carriage
    return in any case. It neither normalizes text nor adds a space: every text comes back from its ids, but for U+2581
    (see SentencePieceTokenizer). No piece holds a space and what is before it, and digits stand alone. The same text
    gives the same file, byte for byte.

    Args:
        data: the `[data]` section; its `tokenizer` is not used.
        out: the file; it must end in .model and not exist.
        vocab_size: pieces.
        training_bytes: text to train on; a sample where the data has more (see texts_of).

    Raises:
        UserError: `out` cannot be used, or a number is out of range for this text.
        DataError: the data cannot be read or holds no text.
    """
    started = time.monotonic()
    _check_out(out)
    if vocab_size < _FIXED_PIECES:
        raise UserError(
            f"a vocabulary of {vocab_size} has no room",
            hint=f"{_FIXED_PIECES} pieces are bytes, marks, the space, tab, newline and carriage return",
        )
    if vocab_size > _MAX_PIECES:
        raise UserError(
            f"a vocabulary of {vocab_size} is larger than {_MAX_PIECES}, the most that there can be",
            hint="ask for a smaller vocabulary",
        )
    if training_bytes < 1:
        raise UserError(f"the training text must be at least 1 byte, not {training_bytes}")
    texts = _Counted(texts_of(data, "train", training_bytes))
    content = _complete(_train(texts, vocab_size), vocab_size)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.model")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        measured = _measure(temporary, data)
        _check_out(out)
        os.replace(temporary, out)
    except OSError as error:
        raise refusal(error, f"cannot write {out}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return TrainingReport(vocab_size, texts.bytes, *measured, time.monotonic() - started)


class _Counted:
    """The texts, and how many bytes of UTF-8 have gone by."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.bytes += len(text.encode())
            yield text


def _train(texts: Iterable[str], vocab_size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    blocks = _Blocks(texts)
    # sentencepiece returns to Python only when it is done, so Ctrl-C ends the process; nothing has been written yet.
    main = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL) if main else None
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(blocks),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _BLOCK,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # a setting of the run is kept in the model; more would change the file and little else
            minloglevel=3,
        )
    except RuntimeError as error:
        if blocks.error is not None:
            raise blocks.error from None
        if not blocks.count:
            raise DataError(
                "there is no text to train a tokenizer on", hint="name files with text in data.paths"
            ) from None
        # "INTERNAL: file.cc(1) [condition] The reason."
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise _wrong_size(vocab_size, reason) from None
    finally:
        if main:
            signal.signal(signal.SIGINT, previous)
    return model.getvalue()


def _complete(content: bytes, vocab_size: int) -> bytes:
    """A model of the trainer with the real characters in place of the stand-ins, and with all of _REQUIRED."""
    content = rename_pieces(content, lambda piece: piece.translate(_FROM_TRAINER))
    present = {piece.text for piece in parse(content).pieces}
    content = add_pieces(content, [char for char in _REQUIRED if char not in present], vocab_size)
    size = len(parse(content).pieces)
    if size > vocab_size:
        raise _wrong_size(vocab_size, f"its characters alone need {size}")
    if size < vocab_size:
        raise _wrong_size(vocab_size, f"Vocabulary size too high, at most {size}")
    return content


def _wrong_size(vocab_size: int, reason: str) -> UserError:
    return UserError(
        f"no vocabulary of {vocab_size} can be made from this text: {reason}",
        hint="choose another size, or give more text",
    )


class _Blocks:
    """The texts as the trainer takes them: pieces of limited length, cut before a space where there is one.

    Attributes:
        count: blocks given so far.
        error: what went wrong in reading the texts; the trainer gives only its words on.
    """

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.count = 0
        self.error: LighthouseError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                for block in _blocks(text.translate(_TO_TRAINER)):
                    self.count += 1
                    yield block
        except LighthouseError as error:
            self.error = error
            raise


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + _BLOCK
        if end < len(text):
            # Words begin with a space, a run of spaces being one word with what follows it.
            space = end
            while (space := text.rfind(" ", start + 1, space)) > 0 and text[space - 1] == " ":
                pass
            end = space if space > 0 else end
        yield text[start:end]
        start = end


def _measure(model: Path, data: "DataSection") -> tuple[float, int, bool]:
    """(bytes per token, bytes of text, whether it was held out) of a model; its round trip is checked on the way."""
    tokenizer = build_tokenizer(str(model))
    texts = list(texts_of(data, "validation", _HELD_OUT_BYTES)) if data.validation else []
    held_out = bool(texts)
    tokens = size = 0
    for text in texts or texts_of(data, "train", _HELD_OUT_BYTES):
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text.replace("\u2581", " "):
            raise LighthouseError("the trained tokenizer does not give text back", hint="please report this")
        tokens += len(ids)
        size += len(text.encode())
    return size / max(tokens, 1), size, held_out


def _check_out(out: Path) -> None:
    if out.suffix != ".model":
        raise UserError(f"{out} does not end in .model", hint="data.tokenizer tells tokenizers apart by their endings")
    check_output(out)
    if out.exists():
        raise UserError(f"{out} exists", hint="give another name; runs may depend on this one")
    if not out.parent.is_dir():
        raise UserError(
            f"cannot write {out}: there is no directory {out.parent}", hint="make it, or choose another OUT"
        )
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise refusal(error, f"cannot write {out}") from None
