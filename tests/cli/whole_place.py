"""A working directory with all that commands read: runs, exports, prepared tokens, a sweep, and what was measured."""

import json
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from directories import plain
from safetensors.torch import load_file, save_file

from lighthouse_core.config import load_recipe
from lighthouse_core.data.build import build_source, build_stream
from lighthouse_core.data.checks import checked_tokenizer
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.recovery import plan_recovery
from lighthouse_core.seal import seal
from lighthouse_core.weights.origin import find_weights

SMALL = """\
[model]
dim = 16
layers = 1
heads = 2
kv_heads = 1
ffn_dim = 32
vocab_size = 64

[lighthouse]
pooling = 2
levels = 2
topk = 2
tile_parents = 2

[data]
source = "files"
paths = ["corpus/*.txt"]
tokenizer = "given/tokenizer.json"
validation = 0.3
packing = "concat"

[training]
seq_len = 32
global_batch_size = 1
steps = 20

[optimizer]
lr = 1e-3

[recover]
steps = 5
"""
SWEEP = """\
recipe = "small.toml"

[evaluate]
tokens = 16
sequences = 2
recipe = "small.toml"

[runs.tiny]

[runs.later]
recover = 5
"""
LEARNT = {"train_state.step": 10, "lr_scheduler.base_lrs": [1e-3], "optimizer.betas": (0.9, 0.95)}
_MEASURE = ("--only", "loss", "--sequences", "2", "--tokens", "16", "--out", "measured")
# A command of every kind that reads what lies here.
COMMANDS = {
    "runs": ("runs", "--json"),
    "compare": ("compare", "tiny", "later", "--out", "compared"),
    "resume": ("pretrain", "--resume", "tiny", "--dry-run"),
    "recover": ("recover", "tiny", "--dry-run"),
    "recover again": ("recover", "later", "--dry-run"),
    "eval": ("eval", "tiny", *_MEASURE),
    "eval, recovered": ("eval", "later", *_MEASURE),
    "eval, exported": ("eval", "exported", "--recipe", "small.toml", *_MEASURE),
    "eval, in parts": ("eval", "parts", "--recipe", "small.toml", *_MEASURE),
    "eval, tokens": ("eval", "tiny", "--recipe", "tokens.toml", *_MEASURE),
    "strip": ("strip", "later", "stripped"),
    "profile": ("profile", "selection", "tiny", "--sequences", "1", "--out", "profiled"),
    "inspect": ("data", "inspect", "small.toml"),
    "verify": ("data", "inspect", "tokens.toml", "--verify"),
    "pretrain": ("pretrain", "tokens.toml", "--dry-run"),
    "begin": ("pretrain", "begin.toml", "--name", "new", "--from", "model"),
    "begin, a run": ("pretrain", "begin.toml", "--name", "new", "--from", "runs/later/checkpoints/step-12"),
    "strip, begun": ("strip", "runs/next/checkpoints/step-0", "stripped"),
    "create": ("pretrain", "small.toml", "--name", "new"),
    "prepare": ("data", "prepare", "small.toml", "tokens", "--workers", "1"),
    "prepare on": ("data", "prepare", "small.toml", "begun", "--workers", "1"),
    "sweep": ("sweep", "sweep.toml", "--dry-run"),
}


def make(place: Path, lighthouse: Callable, commands: Iterable[str]) -> None:
    """Fill the working directory `place` with what some commands read."""
    (place / "corpus").mkdir()
    for i in range(12):
        (place / f"corpus/{i}.txt").write_text("some words of a text " * 40 + "abcdefghijklm"[:i])
    write_tokenizer(place / "given")
    (place / "small.toml").write_text(SMALL)
    (place / "tokens.toml").write_text(SMALL.replace('"files"', '"tokens"').replace("corpus/*.txt", "tokens"))
    (place / "sweep.toml").write_text(SWEEP)
    recipe = load_recipe(place / "small.toml")
    _, data = build_stream(recipe.data, build_tokenizer(recipe.data.tokenizer), 0, "train")
    (place / "begin.toml").write_text(SMALL[SMALL.index("[lighthouse]") :])
    plain(recipe.model, place / "model")
    begun = load_recipe(place / "begin.toml", ['model.from="model"'])
    run = create_run(begun, "begin", "next", weights=find_weights(begun.model).facts)
    save(run.checkpoint_dir(0), recipe, 0)
    for name in ("tiny", "later"):
        run = create_run(recipe, "small", name)
        run.note(data=f"{data:016x}")
        save(run.checkpoint_dir(10), recipe, 10)
        rows = [{"step": step, "stage": "lighthouse", "loss": 2.0, "leaky": True, "tokens": 32 * step, "steps": 1,
                 "seconds": 1.0} for step in range(1, 11)]  # fmt: skip
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.write_recovery(plan_recovery(run))
    save(run.checkpoint_dir(12), recipe, 12)
    for command in ("strip", "prepare", "eval", "compare", "profile", "verify"):
        if command not in commands:
            continue
        arguments = [*COMMANDS[command]]
        if command == "strip":
            arguments[-1] = "exported"
        done = lighthouse(*arguments)
        assert done.code == 0, done
    if "strip" in commands:
        split_weights()
    # A preparation that was cut off, with one record of one task.
    shutil.copytree("tokens", "begun")
    tokens = json.loads(Path("begun/tokens.json").read_text())
    os.unlink("begun/tokens.json")
    os.mkdir("begun/progress")
    source, tokenizer = build_source(recipe.data), checked_tokenizer(recipe)
    work = {"listing": source.fingerprint, "tokenizer": tokenizer.fingerprint, "validation": 0.3, "units": 12}
    plan = {"format": "lighthouse plan", "work": work, "tasks": [[[i, 0, 0, None, 5] for i in range(12)]]}
    Path("begun/progress/plan.json").write_text(json.dumps(plan))
    record = {
        split: {
            "shard": tokens["splits"][split]["shards"][0],
            "units": [
                [source.identities.index(identity), documents, count]
                for identity, parts in tokens["splits"][split]["units"]
                for _, documents, count in parts
            ],
        }
        for split in ("train", "validation")
    }
    Path("begun/progress/00000.json").write_text(json.dumps(record))
    report = {"tokens": 16, "sequences": 2}
    for which in ("switch", "end"):
        os.makedirs(f"runs/tiny/eval/{which}")
        Path(f"runs/tiny/eval/{which}/results.json").write_text(json.dumps(report) + "\n")


def split_weights() -> None:
    """The exported model once more, with its weights in two files."""
    shutil.copytree("exported", "parts")
    weights = load_file("parts/model.safetensors")
    os.unlink("parts/model.safetensors")
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, f"parts/model-{number}.safetensors", {"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)},
    }
    Path("parts/model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    names = ["<unk>", "<s>", "</s>", " ", *map(chr, range(97, 123))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def save(folder: Path, recipe, step: int) -> None:
    torch.manual_seed(step)
    state = {entry.source: torch.randn(entry.shape) * 0.02 for entry in recipe.model.kind.entries(recipe.model)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({**state, **LEARNT, "train_state.step": step}, checkpoint_id=folder, no_dist=True)
    seal(folder)


class Opened:
    """The files below a folder that this process opens for reading, as their names below it."""

    def __init__(self):
        self.folder: Path | None = None
        self.names: set[str] = set()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if event != "open" or self.folder is None or not isinstance(arguments[0], str | os.PathLike):
            return
        path, mode, flags = arguments
        reads = set(mode) <= set("rbtU") if isinstance(mode, str) else (flags & os.O_ACCMODE) != os.O_WRONLY
        path = os.path.abspath(path)
        if reads and path.startswith(f"{self.folder}/") and os.path.isfile(path):
            self.names.add(os.path.relpath(path, self.folder))


def pipe(path: Path, content: bytes) -> None:
    os.mkfifo(path)


def a_socket(path: Path, content: bytes) -> None:
    here = os.getcwd()
    # The name of a socket has at most 107 bytes.
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


# What can lie where a file belongs; each is made at a path, of the file's own content.
TYPES: dict[str, Callable[[Path, bytes], object]] = {
    "nothing": lambda path, content: None,
    "a folder": lambda path, content: path.mkdir(),
    "a folder with a file": lambda path, content: (path.mkdir(), (path / "x").write_text("x")),
    "a pipe": pipe,
    "a socket": a_socket,
    "an endless device": lambda path, content: path.symlink_to("/dev/zero"),
    "an empty device": lambda path, content: path.symlink_to("/dev/null"),
    "a link to itself": lambda path, content: path.symlink_to(path.name),
    "a link to nothing": lambda path, content: path.symlink_to("nowhere"),
    "a link to a folder": lambda path, content: path.symlink_to("/proc"),
    "a link to another's file": lambda path, content: path.symlink_to(Path.cwd() / "canaries/thesis"),
    "an empty file": lambda path, content: path.write_bytes(b""),
    "half of it": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "all but a byte": lambda path, content: path.write_bytes(content[:-1]),
    "a byte more": lambda path, content: path.write_bytes(content + b"\0"),
    "zeros": lambda path, content: path.write_bytes(bytes(len(content))),
    "a null": lambda path, content: path.write_bytes(b"null"),
    "a bare list": lambda path, content: path.write_bytes(b"[1, 2]"),
}
