"""A Hugging Face tokenizer.json as a tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lighthouse_core.data.documents import stable_hash
from lighthouse_core.data.tokenizers.text import to_text
from lighthouse_core.errors import DataError

# Files beside tokenizer.json that name its special tokens.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")
# What BOS and EOS are called where nothing says so, in the usual tokenizers.
_USUAL = (
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<|endoftext|>", "<|endoftext|>"),
)


class HuggingFaceTokenizer:
    """What the `tokenizers` library makes of a tokenizer.json, without its truncation and padding.

    BOS and EOS are those that a tokenizer_config.json or special_tokens_map.json beside it names, else the tokens that
    its post-processor puts around a text, else added tokens of the usual names.

    Attributes:
        path: of the tokenizer.json.
        bos, eos: the tokens themselves.

    Raises:
        DataError: a file is missing or cannot be read, or BOS or EOS cannot be told.
    """

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        content = _read_json(path)
        self.path = path
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises no narrower one
            raise DataError(f"{path} is not a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document that spells a special token must not end or begin one.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.bos, self.eos = _special_tokens(path, content)
        self.bos_id, self.eos_id = (self._id(name) for name in (self.bos, self.eos))
        rules = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        self.fingerprint = stable_hash("tokenizer.json", json.dumps(rules, sort_keys=True), self.bos_id, self.eos_id)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of `text`, int32 [length], without BOS and EOS. A text that spells a special token is its characters.

        Raises:
            DataError: `text` is not UTF-8.
        """
        return np.array(self._tokenizer.encode(to_text(text), add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Text of `ids`. Special tokens and rows above the vocabulary stand for nothing."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise DataError(f"{self.path} has no token {token!r}, which is named as its BOS or EOS")
        return found


def _special_tokens(path: Path, content: dict[str, Any]) -> tuple[str, str]:
    """(BOS, EOS) of the tokenizer.json at `path`."""
    found = dict.fromkeys(("bos_token", "eos_token"))
    around = _around(content.get("post_processor") or {})
    for source in (*(_read_json(file) for name in COMPANIONS if (file := path.with_name(name)).is_file()), around):
        for key in found:
            named = source.get(key)
            found[key] = found[key] or (named.get("content") if isinstance(named, dict) else named)
    added = {token.get("content") for token in content.get("added_tokens") or ()}
    for bos, eos in _USUAL:
        if not any(found.values()) and {bos, eos} <= added:
            found = {"bos_token": bos, "eos_token": eos}
    missing = [key for key, token in found.items() if not token]
    if missing:
        names = " and ".join(key.removesuffix("_token").upper() for key in missing)
        raise DataError(
            f"cannot tell which token of {path} is {names}",
            hint=f'name it in a {path.with_name("tokenizer_config.json")}: {{"{missing[0]}": "..."}}',
        )
    return found["bos_token"], found["eos_token"]


def _around(post_processor: dict[str, Any]) -> dict[str, str]:
    """The tokens that a post-processor puts before and after a text."""
    kind = post_processor.get("type")
    if kind == "Sequence":
        merged: dict[str, str] = {}
        for processor in post_processor["processors"]:
            merged |= _around(processor)
        return merged
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {"bos_token": post_processor["cls"][0], "eos_token": post_processor["sep"][0]}
    if kind != "TemplateProcessing":
        return {}
    special = [part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in post_processor["single"]]
    return {key: special[at] for key, at in (("bos_token", 0), ("eos_token", -1)) if special and special[at]}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read the tokenizer {path}: {error.strerror}",
            hint="data.tokenizer is a path from the current directory",
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a tokenizer's file: it holds no object")
    return content
