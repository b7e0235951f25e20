"""Checkpoints whose pickles were written to run code, and sealed again: nothing of them is run, whoever opens them."""

import builtins
import copyreg
import enum
import functools
import io
import os
import pickle
import random
import shutil
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from types import ModuleType

import kill_saves
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as titles

from lighthouse_cli import _output
from lighthouse_cli.app import main
from lighthouse_core.checkpoint import _whole, check_contents, read_contents
from lighthouse_core.checkpoint_reader import load
from lighthouse_core.config.load import loads_recipe
from lighthouse_core.errors import CheckpointError
from lighthouse_core.evaluate.load import load_checkpoint
from lighthouse_core.export import strip
from lighthouse_core.job import launch
from lighthouse_core.profile.selection import selection_view
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.recovery import plan_recovery
from lighthouse_core.runs.run import Run
from lighthouse_core.seal import damage, seal
from lighthouse_core.unpickle import Refused, loads

RECIPE = """
[model]
dim = 16
layers = 1
heads = 2
kv_heads = 1
ffn_dim = 32
vocab_size = 260

[lighthouse]
pooling = 2
levels = 2
topk = 2
tile_parents = 2

[data]
validation = 0.2
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
VALUES = {
    "train_state.step": 10,
    "lr_scheduler.base_lrs": [1e-3],
    "optimizer.betas": (0.9, 0.95),
    "optimizer.fused": True,
}


def state_of(model) -> dict:
    return {entry.source: torch.ones(entry.shape) for entry in model.kind.entries(model)} | VALUES


def save(state: dict, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    seal(folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A run with one sound checkpoint, of the middle of its stage 1."""
    folder = tmp_path_factory.mktemp("sound")
    # Of so many, some are held out.
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"some text {number} " * 40)
    text = ['data.source="files"', f'data.paths=["{folder}/*.txt"]', f'output.dir="{folder}"']
    run = create_run(loads_recipe(RECIPE, text), "tiny", "tiny")
    save(state_of(run.recipe.model), run.checkpoint_dir(10))
    return run.path


@pytest.fixture
def run(sound, tmp_path, monkeypatch) -> Path:
    """A copy of it, which is the newest run of the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(sound, tmp_path / "runs/tiny"))


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """The file that a payload makes if it is run; a module `payload` is there for it, and `sideeffect` on the disk."""
    path = tmp_path / "canary"
    module = ModuleType("payload")

    class New:
        def __new__(cls, *args):
            path.touch()
            return super().__new__(cls)

    class Setting:
        def __setstate__(self, state):
            path.touch()

    module.New, module.Setting, module.touch = New, Setting, lambda *args: path.touch()
    monkeypatch.setitem(sys.modules, "payload", module)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/sideeffect.py").write_text(f"open({str(path)!r}, 'w')\nThing = object\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "sideeffect", raising=False)
    return path


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):
        """Only what can be called may take a function's place."""


def text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words.encode())) + words.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def _payloads(canary: Path) -> dict[str, bytes]:
    """Pickles by kind; all but the last few run something where `pickle.load` opens them."""
    command = f"touch {canary}"
    touch = text(command)
    return {
        "reduce": pickle.dumps(Call(os.system, command)),
        "reduce of protocol 0": pickle.dumps(Call(os.system, command), protocol=0),
        "build": b"\x80\x04" + named("payload", "Setting") + b")\x81}b.",
        "build twice": b"\x80\x04" + named("torch.distributed.checkpoint.metadata", "Metadata") + b")\x81}"
        + text("__setstate__") + named("os", "system") + b"sb" + touch + b"b.",
        "build of a class": b"\x80\x04" + named("torch.distributed.checkpoint.metadata", "Metadata")
        + b"N}" + text("__setstate__") + named("os", "system") + b"s\x86b)\x81" + touch + b"b.",
        "newobj": b"\x80\x04" + named("payload", "New") + b")\x81.",
        "newobj with keywords": b"\x80\x04" + named("payload", "New") + b")}\x92.",
        "inst": f"(S'{command}'\nios\nsystem\n.".encode(),
        "obj": b"(" + b"cos\nsystem\n" + touch + b"o.",
        "import": b"\x80\x04" + named("sideeffect", "Thing") + b".",
        "import of protocol 2": b"\x80\x02csideeffect\nThing\n.",
        "eval": b"\x80\x04" + named("builtins", "eval") + text(f"open({str(canary)!r}, 'w')") + b"\x85R.",
        "exec": pickle.dumps(Call(builtins.exec, f"open({str(canary)!r}, 'w')")),
        "partial": pickle.dumps(Call(Call(functools.partial, os.system, command))),
        "getattr": b"\x80\x04" + named("builtins", "getattr") + text("os") + text("system") + b"\x86R)R.",
        "getattr of a module": pickle.dumps(Call(Call(getattr, Call(__import__, "os"), "system"), command)),
        "nested": pickle.dumps({"a": [{"b": (1, Call(os.system, command))}]}),
        "extension": b"\x80\x02\x82\xf0" + touch + b"\x85R.",
        "path with an effect": b"\x80\x04" + named("pathlib", "PosixPath.touch") + touch + b"\x85R.",
        "in metadata": pickle.dumps(titles.Metadata({}, {"a": Call(os.system, command)}, {})),
        "as a key": b"\x80\x04}" + named("os", "system") + touch + b"\x85RNs.",
        "persistent id": b"\x80\x02" + touch + b"Q.",
        "persistent id of protocol 0": b"Pa\n.",
        "a number": pickle.dumps(7),
        "a dictionary": pickle.dumps({}),
        "nothing": b"",
        "a memo of four billion": b"\x80\x02Nr\xff\xff\xff\xff0.",
        "a huge text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"a.",
        "deep tuples": b"\x80\x02" + b")" + b"\x85" * 20_000 + b"}" + b"h\x00" + b".",
        "doubling": b"\x80\x02](" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(60)) + b"e.",
        "an archive of torch": _archive(Call(os.system, command)),
        "an old archive of torch": _archive(Call(os.system, command), _use_new_zipfile_serialization=False),
    }  # fmt: skip


def _archive(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def _archived(payload: bytes) -> bytes:
    """What torch.save writes, with a pickle of ours in it."""
    source, target = zipfile.ZipFile(io.BytesIO(_archive(1))), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for record in source.infolist():
            archive.writestr(record, payload if record.filename.endswith("data.pkl") else source.read(record))
    return target.getvalue()


KINDS = sorted(_payloads(Path("canary")))
RUNNING = set(KINDS) - {
    "persistent id", "persistent id of protocol 0", "a number", "a dictionary", "nothing", "a memo of four billion",
    "a huge text", "deep tuples", "doubling", "an archive of torch", "an old archive of torch", "path with an effect",
    "getattr",
}  # fmt: skip


def replace_metadata(folder: Path, payload: bytes) -> None:
    (folder / ".metadata").write_bytes(payload)
    seal(folder, folder.name)


def replace_entry(folder: Path, name: str, content: bytes) -> None:
    """Have an entry of the checkpoint stored anew, at the end of its file."""
    metadata = FileSystemReader(folder).read_metadata()
    index = next(index for index in metadata.storage_data if index.fqn == name)
    place = metadata.storage_data[index]
    file = folder / place.relative_path
    place.offset, place.length = file.stat().st_size, len(content)
    file.write_bytes(file.read_bytes() + content)
    replace_metadata(folder, pickle.dumps(metadata))


WAYS = {
    "strip": lambda run: strip(run, run.parents[1] / "out", allow_unrecovered=True),
    "eval": lambda run: load_checkpoint(run, attention="trained"),
    "selection": lambda run: selection_view(run, sequences=1),
    "recover": lambda run: plan_recovery(Run(run)),
    "resume": lambda run: Run(run).newest_checkpoint().step,
}


def check_refused(way: str, run: Path, canary: Path) -> str:
    folder = run / "checkpoints/step-10"
    assert damage(folder) is None
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as error:
        WAYS[way](run)
    words = str(error.value)
    assert not canary.exists(), words
    assert "\n" not in words and words.isprintable() and len(words) < 500 and "step-10" in words
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert not (run.parents[1] / "out").exists()
    return words


@pytest.fixture
def extension(canary):
    """An extension code that some library registered and used, so that it is in Python's cache."""
    copyreg.add_extension("payload", "touch", 0xF0)
    copyreg._extension_cache[0xF0] = sys.modules["payload"].touch
    yield
    copyreg.remove_extension("payload", "touch", 0xF0)


@pytest.mark.parametrize("kind", KINDS)
def test_payloads_run_something_in_pickles_own_machine(kind, canary, extension):
    if kind in RUNNING:
        try:
            pickle.loads(_payloads(canary)[kind])
        finally:
            if "__setstate__" in vars(titles.Metadata):
                # One of them changes torch's class for all that follows.
                del titles.Metadata.__setstate__
        # os.system is a process of its own, which has ended.
        assert canary.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_is_data(kind, run, canary, extension):
    replace_metadata(run / "checkpoints/step-10", _payloads(canary)[kind])
    for way in WAYS:
        assert ".metadata" in check_refused(way, run, canary)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_plain(kind, run, canary, extension):
    payload = _payloads(canary)[kind]
    # torch opens what is no archive of its newer format with its older one.
    contents = [payload, _archived(payload)] if "archive" not in kind else [payload]
    for content in contents:
        if kind in ("a number", "a dictionary") and content is not payload:
            continue
        replace_entry(run / "checkpoints/step-10", "train_state.step", content)
        for way in ("strip", "recover"):
            assert "train_state.step" in check_refused(way, run, canary)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_tensors(kind, run, canary, extension):
    payload = _payloads(canary)[kind]
    for content in (payload, _archived(payload)):
        replace_entry(run / "checkpoints/step-10", "norm.weight", content)
        assert "norm.weight" in check_refused("eval", run, canary)


STEP = "runs/tiny/checkpoints/step-10"
# Every command that opens a checkpoint, with what it names: the run, or the checkpoint itself.
COMMANDS = [
    "recover tiny",
    "recover tiny --dry-run",
    "recover tiny --strict",
    "pretrain --resume tiny",
    "pretrain --resume tiny --dry-run",
    "pretrain --resume latest",
    "strip runs/tiny out --allow-unrecovered",
    f"strip {STEP} out --allow-unrecovered",
    "eval tiny",
    f"eval {STEP} --attention dense",
    "profile selection tiny",
    f"profile selection {STEP}",
]


@pytest.mark.parametrize("kind", ["in metadata", "a number", "a value"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_end_with_2_and_one_line(command, kind, run, canary, extension, monkeypatch, capsys):
    if kind == "a value":
        name = "norm.weight" if command.split()[0] in ("eval", "profile") else "train_state.step"
        replace_entry(run / "checkpoints/step-10", name, _archived(_payloads(canary)["reduce"]))
    else:
        replace_metadata(run / "checkpoints/step-10", _payloads(canary)[kind])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["lighthouse", *command.split()])
    monkeypatch.setattr(_output, "_quiet", False)
    monkeypatch.setattr(launch, "launch", lambda *args: pytest.fail("it was trained"))
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert end.value.code == 2 and not canary.exists()
    (error,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert "step-10" in error and (name if kind == "a value" else ".metadata") in error
    assert "Traceback" not in said.err and not Path("out").exists()
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.fixture
def job(tmp_path):
    """The trainer's own part that loads, and the folder of a checkpoint that it has saved."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    saver, step, numbers = kill_saves.job(tmp_path / "run", 2, False)
    step.step = 7
    saver.save(7)
    yield saver, step, numbers, tmp_path / "run/checkpoints/step-7"
    saver.close()
    torch.distributed.destroy_process_group()


def test_the_trainer_loads_what_it_saved_and_runs_nothing(job, canary, extension):
    saver, step, numbers, folder = job
    with torch.no_grad():
        for x in numbers:
            x.fill_(3.0)
    step.step = 0
    saver.load()
    assert step.step == 7 and not any((x == 3).all() for x in numbers)
    payloads = _payloads(canary)
    few = [payloads[kind] for kind in ("reduce", "build twice", "getattr of a module", "extension", "a huge text")]
    for payload in few:
        replace_entry(folder, "train_state.step", _archived(payload))
        with pytest.raises(CheckpointError):
            saver.load()
        assert not canary.exists()
    # Plain, but of another kind than what it would take the place of.
    for value in ("7", 7.5, None, True):
        replace_entry(folder, "train_state.step", _archive(value))
        with pytest.raises(CheckpointError, match="where a int belongs"):
            saver.load()
    for payload in few:
        replace_metadata(folder, payload)
        with pytest.raises(CheckpointError):
            saver.load()
        assert not canary.exists()


def edited(folder: Path, change) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    change(metadata)
    replace_metadata(folder, pickle.dumps(metadata))


def place(metadata, name="norm.weight"):
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name)


def drop(metadata, name="norm.weight"):
    index = next(index for index in metadata.storage_data if index.fqn == name)
    del metadata.storage_data[index]


WRONG = {
    "a path above": lambda m: setattr(place(m), "relative_path", "../step-10/__0_0.distcp"),
    "a whole path": lambda m: setattr(place(m), "relative_path", "/etc/passwd"),
    "a path through a folder": lambda m: setattr(place(m), "relative_path", "a/../__0_0.distcp"),
    "the folder": lambda m: setattr(place(m), "relative_path", "."),
    "the folder above": lambda m: setattr(place(m), "relative_path", ".."),
    "a NUL": lambda m: setattr(place(m), "relative_path", "__0_0.distcp\0"),
    "no text": lambda m: setattr(place(m), "relative_path", 5),
    "a file that is not there": lambda m: setattr(place(m), "relative_path", "__9_0.distcp"),
    "a long name": lambda m: setattr(place(m), "relative_path", "a" * 4000),
    "before the file": lambda m: setattr(place(m), "offset", -1),
    "beyond the file": lambda m: setattr(place(m), "offset", 1 << 50),
    "a float": lambda m: setattr(place(m), "offset", 0.5),
    "a huge number": lambda m: setattr(place(m), "length", 10**4000),
    "longer than the file": lambda m: setattr(place(m), "length", 1 << 40),
    "a transformation": lambda m: setattr(place(m), "transform_descriptors", ["stream.zstd"]),
    "no place": drop,
    "a place too many": lambda m: m.storage_data.update({titles.MetadataIndex("more"): place(m)}),
    "no storage": lambda m: setattr(m, "storage_data", None),
    "storage as a list": lambda m: setattr(m, "storage_data", [1]),
    "no tensors": lambda m: setattr(m, "state_dict_metadata", {}),
    "tensors as a number": lambda m: setattr(m, "state_dict_metadata", 3),
    "a tensor as a number": lambda m: m.state_dict_metadata.update({"norm.weight": 3}),
    "a tensor as a value": lambda m: m.state_dict_metadata.update({"norm.weight": titles.BytesStorageMetadata()}),
    "a size as a list": lambda m: setattr(m.state_dict_metadata["norm.weight"], "size", [16]),
    "another size": lambda m: setattr(m.state_dict_metadata["norm.weight"], "size", torch.Size([17])),
    "a huge size": lambda m: setattr(m.state_dict_metadata["norm.weight"], "size", torch.Size([1 << 40, 1 << 40])),
    "no chunks": lambda m: setattr(m.state_dict_metadata["norm.weight"], "chunks", []),
    "half of it": lambda m: setattr(m.state_dict_metadata["norm.weight"].chunks[0], "sizes", torch.Size([8])),
    "the same twice": lambda m: m.state_dict_metadata["norm.weight"].chunks.append(
        m.state_dict_metadata["norm.weight"].chunks[0]
    ),
    "a shifted chunk": lambda m: setattr(m.state_dict_metadata["norm.weight"].chunks[0], "offsets", torch.Size([1])),
    "a strange dtype": lambda m: setattr(m.state_dict_metadata["norm.weight"].properties, "dtype", torch.complex128),
    "a sparse layout": lambda m: setattr(m.state_dict_metadata["norm.weight"].properties, "layout", torch.sparse_coo),
    "paths as a number": lambda m: setattr(m, "planner_data", 3),
    "a path as a number": lambda m: setattr(m, "planner_data", {"a": 3}),
    "a name that is a number": lambda m: m.state_dict_metadata.update({3: titles.BytesStorageMetadata()}),
    "a name with an escape": lambda m: m.state_dict_metadata.update({"\x1b[2J\n": titles.BytesStorageMetadata()}),
}


def test_a_tuple_that_doubles_itself_is_not_followed():
    doubled = b"\x80\x04)" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    with pytest.raises(Refused, match="two places"):
        loads(b"\x80\x04}" + doubled[2:] + b"Ns.")


def test_many_parts_are_looked_through_in_time():
    columns = [((0, i), (4, 1)) for i in range(20_000)]
    assert _whole((4, 20_000), columns)
    assert not _whole((4, 20_000), [*columns[:-1], columns[0]])


@pytest.mark.parametrize("kind", WRONG)
def test_metadata_of_the_wrong_shape(kind, run, canary):
    edited(run / "checkpoints/step-10", WRONG[kind])
    for way in ("strip", "resume"):
        words = check_refused(way, run, canary)
        assert ".metadata" in words or "__9_0.distcp" in words


def test_metadata_that_is_written_anew_is_taken(run):
    """Unchanged: what the tests above refuse is the change."""
    edited(run / "checkpoints/step-10", lambda metadata: None)
    for way in WAYS:
        WAYS[way](run)


def test_a_file_that_is_a_link_is_not_read(run, canary, tmp_path):
    folder = run / "checkpoints/step-10"
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
        (folder / name).rename(tmp_path / "aside")
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(CheckpointError):
            read_contents(folder)
        (tmp_path / "aside").replace(folder / name)
    read_contents(folder)


@pytest.mark.parametrize(
    "stored", [torch.ones(15), torch.ones(16).to_sparse(), 3, {"a": torch.ones(16)}, [torch.ones(16)], None]
)
def test_a_tensor_is_what_the_metadata_says(stored, run, canary):
    replace_entry(run / "checkpoints/step-10", "norm.weight", _archive(stored))
    assert "norm.weight" in check_refused("strip", run, canary)


def test_everything_is_read_as_torch_reads_it(tmp_path):
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool]  # fmt: skip
    shapes = [(), (0,), (3, 0), (5,), (4, 3), (2, 3, 4)]
    state = {
        f"{kind}-{shape}": (torch.randn(shape, generator=generator) * 3).to(kind) for kind in kinds for shape in shapes
    }
    state["transposed"] = torch.randn(6, 4, generator=generator).t()
    state["part"] = torch.randn(6, 4, generator=generator)[1:3, 1:]
    plain = {"none": None, "yes": True, "large": 2**63, "least": -(2**63), "pi": 3.14, "words": "wörds ▁",
             "list": [1, [2]], "tuple": (1, (2.5, "x")), "table": {"a": {"b": 1}}, "empty": [[], (), ""]}  # fmt: skip
    save({"tensors": state, "plain": plain}, tmp_path / "step-1")
    empty = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    ours = {"tensors": dict(empty), "plain": dict.fromkeys(plain) | {"table": {"a": {"b": None}}}}
    load(ours, tmp_path / "step-1", alone=True)
    assert ours["plain"] == plain and all(type(ours["plain"][name]) is type(value) for name, value in plain.items())
    assert all(torch.equal(ours["tensors"][name], tensor) for name, tensor in state.items())
    assert check_contents(tmp_path / "step-1").tensors.keys() == {f"tensors.{name}" for name in state}


def test_a_member_of_an_enumeration_as_an_attribute(run, monkeypatch):
    """As early releases of Python 3.11 write it."""
    folder = run / "checkpoints/step-10"
    metadata = FileSystemReader(folder).read_metadata()
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
    replace_metadata(folder, pickle.dumps(metadata))
    monkeypatch.undo()
    assert b"getattr" in (folder / ".metadata").read_bytes()
    assert check_contents(folder).tensors["norm.weight"].size == (16,)


def mutated(whole: bytes, chance: random.Random) -> bytes:
    content = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at, kind = chance.randrange(len(content)), chance.randrange(5)
        if kind == 0:
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[at] = chance.choice(
                b"().0123abcdefghijklopqrstuxBCGIJKLMNPQRSTUVX]}\x80\x81\x82\x83\x85\x8a\x8c\x8d\x92\x93\x95\x97"
            )
        elif kind == 2:
            del content[at : at + chance.randrange(1, 20)]
        elif kind == 3:
            content[at:at] = content[chance.randrange(len(content)) :][: chance.randrange(1, 40)]
        else:
            content[at : at + 8] = chance.randbytes(8)
    return bytes(content)


def test_a_thousand_mutated_files(run, canary):
    """Whatever a mutation gives, it is a description that can be true, or refused; nothing is imported for it."""
    folder = run / "checkpoints/step-11"
    save({"norm.weight": torch.ones(16), **VALUES}, folder)
    whole, chance = (folder / ".metadata").read_bytes(), random.Random(0)
    payloads, refused = list(_payloads(canary).values()), 0
    for number in range(1000):
        content = mutated(whole, chance)
        if number % 4 == 0:
            payload, at = chance.choice(payloads)[2:-1], chance.randrange(len(content))
            content = content[:at] + payload + content[at:]
        (folder / ".metadata").write_bytes(content)
        modules = set(sys.modules)
        try:
            contents = read_contents(folder)
            assert all((folder / place.file).is_file() for place in contents.places.values())
        except CheckpointError as error:
            refused += 1
            assert str(error).isprintable()
        assert set(sys.modules) == modules
    assert refused > 500 and not canary.exists()


def test_mutated_archives(run, canary):
    """Entries of a checkpoint with bits flipped: read or refused, with no other error."""
    folder = run / "checkpoints/step-10"
    metadata, chance = FileSystemReader(folder).read_metadata(), random.Random(1)
    file = folder / "__0_0.distcp"
    whole = file.read_bytes()
    state = {name: torch.zeros(tensor.size) for name, tensor in read_contents(folder).tensors.items()} | VALUES
    parts = [place for place in metadata.storage_data.values()]
    for _ in range(100):
        content = bytearray(whole)
        for place in parts:
            for _ in range(2):
                content[place.offset + chance.randrange(place.length)] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        try:
            load(dict(state), folder, alone=True)
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "data", [b"\x80\x02}q\x00h\x00h\x00s.", b"\x80\x02]q\x00h\x00a.", b"\x80\x02(](K\x01eq\x00h\x00t."]
)
def test_a_list_is_in_one_place(data):
    with pytest.raises(Refused, match="two places"):
        loads(data)
