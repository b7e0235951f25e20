"""Damaged data: a start finds what a dry run finds; a run that finds it later can go on with the file mended."""

import gzip
import json
import random
from pathlib import Path

import forked
import pytest

from lighthouse_cli import _train
from lighthouse_core.runs.run import Run

SETTINGS = (
    *(
        'data.source="files"',
        'data.paths=["src/*"]',
        "data.validation=0.0",
        "lighthouse.enabled=false",
        "recover.steps=0",
    ),
    *("training.seq_len=128", "training.global_batch_size=2", "training.steps=60", 'training.dtype="float32"'),
    *("metrics.every=1", "metrics.tensorboard=false", "training.deterministic=true"),
)
OPTIONS = tuple(part for setting in SETTINGS for part in ("--set", setting))


@pytest.fixture
def whole(here):
    """The content of a file that comes second, which the others leave at step 30."""
    draw = random.Random(0)
    (here / "src").mkdir()
    texts = ["".join(draw.choices("abcdefgh ", k=126)) for _ in range(300)]
    rows = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    for name in ("a", "b"):
        content = b"".join(rows[:50]) if name == "a" else b"".join(map(gzip.compress, rows[50:]))
        (here / f"src/{name}.jsonl.gz").write_bytes(gzip.compress(content) if name == "a" else content)
    return (here / "src/b.jsonl.gz").read_bytes()


def test_a_start_refuses_what_a_dry_run_refuses(lighthouse, trainer, here, whole):
    (here / "src/b.jsonl.gz").write_bytes(whole[:-9])
    for more in (("--dry-run",), ()):
        answer = lighthouse("pretrain", "tiny.toml", "--name", "a", *OPTIONS, *more)
        assert answer.code == 2 and "b.jsonl.gz: cut off within its gzip data" in answer.err
    assert not trainer.launches and not (here / "runs").exists()


@pytest.mark.parametrize("found", ["in training", pytest.param("in validation", marks=pytest.mark.slow)])
def test_a_run_that_finds_damage_saves_its_last_step_and_goes_on_with_the_file_mended(here, whole, found, monkeypatch):
    # The start reads nothing: the damage is too far on for it.
    monkeypatch.setattr(_train, "_LOOK", 0.0)
    options, last = OPTIONS, 60
    if found == "in validation":
        late = (
            "data.validation=0.2",
            "metrics.validation_every=2",
            "metrics.validation_batches=40",
            "training.steps=4",
        )
        options, last = (*OPTIONS, *(part for setting in late for part in ("--set", setting))), 4

    (here / "src/b.jsonl.gz").write_bytes(whole[: len(whole) // 4])
    _, _, words = ended = forked.lighthouse("pretrain", "tiny.toml", "--name", "a", *options, "--nproc", "2", cwd=here)
    [step] = Run("runs/a").checkpoint_steps()
    assert ended.returncode == 2 and 1 < step < last, words
    assert words.count("error: ") == 1 and "b.jsonl.gz: cut off within its gzip data" in words
    assert "hint: restore this file, or mend it there, and change no other" in words
    assert f"step {step} is saved. Continue with: lighthouse pretrain --resume runs/a" in words
    (here / "src/b.jsonl.gz").write_bytes(whole)
    done = forked.lighthouse("pretrain", "--resume", "a", "--nproc", "1", cwd=here)
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, Path("runs/a/metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, last + 1))
