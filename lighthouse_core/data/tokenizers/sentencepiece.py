"""A sentencepiece .model as a tokenizer."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lighthouse_core.data.documents import stable_hash
from lighthouse_core.data.tokenizers.model_file import BPE, BYTE, NORMAL, UNUSED, USER_DEFINED, ModelFile, parse
from lighthouse_core.data.tokenizers.text import to_text
from lighthouse_core.errors import DataError

SPACE = "\u2581"  # how pieces spell a space
# On a megabyte at once sentencepiece takes twice as long a character as on a few kilobytes.
_CHUNK = 8192
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }
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
        DataError: the file is missing or no model, has no BOS or EOS, or has rules that an exported tokenizer.json
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
            reason = str(error).strip().splitlines()[-1]
            raise DataError(f"{path} is not a sentencepiece model: {reason}") from None
        _check_rules(path, self.model)
        self.vocab_size = len(self.model.pieces)
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        for name, found in (("bos", self.bos_id), ("eos", self.eos_id)):
            if found < 0:
                raise DataError(
                    f"the tokenizer {path} has no {name.upper()} piece",
                    hint=f"train it with --{name}_id set, or with `lighthouse tokenizer train`",
                )
        self.fingerprint = _fingerprint(self.model, self.bos_id, self.eos_id)
        # Fields given again override: this is the same model without the space that some put before a text, so that a
        # text can be cut.
        self._plain = SentencePieceProcessor(model_proto=self.content + _NO_DUMMY_PREFIX)
        self._byte_ids = np.array([i for i, p in enumerate(self.model.pieces) if p.kind == BYTE], dtype=np.int32)
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
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. BOS, EOS and rows above the vocabulary are dropped."""
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

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


def _joined(model: ModelFile) -> frozenset[str]:
    """Every two characters of text that stand side by side in a piece; U+2581 in a text is a space to the model."""
    pairs = set()
    for piece in model.pieces:
        if piece.kind == NORMAL:
            pairs.update(piece.text[i : i + 2] for i in range(len(piece.text) - 1))
    for a, b in list(pairs):
        if SPACE in (a, b):
            pairs.update(x + y for x in (a, " " if a == SPACE else a) for y in (b, " " if b == SPACE else b))
    return frozenset(pairs)


def _check_rules(path: Path, model: ModelFile) -> None:
    kinds = {piece.kind for piece in model.pieces}
    reason = None
    if model.algorithm != BPE:
        reason = "it is not a BPE model"
    elif USER_DEFINED in kinds or UNUSED in kinds:
        reason = "it has user-defined or unused pieces"
    elif model.charsmap or model.squeeze:
        reason = "it normalizes text"
    elif not model.escape or model.suffix or model.denormalizes:
        reason = "it treats spaces in an unusual way or rewrites text when decoding"
    elif model.byte_fallback and sum(piece.kind == BYTE for piece in model.pieces) != 256:
        reason = "its byte pieces are not 256"
    if reason:
        raise DataError(
            f"the tokenizer {path} is not supported: {reason}",
            hint="use the tokenizer.json of the same tokenizer, or train one with `lighthouse tokenizer train`",
        )


def _fingerprint(model: ModelFile, bos_id: int, eos_id: int) -> int:
    rules = (model.byte_fallback, model.dummy_prefix)
    digest = hashlib.sha256(repr((model.pieces, rules)).encode("utf-8", "backslashreplace")).hexdigest()
    return stable_hash("sentencepiece", digest, bos_id, eos_id)
