"""Text as tokenizers take it: a str, or the bytes of a file that should be UTF-8. And texts to try a tokenizer on."""

import random
import re
from collections import defaultdict
from collections.abc import Collection, Iterable

from lighthouse_core.errors import DataError


def to_text(text: str | bytes) -> str:
    """`text` as a str that has a UTF-8 form.

    Raises:
        DataError: the bytes are not UTF-8, or the str holds half a surrogate pair. Replacing what is wrong would train
            on text that nobody wrote.
    """
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8")
        text.encode("utf-8")
        return text
    except UnicodeDecodeError as error:
        raise DataError(
            f"text is not UTF-8: byte {text[error.start]:#04x} at offset {error.start}",
            hint="convert the file, leave it out, or use a tokenizer that keeps any byte "
            '("bytes", or one of `lighthouse tokenizer train`)',
        ) from None
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has half a surrogate pair, U+{ord(error.object[error.start]):04X}, at character {error.start}",
            hint="it comes from a broken escape such as \\ud800 in JSON; repair or drop the document",
        ) from None


# Read as generously as other programs read it, which take small letters and a sign.
_BYTE = re.compile("<0x([0-9A-Fa-f]{2}|\\+[0-9A-Fa-f])>", re.ASCII)


def byte_of(piece: str) -> int | None:
    """The byte, 0 to 255, that a piece such as "<0x0A>" spells; None for any other piece."""
    spelled = _BYTE.fullmatch(piece)
    return int(spelled[1], 16) if spelled else None


def vocabulary_texts(tokens: Iterable[bytes], leave_out: Collection[str] = (), budget: int = 4000) -> list[str]:
    """Texts that try what a vocabulary holds: every token, then tokens that overlap.

    Two tokens overlap where the end of one is the beginning of the other: "ab" and "bc" make the text "abc", in which
    they compete. Small vocabularies give all of these texts. Where there are more than `budget` they are a sample, the
    same every time.

    Args:
        tokens: what the ids stand for (`token_bytes` of a tokenizer). What is not UTF-8 gives no text.
        leave_out: texts that must not occur within one.
        budget: the most texts of two tokens.

    Returns:
        Every text once.
    """
    found: dict[str, None] = {}
    for token in tokens:
        try:
            found[token.decode()] = None
        except UnicodeDecodeError:
            continue
    found.pop("", None)
    texts = list(found)
    beginnings = defaultdict(list)
    for text in texts:
        for size in range(1, len(text)):
            beginnings[text[:size]].append(text)
    ends = [(text, at) for text in texts for at in range(1, len(text)) if text[at:] in beginnings]
    if sum(len(beginnings[text[at:]]) for text, at in ends) > budget:
        draw = random.Random(0)
        drawn = (draw.choice(ends) for _ in range(budget))
        joined = [text[:at] + draw.choice(beginnings[text[at:]]) for text, at in drawn]
    else:
        joined = [text[:at] + other for text, at in ends for other in beginnings[text[at:]]]
    return [text for text in dict.fromkeys(texts + joined) if not any(mark in text for mark in leave_out)]
