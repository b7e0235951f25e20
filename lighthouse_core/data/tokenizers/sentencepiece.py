"""A sentencepiece .model as a tokenizer."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lighthouse_core.data.documents import stable_hash
from lighthouse_core.data.tokenizers.merges import merge_list, shared_scores
from lighthouse_core.data.tokenizers.model_file import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    ModelFile,
    parse,
)
from lighthouse_core.data.tokenizers.text import byte_of, to_text
from lighthouse_core.errors import DataError

SPACE = "\u2581"  # how pieces spell a space
# On a megabyte at once sentencepiece takes twice as long a character as on a few kilobytes.
_CHUNK = 8192
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }
# Lines of tiktoken: a piece as base64, and its rank.
_RANKED = re.compile(rb"(?:[A-Za-z0-9+/]+={0,2} \d+\r?\n){2}")
# What decoding with "surrogateescape" makes of bytes that are not UTF-8.
_INVALID = re.compile("([\udc80-\udcff]+)")


class SentencePieceTokenizer:
    """BPE by a sentencepiece model.

    With byte fallback, as in the models of `lighthouse tokenizer train`, every text comes back from its ids, but for
    U+2581: sentencepiece's own format uses it for the space and gives it back as one. Bytes that are not UTF-8 become
    their byte pieces, so nothing of a raw file is lost or replaced. Without byte fallback they are an error, and
    characters that the model does not know become its unknown piece.

    Attributes:
        content: the bytes of the file.
        model: its vocabulary and rules.

    Raises:
        DataError: the file is missing or no model, has no EOS, or has rules that an exported tokenizer.json
            cannot follow to the letter.
    """

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self.content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read the tokenizer {path}: {error.strerror}",
                hint="data.tokenizer is a path from the current directory; `lighthouse tokenizer train` makes a model",
            ) from None
        try:
            self.model = parse(self.content)
            self._processor = SentencePieceProcessor(model_proto=self.content)
        except (ValueError, RuntimeError) as error:
            if _RANKED.match(self.content):
                raise DataError(
                    f"{path} is tiktoken's list of ranks, as of Llama 3, not a sentencepiece model",
                    hint="use the tokenizer.json of the same model",
                ) from None
            reason = str(error).strip().splitlines()[-1]
            raise DataError(
                f"{path} is not a sentencepiece model: {reason}", hint="copy it anew, or name another data.tokenizer"
            ) from None
        _check_rules(path, self.model)
        self.vocab_size = len(self.model.pieces)
        bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id = bos_id if bos_id >= 0 else None
        if self.eos_id < 0:
            raise DataError(
                f"the tokenizer {path} has no EOS piece",
                hint="train it with --eos_id set, or with `lighthouse tokenizer train`",
            )
        self.fingerprint = _fingerprint(self.model, self.bos_id, self.eos_id)
        # Fields given again override: this is the same model without the space that some put before a text, so that a
        # text can be cut.
        self._plain = SentencePieceProcessor(model_proto=self.content + _NO_DUMMY_PREFIX)
        spelled = [byte_of(piece.text) if piece.kind == BYTE else None for piece in self.model.pieces]
        byte_ids = {byte: i for i, byte in enumerate(spelled) if byte is not None}
        self._byte_ids = np.array([byte_ids[byte] for byte in sorted(byte_ids)], dtype=np.int32)
        self._joined = _joined(self.model)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of `text`, int32 [length], without BOS and EOS. A text that spells "<s>" is those characters.

        Raises:
            DataError: `text` is not UTF-8, and the model has no byte fallback.
        """
        if not self.model.byte_fallback:
            return self._processor.encode_as_numpy(to_text(text))
        if self.model.dummy_prefix and text:
            text = " " + text if isinstance(text, str) else b" " + text
        parts = self._encode_chunks(to_text(text)) if isinstance(text, str) else self._encode_bytes(text)
        return np.concatenate([np.empty(0, dtype=np.int32), *parts])

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. BOS, EOS and ids that are no row of the vocabulary are
        dropped."""
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; see the protocol. A space that the model puts before a text is one of
        them. The unknown piece stands for none: what it took the place of is lost."""
        texts = {NORMAL: lambda text: text.replace(SPACE, " ").encode(), BYTE: _byte}
        return [texts[piece.kind](piece.text) if piece.kind in texts else b"" for piece in self.model.pieces]

    def _encode_bytes(self, data: bytes) -> Iterator[np.ndarray]:
        for part in _INVALID.split(data.decode("utf-8", "surrogateescape")):
            if _INVALID.match(part):
                yield self._byte_ids[np.frombuffer(part.encode("utf-8", "surrogateescape"), dtype=np.uint8)]
            else:
                yield from self._encode_chunks(part)

    def _encode_chunks(self, text: str) -> Iterator[np.ndarray]:
        """Ids of `text`, cut where that changes nothing.

        BPE joins neighbours only into a piece of the vocabulary. Between two characters that no piece holds side by
        side nothing is ever joined, and what happens on one side has no influence on the other.
        """
        start = 0
        while start < len(text):
            end = min(start + _CHUNK, len(text))
            while end < len(text) and text[end - 1 : end + 1] in self._joined:
                end += 1
            yield self._plain.encode_as_numpy(text[start:end])
            start = end


def _byte(text: str) -> bytes:
    byte = byte_of(text)
    return b"" if byte is None else bytes([byte])


def _joined(model: ModelFile) -> frozenset[str]:
    """Every two characters of text that stand side by side in a piece; U+2581 in a text is a space to the model."""
    pairs: set[str] = set()
    for piece in model.pieces:
        if piece.kind == NORMAL:
            pairs.update(piece.text[i : i + 2] for i in range(len(piece.text) - 1))
    for a, b in map(tuple, list(pairs)):
        if SPACE in (a, b):
            pairs.update(x + y for x in (a, " " if a == SPACE else a) for y in (b, " " if b == SPACE else b))
    return frozenset(pairs)


def _check_rules(path: Path, model: ModelFile) -> None:
    hint = "use the tokenizer.json of the same tokenizer, or train one with `lighthouse tokenizer train`"
    reason = _unsupported(model) or _unfit_piece(model)
    if not reason and (reason := _unfit_scores(model)):
        hint = f"give every piece a finite score of its own; else {hint}"
    if reason:
        raise DataError(f"the tokenizer {path} is not supported: {reason}", hint=hint)


def _unsupported(model: ModelFile) -> str | None:
    """Which rule of a model an exported tokenizer.json could not follow to the letter."""
    kinds = {piece.kind for piece in model.pieces}
    if model.algorithm != BPE:
        return "it is not a BPE model"
    if USER_DEFINED in kinds or UNUSED in kinds:
        return "it has user-defined or unused pieces"
    if model.charsmap or model.squeeze:
        return "it normalizes text"
    if not model.escape or model.suffix or model.denormalizes:
        return "it treats spaces in an unusual way or rewrites text when decoding"
    if model.byte_fallback and {byte_of(p.text) for p in model.pieces if p.kind == BYTE} != set(range(256)):
        return "its byte pieces are not 256"
    return None


def _unfit_piece(model: ModelFile) -> str | None:
    """Which piece another program would read otherwise than sentencepiece does."""
    characters = {piece.text for piece in model.pieces if piece.kind == NORMAL and len(piece.text) == 1}
    seen = set()
    for text, _, kind in model.pieces:
        if text in seen:
            return f"its piece {text!r} occurs twice"
        seen.add(text)
        if "\0" in text:
            return f"its piece {text!r} holds a NUL"
        if kind in (CONTROL, UNKNOWN) and len(text) == 1:
            return f"its control piece {text!r} is a character of text"
        if kind == NORMAL and byte_of(text) is not None:
            return f"its piece {text!r} is spelled like a byte"
        if kind == NORMAL and (unknown := set(text) - characters):
            return f"its piece {text!r} has the character {min(unknown)!r}, which is no piece of its own"
    if model.byte_fallback and SPACE not in characters:
        return "the space is no piece of its own, and would come back as U+2581"
    return None


def _unfit_scores(model: ModelFile) -> str | None:
    if shared_scores(model.pieces):
        try:
            merge_list(model.pieces)
        except ValueError as error:
            return str(error)
    return None


def _fingerprint(model: ModelFile, bos_id: int | None, eos_id: int) -> int:
    rules = (model.byte_fallback, model.dummy_prefix)
    digest = hashlib.sha256(repr((model.pieces, rules)).encode("utf-8", "backslashreplace")).hexdigest()
    return stable_hash("sentencepiece", digest, bos_id, eos_id)
