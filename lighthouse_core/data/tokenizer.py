"""Text to token ids and back."""

from collections.abc import Sequence

import numpy as np

from lighthouse_core.errors import DataError


class BytesTokenizer:
    """Byte b is id b; BOS is 256 and EOS is 257. Lossless on every input."""

    vocab_size = 258
    bos_id = 256
    eos_id = 257

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of `text`, int32, without BOS and EOS. A str is taken as UTF-8."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def decode_bytes(self, ids: np.ndarray | Sequence[int]) -> bytes:
        """The bytes that `ids` stand for. BOS, EOS and unused rows above them stand for nothing."""
        ids = np.asarray(ids, dtype=np.int64)
        return ids[ids < 256].astype(np.uint8).tobytes()

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD (decode_bytes keeps them)."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def build_tokenizer(name: str) -> BytesTokenizer:
    """The tokenizer that `[data] tokenizer` names.

    Raises:
        DataError: the name is unknown.
    """
    if name == "bytes":
        return BytesTokenizer()
    raise DataError(f'unknown tokenizer "{name}"', hint='[data] tokenizer can be "bytes"')
