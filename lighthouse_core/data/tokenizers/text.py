"""Text as tokenizers take it: a str, or the bytes of a file that should be UTF-8."""

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
            f"text has half a surrogate pair, U+{ord(text[error.start]):04X}, at character {error.start}",
            hint="it comes from a broken escape such as \\ud800 in JSON; repair or drop the document",
        ) from None
