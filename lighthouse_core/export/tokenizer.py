"""A tokenizer in the files that transformers, tokenizers and llama.cpp read.

Encoding a text with any of them gives what training makes of a document that is the text, without the EOS at its end:
BOS where documents begin with one, and the ids of the text. BOS, EOS and the pad token are special tokens there. One
difference is left, as in every Hugging Face model: a text that spells a special token ("</s>") becomes that token,
where training had its characters.

The tokenizer of the weights that training began with is given back instead: its files are copied as they came.
"""

import itertools
import json
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lighthouse_core.config.origin import TOKENIZER_FILES
from lighthouse_core.data import tokenizer as ours
from lighthouse_core.data.tokenizer import tokenizer_files
from lighthouse_core.data.tokenizers.huggingface import COMPANIONS, NAMING, HuggingFaceTokenizer, token_name
from lighthouse_core.data.tokenizers.merges import merge_list
from lighthouse_core.data.tokenizers.model_file import CONTROL, UNKNOWN
from lighthouse_core.data.tokenizers.sentencepiece import SPACE, SentencePieceTokenizer
from lighthouse_core.data.tokenizers.stands_for import byte_chars
from lighthouse_core.data.tokenizers.text import vocabulary_texts
from lighthouse_core.errors import DataError, ExportError
from lighthouse_core.reading import read_json

BOS, EOS, PAD = "<s>", "</s>", "<pad>"  # of the bytes tokenizer; PAD also of others that have none
_SAMPLE_BYTES = 300_000
_LONG = 100_000  # characters from which on a text is encoded in one way only, for time
_SHORT = (
    "",
    " ",
    "  two  spaces  ",
    "é ß 中文 עברית 👩‍👩‍👧 e\u0301\r\n\tx\x00\x7f",
    "it's 12.5 <0x41>",
    "<s> </s> <unk> <pad> <|endoftext|>",
)
# Families for which transformers 5 takes a tokenizer class of its own, whatever tokenizer_config.json names; the class
# has rules of its own, such as NFC, in place of tokenizer.json's.
_OWN_CLASS = ("qwen2",)
# A tokenizer_config.json that names code is read by the class that it names. There is no such code: who asks for it to
# be run is told that the file is not there.
_NO_CODE = {"auto_map": {"AutoTokenizer": [None, "none.PreTrainedTokenizerFast"]}}
# Settings of a tokenizer_config.json with which transformers changes what tokenizer.json says.
_CHANGING = ("add_bos_token", "add_eos_token", "add_prefix_space", "auto_map", "legacy", "split_special_tokens")


class Special(NamedTuple):
    """A special token and its id."""

    text: str
    id: int


def pad_token(tokenizer: ours.Tokenizer, rows: int) -> Special:
    """The pad token of an export, if possible one that training never produces.

    A collator that leaves pad tokens out of the loss would leave out every EOS if EOS were the pad token, and a model
    fine-tuned with it would never learn to stop. So it is, in this order: what the tokenizer's own files name, were it
    EOS; a special token of the vocabulary that is called pad, or reserved; the unknown piece, where byte fallback
    leaves nothing unknown; the first row of the model above the vocabulary, as "<pad>"; and EOS, where there is none
    of these.

    Args:
        rows: of the model's embedding; ids are below it.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _given_pad(tokenizer, rows)
    ends = _ends(tokenizer)
    taken = {token.text for token in ends}
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = tokenizer.model.pieces
        taken = {piece.text for piece in pieces}
        for i, piece in enumerate(pieces):
            if piece.kind == CONTROL and _called_pad(piece.text) and Special(piece.text, i) not in ends:
                return Special(piece.text, i)
        unknown = next((i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN), None)
        if unknown is not None and tokenizer.model.byte_fallback:
            return Special(pieces[unknown].text, unknown)
    return _row_above(taken, tokenizer.vocab_size, rows) or ends[-1]


def _given_pad(tokenizer: HuggingFaceTokenizer, rows: int) -> Special:
    content = read_json(tokenizer.path)
    whole = Tokenizer.from_str(json.dumps(content))
    vocab, ends = whole.get_vocab(), _ends(tokenizer)
    files = [read_json(file) for name in NAMING if (file := tokenizer.path.with_name(name)).is_file()]
    # The first token that transformers adds takes the first row above, if there is no row that the vocabulary leaves
    # out, and no other token that is named in the files and not in the vocabulary.
    dense = len(vocab) == tokenizer.vocab_size and all(_named(file) <= vocab.keys() for file in files)
    for file in files:
        named = token_name(tokenizer.path, file, "pad_token")
        if named and named in vocab:
            return Special(named, vocab[named])
        if named and dense and tokenizer.vocab_size < rows:
            return Special(named, tokenizer.vocab_size)
    others = [Special(token.content, i) for i, token in whole.get_added_tokens_decoder().items() if token.special]
    for called in (_called_pad, lambda text: "reserved" in text.lower()):
        found = [token for token in others if called(token.text) and token not in ends]
        if found:
            return min(found, key=lambda token: token.id)
    model = content["model"]
    unknown = model.get("unk_token")
    if unknown in vocab and model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
        return Special(unknown, vocab[unknown])
    above = _row_above(set(vocab), tokenizer.vocab_size, rows) if dense else None
    return above or ends[-1]


def _named(config: dict[str, Any]) -> set[str]:
    """The tokens that a file of names speaks of, but for the pad token."""
    tokens = [value for key, value in config.items() if key.endswith("_token") and key != "pad_token"]
    for key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
        several = config.get(key) or ()
        tokens += several.values() if isinstance(several, dict) else several
    contents = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    return {content for content in contents if isinstance(content, str)}


def _ends(tokenizer: ours.Tokenizer) -> list[Special]:
    """BOS, if there is one, and EOS."""
    bos: str | None
    if isinstance(tokenizer, HuggingFaceTokenizer):
        bos, eos = tokenizer.bos, tokenizer.eos
    elif isinstance(tokenizer, SentencePieceTokenizer):
        pieces = tokenizer.model.pieces
        bos = None if tokenizer.bos_id is None else pieces[tokenizer.bos_id].text
        eos = pieces[tokenizer.eos_id].text
    else:
        bos, eos = BOS, EOS
    begin = [] if bos is None or tokenizer.bos_id is None else [Special(bos, tokenizer.bos_id)]
    return [*begin, Special(eos, tokenizer.eos_id)]


def _called_pad(text: str) -> bool:
    return re.search(r"(?<![a-z])pad", text.lower()) is not None


def _row_above(taken: set[str], first: int, rows: int) -> Special | None:
    """The row `first`, under a name that is free; None where the model does not have it."""
    name = next(name for i in range(len(taken) + 1) if (name := PAD if not i else f"<pad{i}>") not in taken)
    return Special(name, first) if first < rows else None


def given_files(folder: Path, tokenizer: ours.Tokenizer, name: str) -> list[Path]:
    """The tokenizer's files in `folder`, which describes the weights that a run began with.

    Args:
        tokenizer: of the run.
        name: what its recipe calls it.

    Returns:
        All of them; none where the run trains with another tokenizer, or where its own chat template or names differ.
    """
    files = {name: file for name in TOKENIZER_FILES if (file := folder / name).is_file()}
    try:
        if ours.build_tokenizer(str(folder)).fingerprint != tokenizer.fingerprint:
            return []
    except DataError:
        return []
    if isinstance(tokenizer, HuggingFaceTokenizer):
        kept = {Path(name).name: file for name, file in tokenizer_files(name).items()}
        for companion in COMPANIONS:
            both = [of.get(companion) for of in (files, kept)]
            if len({file and file.read_bytes() for file in both}) > 1:
                return []
    return list(files.values())


def write_tokenizer(
    out: Path,
    tokenizer: ours.Tokenizer,
    *,
    max_length: int,
    rows: int = 0,
    transformers: bool = False,
    family: str = "",
) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into the directory `out`.

    A sentencepiece model is written beside them as tokenizer.model; tokenizer.json gives the same ids.

    A tokenizer.json that came from elsewhere is copied with the files that lay beside it. It is changed only where BOS
    or EOS is not a special token in it, or where it does not put before a text what training puts before a document.
    In tokenizer_config.json, settings that contradict training's ids (split_special_tokens, add_bos_token,
    add_eos_token) are corrected, what is not named is added, and everything else is kept.

    Args:
        max_length: the longest text in tokens that the model was made for.
        rows: of the model's embedding, of which one above the vocabulary may become the pad token (`pad_token`).
        transformers: whether AutoTokenizer can be asked. If it then does not give training's ids for the files that
            came with a tokenizer.json, their other settings that change ids are left out, too, the class is
            PreTrainedTokenizerFast, and a special_tokens_map.json goes.
        family: of the model. transformers reads the files of a qwen2 by Qwen2's class unless they have an auto_map, so
            they get one where that class has other rules.
    """
    pad = pad_token(tokenizer, rows)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        _copy(out, tokenizer, pad, max_length)
        if transformers:
            _settle(out, tokenizer, pad, family)
        return
    prefix = False
    if isinstance(tokenizer, SentencePieceTokenizer):
        (out / "tokenizer.model").write_bytes(tokenizer.content)
        written = _sentencepiece_tokenizer(tokenizer)
        prefix = tokenizer.model.dummy_prefix
    else:
        written = _bytes_tokenizer()
    written.add_special_tokens([_special(pad.text)])
    assert written.token_to_id(pad.text) == pad.id
    written.save(str(out / "tokenizer.json"))
    names = dict(zip(("eos_token", "bos_token"), (token.text for token in reversed(_ends(tokenizer))), strict=False))
    names["pad_token"] = pad.text
    # llama.cpp puts a space before every text unless it is told not to.
    spaces = {} if prefix else {"add_prefix_space": False}
    code = _NO_CODE if family in _OWN_CLASS else {}
    write_json(out / "tokenizer_config.json", names | spaces | _settings(max_length) | code)
    write_json(out / "special_tokens_map.json", names)


def check_tokenizer(directory: Path, tokenizer: ours.Tokenizer, *, transformers: bool, rows: int | None = None) -> int:
    """Compare a written tokenizer with the one that was trained with, called as its users call it.

    Ids are compared with BOS and without, on the texts of `sample_texts`, from which the spellings of special tokens
    are taken out, and on texts made from the vocabulary. Special tokens are tried on their own: each must be one id.
    Decoding must give BOS and EOS when they are asked
    for, and the text when they are not. BOS and EOS must be those of training, and there must be a pad token.

    Args:
        transformers: also compare what AutoTokenizer makes of the directory.
        rows: of the model's embedding; the pad token must then be that of `pad_token`.

    Returns:
        The size of the text in bytes.

    Raises:
        ExportError: something differs.
    """
    texts = list(sample_texts())
    pad = None if rows is None else pad_token(tokenizer, rows)
    everyone = [_plain(directory), *([_auto(directory, tokenizer)] if transformers else [])]
    pieces = vocabulary_texts(tokenizer.token_bytes() or (), set().union(*(written.specials for written in everyone)))
    expected = [tokenizer.encode(piece).tolist() for piece in pieces]
    for written in everyone:
        _check(written, tokenizer, pad, texts)
        for found, ids in zip(written.encode_all(pieces), expected, strict=True):
            _compare(written.name, tokenizer, found, ids)
    return sum(len(text.encode()) for text in (*texts, *pieces))


def check_given(directory: Path, tokenizer: ours.Tokenizer, *, transformers: bool) -> tuple[int, list[str]]:
    """Compare tokenizer files that were copied as they came with the tokenizer that was trained with.

    Ids are compared with BOS and without, on the texts of `check_tokenizer`. Names, classes and settings are their own.

    Args:
        transformers: also compare what AutoTokenizer makes of the directory. Where only AutoTokenizer differs, it did
            so before the training; that is no error.

    Returns:
        The size of the text in bytes, 0 where there is no tokenizer.json; and what a user should know, a sentence each.

    Raises:
        ExportError: tokenizer.json gives other ids than training had.
    """
    everyone, notes = [_plain(directory)] if (directory / "tokenizer.json").is_file() else [], []
    before = "as it did before the training: the files are unchanged"
    if transformers:
        try:
            everyone.append(_auto(directory, tokenizer))
        except ExportError as error:
            notes.append(f"{error}, {before}")
    texts = list(sample_texts())
    pieces = vocabulary_texts(tokenizer.token_bytes() or (), set().union(*(written.specials for written in everyone)))
    expected = [tokenizer.encode(piece).tolist() for piece in pieces]
    for written in everyone:
        try:
            _check_ids(written, tokenizer, texts, ends=True)
            for found, ids in zip(written.encode_all(pieces), expected, strict=True):
                _compare(written.name, tokenizer, found, ids)
        except ExportError as error:
            if written.names is None:
                raise
            notes.append(f"{error}, {before}")
    has = any(written.names is None for written in everyone)
    return sum(len(text.encode()) for text in (*texts, *pieces)) * has, notes


def sample_texts() -> Iterator[str]:
    """The texts on which an export's ids are compared with training's: source code, as one text, then short texts."""
    code, size = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size < _SAMPLE_BYTES:
            code.append(file.read_text(encoding="utf-8", errors="ignore"))
            size += len(code[-1])
    yield "".join(code)
    yield from _SHORT
    yield from (char * n for char in " \n\t=-#a0" for n in range(1, 40))


class _Written(NamedTuple):
    """A tokenizer that was read back from the written files.

    Attributes:
        name: for messages.
        encode: (text, with BOS) -> ids, once for every way of asking.
        encode_all: texts -> ids of each, without BOS.
        decode: (ids, without special tokens) -> text.
        specials: the special tokens that it looks for in a text.
        names: bos_token, eos_token and pad_token, as (token, id); None where it has no such names.
        rewrites: whether its settings may tidy up decoded text.
    """

    name: str
    encode: Callable[[str, bool], Iterator[list[int]]]
    encode_all: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int], bool], str]
    specials: set[str]
    names: dict[str, tuple[str | None, int | None]] | None
    rewrites: bool


def _plain(directory: Path) -> _Written:
    written = Tokenizer.from_file(str(directory / "tokenizer.json"))
    written.no_truncation()
    written.no_padding()
    return _Written(
        "tokenizer.json",
        lambda text, begins: iter([written.encode(text, add_special_tokens=begins).ids]),
        lambda texts: [found.ids for found in written.encode_batch(texts, add_special_tokens=False)],
        lambda ids, skip: written.decode(ids, skip_special_tokens=skip),
        {token.content for token in written.get_added_tokens_decoder().values() if token.special},
        None,
        rewrites=False,
    )


def _auto(directory: Path, tokenizer: ours.Tokenizer) -> _Written:
    from transformers import AutoTokenizer

    try:
        auto = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what it meets
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"transformers' AutoTokenizer cannot read what was written: {reason}") from error

    def encode(text: str, begins: bool) -> Iterator[list[int]]:
        asked = {} if begins else {"add_special_tokens": False}
        yield auto(text, verbose=False, **asked).input_ids
        yield auto.encode(text, verbose=False, **asked)

    return _Written(
        "transformers' AutoTokenizer",
        encode,
        lambda texts: auto(texts, add_special_tokens=False, verbose=False).input_ids if texts else [],
        lambda ids, skip: auto.decode(ids, skip_special_tokens=skip),
        {token.content for token in auto.added_tokens_decoder.values() if token.special},
        {key: (getattr(auto, key), getattr(auto, f"{key}_id")) for key in ("bos_token", "eos_token", "pad_token")},
        rewrites=isinstance(tokenizer, HuggingFaceTokenizer),
    )


def _check(written: _Written, tokenizer: ours.Tokenizer, pad: Special | None, texts: Iterable[str]) -> None:
    ends = _ends(tokenizer)
    begin = [token.id for token in ends[:-1]]
    if written.names is not None:
        wanted = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        if pad is not None:
            wanted["pad_token"] = pad.id
        elif written.names["pad_token"][1] is None:
            raise ExportError(f"{written.name} has no pad token")
        for key in wanted:
            named, number = written.names[key]
            if number != wanted[key]:
                raise ExportError(f"{written.name} has the {key} {named!r}, id {number}, instead of id {wanted[key]}")
    for token in ends:
        shown, left_out = (written.decode([token.id], skip) for skip in (False, True))
        if not shown or left_out:
            raise ExportError(
                f"{written.name} decodes {token.text!r} to {shown!r}, and to {left_out!r} without special tokens"
            )
        # Alone, and behind a text, as trainers put an EOS behind an example.
        for text in ("", "ab"):
            for found in written.encode(text + token.text, True):
                expected = [*begin, *tokenizer.encode(text).tolist(), token.id]
                _compare(f"{written.name}, given {text + token.text!r},", tokenizer, found, expected)
    for text, ids in _check_ids(written, tokenizer, texts):
        if not written.rewrites and written.decode([*begin, *ids, ends[-1].id], True) != tokenizer.decode(ids):
            raise ExportError(f"{written.name} decodes {text[:40]!r} to another text than the tokenizer of the run")


def _check_ids(
    written: _Written, tokenizer: ours.Tokenizer, texts: Iterable[str], *, ends: bool = False
) -> list[tuple[str, list[int]]]:
    """Compare ids of texts with training's, with BOS and without.

    Args:
        ends: whether something may follow a text, as a post-processor may put an EOS there.

    Returns:
        The texts, without the spellings of special tokens, and training's ids of each.
    """
    begin, checked = [token.id for token in _ends(tokenizer)[:-1]], []
    for text in (_without(text, written.specials) for text in texts):
        ids = tokenizer.encode(text).tolist()
        ways = written.encode(text, True)
        for found in itertools.islice(ways, None if len(text) < _LONG else 1):
            _compare(written.name, tokenizer, found[: len(begin + ids)] if ends else found, begin + ids)
        for found in written.encode(text, False) if len(text) < _LONG else ():
            _compare(f"{written.name}, without special tokens,", tokenizer, found, ids)
        checked.append((text, ids))
    return checked


def _compare(name: str, tokenizer: ours.Tokenizer, found: list[int], expected: list[int]) -> None:
    if found != expected:
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
        near = tokenizer.decode(expected[max(at - 3, 0) : at + 5])
        raise ExportError(
            f"{name} disagrees with the tokenizer that the model was trained with at token {at}, near {near!r}",
            hint='"tokenizer_class": "PreTrainedTokenizerFast" in the tokenizer_config.json of the run may help'
            if isinstance(tokenizer, HuggingFaceTokenizer)
            else None,
        )


def _without(text: str, specials: set[str]) -> str:
    """`text` without the spellings of special tokens, which are ids in an export and characters in training."""
    while found := next((special for special in specials if special and special in text), None):
        text = text.replace(found, "")
    return text


def _settings(max_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],  # no token_type_ids: Llama has none
        "padding_side": "left",  # a text is continued where its batch ends
        "clean_up_tokenization_spaces": False,
    }


def _copy(out: Path, tokenizer: HuggingFaceTokenizer, pad: Special, max_length: int) -> None:
    content = read_json(tokenizer.path)
    if _amend(content, tokenizer):
        (out / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    else:
        shutil.copyfile(tokenizer.path, out / "tokenizer.json")
    for name, beside in tokenizer_files(str(tokenizer.path)).items():
        if Path(name).name in COMPANIONS:
            shutil.copyfile(beside, out / Path(name).name)
    names = _names(tokenizer, pad)
    file = out / NAMING[0]
    # As llama.cpp takes vocabularies with byte fallback for sentencepiece's, and puts a space before every text then.
    begins = _parse(content).encode("a", add_special_tokens=False).tokens[:1]
    spaces = {} if begins and begins[0].startswith(SPACE) else {"add_prefix_space": False}
    if not file.is_file():
        write_json(file, names | spaces | _settings(max_length))
        return
    given = read_json(file)
    config = given | {key: name for key, name in names.items() if token_name(file, given, key) != name}
    for key, token in config.items():
        if key.endswith("_token") and isinstance(token, dict) and "__type" not in token:
            config[key] = token.get("content")  # transformers 5 takes no others
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    config.setdefault("bos_token", None)  # a class may bring a BOS of its own where the key is left out
    if content["model"].get("byte_fallback"):
        config = spaces | config
    if config.get("split_special_tokens"):
        del config["split_special_tokens"]
    for key, wanted in (("add_bos_token", tokenizer.bos is not None), ("add_eos_token", False)):
        if key in config and bool(config[key]) != wanted:
            config[key] = wanted
    if config != given:
        write_json(file, config)


def _names(tokenizer: HuggingFaceTokenizer, pad: Special) -> dict[str, str | None]:
    return {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": pad.text}


def _amend(content: dict[str, Any], tokenizer: HuggingFaceTokenizer) -> bool:
    """Make BOS and EOS of a tokenizer.json special tokens that decoding shows, and put BOS before every text.

    Returns:
        Whether there was anything to change.
    """
    before = json.dumps(content)
    ends = _ends(tokenizer)
    added = content.setdefault("added_tokens", [])
    for token in dict.fromkeys(ends):
        entry = next((entry for entry in added if entry["content"] == token.text), None)
        if entry is None:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": token.id, "content": token.text, **flags, "special": True})
            added.sort(key=lambda entry: entry["id"])
        else:
            entry["special"] = True
    decoder = content.get("decoder") or {}
    if any(not _parse(content).decode([token.id], skip_special_tokens=False) for token in ends):
        # What replaces a token by nothing is how a file may hide it.
        parts = [part for part in decoder.get("decoders", ()) if part["type"] != "Replace" or part["content"]]
        content["decoder"] = decoder | {"decoders": parts} if "decoders" in decoder else content["decoder"]
    given, begin = _parse(content), [token.id for token in ends[:-1]]
    texts = ("", "a", "a b")
    if any(given.encode(text).ids != begin + given.encode(text, add_special_tokens=False).ids for text in texts):
        parts = [part for part in _parts(content.get("post_processor")) if part["type"] == "ByteLevel"]
        if begin:
            given.post_processor = _starts_with(*ends[0])
            parts.append(json.loads(given.to_str())["post_processor"])
        content["post_processor"] = (
            {"type": "Sequence", "processors": parts} if len(parts) > 1 else (parts or [None])[0]
        )
    return json.dumps(content) != before


def _parse(content: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _parts(post_processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    if post_processor is None:
        return []
    return post_processor["processors"] if post_processor["type"] == "Sequence" else [post_processor]


def _settle(out: Path, tokenizer: HuggingFaceTokenizer, pad: Special, family: str) -> None:
    """Leave settings out of the copied tokenizer_config.json until AutoTokenizer gives training's ids, or all are out;
    what is wrong then is for `check_tokenizer` to say."""
    file = out / NAMING[0]
    code = _NO_CODE if family in _OWN_CLASS else {}
    for generic in (False, True):
        try:
            _check(_auto(out, tokenizer), tokenizer, pad, _SHORT)
            return
        except ExportError:
            config = {key: value for key, value in read_json(file).items() if key not in _CHANGING}
            if generic:
                config |= {"tokenizer_class": "PreTrainedTokenizerFast", **_names(tokenizer, pad), **code}
                (out / NAMING[1]).unlink(missing_ok=True)
            write_json(file, config)


def _sentencepiece_tokenizer(source: SentencePieceTokenizer) -> Tokenizer:
    model = source.model
    vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merge_list(model.pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    # Metaspace, the pre-tokenizer made for this, cuts the text at spaces, which pieces may span.
    prefix = [normalizers.Prepend(SPACE)] if model.dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    # Not BOS and EOS alone: sentencepiece makes no control piece of a text, and decodes none to one.
    tokenizer.add_special_tokens([_special(piece.text) for piece in model.pieces if piece.kind == CONTROL])
    if source.bos_id is not None:
        tokenizer.post_processor = _starts_with(model.pieces[source.bos_id].text, source.bos_id)
    return tokenizer


def _bytes_tokenizer() -> Tokenizer:
    ids = {BOS: ours.BytesTokenizer.bos_id, EOS: ours.BytesTokenizer.eos_id}
    vocab = {char: byte for byte, char in enumerate(byte_chars())} | ids
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_special(BOS), _special(EOS)])
    tokenizer.post_processor = _starts_with(BOS, ids[BOS])
    return tokenizer


def _special(text: str) -> AddedToken:
    return AddedToken(text, normalized=False, special=True)


def _starts_with(bos: str, bos_id: int) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
