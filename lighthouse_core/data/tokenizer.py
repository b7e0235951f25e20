"""Text to token ids and back: the `bytes` tokenizer, and tokenizers from files.

What becomes of text that is out of the ordinary:

| in the text | bytes | .model with byte fallback | .model without | tokenizer.json |
|---|---|---|---|---|
| U+2581 | kept | a space | a space | by its rules; made from a .model, a space |
| NUL, U+FEFF (byte-order mark), U+FFFD | kept | kept | unknown, if no piece holds it | by its rules |
| bytes that are not UTF-8 | kept | kept | an error | an error |
| half a surrogate pair in a str | an error | an error | an error | an error |

"Kept" means that `token_bytes` of the ids are the bytes of the text. `decode` gives a str, so that in it U+FFFD stands
for what is not UTF-8. A byte-order mark is a character at any place, at the beginning too; what becomes of one at the
beginning of a file is for the source to say. `decode` leaves out BOS, EOS and ids that are no row of the vocabulary,
negative ones too. The unknown piece decodes to what the file says: " \u2047 " in sentencepiece.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lighthouse_core.config.origin import TOKENIZER
from lighthouse_core.data.documents import Tokenizer, stable_hash
from lighthouse_core.data.tokenizers.text import to_text
from lighthouse_core.errors import DataError
from lighthouse_core.reading import home_expanded


class BytesTokenizer:
    """Byte b is id b; BOS is 256 and EOS is 257. Lossless on every input."""

    vocab_size = 258
    bos_id = 256
    eos_id = 257
    fingerprint = stable_hash("bytes")

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of `text`, int32, without BOS and EOS. A str is taken as UTF-8."""
        data = to_text(text).encode() if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def decode_bytes(self, ids: np.ndarray | Sequence[int]) -> bytes:
        """The bytes that `ids` stand for. BOS, EOS and ids that are no row of the vocabulary stand for nothing."""
        ids = np.asarray(ids, dtype=np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD (decode_bytes keeps them)."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; see the protocol."""
        return [self.decode_bytes([i]) for i in range(self.vocab_size)]


_HINT = (
    '[data] tokenizer can be "bytes", or the path of a sentencepiece .model, of a tokenizer.json, or of a directory '
    "with one"
)


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `[data] tokenizer` names: "bytes", or the path of a .model, of a tokenizer.json, or of a
    directory with one of these, as a model's is.

    Raises:
        DataError: the name is none of these, or the file cannot be used.
    """
    if name == "bytes":
        return BytesTokenizer()
    path = _file(name)
    if path.exists() and not path.is_file():
        # A pipe would be waited for, and a device read until memory is full.
        raise DataError(f"the tokenizer {path} is not a file", hint=_HINT)
    if path.suffix == ".model":
        from lighthouse_core.data.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        from lighthouse_core.data.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path)
    raise DataError(
        f'unknown tokenizer "{name}"',
        hint=_HINT,
    )


def _file(name: str) -> Path:
    """The file that a name of a tokenizer leads to.

    Raises:
        DataError: a directory without one.
    """
    path = home_expanded(name)
    # Not with exists, as a link to nothing is to be told by whoever reads it.
    for inside in (path / "tokenizer.json", path / "tokenizer.model"):
        if path.is_dir() and os.path.lexists(inside):
            return inside
    if path.is_dir():
        raise DataError(f"the tokenizer {path} is a directory without a tokenizer.json", hint=_HINT)
    return path


def tokenizer_files(name: str) -> dict[str, Path]:
    """The files that `build_tokenizer(name)` reads, by the names that they have in a run: the tokenizer comes first.

    A model's tokenizer has a folder of its own there, with the config.json that says that it is one.

    Raises:
        DataError: one beside a tokenizer.json is no file.
    """
    path = _file(name)
    if path.suffix == ".model":
        return {"tokenizer.model": path}
    if path.suffix == ".json":
        from lighthouse_core.data.tokenizers.huggingface import COMPANIONS, MODEL, of_model

        beside = {name: path.with_name(name) for name in COMPANIONS if os.path.lexists(path.with_name(name))}
        for file in beside.values():
            if not file.is_file():
                raise DataError(
                    f"{file} beside the tokenizer is not a file", hint=f"restore {file.name}, or move it away"
                )
        files = {"tokenizer.json": path} | beside
        if of_model(path):
            files[MODEL] = path.with_name(MODEL)
            return {f"{TOKENIZER}/{name}": file for name, file in files.items()}
        return files
    return {}
