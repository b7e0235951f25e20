"""Text files as editors write them: UTF-8, with or without a byte-order mark."""

import codecs

BOM = codecs.BOM_UTF8
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
UTF8_HINT = "save it as UTF-8, for example: iconv -f UTF-16 -t UTF-8 FILE > NEW"


def decoded(content: bytes) -> str:
    """The text of a whole file, without the byte-order mark that it may begin with.

    Raises:
        UnicodeDecodeError: it is not UTF-8; `why_not_utf8` puts that in words.
    """
    return content.removeprefix(BOM).decode()


def why_not_utf8(beginning: bytes, where: str) -> tuple[str, str | None]:
    """A message and a hint for a file that is not UTF-8.

    Args:
        beginning: its first bytes.
        where: the place of the first wrong byte, in words.
    """
    if beginning.startswith(_WIDE):
        return "not UTF-8 text but UTF-16 or UTF-32, by its byte-order mark", UTF8_HINT
    return f"not UTF-8 text ({where})", None
