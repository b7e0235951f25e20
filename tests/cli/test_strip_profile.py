"""strip and profile: which arguments reach the work, and what is shown of its result."""

import json
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lighthouse_core.attention.config import NAMES
from lighthouse_core.attention.settings import Settings
from lighthouse_core.errors import ExportError, UserError
from lighthouse_core.profile.report import Table


@pytest.fixture
def fake(monkeypatch):
    """Puts a module in place of one that imports torch."""

    def put(name: str, **members):
        module = ModuleType(name)
        for key, value in members.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
        # Where the real one was imported before, it is what the package has by that name.
        package, _, leaf = name.rpartition(".")
        monkeypatch.setattr(import_module(package), leaf, module, raising=False)

    return put


def a_run(here, step):
    (here / f"runs/a/checkpoints/step-{step}").mkdir(parents=True)
    (here / "runs/a/recipe.toml").touch()
    (here / "runs/a/ledger.json").write_text('{"version": 1, "stages": [{"stage": "dense", "start": 0, "end": 1}]}')


def test_strip_says_what_was_verified(lighthouse, fake, here):
    calls = []

    def strip(checkpoint, out, **options):
        calls.append((checkpoint, out, options))
        return SimpleNamespace(
            step=120,
            parameters=1000,
            dtype="float32",
            verified=("weights equal",),
            skipped=("logits: no transformers",),
            warnings=("the recovery is not finished",),
        )

    fake("lighthouse_core.export", strip=strip)
    a_run(here, 120)
    answer = lighthouse("strip", "a", "out", "--dtype", "float32", "--verify-length", "9")
    assert (answer.code, answer.out) == (0, "out\n")
    assert answer.err.splitlines() == [
        "step 120, 1000 parameters, float32",
        "verified: weights equal",
        "warning: not verified: logits: no transformers",
        "warning: the recovery is not finished",
    ]
    lighthouse("strip", "runs/a/checkpoints/step-120", "out", "--allow-unrecovered", "--average", "3")
    options = {"dtype": "float32", "allow_unrecovered": False, "verify_length": 9, "average": 1}
    assert calls[0] == (Path("runs/a"), Path("out"), options)
    options = {"dtype": None, "allow_unrecovered": True, "verify_length": None, "average": 3}
    assert calls[1] == ((here / "runs/a/checkpoints/step-120").resolve(), Path("out"), options)


def test_a_failed_export_is_a_fault(lighthouse, fake, here):
    def strip(checkpoint, out, **options):
        raise ExportError("logits differ", hint="keep the checkpoint")

    fake("lighthouse_core.export", strip=strip)
    a_run(here, 120)
    answer = lighthouse("strip", "a", "out")
    assert (answer.code, answer.out, answer.err) == (1, "", "error: logits differ\nhint: keep the checkpoint\n")


@pytest.fixture
def profiler(fake):
    """In place of lighthouse_core.profile.run; what each kind was called with."""
    calls = []

    def kind(name):
        def work(*arguments, **options):
            calls.append((name, arguments, options))
            report = _Report([Table("Stages", ("stage", "ms"), [("select", "1.50")]), "Checked."])
            return (report, "a plot") if name == "attention" else report

        return work

    class _Report:
        roof = None

        def __init__(self, parts):
            self.parts = parts

        def as_json(self):
            return {"schema": 3}

        def write(self, folder):
            (folder / "report.md").write_text("# it\n")

    kinds = {name: kind(name) for name in ("attention", "step", "tune", "selection")}
    fake("lighthouse_core.profile.run", device=lambda: SimpleNamespace(type="cpu"), **kinds)
    return calls


def test_profile_shows_a_table_and_writes_a_report(lighthouse, profiler, here):
    answer = lighthouse("profile", "--seq", "4096,1024", "--heads", "4", "--kv-heads", "2", "--dtype", "bfloat16")
    assert answer.code == 0
    assert ["select", "1.50"] in [line.split() for line in answer.out.splitlines()]
    assert "Checked.\na plot\n" in answer.out and "\x1b" not in answer.out
    (folder,) = (here / "profiles").iterdir()
    assert folder.name.startswith("attention-4096-") and (folder / "report.md").is_file()
    assert answer.err.splitlines()[-1] == f"written to profiles/{folder.name}"
    ((name, (shapes, where, _), _),) = profiler
    assert name == "attention" and where == Path("profiles", folder.name)
    assert [(shape.tokens, shape.heads, shape.kv_heads, shape.head_dim, shape.dtype) for shape, _ in shapes] == [
        (1024, 4, 2, 128, "bfloat16"),
        (4096, 4, 2, 128, "bfloat16"),
    ]


def test_profile_prints_json_when_asked(lighthouse, profiler, here):
    answer = lighthouse("profile", "--seq", "4096", "--json", "--out", "elsewhere/deep")
    assert json.loads(answer.out) == {"schema": 3}
    assert (here / "elsewhere/deep/report.md").is_file()
    (here / "file").touch()
    answer = lighthouse("profile", "--seq", "4096", "--json", "--out", "file")
    assert (answer.code, answer.out) == (2, "") and "file is there and is no report" in answer.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seq", "98304"], (4, 3, 1536)),
        (["--seq", "524288"], (4, 4, 2048)),
        (["--seq", "1048576"], (4, 5, 2048)),
        (["--seq", "8192"], (4, 3, 256)),
        (["--seq", "12287"], (4, 3, 256)),
        (["--seq", "12288"], (4, 3, 384)),
        (["--seq", "2048"], (4, 3, 128)),
        (["--seq", "1024"], (4, 3, 64)),
        (["--seq", "100"], (4, 3, 4)),
        (["--seq", "1"], (4, 3, 128)),
        (["--seq", "1024", "--topk", "128"], (4, 3, 128)),
        (["--seq", "1024", "--levels", "2", "--pooling", "8"], (8, 2, 64)),
        (["--seq", "1024", "--levels", "1"], (4, 1, 128)),
        (["--seq", "98304", "--levels", "4", "--pooling", "2"], (2, 4, 1536)),
        (["--seq", "98304", "--topk", "256"], (4, 3, 256)),
    ],
)
def test_profile_defaults_follow_the_length(lighthouse, profiler, here, arguments, expected):
    answer = lighthouse("profile", *arguments)
    ((_, cfg),) = profiler[0][1][0]
    assert (cfg.pooling, cfg.levels, cfg.topk) == expected
    assert "pooling {}, levels {}, topk {}".format(*expected) in answer.err
    assert cfg.tile_parents == min(128, cfg.topk)
    (tokens,) = (int(value) for option, value in pairwise(arguments) if option == "--seq")
    # What a short sequence is given by default selects something, but for the shortest.
    assert cfg.geometry(tokens).dense == (tokens == 1 or cfg.levels == 1 or "128" in arguments)


def test_a_failed_profile_leaves_no_folder_but_those_of_others(lighthouse, fake, here):
    def attention(*arguments, **options):
        raise UserError("it does not fit")

    fake("lighthouse_core.profile.run", device=lambda: SimpleNamespace(type="cpu"), attention=attention)
    (here / "mine").mkdir()
    (here / "reports").mkdir()
    for out in ("mine", "reports/a/b", "new/c"):
        answer = lighthouse("profile", "--seq", "4096", "--out", out)
        assert (answer.code, answer.err.splitlines()[-1]) == (2, "error: it does not fit")
    assert sorted(path.name for path in here.rglob("*") if path.is_dir()) == ["mine", "reports"]


def test_profile_takes_the_settings_of_other_methods(lighthouse, profiler, here):
    settings = ["--method", "chunked", "--window", "512", "--dense-backend", "flash", "--backend", "reference"]
    answer = lighthouse("profile", "--seq", "4096", *settings)
    ((_, cfg),) = profiler[0][1][0]
    assert (cfg.method, cfg.window, cfg.dense_backend, cfg.backend) == ("chunked", 512, "flash", "reference")
    assert "chunked, window 512" in answer.err


def test_profile_of_a_recipe_a_search_and_a_selection(lighthouse, profiler, here):
    lighthouse("profile", "step", "quickstart", "--set", "training.steps=9")
    lighthouse("profile", "tune", "quickstart", "--seq", "4096", "--floor", "0.125", "--nproc", "1")
    lighthouse("profile", "tune")
    a_run(here, 4)
    lighthouse("profile", "selection", "a", "--sequences", "2")
    lighthouse("profile", "selection", "runs/a/checkpoints/step-4")
    names = [name for name, _, _ in profiler]
    assert names == ["step", "tune", "tune", "selection", "selection"]
    path, recipe, settings, *_ = profiler[0][1]
    assert (path.stem, recipe.training.steps, settings) == ("quickstart", 9, ["training.steps=9"])
    path, recipe, settings, floor, _, nproc, _ = profiler[1][1]
    assert (path.stem, recipe.training.seq_len, floor, nproc) == ("quickstart", 4096, 0.125, 1)
    assert settings == ["training.seq_len=4096"]
    assert profiler[2][1][0].stem == "530m_98k"
    assert (profiler[3][1][0].name, profiler[3][1][1]) == ("a", 2)
    assert profiler[4][1][0] == (here / "runs/a/checkpoints/step-4").resolve()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "takes --seq N or a command: step, tune or selection"),
        (["--topk", "128"], "takes --seq N or a command: step, tune or selection"),
        (["step"], "Missing argument"),
        (["selection"], "Missing argument"),
        (["--seq", "4096", "selection", "a"], "--seq stands before the command selection"),
        (["-q", "step", "quickstart"], "--quiet stands before the command step"),
        (["--json", "tune"], "--json stands before the command tune"),
        (["--seq", "4096,no"], "--seq takes numbers of tokens with commas between them, not '4096,no'"),
        (["--seq", "4096,0"], "--seq must be at least 1, not 0"),
        (["tune", "--seq", "4096,8192"], "Invalid value for '--seq'"),
        (["tune", "--floor", "1.5"], "--floor must lie between 0 and 1, not 1.5"),
        (["--seq", "4096", "--dense-backend", "fa9"], "dense_backend must be one of auto, fa4"),
        (["--seq", "4096", "--method", "chunked"], "window must be a number of tokens"),
        (["--seq", "8192", "--method", "compressed", "--window", "7"], "hint: use a --window that is a multiple of it"),
        (["--seq", "4096", "--heads", "8", "--kv-heads", "3"], "8 heads, 3 KV heads"),
        (["selection", "a", "--sequences", "0"], "--sequences must be at least 1"),
        (["step", "quickstat"], "quickstart"),
        (["tune", "quickstat"], "quickstart"),
    ],
)
def test_profile_refuses_what_makes_no_sense(lighthouse, profiler, here, arguments, words):
    answer = lighthouse("profile", *arguments)
    assert (answer.code, answer.out) == (2, "") and words in answer.err
    assert not profiler and not (here / "profiles").exists()


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--seq", "4096", "--set", "a.b=1"], "--set"),
        (["--seq", "4096", "--floor", "0.0625"], "--floor"),
        (["step", "quickstart", "--topk", "128"], "--topk"),
        (["step", "quickstart", "--seq", "4096"], "--seq"),
        (["step", "quickstart", "--floor", "0.0625"], "--floor"),
        (["tune", "--kv-heads", "2"], "--kv-heads"),
        (["selection", "a", "--nproc", "1"], "--nproc"),
    ],
)
def test_each_kind_of_profile_has_options_of_its_own(lighthouse, profiler, arguments, option):
    error = lighthouse("profile", *arguments).error
    assert "No such option" in error and option in error
    assert not profiler


@pytest.mark.parametrize(
    ("arguments", "unknown"),
    [
        (["--recipe", "quickstart", "--set", "training.steps=9"], "--recipe"),
        (["quickstart"], "No such command 'quickstart'"),
    ],
)
def test_what_profile_has_not_is_answered_with_its_commands(lighthouse, profiler, arguments, unknown):
    answer = lighthouse("profile", *arguments)
    assert answer.code == 2 and "No such" in answer.error and unknown in answer.error
    assert answer.err.splitlines()[1] == (
        "hint: commands of lighthouse profile: step RECIPE, tune [RECIPE] and selection RUN; "
        "--help lists what each takes"
    )
    assert not profiler


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--tune", "quickstart"], "tune is a command: lighthouse profile tune [RECIPE]"),
        (["--seq", "4096", "--selection", "a"], "selection is a command: lighthouse profile selection RUN"),
        (
            ["step", "quickstart", "--seq", "4096"],
            "--seq is an option of lighthouse profile and lighthouse profile tune; "
            "lighthouse profile step --help lists what it takes",
        ),
        (
            ["--floor", "0.1"],
            "--floor is an option of lighthouse profile tune; lighthouse profile --help lists what it takes",
        ),
    ],
)
def test_an_option_of_another_command_is_answered_with_that_one(lighthouse, profiler, arguments, hint):
    answer = lighthouse("profile", *arguments)
    assert answer.code == 2 and "No such option" in answer.error
    assert answer.err.splitlines()[1] == f"hint: {hint}"
    assert not profiler


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["--seq", "4096"], "attention"),
        (["step", "quickstart"], "step"),
        (["tune", "quickstart"], "tune"),
        (["selection", "a"], "selection"),
    ],
)
def test_each_kind_of_profile_takes_out_quiet_and_json(lighthouse, profiler, here, arguments, kind):
    a_run(here, 4)
    answer = lighthouse("profile", *arguments, "--out", "report", "--quiet", "--json")
    assert json.loads(answer.out) == {"schema": 3}
    assert answer.err == "written to report\n" and (here / "report/report.md").is_file()
    assert [name for name, _, _ in profiler] == [kind]


def test_help_lists_the_names_and_defaults_of_settings(lighthouse, here):
    words = " ".join(lighthouse("profile", "--help").out.split())
    for setting in ("scorer", "method", "backend", "dense_backend"):
        begin = words.index(f"--{setting.replace('_', '-')} ")
        text = words[begin : words.index("]", begin) + 1]
        *others, last = NAMES[setting]
        assert f"{', '.join(others)} or {last}" in text
        assert text.endswith(f"[default: {getattr(Settings, setting)}]")
