"""sentencepiece models written by hand, piece by piece."""

import struct

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def piece(text: str, score: float = 0.0, kind: int = NORMAL) -> bytes:
    score_bytes = varint(2 << 3 | 5) + struct.pack("<f", score)
    return message(1, message(1, text.encode()) + score_bytes + number(3, kind))


def bpe_model(pieces, *, byte_fallback=True, dummy_prefix=False, byte_order=range(256)) -> bytes:
    """A BPE model of <unk>, <s>, </s>, the bytes, and `pieces`: (text, score) or (text, score, kind)."""
    fixed = [piece("<unk>", kind=UNKNOWN)] + [piece(text, kind=CONTROL) for text in ("<s>", "</s>")]
    if byte_fallback:
        fixed += [piece(f"<0x{byte:02X}>", kind=BYTE) for byte in byte_order]
    trainer = number(3, 2) + number(35, int(byte_fallback)) + number(41, 1) + number(42, 2)
    normalizer = message(1, b"identity") + number(3, int(dummy_prefix)) + number(4, 0) + number(5, 1)
    return b"".join([*fixed, *(piece(*given) for given in pieces), message(2, trainer), message(3, normalizer)])
