"""strip and profile: which arguments reach the work, and what is shown of its result."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lighthouse_core.errors import ExportError


@pytest.fixture
def fake(monkeypatch):
    """Puts a module in place of one that imports torch."""

    def put(name: str, **members):
        module = ModuleType(name)
        for key, value in members.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)

    return put


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
    (here / "runs/a/checkpoints/step-120").mkdir(parents=True)
    (here / "runs/a/recipe.toml").touch()
    (here / "runs/a/ledger.json").write_text('{"version": 1, "stages": [{"stage": "dense", "start": 0, "end": 1}]}')
    answer = lighthouse("strip", "a", "out", "--dtype", "float32", "--verify-length", "9")
    assert (answer.code, answer.out) == (0, "out\n")
    assert answer.err.splitlines() == [
        "step 120, 1000 parameters, float32",
        "verified: weights equal",
        "warning: not verified: logits: no transformers",
        "warning: the recovery is not finished",
    ]
    lighthouse("strip", "runs/a/checkpoints/step-120", "out", "--allow-unrecovered")
    options = {"dtype": "float32", "allow_unrecovered": False, "verify_length": 9}
    assert calls[0] == (Path("runs/a"), Path("out"), options)
    options = {"dtype": "bfloat16", "allow_unrecovered": True, "verify_length": None}
    assert calls[1] == (Path("runs/a/checkpoints/step-120"), Path("out"), options)


def test_a_failed_export_is_a_fault(lighthouse, fake, here):
    def strip(checkpoint, out, **options):
        raise ExportError("logits differ", hint="keep the checkpoint")

    fake("lighthouse_core.export", strip=strip)
    answer = lighthouse("strip", ".", "out")
    assert (answer.code, answer.out, answer.err) == (1, "", "error: logits differ\nhint: keep the checkpoint\n")


REPORT = {
    "settings": {"seq": 4096, "gathered_length": 1280, "dtype": "float32"},
    "machine": {"device": "cpu"},
    "stages": [{"name": "select", "forward_ms": 1.5, "backward_ms": None}],
    "calls": [{"name": "dense", "forward_ms": 1234.5, "backward_ms": 2.0}],
    "peak_gib": {"dense": None},
    "resident_gib": 0.5,
    "speedup": {"forward": 2.0, "forward_backward": 3.0},
}


@pytest.fixture
def profiler(fake):
    calls = []

    def run(seq, cfg, **options):
        calls.append((seq, cfg, options))
        return SimpleNamespace(as_json=lambda: REPORT)

    fake("lighthouse_core.profile", run=run)
    return calls


def test_profile_prints_a_table_and_writes_json(lighthouse, profiler, here):
    answer = lighthouse("profile", "--seq", "4096", "--heads", "4", "--kv-heads", "2", "--dtype", "bfloat16")
    assert answer.code == 0
    rows = [line.split() for line in answer.out.splitlines() if line.strip()]
    assert ["select", "1.50", "-", "1.50", "-"] in rows
    assert ["dense", "1234.50", "2.00", "1236.50", "-"] in rows
    assert "\x1b" not in answer.out
    assert json.loads((here / "profiles/profile-4096.json").read_text()) == REPORT
    assert profiler[0][0] == 4096
    assert profiler[0][2] == {"heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": "bfloat16"}


def test_profile_prints_json_when_asked(lighthouse, profiler, here):
    answer = lighthouse("profile", "--seq", "4096", "--json", "--out", "elsewhere/deep")
    assert json.loads(answer.out) == REPORT
    assert (here / "elsewhere/deep/profile-4096.json").is_file()
    (here / "file").touch()
    assert "cannot write" in lighthouse("profile", "--seq", "4096", "--json", "--out", "file").err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seq", "98304"], (4, 3, 1536)),
        (["--seq", "524288"], (4, 4, 2048)),
        (["--seq", "1048576"], (4, 5, 2048)),
        (["--seq", "8192"], (4, 3, 256)),
        (["--seq", "12287"], (4, 3, 256)),
        (["--seq", "12288"], (4, 3, 384)),
        (["--seq", "100"], (4, 3, 128)),
        (["--seq", "98304", "--levels", "4", "--pooling", "2"], (2, 4, 1536)),
        (["--seq", "98304", "--topk", "256"], (4, 3, 256)),
    ],
)
def test_profile_defaults_follow_the_length(lighthouse, profiler, arguments, expected):
    answer = lighthouse("profile", *arguments)
    cfg = profiler[0][1]
    assert (cfg.pooling, cfg.levels, cfg.topk) == expected
    assert "pooling {}, levels {}, topk {}".format(*expected) in answer.err
