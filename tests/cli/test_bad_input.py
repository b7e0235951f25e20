"""Whatever a command is given, it answers in one line, with exit code 2 or 1, and leaves the disk as it was."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parameters import parameters

from lighthouse_core.config import Recipe, load_recipe
from lighthouse_core.config.sweep import Sweep, load_sweep
from lighthouse_core.errors import RecipeError
from lighthouse_core.shown import shown

DATA = 'paths = ["corpus"]\nvalidation = 0.0\n'
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
    (here / "ids.bin").write_bytes(b"a\0" * 32)
    (here / "folder").mkdir()
    # As much of an exported model as is looked at before a recipe.
    (here / "model").mkdir()
    (here / "model/config.json").write_text("{}")
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


def names_path(error: str, value: str, command: tuple[str, ...]) -> bool:
    """Whether an error names the path that was given, by its beginning, or the key whose value no path is made of."""
    keys = [part.partition("=")[0] for part in command if "=" in part and "{}" in part]
    return shown(value)[:20] in error or (value in (DEEP, "e\udcff") and any(key in error for key in keys))


def names_option(error: str, option: str) -> bool:
    """Whether an error names an option, or the setting of that name."""
    name = option.split()[-1]
    return bool(re.search(rf"{name}\b|\b{name.removeprefix('--').replace('-', '_')}\b", error))


# Where a command takes a path or a name: {} stands for it.
READ = {
    "pretrain": ("pretrain", "{}"),
    "resume": ("pretrain", "--resume", "{}"),
    "from": ("pretrain", "tiny.toml", "--from", "{}"),
    "from, a setting": ("pretrain", "tiny.toml", "--set", 'model.from="{}"', "--set", "model.norm_eps=1e-5"),
    "recover": ("recover", "{}"),
    "strip": ("strip", "{}", "out"),
    "eval": ("eval", "{}"),
    "eval, a recipe": ("eval", "model", "--recipe", "{}"),
    "compare": ("compare", "{}"),
    "sweep": ("sweep", "{}"),
    "prepare": ("data", "prepare", "{}", "out"),
    "inspect": ("data", "inspect", "{}"),
    "import": ("data", "import", "out", "--from", "{}", "--tokenizer", "bytes"),
    "import, a tokenizer": ("data", "import", "out", "--from", "ids.bin", "--tokenizer", "{}"),
    "tokenizer": ("tokenizer", "train", "{}", "t.model"),
    "show": ("recipes", "show", "{}"),
    "copy": ("recipes", "copy", "{}"),
    "step": ("profile", "step", "{}"),
    "selection": ("profile", "selection", "{}"),
    "a .model": ("pretrain", "tiny.toml", "--dry-run", "--set", 'data.tokenizer="{}.model"'),
    "a .json": ("pretrain", "tiny.toml", "--dry-run", "--set", 'data.tokenizer="{}.json"'),
    "runs": ("runs", "{}"),
    "tune": ("profile", "tune", "{}"),
    "recover, several": ("recover", "{}", "--dry-run"),
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
    "tokenizer": ("tokenizer", "train", "tiny.toml", "{}.model", "--vocab", "280"),
    "import": ("data", "import", "{}", "--from", "ids.bin", "--tokenizer", "bytes", "--workers", "1"),
    "copy": ("recipes", "copy", "quickstart", "{}"),
    "profile": ("profile", "--seq", "1024", "--heads", "1", "--head-dim", "8", "--out", "{}"),
    "step": ("profile", "step", "tiny.toml", "--nproc", "1", "--out", "{}"),
    "tune": ("profile", "tune", "tiny.toml", "--nproc", "1", "--out", "{}"),
    "selection": ("profile", "selection", "run", "--out", "{}"),
    "output.dir": ("pretrain", "tiny.toml", "--set", 'output.dir="{}"'),
    "output.dir, dry": ("pretrain", "tiny.toml", "--dry-run", "--name", "a", "--set", 'output.dir="{}"'),
    "--name": ("pretrain", "tiny.toml", "--name", "{}"),
    "--name, dry": ("pretrain", "tiny.toml", "--dry-run", "--name", "{}"),
}
# Which of them each parameter of a command is.
PATHS = {
    "pretrain recipe": (READ, "pretrain"),
    "pretrain --resume": (READ, "resume"),
    "pretrain --from": (READ, "from"),
    "pretrain --name": (WRITTEN, "--name"),
    "recover run": (READ, "recover"),
    "strip checkpoint": (READ, "strip"),
    "strip out": (WRITTEN, "strip"),
    "profile --out": (WRITTEN, "profile"),
    "profile step recipe": (READ, "step"),
    "profile step --out": (WRITTEN, "step"),
    "profile tune recipe": (READ, "tune"),
    "profile tune --out": (WRITTEN, "tune"),
    "profile selection target": (READ, "selection"),
    "profile selection --out": (WRITTEN, "selection"),
    "runs directory": (READ, "runs"),
    "compare runs": (READ, "compare"),
    "compare --out": (WRITTEN, "compare"),
    "sweep file": (READ, "sweep"),
    "sweep --output": (WRITTEN, "sweep"),
    "eval target": (READ, "eval"),
    "eval --recipe": (READ, "eval, a recipe"),
    "eval --out": (WRITTEN, "eval"),
    "data prepare recipe": (READ, "prepare"),
    "data prepare out": (WRITTEN, "prepare"),
    "data import out": (WRITTEN, "import"),
    "data import --from": (READ, "import"),
    "data import --tokenizer": (READ, "import, a tokenizer"),
    "data inspect recipe": (READ, "inspect"),
    "tokenizer train recipe": (READ, "tokenizer"),
    "tokenizer train out": (WRITTEN, "tokenizer"),
    "recipes show name": (READ, "show"),
    "recipes copy name": (READ, "copy"),
    "recipes copy dest": (WRITTEN, "copy"),
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
        error = check_refused(lighthouse(*(part.replace("{}", text) for part in READ[command])))
        assert names_path(error, value, READ[command])
        assert tree(place) == before, value


@pytest.mark.parametrize("command", WRITTEN)
def test_a_path_to_write_that_cannot_be_one(lighthouse, trainer, place, a_run, command):
    before = tree(place)
    # A dry run tries no folder; strip's place is tests/core/test_export.py, for it needs a real checkpoint.
    values = [value for value in UNWRITABLE.values() if "dry" not in command or "/proc" not in value]
    for value in values if command != "strip" else ():
        error = check_refused(lighthouse(*(part.replace("{}", value) for part in WRITTEN[command])))
        assert names_path(error, value, WRITTEN[command])
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

# Where a command takes a number: what comes before it.
NUMBERED = {
    "recover --steps": ("recover", "run"),
    "recover --extend": ("recover", "run"),
    "pretrain --gpu-memory": ("pretrain", "tiny.toml", "--dry-run"),
    "recover --gpu-memory": ("recover", "run", "--dry-run"),
    "recover --nproc": ("recover", "run"),
    "recover --nnodes": ("recover", "run", "--rdzv-endpoint", "h:1"),
    "recover --node-rank": ("recover", "run"),
    "strip --verify-length": ("strip", "run", "out"),
    "strip --average": ("strip", "run", "out"),
    "eval --tokens": ("eval", "run"),
    "eval --sequences": ("eval", "run"),
    "eval --context": ("eval", "run", "--only", "context"),
    "eval --trials": ("eval", "run"),
    "profile --seq": ("profile",),
    "profile --pooling": ("profile", "--seq", "1024"),
    "profile --levels": ("profile", "--seq", "1024"),
    "profile --topk": ("profile", "--seq", "1024"),
    "profile --tile-parents": ("profile", "--seq", "1024"),
    "profile --window": ("profile", "--seq", "1024", "--method", "sliding"),
    "profile --heads": ("profile", "--seq", "1024"),
    "profile --kv-heads": ("profile", "--seq", "1024"),
    "profile --head-dim": ("profile", "--seq", "1024"),
    "profile step --nproc": ("profile", "step", "tiny.toml"),
    "profile tune --seq": ("profile", "tune", "tiny.toml"),
    "profile tune --floor": ("profile", "tune", "tiny.toml"),
    "profile tune --nproc": ("profile", "tune", "tiny.toml"),
    "profile selection --sequences": ("profile", "selection", "run"),
    "tokenizer train --vocab": ("tokenizer", "train", "tiny.toml", "t.model"),
    "tokenizer train --bytes": ("tokenizer", "train", "tiny.toml", "t.model"),
    "data inspect --samples": ("data", "inspect", "tiny.toml"),
    "data inspect --seconds": ("data", "inspect", "tiny.toml"),
    "data prepare --workers": ("data", "prepare", "tiny.toml", "out"),
    "data import --workers": ("data", "import", "out", "--from", "ids.bin", "--tokenizer", "bytes"),
    "data import --validation": ("data", "import", "out", "--from", "ids.bin", "--tokenizer", "bytes"),
    "sweep --minutes": ("sweep", "sweep.toml"),
    "pretrain --nproc": ("pretrain", "tiny.toml"),
    "pretrain --nnodes": ("pretrain", "tiny.toml", "--name", "a", "--rdzv-endpoint", "h:1"),
    "pretrain --node-rank": ("pretrain", "tiny.toml"),
}
# Names from a list, and what other tests of this folder give odd values to.
WORDS = {
    "profile --scorer": "profile --seq 1024",
    "profile --method": "profile --seq 1024",
    "profile --backend": "profile --seq 1024",
    "profile --dense-backend": "profile --seq 1024",
    "profile --dtype": "profile --seq 1024",
    "strip --dtype": "strip run out",
    "eval --attention": "eval run",
    "eval --only": "eval run",
    "pretrain --rdzv-endpoint": "pretrain tiny.toml --name a --nnodes 2",
    "recover --rdzv-endpoint": "recover run --nnodes 2",
    "pretrain --set": "pretrain tiny.toml",
    "recover --set": "recover run",
    "profile step --set": "profile step tiny.toml",
    "profile tune --set": "profile tune tiny.toml",
    "eval --set": "eval run --recipe tiny.toml",
    "data prepare --set": "data prepare tiny.toml out",
    "data import --format": "data import out --from ids.bin --tokenizer bytes",
    "data inspect --set": "data inspect tiny.toml",
    "tokenizer train --set": "tokenizer train tiny.toml t.model",
}
# No number is as large, as small or as odd: all commands refuse all of them.
beyond = (
    st.integers(min_value=10**14, max_value=10**30).map(str)
    | st.integers(max_value=-1).map(str)
    | st.floats(max_value=-1e-9, allow_nan=False).map(repr)
    | st.sampled_from([BIG, f"-{BIG}", "nan", "inf", "-inf", "true", "", "0x10", "1e999", "\x1b[2J", "1\0"])
)
# Letters, signs, and what a terminal would obey or not show.
words = st.characters(categories=["L", "N", "P", "S", "Cc"]) | st.sampled_from("\xad\u200b\u202e\U0001d173")
draws = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_every_parameter_has_its_hostile_values():
    needed = {parameter.id for parameter in parameters() if parameter.kind is not bool}
    assert needed == {*PATHS, *NUMBERED, *WORDS}
    assert all(name in table for table, name in PATHS.values())
    kinds = {parameter.id: parameter.kind for parameter in parameters()}
    assert all(kinds[id] in (int, float, str) for id in NUMBERED)
    assert all(id in NUMBERED for id, kind in kinds.items() if kind in (int, float))
    assert all(id in PATHS for id, kind in kinds.items() if kind is Path)


@pytest.mark.parametrize("option", NUMBERED)
def test_a_number_of_an_option_out_of_range(lighthouse, trainer, place, a_run, option):
    before = tree(place)

    @draws
    @given(value=beyond)
    def refused(value):
        assert names_option(check_refused(lighthouse(*NUMBERED[option], f"{option.split()[-1]}={value}")), option)

    refused()
    assert tree(place) == before and not trainer.launches


@pytest.mark.parametrize("option", WORDS)
def test_a_word_of_an_option_that_is_none(lighthouse, trainer, place, a_run, option):
    before = tree(place)

    @draws
    @given(value=st.text(words, min_size=1, max_size=8) | st.sampled_from([LONG, BIG]))
    def refused(value):
        assert names_option(check_refused(lighthouse(*WORDS[option].split(), f"{option.split()[-1]}={value}")), option)

    refused()
    assert tree(place) == before and not trainer.launches


def numeric(section: type, prefix: str = "") -> dict[str, tuple]:
    """Every key of a section and of those in it that takes a number, or a list of them: its type, and its limits."""
    found = {}
    for name, field in section.model_fields.items():
        kinds = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        inner = next((part for part in kinds if isinstance(part, type) and hasattr(part, "model_fields")), None)
        if inner is not None:
            found |= numeric(inner, f"{prefix}{name}." if get_origin(field.annotation) is not dict else "runs.one.")
        elif field.annotation in (int, float) or "int" in str(field.annotation).replace("Literal", ""):
            limits = {key: getattr(one, key) for one in field.metadata for key in LIMITS if hasattr(one, key)}
            found[prefix + name] = (field.annotation, limits)
    return found


LIMITS = ("gt", "ge", "lt", "le")
KEYS = numeric(Recipe)
SWEEP_KEYS = numeric(Sweep)
not_integers = (
    st.integers(min_value=10**19, max_value=10**60).map(str)
    | st.integers(max_value=-(10**7)).map(str)
    | st.sampled_from([BIG, f"-{BIG}", "true", "1.5", "nan", "inf", '"1"', "{}", '["a"]', "1979-05-27", '"\\u0000"'])
)
not_numbers = st.sampled_from(["nan", "-inf", "inf", "true", "1e999", '"1"', "[]", "{}", "1979-05-27", "-1", "-0.5"])


@pytest.mark.parametrize("key", KEYS)
def test_a_number_of_a_recipe_out_of_range(lighthouse, place, key):
    kind, _ = KEYS[key]

    @draws
    @given(value=not_numbers if kind is float else not_integers)
    def refused(value):
        with pytest.raises(RecipeError) as error:
            load_recipe("tiny.toml", [f"{key}={value if kind in (int, float) else f'[{value}]'}"])
        assert key.split(".")[1] in str(error.value) and "\n" not in str(error.value)

    refused()
    value = "1e999" if kind is float else "10000000000000000000"
    value = value if kind in (int, float) else f"[{value}]"
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", "--set", f"{key}={value}")
    assert key.split(".")[1] in check_refused(answer)


@pytest.mark.parametrize("key", SWEEP_KEYS)
def test_a_number_of_a_sweep_out_of_range(place, key):
    table, _, name = key.rpartition(".")

    @draws
    @given(value=not_integers)
    def refused(value):
        given = {"runs.one": "", "evaluate": "tokens = 512\n", "": ""}
        given[table] = ("" if name == "tokens" else given[table]) + f"{name} = {value}\n"
        text = f'recipe = "tiny.toml"\n{given[""]}[runs.one]\n{given["runs.one"]}[evaluate]\n{given["evaluate"]}'
        (place / "sweep.toml").write_text(text)
        with pytest.raises(RecipeError) as error:
            load_sweep(place / "sweep.toml")
        # TOML has no integer of so many digits, so that no key of it is known.
        assert (key if value.strip("-") != BIG else "sweep.toml: not valid TOML") in str(error.value)
        assert "\n" not in str(error.value)

    refused()


def legal(kind: type, limits: dict) -> st.SearchStrategy:
    """Numbers that a key takes by itself, its extremes among them."""
    if kind is float:
        low, high = limits.get("ge", limits.get("gt", 0.0)), limits.get("le", limits.get("lt", 1e308))
        floats = st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits)
        return floats.map(repr)
    low = limits["gt"] + 1 if "gt" in limits else limits.get("ge", 1)
    high = limits["lt"] - 1 if "lt" in limits else limits.get("le", 2**30)
    powers = [number for number in (2**n for n in range(64)) if low <= number <= high]
    return (st.sampled_from([low, high, *powers]) | st.integers(low, high)).map(str)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({}, optional={k: legal(*KEYS[k]) for k in KEYS if KEYS[k][0] in (int, float)}))
def test_numbers_within_all_limits_together(lighthouse, trainer, place, given):
    # Of this process, however busy the machine is; the first call imports torch.
    began = time.process_time()
    pairs = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    answer = lighthouse("pretrain", "tiny.toml", "--dry-run", *pairs)
    if answer.code:
        check_refused(answer)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("key", [key for key in KEYS if KEYS[key][0] in (int, float)])
def test_each_number_at_its_limits(lighthouse, trainer, place, key):
    @draws
    @given(value=legal(*KEYS[key]))
    def answered(value):
        answer = lighthouse("pretrain", "tiny.toml", "--dry-run", "--set", f"{key}={value}")
        if answer.code:
            assert key.split(".")[1] in check_refused(answer)

    answered()


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
        "[data]\nsources = []",
        "[data]\nsources = [[1], {}, 2]",
        "[data.sources]\nweight = 1",
        "[data]\n[[data.sources]]\nweight = 0",
        "[data]\n[[data.sources]]\nweight = nan",
        "[data]\n[[data.sources]]\nweigth = 1",
        '[data]\n[[data.sources]]\nweight = 1\nname = "a\\nb"',
        '[data]\npaths = ["stdlib"]\n[[data.sources]]\nweight = 1',
    ],
    ids=range(24),
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
        assert f"{command[-1]}:" in check_refused(lighthouse(*command))
    assert tree(place) == before


@pytest.mark.parametrize(
    "name", ["latest", "", "a/b", "..", ".", "-a", "a\nb", "a\x1b[2J", "a\0", "\u202ea", "\udcff", "~a", LONG]
)
def test_a_name_that_cannot_be_a_runs(lighthouse, trainer, place, name):
    before = tree(place)
    for more in ((), ("--dry-run",)):
        error = check_refused(lighthouse("pretrain", "tiny.toml", "--name", name, *more))
        assert shown(name)[:20] in error if name else "--name" in error
    assert tree(place) == before and not trainer.launches


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
