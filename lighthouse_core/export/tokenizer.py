"""A tokenizer in the files that transformers and tokenizers read."""

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lighthouse_core.data import tokenizer as ours
from lighthouse_core.data.tokenizers.huggingface import COMPANIONS, HuggingFaceTokenizer
from lighthouse_core.data.tokenizers.model_file import NORMAL, UNKNOWN, ModelFile
from lighthouse_core.data.tokenizers.sentencepiece import SPACE, SentencePieceTokenizer
from lighthouse_core.errors import ExportError

BOS, EOS = "<s>", "</s>"  # of the bytes tokenizer
_SAMPLE_BYTES = 300_000


def write_tokenizer(out: Path, tokenizer: ours.Tokenizer, *, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into the directory `out`.

    A sentencepiece model is written beside them as tokenizer.model; tokenizer.json gives the same ids. A tokenizer.json
    is copied with the files that came with it. Encoding prepends BOS, as every training document starts with it.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        _copy(out, tokenizer, max_length)
        return
    if isinstance(tokenizer, SentencePieceTokenizer):
        (out / "tokenizer.model").write_bytes(tokenizer.content)
        pieces = tokenizer.model.pieces
        bos, eos = pieces[tokenizer.bos_id].text, pieces[tokenizer.eos_id].text
        written = _sentencepiece_tokenizer(tokenizer)
    else:
        bos, eos = BOS, EOS
        written = _bytes_tokenizer()
    written.save(str(out / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": eos}
    _write_json(out / "tokenizer_config.json", names | _settings(max_length))
    _write_json(out / "special_tokens_map.json", names)


def check_tokenizer(directory: Path, tokenizer: ours.Tokenizer, *, transformers: bool) -> int:
    """Compare a written tokenizer with the one that was trained with, on source code and on runs of one character.

    Args:
        transformers: also compare what AutoTokenizer makes of the directory.

    Returns:
        The size of the text in bytes.

    Raises:
        ExportError: an id differs.
    """
    texts = _sample()
    written = Tokenizer.from_file(str(directory / "tokenizer.json"))
    written.encode_special_tokens = True
    written.no_truncation()
    written.no_padding()
    for text in texts:
        _compare("tokenizer.json", text, written.encode(text, add_special_tokens=False).ids, tokenizer)
    if transformers:
        from transformers import AutoTokenizer

        auto = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        for text in texts[1:]:
            ids = auto(text, add_special_tokens=False, verbose=False).input_ids
            _compare("transformers' AutoTokenizer", text, ids, tokenizer)
    return sum(len(text.encode()) for text in texts)


def _compare(name: str, text: str, found: list[int], tokenizer: ours.Tokenizer) -> None:
    expected = tokenizer.encode(text).tolist()
    if found != expected:
        at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
        near = tokenizer.decode(expected[max(at - 3, 0) : at + 5])
        raise ExportError(
            f"{name} disagrees with the tokenizer that the model was trained with at token {at}, near {near!r}",
            hint='"tokenizer_class": "PreTrainedTokenizerFast" in the tokenizer_config.json of the run may help'
            if isinstance(tokenizer, HuggingFaceTokenizer)
            else None,
        )


def _sample() -> list[str]:
    """Source code, as one text, then short texts."""
    code, size = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size < _SAMPLE_BYTES:
            code.append(file.read_text(encoding="utf-8", errors="ignore"))
            size += len(code[-1])
    short = ["", " ", "  two  spaces  ", "é ß 中文 עברית 👩‍👩‍👧 e\u0301\r\n\tx\x00\x7f", "it's 12.5 <0x41>"]
    return ["".join(code), *short, *(char * n for char in " \n\t=-#a0" for n in range(1, 40))]


def _settings(max_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],  # no token_type_ids: Llama has none
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that spells "<s>" is its characters, as in training
    }


def _copy(out: Path, tokenizer: HuggingFaceTokenizer, max_length: int) -> None:
    shutil.copyfile(tokenizer.path, out / "tokenizer.json")
    for name in COMPANIONS:
        if tokenizer.path.with_name(name).is_file():
            shutil.copyfile(tokenizer.path.with_name(name), out / name)
    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    config = out / "tokenizer_config.json"
    if config.is_file():
        given = json.loads(config.read_bytes())
        missing = {key: token for key, token in names.items() if not given.get(key)}
        if missing:
            _write_json(config, given | missing)
    else:
        _write_json(config, names | _settings(max_length))


def _sentencepiece_tokenizer(source: SentencePieceTokenizer) -> Tokenizer:
    model = source.model
    vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
    unknown = next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=_merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback
        )
    )
    # Metaspace, the pre-tokenizer made for this, cuts the text at spaces, which pieces may span.
    prefix = [normalizers.Prepend(SPACE)] if model.dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    bos, eos = (model.pieces[i].text for i in (source.bos_id, source.eos_id))
    # BOS and EOS are no added tokens: those are searched for in the text. So the decoder is what drops them.
    drop = [decoders.Replace(Regex(rf"\A{_escape(mark)}\z"), "") for mark in dict.fromkeys((bos, eos))]
    strip = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [*drop, decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.post_processor = _starts_with(bos, source.bos_id)
    return tokenizer


def _merges(model: ModelFile) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, pieces with the higher score first.

    sentencepiece has no merges: of all neighbours that make a piece it joins those with the highest score, the leftmost
    first. Splits of one piece are therefore equals to it, which merges cannot be: where two overlap, as in a run of one
    character, the longer left part first is the leftmost, because what is left over collects on the right.
    """
    pieces = [piece for piece in model.pieces if piece.kind == NORMAL]
    texts = {piece.text for piece in pieces}
    ordered = sorted(pieces, key=lambda piece: -piece.score)
    return [
        (text[:at], text[at:])
        for text in (piece.text for piece in ordered)
        for at in range(len(text) - 1, 0, -1)
        if text[:at] in texts and text[at:] in texts
    ]


def _bytes_tokenizer() -> Tokenizer:
    # BOS and EOS are words of the vocabulary without being added tokens: those are searched for in the text, and a
    # text that spells "<s>" would become BOS. For the same reason the decoder is what drops them.
    ids = {BOS: ours.BytesTokenizer.bos_id, EOS: ours.BytesTokenizer.eos_id}
    vocab = {char: byte for byte, char in enumerate(_byte_chars())} | ids
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(BOS, ""), decoders.Replace(EOS, ""), decoders.ByteLevel()])
    tokenizer.post_processor = _starts_with(BOS, ids[BOS])
    return tokenizer


def _starts_with(bos: str, bos_id: int) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def _byte_chars() -> list[str]:
    """The printable character that stands for each byte in the ByteLevel alphabet.

    Printable Latin-1 stands for itself; the other bytes take the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _escape(text: str) -> str:
    return "".join(char if char.isalnum() else f"\\{char}" for char in text)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
