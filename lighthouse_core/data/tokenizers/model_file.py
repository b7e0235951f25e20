"""What a sentencepiece .model file holds: a protobuf message, of which a few fields are needed.

It is read by hand because the classes that come with sentencepiece demand the very protobuf release they were generated
with, and collide with the copies of them in other packages. Field numbers: sentencepiece_model.proto.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2


class Piece(NamedTuple):
    """One row of the vocabulary; its index is its id."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class ModelFile:
    """The vocabulary and the rules of a sentencepiece model.

    Attributes:
        charsmap: text is normalized by compiled rules.
        dummy_prefix: a space is put before the text.
        squeeze: spaces at either end are dropped, and runs of them become one.
        escape: a space is written U+2581 in pieces.
        suffix: the dummy space goes behind the text instead.
        denormalizes: decoding rewrites text as well.
    """

    pieces: tuple[Piece, ...]
    algorithm: int
    byte_fallback: bool
    charsmap: bool
    dummy_prefix: bool
    squeeze: bool
    escape: bool
    suffix: bool
    denormalizes: bool


def parse(content: bytes) -> ModelFile:
    """Read the bytes of a .model file.

    Raises:
        ValueError: they are not one.
    """
    pieces = []
    sections: dict[int, dict[int, Any]] = {2: {}, 3: {}, 5: {}}
    try:
        for number, _, value in _fields(content):
            if number == 1:
                pieces.append(_piece(value))
            elif number in sections:
                sections[number] = {inner: given for inner, _, given in _fields(value)}
    except (AttributeError, TypeError, struct.error):
        raise ValueError("a field has another type than in a model") from None
    trainer, normalizer, denormalizer = sections[2], sections[3], sections[5]
    if not pieces:
        raise ValueError("it holds no pieces")
    return ModelFile(
        pieces=tuple(pieces),
        algorithm=trainer.get(3, 1),
        byte_fallback=bool(trainer.get(35, False)),
        charsmap=bool(normalizer.get(2)),
        dummy_prefix=bool(normalizer.get(3, True)),
        squeeze=bool(normalizer.get(4, True)),
        escape=bool(normalizer.get(5, True)),
        suffix=bool(trainer.get(24, False)),
        denormalizes=bool(denormalizer.get(2)),
    )


def rename_pieces(content: bytes, rename: Callable[[str], str]) -> bytes:
    """The same model with other texts for its pieces of kind NORMAL."""
    out = bytearray()
    for number, start, value in _fields(content):
        if number == 1 and (piece := _piece(value)).kind == NORMAL:
            text = rename(piece.text).encode()
            rest = b"".join(value[at:end] for field, at, end in _spans(value) if field != 1)
            value = b"\x0a" + _varint(len(text)) + text + rest
            out += b"\x0a" + _varint(len(value)) + value
        else:
            out += start
    return bytes(out)


def add_pieces(content: bytes, texts: Sequence[str], limit: int) -> bytes:
    """The same model with more pieces of kind NORMAL behind the others, and with lower scores.

    Where this makes more than `limit` pieces, pieces of several characters are left out, the last ones first. In a
    model as the trainer writes it, no other piece is made of these.
    """
    fields = list(_fields(content))
    pieces = [(at, _piece(value)) for at, (number, _, value) in enumerate(fields) if number == 1]
    learnt = [at for at, piece in pieces if piece.kind == NORMAL and len(piece.text) > 1]
    left_out = set(learnt[max(len(learnt) + min(limit - len(pieces) - len(texts), 0), 0) :])
    lowest = min(piece.score for _, piece in pieces)
    added = b""
    for number, text in enumerate(texts, 1):
        value = b"\x0a" + _varint(len(text.encode())) + text.encode() + b"\x15" + struct.pack("<f", lowest - number)
        added += b"\x0a" + _varint(len(value)) + value
    first = pieces[-1][0] + 1
    kept = [start for at, (_, start, _) in enumerate(fields) if at not in left_out]
    # Behind the last piece, wherever the other fields stand.
    before = first - len(left_out)
    return b"".join([*kept[:before], added, *kept[before:]])


def _piece(message: bytes) -> Piece:
    fields = {number: value for number, _, value in _fields(message)}
    (score,) = struct.unpack("<f", fields[2]) if 2 in fields else (0.0,)
    return Piece(fields.get(1, b"").decode(), score, fields.get(3, NORMAL))


def _fields(message: bytes) -> Iterator[tuple[int, bytes, Any]]:
    """(number, the field as written, its value): an int for a varint, else bytes."""
    for number, start, end in _spans(message):
        tag, at = _read_varint(message, start)
        if tag & 7 == 0:
            value: Any = _read_varint(message, at)[0]
        else:
            value = message[_read_varint(message, at)[1] if tag & 7 == 2 else at : end]
        yield number, message[start:end], value


def _spans(message: bytes) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of each field."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _read_varint(message, at)
        kind = tag & 7
        if kind == 0:
            at = _read_varint(message, at)[1]
        elif kind == 2:
            size, at = _read_varint(message, at)
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        if at > len(message):
            raise ValueError("it ends early")
        yield tag >> 3, start, at


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("it ends early")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
