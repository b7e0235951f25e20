"""Whatever a command is given, it answers in one line, with exit code 2 or 1, and leaves the disk as it was."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lighthouse_core import launch
from lighthouse_core.config import load_recipe
from lighthouse_core.errors import RecipeError

DATA = '[data]\npaths = ["corpus"]\nvalidation = 0.0\n'
BIG = "9" * 5000
LONG, DEEP = "n" * 300, "/".join(["d" * 200] * 30)


@pytest.fixture
def place(here, trainer) -> Path:
    """A working directory with a recipe, a run's name free, and things that are no files of ours."""
    (here / "corpus").mkdir()
    (here / "corpus/a.py").write_text("print('hello')\n" * 50)
    (here / "corpus/b.txt").write_text("hello world\n" * 50)
    with (here / "tiny.toml").open("a") as recipe:
        recipe.write(DATA)
    (here / "sweep.toml").write_text('recipe = "tiny.toml"\n[runs.one]\n')
    (here / "file").write_text("x")
    (here / "folder").mkdir()
    for suffix in ("", ".model", ".json", ".toml"):
        os.mkfifo(here / f"pipe{suffix}")
        os.symlink("/dev/zero", here / f"zero{suffix}")
    os.symlink("loop", here / "loop")
    return here


@pytest.fixture(autouse=True)
def _in_time():
    """A command that waits for ever fails its test."""

    def late(number, frame):
        raise TimeoutError("a command did not end")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def tree(folder: Path) -> dict[str, tuple]:
    """Every path below a folder, with what it is and what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(folder))] = (state.st_mode, content)
    return found


def check_refused(answer, code: int = 2) -> str:
    """That an answer is one line of error, and no more than a hint; returns the error."""
    lines = answer.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert answer.code == code and len(errors) == 1, answer
    after = lines[lines.index(errors[0]) + 1 :]
    assert len(after) <= 1 and all(line.startswith("hint: ") for line in after), answer
    assert all(len(line) < 1000 and line.isprintable() for line in lines), answer
    return errors[0]


# Where a command takes a path or a name: {} stands for it.
READ = {
    "pretrain": ("pretrain", "{}"),
    "resume": ("pretrain", "--resume", "{}"),
    "recover": ("recover", "{}"),
    "strip": ("strip", "{}", "out"),
    "eval": ("eval", "{}"),
    "eval, a recipe": ("eval", "run", "--recipe", "{}"),
    "compare": ("compare", "{}"),
    "sweep": ("sweep", "{}"),
    "prepare": ("data", "prepare", "{}", "out"),
    "inspect": ("data", "inspect", "{}"),
    "tokenizer": ("tokenizer", "train", "{}", "t.model"),
    "show": ("recipes", "show", "{}"),
    "copy": ("recipes", "copy", "{}"),
    "profile, a recipe": ("profile", "--recipe", "{}"),
    "profile, a run": ("profile", "--selection", "{}"),
    "a .model": ("pretrain", "tiny.toml", "--dry-run", "--set", 'data.tokenizer="{}.model"'),
    "a .json": ("pretrain", "tiny.toml", "--dry-run", "--set", 'data.tokenizer="{}.json"'),
    "sources": ("pretrain", "tiny.toml", "--dry-run", "--set", 'data.paths=["{}"]'),
    "files": ("pretrain", "tiny.toml", "--dry-run", "--set", 'data.source="files"', "--set", 'data.paths=["{}"]'),
    "tokens": ("pretrain", "tiny.toml", "--dry-run", "--set", 'data.source="tokens"', "--set", 'data.paths=["{}"]'),
}
HOSTILE = {
    "300 characters": LONG,
    "5000 characters": DEEP,
    "a pipe": "pipe",
    "a device": "zero",
    "no such user": "~nosuchuser/x",
    "below a file": "file/x",
    "a link to itself": "loop",
    "nothing there": "nowhere",
    "escapes": "e\x1b[2J\x9b\u202e",
    "not UTF-8": "e\udcff",
}
WRITTEN = {
    "strip": ("strip", "run", "{}"),
    "eval": ("eval", "run", "--out", "{}"),
    "compare": ("compare", "run", "--out", "{}"),
    "sweep": ("sweep", "sweep.toml", "--output", "{}"),
    "prepare": ("data", "prepare", "tiny.toml", "{}", "--workers", "1"),
    "tokenizer": ("tokenizer", "train", "tiny.toml", "{}", "--vocab", "280"),
    "copy": ("recipes", "copy", "quickstart", "{}"),
    "profile": ("profile", "--seq", "1024", "--heads", "1", "--head-dim", "8", "--out", "{}"),
    "output.dir": ("pretrain", "tiny.toml", "--set", 'output.dir="{}"'),
    "output.dir, dry": ("pretrain", "tiny.toml", "--dry-run", "--name", "a", "--set", 'output.dir="{}"'),
    "--name": ("pretrain", "tiny.toml", "--name", "{}"),
    "--name, dry": ("pretrain", "tiny.toml", "--dry-run", "--name", "{}"),
}
UNWRITABLE = {
    "300 characters": LONG,
    "5000 characters": DEEP,
    "below a file": "file/x",
    "a link to itself": "loop/x",
    "a pipe": "pipe/x",
    "in /proc": "/proc/nowhere/x",
}


@pytest.mark.parametrize("command", READ)
def test_a_path_to_read_that_cannot_be_one(lighthouse, place, command):
    before = tree(place)
    for value in HOSTILE.values():
        plain = "--set" not in READ[command] or value.isprintable()
        text = value if plain else value.replace("\x1b", "\\u001b").replace("\x9b", "\\u009b")
        check_refused(lighthouse(*(part.replace("{}", text) for part in READ[command])))
        assert tree(place) == before, value


@pytest.mark.parametrize("command", WRITTEN)
def test_a_path_to_write_that_cannot_be_one(lighthouse, trainer, place, a_run, command):
    before = tree(place)
    # A dry run tries no folder; strip's place is tests/core/test_export.py, for it needs a real checkpoint.
    values = [value for value in UNWRITABLE.values() if "dry" not in command or "/proc" not in value]
    for value in values if command != "strip" else ():
        check_refused(lighthouse(*(part.replace("{}", value) for part in WRITTEN[command])))
        assert tree(place) == before, value
    assert not trainer.launches


@pytest.fixture
def a_run(place) -> Path:
    """A run with rows and no checkpoint, made by hand: run/."""
    run = place / "run"
    run.mkdir()
    (run / "recipe.toml").write_text((place / "tiny.toml").read_text())
    (run / "ledger.json").write_text(
        json.dumps({"version": 1, "stages": [{"stage": "lighthouse", "start": 0, "end": 100}]})
    )
    (run / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    return run


ROW = {"step": 100, "stage": "lighthouse", "leaky": True, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": 100}
ROW |= {"steps": 100, "tokens_per_second": 1.0, "seconds": 1.0, "data_seconds": 0.0, "memory_gib": 0.1}

INTEGERS = {
    "model": "dim layers heads kv_heads head_dim ffn_dim vocab_size",
    "lighthouse": "dense_every pooling levels topk tile_parents score_block window compression keep",
    "training": "seq_len local_batch_size global_batch_size steps seed loss_chunk nonfinite_limit",
    "schedule": "warmup_steps decay_steps",
    "recover": "steps",
    "parallel": "shard replicate hang_seconds",
    "checkpoint": "interval keep",
    "metrics": "every validation_every validation_batches",
}
NUMBERS = {
    "training": "nonfinite_limit",
    "optimizer": "lr beta1 beta2 eps weight_decay clip_norm",
    "data": "validation",
    "model": "rope_theta norm_eps embedding_std",
}


@pytest.mark.parametrize("key", [f"{section}.{key}" for section, keys in INTEGERS.items() for key in keys.split()])
def test_an_integer_of_a_recipe_out_of_range(lighthouse, place, key):
    for value in ("-10000000000000000000", BIG, "true", "1.5", "nan", '"1"'):
        with pytest.raises(RecipeError) as error:
            load_recipe("tiny.toml", [f"{key}={value}"])
        assert key.split(".")[1] in str(error.value) and "\n" not in str(error.value)
    error = check_refused(lighthouse("pretrain", "tiny.toml", "--dry-run", "--set", f"{key}=10000000000000000000"))
    assert key.split(".")[1] in error


@pytest.mark.parametrize("key", [f"{section}.{key}" for section, keys in NUMBERS.items() for key in keys.split()])
def test_a_number_of_a_recipe_out_of_range(lighthouse, place, key):
    for value in ("nan", "-inf", "true", "1e999"):
        assert key in check_refused(lighthouse("pretrain", "tiny.toml", "--dry-run", "--set", f"{key}={value}"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("recover", "run", "--steps"),
        ("recover", "run", "--extend"),
        ("strip", "run", "out", "--verify-length"),
        ("eval", "run", "--tokens"),
        ("eval", "run", "--sequences"),
        ("eval", "run", "--only", "context", "--context"),
        ("eval", "run", "--trials"),
        ("profile", "--seq"),
        ("profile", "--seq", "1024", "--pooling"),
        ("profile", "--seq", "1024", "--levels"),
        ("profile", "--seq", "1024", "--topk"),
        ("profile", "--seq", "1024", "--tile-parents"),
        ("profile", "--seq", "1024", "--method", "sliding", "--window"),
        ("profile", "--seq", "1024", "--heads"),
        ("profile", "--seq", "1024", "--kv-heads"),
        ("profile", "--seq", "1024", "--head-dim"),
        ("profile", "--selection", "run", "--sequences"),
        ("profile", "--tune", "--recipe", "tiny.toml", "--floor"),
        ("tokenizer", "train", "tiny.toml", "t.model", "--vocab"),
        ("tokenizer", "train", "tiny.toml", "t.model", "--bytes"),
        ("data", "inspect", "tiny.toml", "--samples"),
        ("data", "inspect", "tiny.toml", "--seconds"),
        ("data", "prepare", "tiny.toml", "out", "--workers"),
        ("sweep", "sweep.toml", "--minutes"),
        ("pretrain", "tiny.toml", "--nproc"),
        ("pretrain", "tiny.toml", "--name", "a", "--rdzv-endpoint", "h:1", "--nnodes"),
        ("pretrain", "tiny.toml", "--node-rank"),
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_a_number_of_an_option_out_of_range(lighthouse, trainer, place, a_run, arguments):
    before = tree(place)
    for value in (str(10**19), str(-(10**19)), BIG, "nan", "\x1b[2J"):
        check_refused(lighthouse(*arguments[:-1], f"{arguments[-1]}={value}"))
    assert tree(place) == before and not trainer.launches


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 100_000,
        "x = " + "{a=" * 5000,
        ".".join(["a"] * 5000) + " = 1",
        "[" + ".".join(["a"] * 5000) + "]",
        f"x = {BIG}",
        'x = "\x00"',
        "x = 1\x1b[2J",
        "\udcff = 1",
        "[data]\npaths = ['a\\u0000']".replace("'", '"'),
        '[output]\ndir = "a\\u0000b"',
        "[output]\ndir = ''",
        "[[model]]\ndim = 1",
        "model = 1",
        "a = 1\n" * 3,
        "[titan.a." + ".".join(["b"] * 500) + "]",
        "\n" * 20_000 + "[modle]",
    ],
    ids=range(16),
)
def test_a_recipe_that_is_none(lighthouse, place, text):
    (place / "odd.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    (place / "odd-sweep.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = tree(place)
    whole = (place / "tiny.toml").read_text().partition("[data]")[0] if text.startswith(("[data]", "[output]")) else ""
    if whole:
        (place / "odd.toml").write_text(whole + text)
        before = tree(place)
    for command in (("pretrain", "odd.toml"), ("data", "inspect", "odd.toml"), ("sweep", "odd-sweep.toml")):
        check_refused(lighthouse(*command))
    assert tree(place) == before


@pytest.mark.parametrize(
    "name", ["latest", "", "a/b", "..", ".", "-a", "a\nb", "a\x1b[2J", "a\0", "\u202ea", "\udcff", "~a", LONG]
)
def test_a_name_that_cannot_be_a_runs(lighthouse, trainer, place, name):
    before = tree(place)
    for more in ((), ("--dry-run",)):
        check_refused(lighthouse("pretrain", "tiny.toml", "--name", name, *more))
    assert tree(place) == before and not trainer.launches


def child(*arguments: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "lighthouse_cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, timeout=60, text=True, **options)


@pytest.mark.parametrize("closed", ["(1,)", "(2,)", "(1, 2)", "(0, 1, 2)"])
def test_streams_that_are_closed(place, closed):
    # Closed before the interpreter begins, as a shell's >&- does it.
    redirected = " ".join({"0": "<&-", "1": ">&-", "2": "2>&-"}[number] for number in "012" if number in closed)
    command = f"exec {sys.executable} -m lighthouse_cli recipes copy quickstart {redirected}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    answer = subprocess.run(["sh", "-c", command], cwd=place, capture_output=True, env=environment, timeout=60)
    assert (answer.returncode, answer.stdout, answer.stderr) in ((0, b"", b""), (0, b"quickstart.toml\n", b""))
    # No stream's number was given to the file.
    assert (place / "quickstart.toml").read_bytes().startswith(b"#")


@pytest.mark.parametrize("arguments", [("recipes", "list"), ("recipes", "show", "quickstart"), ("--help",)])
def test_a_full_device_takes_no_output(place, arguments):
    with open("/dev/full", "w") as full:
        answer = child(*arguments, cwd=place, stdout=full, stderr=subprocess.PIPE)
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: No space left on device\n") and answer.stderr.count("\n") == 2


def test_a_reader_that_goes_away(place):
    begin = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    begin.wait()
    answer = child("recipes", "list", cwd=place, stdout=begin.stdin, stderr=subprocess.PIPE)
    begin.stdin.close()
    assert (answer.returncode, answer.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [("compare", "a"), ("eval", "a"), ("runs",), ("pretrain", "quickstart")])
def test_a_working_directory_that_is_gone(lighthouse, place, arguments):
    (place / "gone").mkdir()
    os.chdir(place / "gone")
    (place / "gone").rmdir()
    answer = lighthouse(*arguments)
    assert check_refused(answer) == "error: No such file or directory"
    assert answer.err.endswith("hint: the working directory is gone: change to another one\n")


def test_nobody_has_a_home(lighthouse, place, monkeypatch):
    # As in a container whose user the machine does not know.
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os, "getuid", lambda: 65000)
    before = tree(place)
    error = check_refused(lighthouse("pretrain", "tiny.toml", "--dry-run", "--set", 'data.paths=["~/x"]'))
    assert error == "error: data.paths: no directory ~/x" and tree(place) == before
    text = ("--set", 'data.source="files"', "--set", 'data.paths=["corpus/*.txt"]')
    assert lighthouse("data", "prepare", "tiny.toml", "out", "--workers", "1", *text).code == 0
    tokens = ("--set", 'data.source="tokens"', "--set", 'data.paths=["out"]')
    assert lighthouse("pretrain", "tiny.toml", "--name", "a", *tokens).code == 0
    # What has been verified is remembered nowhere, rather than in a folder of this name.
    assert not (place / "~").exists()


@pytest.fixture
def disk(place, small_disk):
    """A small disk of its own, disk/, which a test can fill or make read-only."""
    return small_disk(place / "disk", "64k")


ON_A_DISK = [name for name in WRITTEN if name != "strip" and "name" not in name and "dry" not in name]


@pytest.mark.parametrize("command", ON_A_DISK)
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_nothing(lighthouse, trainer, place, a_run, disk, command, fault):
    if fault == "full":
        with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1024))
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = tree(place)
    where = "disk/t.model" if command == "tokenizer" else "disk/x"
    answer = lighthouse(*(part.replace("{}", where) for part in WRITTEN[command]))
    error = check_refused(answer, 1 if fault == "full" else 2)
    assert error.endswith("No space left on device" if fault == "full" else "Read-only file system")
    assert tree(place) == before and not trainer.launches


def test_a_folder_that_is_deleted_under_a_job(lighthouse, trainer, place, monkeypatch):
    def delete(run_dir, plan, watcher):
        subprocess.run(["rm", "-r", str(place / "runs")], check=True)
        watcher.tick(False)
        return 0

    monkeypatch.setattr(launch, "launch", delete)
    answer = lighthouse("pretrain", "tiny.toml", "--name", "a")
    assert answer.code in (0, 1, 2) and "Traceback" not in answer.err


@pytest.mark.parametrize(
    "setting",
    ["model.vocab_size=16777216", "model.layers=10000", "training.seq_len=1073741824", "model.ffn_dim=4194304"],
)
def test_a_model_that_no_machine_holds(lighthouse, trainer, place, monkeypatch, setting):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 17}[name])
    before = tree(place)
    words = "and this machine has no GPU and 0.50 GiB"
    assert words in check_refused(lighthouse("pretrain", "tiny.toml", "--name", "a", "--set", setting))
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", "--set", setting)
    assert answer.code == 0 and answer.err.startswith("warning: a step takes about ") and words in answer.err
    assert tree(place) == before and not trainer.launches
