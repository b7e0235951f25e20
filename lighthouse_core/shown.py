"""Text from outside made safe to print. Standard library only.

A name of a file, a key, a column or a document can hold anything, escape sequences of the terminal among it. What
would move a cursor, change a colour, clear a screen or turn the direction of reading is shown by its number instead.
"""

import re

# Control characters (C0, DEL, C1), lone surrogates, line and paragraph separators, marks that turn the direction of
# reading, and characters without width, which make two different names look the same. A joiner (U+200D) stays: scripts
# and emoji need it.
_UNSAFE = (
    "\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f"
)
_LINE = re.compile(f"[{_UNSAFE}]")
_LINES = re.compile(f"[{_UNSAFE}]".replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# What only sets colours and weights.
_STYLE = re.compile(r"(\x1b\[[0-9;]*m)")


def shown(text: object) -> str:
    """One line of text: what a terminal would obey is escaped, line breaks and tabs too.

    The escapes of characters above U+007E are also those of JSON and TOML, so a document that has such characters in
    its strings stays the same document.
    """
    return _LINE.sub(_escape, _characters(text))


def shown_lines(text: object) -> str:
    """As `shown`, of text that may have several lines: line breaks and tabs stay."""
    return _LINES.sub(_escape, _characters(text))


def _characters(text: object) -> str:
    """The text; of a name that Python read as single bytes, in the C locale, the characters that its bytes are."""
    text = str(text)
    try:
        return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeError:
        return text


def shown_drawing(text: object) -> str:
    """As `shown_lines`, of a drawing of ours: colours stay."""
    parts = _STYLE.split(str(text))
    return "".join(part if number % 2 else shown_lines(part) for number, part in enumerate(parts))


def shortened(text: object, most: int = 200) -> str:
    """At most so many characters: the beginning and the end of a longer text."""
    text = str(text)
    return text if len(text) <= most else f"{text[: most - most // 4 - 3]}...{text[-(most // 4) :]}"


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if found[0] in _NAMED:
        return _NAMED[found[0]]
    return f"\\x{code:02x}" if code < 0x20 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
