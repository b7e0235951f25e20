"""The `bytes` tokenizer in the files that transformers and tokenizers read."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

BOS, BOS_ID = "<s>", 256
EOS, EOS_ID = "</s>", 257


def write_bytes_tokenizer(out: Path, *, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into the directory `out`.

    Byte b is id b. Encoding prepends BOS, as every training document starts with it.
    """
    _bytes_tokenizer().save(str(out / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS}
    config = names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],  # no token_type_ids: Llama has none
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that spells "<s>" is three bytes, as in training
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def _bytes_tokenizer() -> Tokenizer:
    # BOS and EOS are words of the vocabulary without being added tokens: those are searched for in the text, and a
    # text that spells "<s>" would become BOS. For the same reason the decoder is what drops them.
    vocab = {char: byte for byte, char in enumerate(_byte_chars())} | {BOS: BOS_ID, EOS: EOS_ID}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(BOS, ""), decoders.Replace(EOS, ""), decoders.ByteLevel()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def _byte_chars() -> list[str]:
    """The printable character that stands for each byte in the ByteLevel alphabet.

    Printable Latin-1 stands for itself; the other bytes take the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
