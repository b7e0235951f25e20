"""Which bytes of text the tokens of a tokenizer.json stand for, read from its rules."""

from collections.abc import Callable, Mapping
from typing import Any

from lighthouse_core.data.tokenizers.text import byte_of

Step = Callable[[str], str]


def byte_chars() -> list[str]:
    """The printable character that stands for each byte in the ByteLevel alphabet.

    Printable Latin-1 stands for itself; the other bytes take the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def bytes_by_rules(content: Mapping[str, Any], vocab: Mapping[str, int]) -> dict[int, bytes] | None:
    """The bytes of each id.

    Special tokens and the unknown token stand for nothing. Another added token stands for its text. A token of the
    model stands for what the decoder makes of it alone: a byte-level alphabet gives bytes, "<0x0A>" under byte fallback
    is one byte, and U+2581 is the space that the decoder replaces it by. What the decoder takes off the ends of a whole
    text, such as the space that was put before it, still counts.

    Args:
        content: of the tokenizer.json.
        vocab: id of each token, with the added ones.

    Returns:
        None where the rules do not tell what a token alone stands for: where decoding depends on a token's neighbours
        (WordPiece, CTC), where words have a mark at their end, or where there is no decoder and the text is cut or
        changed before it reaches the model.
    """
    model = content["model"]
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        return None
    rules = _rules(content)
    if rules is None:
        return None
    steps, byte_level = rules
    added = {token["content"]: token for token in content.get("added_tokens") or ()}
    unknown = model.get("unk_token")
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    bytes_of = {char: byte for byte, char in enumerate(byte_chars())}
    fallback = bool(model.get("byte_fallback")) or "ByteFallback" in _kinds(content.get("decoder"))
    found = {}
    for token, i in vocab.items():
        if token == unknown or (token in added and added[token]["special"]):
            found[i] = b""
        elif token in added and byte_level:
            found[i] = token.encode()
        elif fallback and token not in added and (byte := byte_of(token)) is not None:
            found[i] = bytes([byte])
        else:
            text = token
            for step in steps:
                text = step(text)
            spelled = byte_level and all(char in bytes_of for char in text)
            found[i] = bytes(bytes_of[char] for char in text) if spelled else text.encode()
    return found


def _rules(content: Mapping[str, Any]) -> tuple[list[Step], bool] | None:
    """(what changes one token, whether it is then spelled in the ByteLevel alphabet)."""
    if not content.get("decoder"):
        if "ByteLevel" in _kinds(content.get("pre_tokenizer")):
            return [], True
        return None if content.get("pre_tokenizer") or content.get("normalizer") else ([], False)
    steps: list[Step] = []
    joined = byte_level = False
    for part in _parts(content["decoder"]):
        kind = part["type"]
        if joined and kind not in ("Strip", "Fuse"):
            return None
        if kind == "ByteLevel":
            joined = byte_level = True
        elif kind == "Fuse":
            joined = True
        elif kind == "Metaspace":
            steps.append(_spaces(part["replacement"]))
        elif kind == "Replace":
            steps.append(_replacement(part["pattern"], part["content"]))
        elif kind != "ByteFallback" and not (kind == "Strip" and joined):
            return None
    return steps, byte_level


def _spaces(mark: str) -> Step:
    return lambda text: text.replace(mark, " ")


def _replacement(pattern: Mapping[str, str], content: str) -> Step:
    if "String" in pattern:
        return lambda text: text.replace(pattern["String"], content)
    from tokenizers import Regex, decoders

    decoder = decoders.Replace(Regex(pattern["Regex"]), content)
    return lambda text: decoder.decode([text])


def _parts(rule: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A rule's parts, in order, those of a Sequence within a Sequence as well."""
    inner = [rule[key] for key in ("decoders", "pretokenizers") if key in rule]
    return [part for rules in inner for each in rules for part in _parts(each)] if inner else [rule]


def _kinds(rule: Mapping[str, Any] | None) -> set[str]:
    return {part["type"] for part in _parts(rule)} if rule else set()
