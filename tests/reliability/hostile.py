"""What somebody else made, given to the real command line: eight ways to run code, and five to lose files.

    python tests/reliability/hostile.py [--python FILE] [--ways 1,7] [--json FILE]

A small run is trained first. Each case is a command in a process of its own, with hostile files before it and other
people's files beside it. A case is well if nothing that was planted ran, no foreign file changed in content, mode or
target, and the command ended as it should: with the expected exit code, without a traceback, and with one line of error
where it refuses. Before that every payload is run where nothing stops it, to show that it would be seen. Prints a row
for each way; ends with 1 if one of them is wrong. `--python` names the interpreter whose `lighthouse` is tested, by
default this one; `--ways` leaves out the others.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import platform
import re
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import children
import torch
from torch.distributed.checkpoint import FileSystemReader

WAYS = {
    1: "a pickle as a checkpoint's metadata",
    2: "a pickle as a value of a checkpoint",
    3: "sockets that other machines reach",
    4: "modules in the working directory and in a run",
    5: "code that comes with a Hugging Face directory",
    6: "[titan] keys that write or import",
    7: "links in a run and beside it",
    8: "a compile cache that others can write",
    9: "folders that a sweep takes for its own",
    10: "checkpoints that are a link to another run's",
    11: "output into a checkpoint",
    12: "reports over other people's files",
    13: "a run that another process trains",
}
# The newest checkpoint of the small run, in the middle of stage 1.
STEP = 2
TEXT = """\
[model]
dim = 64
layers = 2
heads = 2
kv_heads = 1
ffn_dim = 96
vocab_size = 320
dense_layers = [0]

[lighthouse]
topk = 16
tile_parents = 16
scorer = "random"

[data]
source = "files"
paths = ["{folder}/txt/*.txt"]
validation = 0.1
packing = "concat"

[training]
seq_len = 512
global_batch_size = {batch}
steps = {steps}
compile = {compile}
dtype = "float32"

[optimizer]
lr = 1e-3

[recover]
steps = 2

[checkpoint]
interval = {interval}
keep = {keep}

[metrics]
every = 1
validation_batches = 1
"""
TRAINS = ("--nproc", "1", "--quiet")
OTHER_USER = 54321
MINE = {
    "a.txt": "of mine\n",
    "thesis.tex": "\\begin{document}\n",
    "results.json": '{"mine": 1}\n',
    "report.md": "# Mine\n",
    "notes/one.md": "of mine\n",
    "notes/secret": "0123\n",
}
# None of them takes a tenth of it on a machine of its own.
SECONDS = 600


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable, *args: Any):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@dataclass
class Outcome:
    """What one command did.

    Attributes:
        way: of WAYS.
        case: the planted thing, and the command.
        code: its exit code.
        executed: the payloads that ran.
        changed: foreign names that are not as they were.
        bytes: of them.
        wrong: everything that is wrong.
        words: what it printed, where something is.
    """

    way: int
    case: str
    code: int | None
    seconds: float
    executed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    bytes: int = 0
    traceback: bool = False
    hint: bool = False
    wrong: list[str] = field(default_factory=list)
    words: str = ""

    def line(self) -> str:
        verdict = "; ".join(self.wrong) or "well"
        return f"{self.way:>2}  {self.seconds:5.1f} s  exit {self.code}  {self.case}: {verdict}"


def tree(path: Path) -> dict[str, tuple[int, str, str, int]]:
    """Everything at and below a path: mode, target of a link, digest and size."""
    found = {}
    for each in [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]:
        if not os.path.lexists(each):
            continue
        status = each.lstat()
        target = os.readlink(each) if stat.S_ISLNK(status.st_mode) else ""
        content = each.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(each)] = status.st_mode, target, hashlib.sha256(content).hexdigest(), len(content)
    return found


class Tested:
    """The command line under test.

    Args:
        python: its interpreter.
        folder: for all that is made.
    """

    def __init__(self, python: str, folder: Path):
        self.python, self.folder = python, folder
        command = Path(python).with_name("lighthouse")
        # As users call it; `python -m` would have the working directory on its path.
        self.command = [str(command)] if command.is_file() else [python, "-P", "-m", "lighthouse_cli"]
        self.base, self.exported = folder / "base", folder / "exported"
        self.outcomes: list[Outcome] = []
        # The text to train on, of all cases.
        (folder / "txt").mkdir()
        for number in range(40):
            words = "".join(f"some words, and number {i} of {number}\n" for i in range(300))
            (folder / f"txt/{number}.txt").write_text(words)

    def ask(self, code: str, *arguments: str, **more: Any) -> str:
        done = subprocess.run(
            [self.python, "-P", "-c", code, *arguments], cwd=self.folder, text=True, capture_output=True, **more
        )
        if done.returncode:
            raise RuntimeError(f"{code}\n{done.stderr}")
        return done.stdout

    def facts(self) -> dict[str, Any]:
        code = """
import json, platform, torch, transformers
from lighthouse_core.runs.create import git_commit
print(json.dumps({"commit": git_commit(), "python": platform.python_version(), "torch": torch.__version__,
                  "transformers": transformers.__version__}))
"""
        return json.loads(self.ask(code))

    def seal(self, folder: Path) -> None:
        """A seal is a checksum: whoever changes a checkpoint can make it again."""
        code = "import sys; from pathlib import Path; from lighthouse_core.seal import seal; seal(Path(sys.argv[1]))"
        self.ask(code, str(folder))

    def train(self) -> None:
        """Make the small run, and a Hugging Face directory of it."""
        place = Place(self, 0, self.base)
        place.write_recipe(keep=0)
        self._succeed(place, "pretrain", "q.toml", "--name", "tiny", *TRAINS)
        # The run as it was after two of its four steps, with a recipe that has older checkpoints deleted.
        for step in range(STEP + 1, 5):
            shutil.rmtree(place.run / f"checkpoints/step-{step}")
        recipe = place.run / "recipe.toml"
        before, section, after = recipe.read_text().partition("[checkpoint]")
        recipe.write_text(before + section + after.replace("\nkeep = 0\n", "\nkeep = 2\n"))
        self._succeed(place, "strip", "tiny", str(self.exported), "--allow-unrecovered")
        self.outcomes.clear()

    def _succeed(self, place: "Place", *arguments: str) -> None:
        found = place.lighthouse(*arguments, codes=(0,))
        if found.wrong:
            raise RuntimeError(f"{found.case}: {found.wrong}\n{found.words}")


class Place:
    """The working directory of some cases, with a recipe, a copy of the small run, and other people's files.

    Args:
        tested: the command line.
        way: of WAYS.
        folder: to be made.
    """

    def __init__(self, tested: Tested, way: int, folder: Path):
        self.tested, self.way, self.folder = tested, way, folder
        self.run, self.others, self.ran = folder / "runs/tiny", folder / "others", folder / "ran"
        if tested.base.exists():
            shutil.copytree(tested.base / "runs", folder / "runs")
        for made in (self.ran, folder / "tmp"):
            made.mkdir(parents=True)
        for name, content in MINE.items():
            (self.others / name).parent.mkdir(parents=True, exist_ok=True)
            (self.others / name).write_text(content)
        (self.others / "notes/secret").chmod(0o600)
        (self.others / "link").symlink_to("thesis.tex")
        self.write_recipe()
        self.watched = [self.others]
        self.environment: dict[str, str] = {}

    def write_recipe(self, more: str = "", **changes: Any) -> None:
        settings = {
            "folder": self.tested.folder,
            "batch": 1,
            "steps": 4,
            "compile": "false",
            "interval": 1,
            "keep": 2,
            **changes,
        }
        (self.folder / "q.toml").write_text(TEXT.format(**settings) + more)

    @property
    def checkpoint(self) -> Path:
        return self.run / f"checkpoints/step-{STEP}"

    def watch(self, *paths: Path) -> None:
        """More that is foreign here."""
        self.watched += paths

    def payload(self, name: str) -> str:
        """A shell command that leaves a trace."""
        return f"touch {shlex.quote(str(self.ran / name))}"

    def start(self, *arguments: str, cwd: Path | None = None, words: Path) -> subprocess.Popen:
        theirs = ("PYTHON", "TORCHINDUCTOR")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        variables |= {"TMPDIR": str(self.folder / "tmp"), **self.environment}
        with words.open("wb") as file:
            return children.start(
                [*self.tested.command, *arguments],
                seconds=SECONDS,
                cwd=cwd or self.folder,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
            )

    def lighthouse(
        self,
        *arguments: str,
        planted: str = "",
        codes: tuple[int, ...] = (2,),
        cwd: Path | None = None,
        until: Callable[[subprocess.Popen], bool] | None = None,
        never: str = "",
    ) -> Outcome:
        """Run a command, and judge it.

        Args:
            arguments: of the command line.
            planted: what was, in words.
            codes: with which it may end.
            cwd: its working directory.
            until: once this is true the command is ended by SIGTERM.
            never: a regular expression that what it prints must not match.
        """
        before = [(path, tree(path)) for path in self.watched]
        begun, words_path = time.monotonic(), self.folder / "tmp/words.txt"
        process = self.start(*arguments, cwd=cwd, words=words_path)
        # Somebody who says yes to everything.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"y\n" * 20)
            process.stdin.close()
        if until is not None:
            while process.poll() is None and not until(process):
                time.sleep(0.05)
            if process.poll() is None:
                process.terminate()
        code = process.wait()
        words = words_path.read_text(errors="replace")
        case = f"{planted}: {' '.join(arguments)}" if planted else " ".join(arguments)
        found = Outcome(self.way, case.replace(str(self.folder), "."), code, round(time.monotonic() - begun, 1))
        found.executed = sorted(path.name for path in self.ran.iterdir())
        for path in self.ran.iterdir():
            path.unlink()
        for path, was in before:
            now = tree(path)
            for name in sorted(was.keys() | now.keys()):
                if was.get(name) != now.get(name):
                    found.changed.append(name.replace(str(self.folder), "."))
                    found.bytes += max(was.get(name, (0,))[-1], now.get(name, (0,))[-1], 1)
        found.traceback = "Traceback" in words
        said = [sum(line.startswith(kind) for line in words.splitlines()) for kind in ("error: ", "hint: ")]
        refused, found.hint = code not in (0, 130, 143), bool(said[1])
        checks = {
            f"ran: {', '.join(found.executed[:5])}": not found.executed,
            f"changed: {', '.join(found.changed[:5])}": not found.changed,
            f"exit code {code}": code in codes,
            "a traceback": not found.traceback,
            f"{said[0]} errors and {said[1]} hints": not refused or (said[0] == 1 and said[1] < 2),
            f"it says {never}": not never or not re.search(never, words),
        }
        found.wrong = [what for what, well in checks.items() if not well]
        found.words = words[-3000:] if found.wrong else ""
        self.tested.outcomes.append(found)
        return found


def archive(value: Any, **more: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **more)
    return file.getvalue()


def pickles(place: Place) -> dict[str, bytes]:
    """Metadata that runs something when pickle opens it."""
    metadata = FileSystemReader(place.checkpoint).read_metadata()
    metadata.planner_data = {**metadata.planner_data, "more": Call(os.system, place.payload("inside"))}
    return {
        "a call alone": pickle.dumps(Call(os.system, place.payload("call"))),
        "a call in a whole description": pickle.dumps(metadata),
    }


def values(place: Place) -> dict[str, bytes]:
    """Values of a checkpoint that run something when torch opens them."""
    call = Call(os.system, place.payload("value"))
    return {"an archive": archive(call), "an old archive": archive(call, _use_new_zipfile_serialization=False)}


def replace_entry(place: Place, name: str, content: bytes) -> None:
    """Have an entry of the checkpoint stored anew, at the end of its file."""
    metadata = FileSystemReader(place.checkpoint).read_metadata()
    entry = metadata.storage_data[next(index for index in metadata.storage_data if index.fqn == name)]
    file = place.checkpoint / entry.relative_path
    entry.offset, entry.length = file.stat().st_size, len(content)
    file.write_bytes(file.read_bytes() + content)
    (place.checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    place.tested.seal(place.checkpoint)


STRIP = ("strip", "tiny", "out", "--allow-unrecovered")
EVAL = ("eval", "tiny", "--tokens", "256", "--sequences", "2", "--only", "loss")
SELECTION = ("profile", "selection", "tiny", "--sequences", "1", "--out", "selection")
RESUME = ("pretrain", "--resume", "tiny", *TRAINS)
RECOVER = ("recover", "tiny", *TRAINS)
SWEEP = ("sweep", "s.toml")
ATTENTION = ("profile", "--seq", "256", "--heads", "2", "--topk", "16", "--tile-parents", "16", "--out")
PREPARE = ("data", "prepare", "q.toml", "tokens")
TOKENIZER = ("tokenizer", "train", "q.toml", "t.model", "--vocab", "300", "--bytes", "100000")
OPENING = (STRIP, EVAL, SELECTION, RESUME, RECOVER, SWEEP)


def write_sweep(place: Place, *runs: str) -> None:
    text = 'recipe = "q.toml"\n' + "".join(f"[runs.{run}]\n" for run in runs)
    (place.folder / "s.toml").write_text(text)


Make = Callable[[], Place]
CASES: list[tuple[int, str, Callable[[Make], None]]] = []


def cases(way: int) -> Callable:
    """Marks what yields the cases of a way, each a function that makes its own places."""

    def take(listed: Callable[[], Iterator[Callable[[Make], None]]]) -> Callable:
        CASES.extend((way, listed.__name__, case) for case in listed())
        return listed

    return take


@cases(1)
def metadata() -> Iterator[Callable[[Make], None]]:
    def case(make: Make, kind: str, command: tuple[str, ...]) -> None:
        place = make()
        (place.checkpoint / ".metadata").write_bytes(pickles(place)[kind])
        place.tested.seal(place.checkpoint)
        write_sweep(place, "tiny")
        place.lighthouse(*command, planted=kind, codes=(1,) if command is SWEEP else (2,))

    for kind in ("a call alone", "a call in a whole description"):
        for command in OPENING:
            if command is not SWEEP or kind == "a call alone":
                yield functools.partial(case, kind=kind, command=command)


@cases(2)
def entries() -> Iterator[Callable[[Make], None]]:
    def case(make: Make, kind: str, name: str, command: tuple[str, ...]) -> None:
        place = make()
        replace_entry(place, name, values(place)[kind])
        place.lighthouse(*command, planted=f"{kind} as {name}")

    for kind, name, command in (
        ("an archive", "train_state.step", RECOVER),
        ("an archive", "dataloader.samples", RESUME),
        ("an old archive", "train_state.step", RESUME),
        ("an old archive", "lr_scheduler.last_epoch", RECOVER),
        ("an archive", "norm.weight", STRIP),
        ("an old archive", "norm.weight", EVAL),
        ("an archive", "train_state.step", STRIP),
    ):
        yield functools.partial(case, kind=kind, name=name, command=command)


@cases(3)
def sockets() -> Iterator[Callable[[Make], None]]:
    def case(make: Make, command: tuple[str, ...], processes: str) -> None:
        place = make()
        seen: set[tuple[str, int]] = set()
        rows = place.folder / "runs" / ("new" if "new" in command else "tiny") / "metrics.jsonl"
        had = rows.stat().st_size if rows.exists() else 0

        def trained(process: subprocess.Popen) -> bool:
            seen.update(children.listening(children.tree(process.pid)))
            return rows.exists() and rows.stat().st_size > had + 300

        found = place.lighthouse(
            *command, "--nproc", processes, "--quiet", "--set", "metrics.every=1", planted=f"{processes} processes",
            codes=(0, 143), until=trained,
        )  # fmt: skip
        outside = sorted(f"{host}:{port}" for host, port in seen if not host.startswith("127.") and host != "::1")
        # What listens there obeys whoever connects.
        found.executed += outside
        if outside:
            found.wrong.append(f"listens at {', '.join(outside)}")

    longer = ("--set", "training.steps=100000", "--set", "training.global_batch_size=2")
    new = ("pretrain", "q.toml", "--name", "new", *longer)
    for processes in ("1", "2"):
        yield functools.partial(case, command=new, processes=processes)
    yield functools.partial(case, command=("recover", "tiny", "--steps", "100000"), processes="1")


TRAPS = set(sys.stdlib_module_names) - {"__future__"}
TRAPS |= {
    "torch",
    "numpy",
    "transformers",
    "torchtitan",
    "tensorboard",
    "matplotlib",
    "pydantic",
    "typer",
    "safetensors",
}
TRAPS |= {"lighthouse_cli", "lighthouse_core", "sitecustomize", "usercustomize"}


def trap(place: Place, folder: Path) -> None:
    """Every name that may be imported, as a module in a folder."""
    for name in TRAPS:
        (folder / f"{name}.py").write_text(f"open({str(place.ran / name)!r}, 'w').close()\n")


@cases(4)
def modules() -> Iterator[Callable[[Make], None]]:
    def case(make: Make, commands: Sequence[tuple[str, ...]], inside: bool = False) -> None:
        place = make()
        write_sweep(place, "tiny", "more")
        for folder in (place.folder, place.run, place.run / "checkpoints", place.others):
            trap(place, folder)
        for command in commands:
            planted = "modules in the run" if inside else "modules beside the recipe"
            place.lighthouse(*command, planted=planted, codes=(0,), cwd=place.run if inside else None)

    here = ("pretrain", "q.toml", "--name", "new", *TRAINS)
    quick = [("recipes", "list"), ("recipes", "copy", "quickstart", "mine.toml"), ("runs",), ("compare", "tiny")]
    yield functools.partial(case, commands=[*quick, RESUME, RECOVER])
    yield functools.partial(case, commands=[STRIP, EVAL, SELECTION])
    yield functools.partial(case, commands=[here, SWEEP])
    data = ("data", "prepare", "q.toml", "tokens", "--workers", "2"), ("data", "inspect", "q.toml")
    tokenizer = ("tokenizer", "train", "q.toml", "t.model", "--vocab", "300", "--bytes", "100000")
    attention = (*ATTENTION, "attention")
    step = ("profile", "step", "q.toml", "--nproc", "1", "--out", "step")
    yield functools.partial(case, commands=[*data, tokenizer, attention])
    yield functools.partial(case, commands=[step])
    inner = [("recover", ".", *TRAINS), ("strip", ".", "../../out", "--allow-unrecovered")]
    yield functools.partial(case, commands=inner, inside=True)


def change_json(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


def hugging_face(place: Place) -> dict[str, Path]:
    """Directories of a model with code of their own, or pickled weights."""
    found = {}

    def copied(kind: str) -> Path:
        found[kind] = Path(shutil.copytree(place.tested.exported, place.folder / f"model-{len(found)}"))
        for name in ("evil", "modeling_evil", "tokenization_evil", "configuration_evil"):
            (found[kind] / f"{name}.py").write_text(f"open({str(place.ran / name)!r}, 'w').close()\n")
        return found[kind]

    auto = {"AutoConfig": "configuration_evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    change_json(copied("code of a Llama") / "config.json", auto_map=auto)
    change_json(copied("code of its own type") / "config.json", auto_map=auto, model_type="evil", architectures=["E"])
    tokenizer = {"AutoTokenizer": ["tokenization_evil.Tokenizer", "tokenization_evil.Tokenizer"]}
    change_json(copied("code of a tokenizer") / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Evil")
    whole = copied("code of everything")
    change_json(whole / "config.json", auto_map=auto | tokenizer, model_type="evil", tokenizer_class="Evil")
    change_json(whole / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Evil")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (whole / name).unlink(missing_ok=True)
    weights = copied("pickled weights")
    (weights / "model.safetensors").unlink()
    (weights / "pytorch_model.bin").write_bytes(archive(Call(os.system, place.payload("weights"))))
    adapter = copied("a pickled adapter")
    change_json(adapter / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(place.tested.exported))
    (adapter / "adapter_model.bin").write_bytes(archive(Call(os.system, place.payload("adapter"))))
    generate = copied("code that generates") / "custom_generate"
    generate.mkdir()
    (generate / "generate.py").write_text(f"open({str(place.ran / 'generate')!r}, 'w').close()\n")
    return found


@cases(5)
def directories() -> Iterator[Callable[[Make], None]]:
    def case(make: Make, kinds: Sequence[int]) -> None:
        place = make()
        for number, (kind, folder) in enumerate(hugging_face(place).items()):
            if number in kinds:
                # Whether code is left out or the whole refused is no matter here.
                options = ("--recipe", "q.toml", *EVAL[2:])
                place.lighthouse("eval", folder.name, *options, planted=kind, codes=(0, 2))

    for kinds in ((0, 4), (1, 5), (2, 3, 6)):
        yield functools.partial(case, kinds=kinds)


@cases(6)
def keys() -> Iterator[Callable[[Make], None]]:
    def case(make: Make, keys: dict[str, str], where: str) -> None:
        place = make()
        place.watch(place.run / "recipe.toml", place.run / "ledger.json")
        values = {key: value.replace("OTHERS", str(place.others)) for key, value in keys.items()}
        tables: dict[str, str] = {}
        for key, value in values.items():
            table, _, name = key.rpartition(".")
            tables[table] = tables.get(table, "") + f"{name} = {value}\n"
        text = "".join(f"\n[titan.{table}]\n{lines}" for table, lines in tables.items())
        given = [part for key, value in values.items() for part in ("--set", f"titan.{key}={value}")]
        command: tuple[str, ...] = ("pretrain", "q.toml", "--name", "new", *TRAINS)
        if where == "recipe":
            place.write_recipe(text)
        elif where == "a run's recipe":
            with (place.run / "recipe.toml").open("a") as file:
                file.write(text)
            command = RECOVER if "job.save_config_file" in keys else RESUME
        elif where == "--set":
            command = (*command, *given)
        elif where == "--set of a run":
            command = (*RESUME, *given)
        place.lighthouse(*command, planted=f"{', '.join(keys)} in {where}")

    saved = {"job.save_config_file": '"OTHERS/thesis.tex"'}
    traces = {"profiling.enable_profiling": "true", "profiling.profile_freq": "2", "profiling.profiler_active": "1",
              "profiling.profiler_warmup": "1", "profiling.save_traces_folder": '"OTHERS/notes"'}  # fmt: skip
    for keys, where in (
        (saved, "recipe"),
        (saved, "--set"),
        (saved, "a run's recipe"),
        (saved, "--set of a run"),
        ({"job.save_config_file": '"recipe.toml"'}, "a run's recipe"),
        (traces, "recipe"),
        (traces, "a run's recipe"),
        ({"job.dump_folder": '"OTHERS"'}, "recipe"),
        ({"checkpoint.folder": '"OTHERS/notes"'}, "recipe"),
        ({"metrics.save_tb_folder": '"OTHERS/notes"', "metrics.enable_tensorboard": "true"}, "recipe"),
        ({"comm.save_traces_folder": '"OTHERS/notes"'}, "recipe"),
        ({"experimental.custom_import": '"antigravity"'}, "recipe"),
        ({"job.custom_config_module": '"antigravity"'}, "recipe"),
    ):
        yield functools.partial(case, keys=keys, where=where)


CONTROL = "its folder is this user's alone"
# Payloads that were seen to run where nothing stops them.
PROVEN: dict[str, bool] = {}
# A process that is started now has one of the next numbers.
NEXT_PIDS = 400


def link(place: Place, path: Path) -> None:
    """Have a name lead to a file of others, which holds what was there."""
    target = place.others / f"of-{path.name}"
    if path.is_dir() and not path.is_symlink():
        path.rename(target)
    elif path.exists():
        path.replace(target)
    elif not os.path.lexists(target):
        target.write_text("of mine\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def link_folder(place: Place, path: Path) -> None:
    """Have a name lead to a folder of others."""
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(place.others / "notes")


def link_temporary(place: Place, *names: str) -> None:
    """Have the names that a process with one of the next numbers would use lead to a file of others."""
    first = int(Path("/proc/loadavg").read_text().split()[-1])
    for name in names:
        for pid in range(first, first + NEXT_PIDS):
            path = place.folder / name.replace("PID", str(pid))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(place.others / "thesis.tex")


@cases(7)
def links() -> Iterator[Callable[[Make], None]]:
    fine = (0, 2)

    def trained(make: Make, name: str, command: tuple[str, ...], folder: bool = False) -> None:
        place = make()
        (link_folder if folder else link)(place, place.folder / name)
        write_sweep(place, "tiny")
        # A save that fails is a fault of the job, and so is a run of a sweep.
        codes = (*fine, 1) if command is SWEEP or name.endswith("step-4") else fine
        place.lighthouse(*command, planted=f"{name} is a link", codes=codes)

    def temporary(make: Make, names: Sequence[str], command: tuple[str, ...]) -> None:
        place = make()
        link_temporary(place, *names)
        place.lighthouse(*command, planted=f"{', '.join(names)} are links", codes=fine)

    run = "runs/tiny"
    changed = (*RESUME, "--set", "metrics.every=2")
    results = f"eval/tiny-step-{STEP}-Lighthouse-attention-loss"
    for name, command in (
        (f"{run}/metrics.tmp", RESUME),
        (f"{run}/metrics.jsonl", RESUME),
        (f"{run}/ledger.json", RECOVER),
        (f"{run}/recipe.toml", changed),
        (f"{run}/recover.toml", RECOVER),
        (f"{run}/logs/rank0.log", RESUME),
        (f"{run}/checkpoints/.step-4.saving", RESUME),
        (f"{run}/checkpoints/step-4", RESUME),
        (f"{run}/{results}/results.json", EVAL),
        ("compare/compare.json", ("compare", "tiny")),
        ("selection/report.md", SELECTION),
        ("runs/.s.lock", SWEEP),
        ("runs/s.json", SWEEP),
        ("mine.toml", ("recipes", "copy", "quickstart", "mine.toml")),
        ("t.model", TOKENIZER),
        ("tokens/tokens.json", PREPARE),
    ):
        yield functools.partial(trained, name=name, command=command)
    for name, command in (
        (f"{run}/logs", RESUME),
        (f"{run}/tb", RESUME),
        (f"{run}/wandb", RESUME),
        (f"{run}/checkpoints/.step-2.deleting", RECOVER),
        (f"{run}/eval", EVAL),
        ("tokens/progress", PREPARE),
        ("out", STRIP),
    ):
        yield functools.partial(trained, name=name, command=command, folder=True)
    names = [f"{run}/.{name}.PID" for name in ("recover.toml", "ledger.json", "recipe.toml", "metrics.jsonl")]
    yield functools.partial(temporary, names=names, command=RECOVER)
    names = [f"tokens/{name}.PID.partial" for name in ("progress/plan.json", "train-00000.tokens", "tokens.json")]
    yield functools.partial(temporary, names=names, command=PREPARE)
    yield functools.partial(temporary, names=[".t.model.PID.model"], command=TOKENIZER)


HARMFUL = """
#include <fcntl.h>
__attribute__((constructor)) static void run(void) { open("TRACE", O_CREAT | O_WRONLY, 0600); }
"""


def library(place: Place, name: str) -> Path:
    """A library that leaves a trace when it is loaded."""
    source, built = place.folder / f"tmp/{name}.c", place.folder / f"tmp/{name}.so"
    source.write_text(HARMFUL.replace("TRACE", str(place.ran / name)))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", built, source], check=True)
    return built


@functools.cache
def compiled_first(tested: Tested) -> tuple[str, ...]:
    """The libraries that torch's compiler loads first, in each cache: it tries the processor's instructions."""
    seed = tested.folder / "seed"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(seed), "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    tested.ask("from torch._inductor.cpu_vec_isa import pick_vec_isa; pick_vec_isa()", env=environment)
    return tuple(path.relative_to(seed).as_posix() for path in seed.rglob("*.so"))


@cases(8)
def caches() -> Iterator[Callable[[Make], None]]:
    def case(make: Make, kind: str) -> None:
        place = make()
        home = place.folder / "home"
        home.mkdir()
        own = home / ".cache/lighthouse/compiled"
        guessable = place.folder / "tmp/torchinductor_root"
        cache = guessable if "temporary" in kind else own / "inductor"
        harmful = library(place, "compiled")
        for name in (names := compiled_first(place.tested)):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(harmful, cache / name)
        own.mkdir(parents=True, exist_ok=True)
        for folder in (home, home / ".cache", home / ".cache/lighthouse", own):
            folder.chmod(0o700)
        if kind == "its folder is another user's":
            os.chown(own, OTHER_USER, OTHER_USER)
        elif kind == "its folder is open to all":
            own.chmod(0o777)
        elif kind == "the folder above is open to all":
            own.parent.chmod(0o777)
        elif "temporary" in kind:
            for path in (guessable, *guessable.rglob("*")):
                os.chown(path, OTHER_USER, OTHER_USER)
                path.chmod(0o777)
        place.environment = {"HOME": str(home), "XDG_CACHE_HOME": "", "USER": "root", "LOGNAME": "root"}
        place.write_recipe(compile="true")

        def compiles(process: subprocess.Popen) -> bool:
            """Whether it has got past what was planted, or into it."""
            if any(place.ran.iterdir()):
                return True
            for pid in children.tree(process.pid):
                used = children.environment(pid).get("TORCHINDUCTOR_CACHE_DIR")
                if used and "RANK" in children.environment(pid) and Path(used) != cache:
                    return all(Path(used, name).exists() for name in names)
            return False

        found = place.lighthouse(
            "pretrain", "q.toml", "--name", "new", *TRAINS, planted=kind, codes=(0, 2, 143), until=compiles
        )
        if kind == CONTROL:
            # What this user alone could have put there is run: the payload works, at the place where it lies.
            found.wrong = [] if found.executed else ["the payload does not run where it is trusted"]
            place.tested.outcomes.remove(found)
            PROVEN["a library in the user's own compile cache"] = bool(found.executed)

    for kind in (
        CONTROL,
        "the folder of torch in the temporary one is another user's",
        "its folder is another user's",
        "its folder is open to all",
        "the folder above is open to all",
    ):
        yield functools.partial(case, kind=kind)


@cases(9)
def sweeps() -> Iterator[Callable[[Make], None]]:
    def a_file(name: str) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            (path / name).parent.mkdir(parents=True)
            (path / name).write_text("of mine\n")

        return make

    def damaged(path: Path) -> None:
        (path / "checkpoints").mkdir(parents=True)
        shutil.copytree(path.with_name("tiny") / f"checkpoints/step-{STEP}", path / f"checkpoints/step-{STEP}.damaged")
        for name in ("recipe.toml", "ledger.json", "environment.json"):
            shutil.copy(path.with_name("tiny") / name, path / name)
        (path / "notes.md").write_text("of mine\n")

    def checkpoints(path: Path) -> None:
        shutil.copytree(path.with_name("tiny") / "checkpoints", path / "checkpoints")

    def unfinished(path: Path) -> None:
        path.mkdir()
        for name in ("recipe.toml", "ledger.json", "environment.json", "metrics.jsonl"):
            shutil.copy(path.with_name("tiny") / name, path / name)

    kinds = {
        "checkpoints without a recipe": checkpoints,
        "damaged checkpoints, and notes": damaged,
        "a run of mine without a checkpoint": unfinished,
        "metrics-2024.csv alone": a_file("metrics-2024.csv"),
        "recipe-notes/ alone": a_file("recipe-notes/one.md"),
        "an empty folder": lambda path: path.mkdir(),
        "a link": lambda path: path.symlink_to("../others"),
    }

    def case(make: Make, kind: str) -> None:
        place = make()
        path = place.folder / "runs/a"
        kinds[kind](path)
        place.watch(path)
        (place.folder / "s.toml").write_text('recipe = "q.toml"\n[runs.a]\nset = ["training.steps=2"]\n')
        place.lighthouse(*SWEEP, planted=kind, codes=(1, 2))

    def branching(make: Make) -> None:
        place = make()
        a_file(".b.branching/thesis.tex")(place.folder / "runs")
        place.watch(place.folder / "runs/.b.branching")
        runs = f'[runs.tiny]\n[runs.b]\nstage_1 = "tiny"\nat = {STEP}\nrecover = 1\n'
        (place.folder / "s.toml").write_text('recipe = "q.toml"\n' + runs)
        # Of a run that keeps all of its checkpoints.
        recipe = place.run / "recipe.toml"
        before, section, after = recipe.read_text().partition("[checkpoint]")
        recipe.write_text(before + section + after.replace("\nkeep = 2\n", "\nkeep = 0\n"))
        place.write_recipe(keep=0)
        place.lighthouse(*SWEEP, planted="a folder of the name under which a branch is made", codes=(1,))

    for kind in kinds:
        yield functools.partial(case, kind=kind)
    yield branching


@cases(10)
def linked_checkpoints() -> Iterator[Callable[[Make], None]]:
    def case(make: Make, name: str, command: tuple[str, ...]) -> None:
        place = make()
        other = place.folder / "runs/other"
        shutil.copytree(place.run, other)
        place.watch(other)
        shutil.rmtree(place.run / name)
        (place.run / name).symlink_to(other / name)
        write_sweep(place, "tiny")
        codes = (2,) if name == "checkpoints" and command is not STRIP else (0, 1, 2)
        place.lighthouse(*command, planted=f"{name} is a link to another run's", codes=codes)

    for name in ("checkpoints", f"checkpoints/step-{STEP}"):
        for command in (RECOVER, RESUME):
            yield functools.partial(case, name=name, command=command)
    yield functools.partial(case, name="checkpoints", command=STRIP)


@cases(11)
def into_checkpoints() -> Iterator[Callable[[Make], None]]:
    def case(make: Make, commands: Sequence[tuple[str, ...]]) -> None:
        place = make()
        place.watch(place.run / "checkpoints")
        write_sweep(place, "x")
        for command in commands:
            place.lighthouse(*command, planted="a place of results in a checkpoint")

    inside = f"runs/tiny/checkpoints/step-{STEP}"
    strip, evaluation = STRIP[:2], EVAL
    step = ("profile", "step", "q.toml", "--nproc", "1")
    pretrain = ("pretrain", "q.toml", *TRAINS)
    for commands in (
        [
            (*strip, f"{inside}/out", "--allow-unrecovered"),
            (*strip, "runs/tiny/checkpoints/step-99", "--allow-unrecovered"),
            (*strip, "runs/tiny/checkpoints/out", "--allow-unrecovered"),
        ],
        [
            (*evaluation, "--out", inside),
            (*evaluation, "--out", f"{inside}/a/b"),
            ("compare", "tiny", "--out", inside),
        ],
        [
            (*SELECTION[:-1], inside),
            (*ATTENTION, f"{inside}/out"),
            (*step, "--out", f"{inside}/out"),
        ],
        [
            ("recipes", "copy", "quickstart", inside),
            ("recipes", "copy", "quickstart", f"{inside}/mine.toml"),
            (*PREPARE[:-1], f"{inside}/tokens"),
            ("tokenizer", "train", "q.toml", f"{inside}/t.model", "--vocab", "300"),
        ],
        [
            ("sweep", "s.toml", "--output", inside),
            (*pretrain, "--name", "x", "--set", f'output.dir="{inside}"'),
            (*pretrain, "--name", "step-99", "--set", 'output.dir="runs/tiny/checkpoints"'),
        ],
    ):
        yield functools.partial(case, commands=commands)


@cases(12)
def reports() -> Iterator[Callable[[Make], None]]:
    def users(make: Make, name: str, commands: Sequence[tuple[str, ...]]) -> None:
        place = make()
        folder = place.folder / "mine"
        folder.mkdir()
        (folder / name).write_text('{"mine": 1}\n')
        place.watch(folder)
        write_sweep(place, "x")
        for command in commands:
            place.lighthouse(*command, planted=f"{name} of mine")

    def each_others(make: Make) -> None:
        place = make()
        place.lighthouse(*EVAL, "--out", "evaluated", codes=(0,))
        place.lighthouse(*SELECTION, codes=(0,))
        # A file of its own beside the others is no fault.
        place.watch(*(file for name in ("evaluated", "selection") for file in (place.folder / name).iterdir()))
        place.lighthouse(*EVAL, "--out", "selection", planted="a report of profile")
        place.lighthouse(*SELECTION[:-1], "evaluated", planted="a report of eval")
        place.lighthouse(*ATTENTION, "selection", planted="a report of another kind")
        for folder in ("evaluated", "selection"):
            place.lighthouse("compare", "tiny", "--out", folder, planted=f"what is {folder}", codes=(0, 2))

    def log(make: Make) -> None:
        place = make()
        folder = place.folder / "project"
        folder.mkdir()
        shutil.move(place.folder / "runs", folder / "runs")
        (folder / "pretrain.log").write_text("of mine\n")
        place.watch(folder)
        command = ("profile", "step", "q.toml", "--nproc", "1", "--out", "project")
        place.lighthouse(*command, planted="runs and a pretrain.log of mine")

    yield functools.partial(
        users, name="results.json", commands=[(*ATTENTION, "mine"), (*SELECTION[:-1], "mine"), (*EVAL, "--out", "mine")]
    )
    yield functools.partial(users, name="report.md", commands=[(*ATTENTION, "mine"), (*SELECTION[:-1], "mine")])
    yield functools.partial(users, name="by_position.png", commands=[(*EVAL, "--out", "mine")])
    yield functools.partial(users, name="compare.json", commands=[("compare", "tiny", "--out", "mine")])
    yield functools.partial(users, name="s.json", commands=[("sweep", "s.toml", "--output", "mine")])
    yield each_others
    yield log


@cases(13)
def running() -> Iterator[Callable[[Make], None]]:
    def case(make: Make) -> None:
        place = make()
        (place.folder / "runs/tiny").rename(place.folder / "runs/earlier")
        place.write_recipe(steps=1000000, interval=1000000)
        write_sweep(place, "tiny")
        words = place.folder / "tmp/job.txt"
        job = place.start("pretrain", "q.toml", "--name", "tiny", *TRAINS, words=words)
        try:
            metrics = place.run / "metrics.jsonl"
            children.wait_until(lambda: metrics.exists() and metrics.stat().st_size, job, 120)
            place.watch(*(place.run / name for name in ("recipe.toml", "ledger.json", "checkpoints")))
            for command in (
                ("pretrain", "q.toml", "--name", "tiny", *TRAINS),
                RESUME, RECOVER, STRIP, EVAL, SELECTION, SWEEP,
                ("pretrain", "q.toml", "--name", "tiny", "--dry-run"),
            ):  # fmt: skip
                codes = (1, 2) if command is SWEEP else (2,)
                place.lighthouse(*command, planted="a run that is being trained", codes=codes, never="delete|remove")
            alive = job.poll() is None and metrics.exists()
            if not alive:
                place.tested.outcomes[-1].wrong.append(f"the job that trained ended: {words.read_text()[-500:]}")
        finally:
            job.terminate()
            try:
                job.wait(60)
            except subprocess.TimeoutExpired:
                job.send_signal(signal.SIGKILL)
                job.wait()

    yield case


def prove(tested: Tested) -> None:
    """Run every payload where nothing stops it. What does not run there would prove nothing.

    Raises:
        AssertionError: one does not run.
    """
    place = Place(tested, 0, tested.folder / "proof")

    def ran(name: str) -> None:
        traces = [path.name for path in place.ran.iterdir()]
        assert traces, f"{name} does not run"
        PROVEN[name] = True
        for path in place.ran.iterdir():
            path.unlink()

    for name, content in pickles(place).items():
        pickle.loads(content)
        ran(f"metadata: {name}")
    for name, content in values(place).items():
        torch.load(io.BytesIO(content), weights_only=False)
        ran(f"value: {name}")
    trap(place, place.folder)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for name in ("logging", "tokenize", "torch"):
        command = [tested.python, "-c", f"import {name}"]
        subprocess.run(command, cwd=place.folder, env=variables, stderr=subprocess.DEVNULL)
        ran(f"module: {name}")
    for name, folder in hugging_face(place).items():
        for path in sorted(folder.rglob("*.py")):
            subprocess.run([tested.python, "-P", path], check=True)
            ran(f"Hugging Face: {path.name} of {name}")
        for path in folder.glob("*.bin"):
            torch.load(path, weights_only=False)
            ran(f"Hugging Face: {name}")
    subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library(place, 'own'))!r})"], check=True)
    ran("a library")


def judge(outcomes: list[Outcome], ways: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each way."""
    found = []
    for way in ways:
        its = [outcome for outcome in outcomes if outcome.way == way]
        found.append(
            {
                "way": way,
                "name": WAYS[way],
                "cases": len(its),
                "executed": sum(bool(outcome.executed) for outcome in its),
                "foreign_changed": sum(bool(outcome.changed) for outcome in its),
                "foreign_bytes": sum(outcome.bytes for outcome in its),
                "tracebacks": sum(outcome.traceback for outcome in its),
                "wrong": sum(bool(outcome.wrong) for outcome in its),
            }
        )
    return found


def show(rows: list[dict[str, Any]]) -> None:
    heads = ("way", "cases", "ran", "lost", "bytes", "tracebacks", "wrong", "verdict")
    print("{:<52}{:>6}{:>6}{:>6}{:>9}{:>12}{:>7}  {}".format(*heads))
    for row in rows:
        name = f"{row['way']:>2} {row['name']}"
        numbers = (row[key] for key in ("cases", "executed", "foreign_changed", "foreign_bytes", "tracebacks", "wrong"))
        verdict = "WRONG" if row["wrong"] or not row["cases"] else "well"
        print("{:<52}{:>6}{:>6}{:>6}{:>9}{:>12}{:>7}  {}".format(name, *numbers, verdict))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter whose command is tested")
    parser.add_argument("--ways", default="", help="some of 1 to 13, with commas")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for the figures")
    parser.add_argument("--verbose", action="store_true", help="print each case")
    arguments = parser.parse_args()
    ways = [int(way) for way in arguments.ways.split(",")] if arguments.ways else list(WAYS)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        tested = Tested(arguments.python, Path(name).resolve())
        tested.train()
        prove(tested)
        print(f"{len(PROVEN)} payloads run where nothing stops them ({time.monotonic() - begun:.0f} s)", flush=True)
        facts = tested.facts()
        listed = [(way, case) for way, _, case in CASES if way in ways]
        printed: set[int] = set()
        printing = threading.Lock()

        def one(numbered: tuple[int, tuple[int, Callable[[Make], None]]]) -> None:
            number, (way, case) = numbered
            count = iter(range(1000))
            folder = tested.folder / f"case-{number}"
            try:
                case(lambda: Place(tested, way, folder / f"{next(count)}"))
            except Exception as error:  # of any kind: the others go on
                tested.outcomes.append(
                    Outcome(way, "the case itself", None, 0, wrong=[f"{type(error).__name__}: {error}"])
                )
            shutil.rmtree(folder)
            if arguments.verbose:
                with printing:
                    for outcome in [outcome for outcome in tested.outcomes if id(outcome) not in printed]:
                        print(outcome.line(), outcome.words[-400:] if outcome.wrong else "", flush=True)
                        printed.add(id(outcome))

        # Those that take longest first.
        listed.sort(key=lambda one: one[0] not in (8, 13, 4))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for _ in pool.map(one, enumerate(listed)):
                pass
    outcomes = sorted(tested.outcomes, key=lambda outcome: outcome.way)
    for outcome in outcomes:
        if outcome.wrong:
            print(outcome.line())
    rows, seconds = judge(outcomes, ways), time.monotonic() - begun
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = used.ru_utime + used.ru_stime
    show(rows)
    wrong = sum(row["wrong"] for row in rows) + sum(not well for well in PROVEN.values())
    print(
        f"{len(outcomes)} cases, {wrong} wrong, {seconds:.0f} s, {processors:.0f} s of one processor; "
        f"commit {facts['commit']}, torch {facts['torch']}"
    )
    if arguments.json:
        machine = {"platform": platform.platform(), "processors": os.cpu_count()}
        figures = {
            **facts,
            "machine": machine,
            "seconds": round(seconds),
            "processor_seconds": round(processors),
            "payloads": PROVEN,
            "ways": rows,
        }
        figures["cases"] = [asdict(outcome) for outcome in outcomes]
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(bool(wrong) or not all(row["cases"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
