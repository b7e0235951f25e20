"""A Hugging Face tokenizer.json as a tokenizer."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lighthouse_core.data.documents import stable_hash
from lighthouse_core.data.tokenizers.stands_for import bytes_by_rules
from lighthouse_core.data.tokenizers.text import to_text
from lighthouse_core.errors import DataError
from lighthouse_core.reading import read_json

# Files beside tokenizer.json that name its special tokens.
NAMING = ("tokenizer_config.json", "special_tokens_map.json")
# Files beside tokenizer.json that a run and an export keep.
COMPANIONS = (*NAMING, "chat_template.jinja")
# Beside a tokenizer.json, this file says that the tokenizer is a model's.
MODEL = "config.json"
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
    its post-processor puts around a text. Where none of these names EOS, they are added tokens of the usual names; a
    lone <|endoftext|> is then both, as in GPT-2. `"bos_token": null` in tokenizer_config.json says that there is no
    BOS, whatever the others say, and so does an EOS that is named without a BOS: documents then begin without one.

    A tokenizer.json beside a config.json is a model's. Its post-processor alone says whether there is a BOS, and which:
    the model saw what it puts before a text. The tokenizer_config.json may name a BOS that no text begins with.

    Attributes:
        path: of the tokenizer.json.
        bos, eos: the tokens themselves; bos and bos_id are None where there is none.

    Raises:
        DataError: a file is missing or cannot be read, EOS cannot be told, BOS or EOS is not in the vocabulary, or is a
            piece of ordinary text; or a model's post-processor puts more than a BOS before a text.
    """

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        content = _read_json(path)
        if "config" in content and isinstance(content.get("vocab"), list):
            raise DataError(
                f"{path} is a tekken.json of Mistral, not a tokenizer.json",
                hint="use the tokenizer.json of the same model",
            )
        self.path = path
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises no narrower one
            raise DataError(
                f"{path} is not a tokenizer.json: {error}", hint="copy it anew, or name another data.tokenizer"
            ) from None
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.bos, self.eos = _special_tokens(path, content)
        self.bos_id = None if self.bos is None else self._id(self.bos)
        self.eos_id = self._id(self.eos)
        self._encoder = Tokenizer.from_str(json.dumps(_without_pieces(content, {self.bos, self.eos})))
        self._encoder.no_truncation()
        self._encoder.no_padding()
        # A document that spells a special token must not end or begin one.
        self._encoder.encode_special_tokens = True
        for key, token in (("bos_token", self.bos), ("eos_token", self.eos)):
            if token is not None and self._from_text(token, content):
                raise DataError(
                    f"{path} has {token!r} as its {key}, which ordinary text holds, too: a document would end or begin "
                    "in its middle",
                    hint=f"name a token of its own in a {path.with_name(NAMING[0])}",
                )
        if of_model(path):
            self._check_beginning()
        rules = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        self.fingerprint = stable_hash("tokenizer.json", json.dumps(rules, sort_keys=True), self.bos_id, self.eos_id)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of `text`, int32 [length], without BOS and EOS. A text that spells a special token is its characters;
        in what transformers and tokenizers make of the same files it is that token.

        Raises:
            DataError: `text` is not UTF-8.
        """
        return np.array(self._encoder.encode(to_text(text), add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Text of `ids`. Special tokens, BOS, EOS and ids that are no row of the vocabulary stand for nothing."""
        ends = (self.bos_id, self.eos_id)  # which are not special in every file
        within = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in ends]
        return self._tokenizer.decode(within, skip_special_tokens=True)

    def token_bytes(self) -> list[bytes] | None:
        """The bytes that each id stands for; see the protocol and `bytes_by_rules`, which says when it is None."""
        found = bytes_by_rules(json.loads(self._tokenizer.to_str()), self._tokenizer.get_vocab())
        if found is None:
            return None
        found |= {end: b"" for end in (self.bos_id, self.eos_id) if end is not None}
        return [found.get(i, b"") for i in range(self.vocab_size)]

    def _from_text(self, token: str, content: dict[str, Any]) -> bool:
        """Whether some text becomes this token. A special one does not, unless the vocabulary's rules make it, too."""
        found = self._id(token)
        spelt = self._tokenizer.decode([found], skip_special_tokens=False)
        # A piece may need a beginning or an end of a word before or after it.
        marks = [content["model"].get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")]
        words = {token, spelt, spelt.strip(), token.removeprefix(marks[0]).removesuffix(marks[1])} - {""}
        texts = (text for word in words for text in (word, f" {word}", f"a{word}", f"{word}a", f"{word} a"))
        return any(found in self._encoder.encode(text, add_special_tokens=False).ids for text in texts)

    def _check_beginning(self) -> None:
        """Meet a post-processor that puts more before a text than the BOS that a document begins with."""
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        expected = [self.bos_id] * (self.bos_id is not None) + self._tokenizer.encode("a", add_special_tokens=False).ids
        found = self._tokenizer.encode("a").ids
        if found[: len(expected)] != expected:
            raise DataError(
                f"the post-processor of {self.path} puts more before a text than one token",
                hint="a document of training begins with one BOS or none; name another data.tokenizer",
            )

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise DataError(
                f"{self.path} has no token {token!r}, which is named as its BOS or EOS",
                hint=f"name tokens of its vocabulary in a {self.path.with_name(NAMING[0])}",
            )
        return found


def of_model(path: Path) -> bool:
    """Whether the tokenizer.json at `path` is a model's: whether a config.json lies beside it."""
    return path.with_name(MODEL).is_file()


def _without_pieces(content: dict[str, Any], tokens: set[str | None]) -> dict[str, Any]:
    """A tokenizer.json in which no text becomes these special tokens.

    A model that looks whole pieces up finds in a text whatever its vocabulary holds, special tokens among them. BPE
    finds what its merges make, and needs no change. A token of one character is ordinary text, and stays.
    """
    added = content.get("added_tokens") or ()
    model = content.get("model") or {}
    spelt = {token["content"] for token in added if token.get("special") and len(token["content"]) > 1} & tokens
    spelt.discard(model.get("unk_token"))
    if not spelt or model.get("type") not in ("Unigram", "WordLevel", "WordPiece"):
        return content
    if model["type"] == "Unigram":
        # The place in the list is the id; an empty piece is in no text.
        vocab: Any = [["" if piece in spelt else piece, score] for piece, score in model["vocab"]]
    else:
        vocab = {piece: found for piece, found in model["vocab"].items() if piece not in spelt}
    kept = [token for token in added if token["content"] not in spelt]
    return content | {"model": model | {"vocab": vocab}, "added_tokens": kept}


def _special_tokens(path: Path, content: dict[str, Any]) -> tuple[str | None, str]:
    """(BOS, EOS) of the tokenizer.json at `path`; None for a BOS that it has not."""
    # What is there and is no file is refused: without it, other tokens could be taken for BOS and EOS.
    files = {name: _read_json(file) for name in NAMING if os.path.lexists(file := path.with_name(name))}
    around = _around(content.get("post_processor") or {})
    bos, eos = (
        next((name for source in (*files.values(), around) if (name := token_name(path, source, key))), None)
        for key in ("bos_token", "eos_token")
    )
    # Said in so many words, as Qwen's files do, unlike a key that is left out.
    without = files.get(NAMING[0], {}).get("bos_token", "") is None
    if of_model(path):
        bos = around.get("bos_token")
        without = bos is None
    elif without:
        bos = None
    added = {token.get("content") for token in content.get("added_tokens") or ()}
    for usual in _USUAL:
        if not eos and bos in (None, usual[0]) and set(usual) <= added:
            bos, eos = (None if without else usual[0]), usual[1]
    if not eos:
        names = "EOS" if bos or without else "BOS and EOS"
        raise DataError(
            f"cannot tell which token of {path} is {names}",
            hint=f'name both in a {path.with_name(NAMING[0])}: {{"bos_token": "...", "eos_token": "..."}}; '
            "null is a BOS that there is not",
        )
    return bos, eos


def token_name(path: Path, source: dict[str, Any], key: str) -> str | None:
    """The token that a file of names beside `path` gives under `key`, as a string or as an object; None for null.

    Raises:
        DataError: it is neither.
    """
    named = source.get(key)
    if isinstance(named, dict):
        named = named.get("content")
    if named is not None and not isinstance(named, str):
        raise DataError(f"{key} beside {path} is no token: {named!r}", hint=f'write it as {{"{key}": "..."}}')
    return named


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
    ends = (("bos_token", 0), ("eos_token", -1))
    return {key: token for key, at in ends if special and (token := special[at])}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except OSError as error:
        raise DataError(
            f"cannot read the tokenizer {path}: {error.strerror}",
            hint="data.tokenizer is a path from the current directory"
            if path.name not in NAMING
            else f"restore {path.name}, or move it away",
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", hint="copy it anew, or name another data.tokenizer") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path} is not a tokenizer's file: it holds no object", hint="copy it anew, or name another data.tokenizer"
        )
    return content
