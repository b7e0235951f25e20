"""What other tools make of exports: python tests/exports.py FOLDER [--llama-cpp TREE]

Trains four tiny models for three steps each into FOLDER and strips them: one of bytes, one of sentencepiece pieces, and
two of a tokenizer.json, with a BOS and without one. Then four tools use each export as their users would:

- TRL fine-tunes it for three steps. Examples must begin with BOS and end in EOS, EOS must count in the loss, and a
  token that is added for a chat must stay one id.
- lm-eval encodes a text and runs a local task of log-likelihoods: BOS must be there with add_bos_token=True.
- transformers' pipeline continues two texts of different length in one batch as it does one by one.
- llama.cpp converts the vocabulary and tokenizes 400 kB of text: its ids must be those of training.

It needs `pip install trl lm_eval`, a built llama.cpp (target llama-tokenize), and what convert_hf_to_gguf.py needs.
llama.cpp converts only tokenizer.json that it knows, so they are made from vocabularies in its models/. It refuses
exports of bytes, which is reported and no error.

Prints a row a figure. Ends with 1 where a figure is wrong or a tool is missing.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TEXT_BYTES = 400_000
CHAT = "<|im_start|>"
SIZES = {"dim": 32, "layers": 2, "heads": 2, "head_dim": 16, "ffn_dim": 64, "dense_layers": "[0, 1]"}


class Row(NamedTuple):
    """One figure of one tool on one export; None for `right` is something that is told and not judged."""

    export: str
    tool: str
    figure: str
    found: str
    right: bool | None


class Export(NamedTuple):
    """A directory of `lighthouse strip`, and the tokenizer that its model was trained with."""

    name: str
    path: Path
    tokenizer: Any

    @property
    def begin(self) -> list[int]:
        return [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]

    def ids(self, text: str) -> list[int]:
        """What a tool must make of a text."""
        return self.begin + self.tokenizer.encode(text).tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what is made goes here; exports that lie there are used again")
    parser.add_argument("--llama-cpp", type=Path, help="a source tree of llama.cpp with build/bin/llama-tokenize")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tree = given.llama_cpp.resolve() if given.llama_cpp else None
    tools: dict[str, Callable[[Export, Path], Iterator[tuple[str, Any, bool | None]]]] = {
        "TRL": trl,
        "lm-eval": lm_eval,
        "pipeline": pipeline,
        "llama.cpp": lambda export, scratch: llama_cpp(export, scratch, tree),
    }
    rows: list[Row] = []
    for export in exports(folder, tree):
        for tool, use in tools.items():
            scratch = folder / "scratch" / f"{export.name}-{tool}"
            scratch.mkdir(parents=True, exist_ok=True)
            print(f"{export.name}: {tool}", file=sys.stderr)
            try:
                rows += (
                    Row(export.name, tool, figure, str(found), right) for figure, found, right in use(export, scratch)
                )
            except Missing as missing:
                rows.append(Row(export.name, tool, "not installed", str(missing), False))
            except Exception as error:  # one tool's fault is a row, and the others still run
                traceback.print_exc()
                rows.append(Row(export.name, tool, type(error).__name__, (str(error).splitlines() or [""])[0], False))
    words = {True: "right", False: "WRONG", None: "told"}
    cells = [("export", "tool", "figure", "found", ""), *((*row[:4], words[row.right]) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return int(any(row.right is False for row in rows))


class Missing(Exception):
    """A tool that is not installed."""


def exports(folder: Path, tree: Path | None) -> Iterator[Export]:
    from lighthouse_core.data.tokenizer import build_tokenizer

    model = folder / "pieces.model"
    if not model.exists():
        lighthouse(folder, "tokenizer", "train", ROOT / "recipes/quickstart.toml", model, "--vocab", "2000")
    kinds: dict[str, tuple[str, int]] = {"bytes": ("bytes", 320), "sentencepiece": (str(model), 2048)}
    for name, (vocabulary, special, config) in GIVEN.items():
        kinds[name] = give(folder / name, tree, vocabulary, special, config)
    for name, (tokenizer, rows) in kinds.items():
        out = folder / f"{name}-export"
        if not out.exists():
            size = {"vocab_size": rows} | SIZES
            settings = [f"model.{key}={value}" for key, value in size.items()]
            settings += ["lighthouse.enabled=false", f"data.tokenizer='{tokenizer}'", 'data.paths=["stdlib"]']
            settings += ["training.steps=3", "training.seq_len=256", "training.global_batch_size=1"]
            settings += ["schedule.warmup_steps=1", "metrics.every=1"]
            sets = [part for setting in settings for part in ("--set", setting)]
            lighthouse(folder, "pretrain", ROOT / "recipes/quickstart.toml", "--name", name, *sets)
            lighthouse(folder, "strip", folder / "runs" / name, out)
        yield Export(name, out, build_tokenizer(tokenizer))


def lighthouse(folder: Path, *arguments: Any) -> None:
    command = [str(Path(sys.executable).with_name("lighthouse")), *map(str, arguments)]
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)


# The vocabularies of llama.cpp that are taken, their special tokens, and what is said of these.
GIVEN: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "json-bos": (
        "llama-bpe",
        ["<|begin_of_text|>", "<|end_of_text|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "json-no-bos": ("gpt-2", ["<|endoftext|>"], {"bos_token": None, "eos_token": "<|endoftext|>"}),
}
# How the first of them cuts text into words; the second does as ByteLevel.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def give(folder: Path, tree: Path | None, name: str, special: list[str], config: dict[str, Any]) -> tuple[str, int]:
    """(path of a tokenizer.json, rows of its model): a vocabulary of llama.cpp, or one trained here without it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    out, above = folder / "tokenizer.json", 0 if name == "llama-bpe" else 7
    if out.is_file():
        return str(out), Tokenizer.from_file(str(out)).get_vocab_size() + above
    file = tree / f"models/ggml-vocab-{name}.gguf" if tree else None
    large = name == "llama-bpe"
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not large)
    words = [pre_tokenizers.Split(Regex(WORDS), "isolated")] if large else []
    if file and file.is_file():
        tokens, kinds, merges = vocabulary(tree, name)
        vocab = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=large))
        special = special + [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    else:
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, cut])
        tokenizer.train_from_iterator([sample()], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, cut])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in dict.fromkeys(special)]
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer.save(str(out))
    return str(out), tokenizer.get_vocab_size() + above


def vocabulary(tree: Path, name: str) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """(tokens, the kind of each, merges) of a vocabulary of llama.cpp; one of pieces has no merges."""
    sys.path.insert(0, str(tree / "gguf-py"))
    import gguf

    fields = gguf.GGUFReader(tree / f"models/ggml-vocab-{name}.gguf").fields
    merges = fields["tokenizer.ggml.merges"].contents() if "tokenizer.ggml.merges" in fields else []
    pairs = [tuple(merge.split(" ")) for merge in merges]
    return fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents(), pairs


def sample() -> str:
    """TEXT_BYTES of the standard library and of the characters of several scripts."""
    ranges = ((0x20, 0x250), (0x370, 0x600), (0x4E00, 0x4F00), (0xAC00, 0xAC80), (0x1F600, 0x1F640))
    text = "\n".join("".join(map(chr, range(*between))) for between in ranges)
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), reverse=True):
        if len(text.encode()) >= TEXT_BYTES:
            break
        text += file.read_text(encoding="utf-8", errors="ignore").replace("\r", "")
    return text


def trl(export: Export, scratch: Path) -> Iterator[tuple[str, Any, bool | None]]:
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise Missing(error) from None
    from transformers import AutoTokenizer

    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(12)]
    config = SFTConfig(
        output_dir=str(scratch), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(str(export.path), args=config, train_dataset=Dataset.from_dict({"text": texts}))
    trainer.train()
    examples = [list(example["input_ids"]) for example in trainer.train_dataset]
    eos = export.tokenizer.eos_id
    wanted = sorted([*export.ids(text), eos] for text in texts)
    yield "examples are BOS, text, EOS", f"... {examples[0][-3:]}, EOS is {eos}", sorted(examples) == wanted
    batch = next(iter(trainer.get_train_dataloader()))
    ends = batch["labels"][batch["input_ids"] == eos].tolist()
    yield "labels of EOS", ends, len(ends) >= 2 and all(label == eos for label in ends[-2:])
    pads = trainer.processing_class.pad_token_id
    yield "pad token", f"{pads}, EOS is {eos}", pads != eos
    yield "steps", trainer.state.global_step, trainer.state.global_step == 3
    tokenizer = AutoTokenizer.from_pretrained(export.path)
    tokenizer.add_special_tokens({"additional_special_tokens": [CHAT]})
    ids = tokenizer(f"{CHAT}a", add_special_tokens=False).input_ids
    yield (
        "added chat token",
        ids,
        ids == [tokenizer.convert_tokens_to_ids(CHAT), *export.tokenizer.encode("a").tolist()],
    )


def lm_eval(export: Export, scratch: Path) -> Iterator[tuple[str, Any, bool | None]]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Missing(error) from None

    questions = [{"q": f"{i} + {i} is", "a": [str(2 * i), str(3 * i)], "gold": 0} for i in range(1, 9)]
    (scratch / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (scratch / "sums.yaml").write_text(
        "task: lighthouse_sums\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {scratch / 'data.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: a\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n"
    )
    firsts: list[int] = []

    class Watched(HFLM):
        """Keeps the first token of every row that the model is given."""

        def _model_call(self, inps, *more, **others):
            firsts.extend(inps[:, 0].tolist())
            return super()._model_call(inps, *more, **others)

    model = Watched(pretrained=str(export.path), add_bos_token=True, device="cpu", batch_size=4)
    text = "a b"
    yield "tok_encode", model.tok_encode(text), model.tok_encode(text) == export.ids(text)
    results = simple_evaluate(
        model=model, tasks=["lighthouse_sums"], task_manager=TaskManager(include_path=str(scratch))
    )
    score = results["results"]["lighthouse_sums"]["acc,none"]
    yield "accuracy of a task", score, 0 <= score <= 1
    bos = export.tokenizer.bos_id
    wanted = {bos} if bos is not None else {export.ids(question["q"])[0] for question in questions}
    yield "first tokens in it", f"{sorted(set(firsts))}, BOS is {bos}", set(firsts) == wanted


def pipeline(export: Export, scratch: Path) -> Iterator[tuple[str, Any, bool | None]]:
    import transformers

    texts = ["def", "def main(argument):\n    return argument + 1\n"]
    generate = transformers.pipeline("text-generation", str(export.path), device="cpu", dtype="float32")
    options = {"max_new_tokens": 12, "do_sample": False}
    alone = [generate(text, **options)[0]["generated_text"] for text in texts]
    batched = [found[0]["generated_text"] for found in generate(texts, batch_size=2, **options)]
    yield "two texts in a batch", "as one by one" if batched == alone else f"{batched} {alone}", batched == alone
    begun = all(found.startswith(text) for found, text in zip(alone, texts, strict=True))
    yield "the text comes first", begun, begun


def llama_cpp(export: Export, scratch: Path, tree: Path | None) -> Iterator[tuple[str, Any, bool | None]]:
    program = tree / "build/bin/llama-tokenize" if tree else None
    if tree is None or program is None or not program.is_file():
        raise Missing("give --llama-cpp the tree of a built llama.cpp")
    vocabulary, file, text = scratch / "vocab.gguf", scratch / "text", sample()
    convert = [sys.executable, tree / "convert_hf_to_gguf.py", export.path, "--vocab-only", "--outfile", vocabulary]
    converted = subprocess.run(list(map(str, convert)), capture_output=True, text=True)
    if converted.returncode:
        reason = converted.stderr.strip().splitlines()[-1]
        # It knows none of bytes alone.
        refused = export.name == "bytes" and "pre-tokenizer was not recognized" in reason
        yield "conversion", f"refused: {reason}", None if refused else False
        return
    for what, content in (("ids of a short text", "a b"), (f"ids of {len(text.encode()):,} bytes", text)):
        file.write_text(content, encoding="utf-8", newline="")
        command = [str(program), "-m", str(vocabulary), "-f", str(file), "--ids", "--no-escape", "--log-disable"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found, wanted = json.loads(done.stdout), export.ids(content)
        same = found == wanted
        at = next((i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))
        yield (
            what,
            f"{len(found)}, equal" if same else f"differ at {at} of {len(wanted)}: {found[at - 2 : at + 4]}",
            same,
        )


if __name__ == "__main__":
    sys.exit(main())
