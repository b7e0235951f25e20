"""Text to token ids and back: the `bytes` tokenizer, and tokenizers from files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lighthouse_core.data.documents import Tokenizer, stable_hash
from lighthouse_core.data.tokenizers.text import to_text
from lighthouse_core.errors import DataError


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
        """The bytes that `ids` stand for. BOS, EOS and unused rows above them stand for nothing."""
        ids = np.asarray(ids, dtype=np.int64)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD (decode_bytes keeps them)."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `[data] tokenizer` names: "bytes", or the path of a .model or a tokenizer.json.

    Raises:
        DataError: the name is neither, or the file cannot be used.
    """
    if name == "bytes":
        return BytesTokenizer()
    path = Path(name).expanduser()
    if path.suffix == ".model":
        from lighthouse_core.data.tokenizers.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        from lighthouse_core.data.tokenizers.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path)
    raise DataError(
        f'unknown tokenizer "{name}"',
        hint='[data] tokenizer can be "bytes", or the path of a sentencepiece .model or a tokenizer.json',
    )


def tokenizer_files(name: str) -> dict[str, Path]:
    """The files that `build_tokenizer(name)` reads, by the names that they have in a run."""
    path = Path(name).expanduser()
    if path.suffix == ".model":
        return {"tokenizer.model": path}
    if path.suffix == ".json":
        from lighthouse_core.data.tokenizers.huggingface import COMPANIONS

        return {"tokenizer.json": path} | {n: path.with_name(n) for n in COMPANIONS if path.with_name(n).is_file()}
    return {}
