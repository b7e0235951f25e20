"""A run on two sources: resumed on another number of processes, it sees the same text."""

import json
import random
import shutil
from pathlib import Path

import pytest
from jobs import RECIPE, TINY, Job, newest, options, rows, succeed

from lighthouse_core.runs.listing import checkpoint_steps

SETTINGS = options(
    *TINY,
    "data.validation=0.1",
    'training.dtype="float32"',
    "training.seq_len=256",
    "training.global_batch_size=6",
    "metrics.validation_every=4",
    "checkpoint.interval=2",
    "checkpoint.keep=0",
)
# The sums of several processes are made in another order.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two sources, of which a few steps pass the second more than once; the recipe of their mixture."""
    root = tmp_path_factory.mktemp("mixture")
    draw = random.Random(0)
    (root / "web").mkdir()
    lines = ("".join(draw.choices("abcdefgh ", k=draw.randrange(50, 900))) for _ in range(400))
    (root / "web/a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for i in range(12):
        (root / f"code/{i}").mkdir(parents=True)
        (root / f"code/{i}/a.py").write_text("".join(draw.choices("01234567\n", k=draw.randrange(50, 500))))
    text = RECIPE.read_text()
    begin = text.index("[data]")
    end = text.index("\n[", begin)
    mixture = """[data]
packing = "concat"
[[data.sources]]
source = "files"
paths = ["web/*.jsonl"]
weight = 0.7
[[data.sources]]
paths = ["code"]
weight = 0.3
"""
    (root / "mixture.toml").write_text(text[:begin] + mixture + text[end:])
    return root


def pretrain(place: Path, name: str, steps: int) -> list[str]:
    return ["pretrain", "mixture.toml", "--name", name, "--nproc", "1", *SETTINGS, *options(f"training.steps={steps}")]


def agree(run: Path, other: Path) -> None:
    for key in ("loss", "val_loss"):
        seen, expected = rows(run, key), rows(other, key)
        assert seen.keys() == expected.keys() and seen
        for step in expected:
            assert seen[step][key] == pytest.approx(expected[step][key], rel=CLOSE)
    sources, others = (
        json.loads((one / "ledger.json").read_text())["stages"][0]["sources_since_start"] for one in (run, other)
    )
    assert sources == others


@pytest.mark.slow
def test_a_mixture_goes_on_with_two_processes(place):
    begun = succeed(*pretrain(place, "one", 8), cwd=place)
    assert begun.words.count("source code: epoch 2 begins") == 1 and "source web: epoch" not in begun.words
    one, two = place / "runs/one", place / "runs/two"
    shutil.copytree(one, two)
    for step in (6, 8):
        shutil.rmtree(two / f"checkpoints/step-{step}")
    job = succeed("pretrain", "--resume", "two", "--nproc", "2", cwd=place)
    agree(two, one)
    ledger = json.loads((one / "ledger.json").read_text())
    # 48 sequences.
    sources = ledger["stages"][0]["sources_since_start"]
    assert {name: source["samples"] for name, source in sources.items()} == {"web": 34, "code": 14}
    assert sources["code"]["epoch"] == 2
    assert (
        "sequences by source since step 1: web 34 (70.8%), in its epoch 1; code 14 (29.2%), in its epoch 2" in job.words
    )


@pytest.mark.slow
def test_a_mixture_that_is_killed_goes_on_with_three_processes(place):
    succeed(*pretrain(place, "whole", 40), cwd=place)
    whole, killed = place / "runs/whole", place / "runs/killed"
    for number, processes in enumerate((3, 2, 3, 1)):
        again = ["pretrain", "--resume", "killed", "--nproc", str(processes)]
        job = Job(*(again if number else pretrain(place, "killed", 40)), cwd=place)
        assert job.wait_until(lambda: newest(killed) >= 9 * (number + 1)), job.words  # noqa: B023
        job.kill()
        assert 0 < checkpoint_steps(killed)[-1] < 40
    succeed("pretrain", "--resume", "killed", "--nproc", "2", cwd=place)
    agree(killed, whole)
