"""Begin with weights that exist, and go on: from a directory, and from run to run, through the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from directories import RECIPE, corpus, made, same_bits, tensors
from jobs import options
from test_pipeline import rows, succeed

from lighthouse_core.checkpoint import check_contents
from lighthouse_core.checkpoint_reader import load
from lighthouse_core.models.family import to_interleaved
from lighthouse_core.runs.listing import checkpoint_steps
from lighthouse_core.runs.run import Run

SETTINGS = options("metrics.every=1", "metrics.validation_batches=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    made(folder / "given", "qwen3", "bfloat16", tie_word_embeddings=True, shards="60KB")
    (folder / "begin.toml").write_text(RECIPE)
    corpus(folder)
    return folder


def begin(place: Path, name: str, origin: str, *more: str) -> Path:
    succeed("pretrain", "begin.toml", "--name", name, "--from", origin, *SETTINGS, *more, cwd=place)
    return place / "runs" / name


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The model of a checkpoint."""
    model = Run(run).recipe.model
    weights = {entry.source: torch.empty(entry.shape) for entry in model.kind.entries(model)}
    path = Run(run).checkpoint_dir(step)
    load(weights, path, check_contents(path), alone=True)
    return weights


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def one(place):
    return begin(place, "one", "given", "--nproc", "1", *options('training.activation_checkpointing="full"'))


def test_no_step_changes_no_bit(place, one):
    model, given = Run(one).recipe.model, tensors(place / "given")
    assert checkpoint_steps(one) == [0, 2] and len(list((place / "given").glob("*.safetensors"))) > 1
    for entry in model.kind.entries(model):
        weight = given.pop(entry.target).float()
        weight = to_interleaved(weight, entry.rotary_heads) if entry.rotary_heads else weight
        assert same_bits(saved(one, 0)[entry.source], weight), entry.source
    assert not given
    succeed("strip", "runs/one/checkpoints/step-0", "same", cwd=place)
    assert equal(tensors(place / "given"), tensors(place / "same"))
    shutil.rmtree(place / "same")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((), id="sharded"),
        pytest.param(("parallel.replicate=2", "parallel.shard=1"), id="replicated", marks=pytest.mark.slow),
    ],
)
def test_two_processes_give_the_losses_of_one(place, one, settings):
    run = begin(place, f"two-{len(settings)}", "given", "--nproc", "2", *options(*settings))
    assert equal(saved(run, 0), saved(one, 0))
    for step, row in rows(one).items():
        other = rows(run)[step]
        assert abs(other["loss"] - row["loss"]) < 2e-5 * row["loss"]
        assert abs(other["grad_norm"] - row["grad_norm"]) < 1e-3 * row["grad_norm"]


@pytest.mark.slow
def test_a_run_goes_on_as_another(place, one):
    """With another length, rotation, data and rate: new steps, a new optimizer, a new place in the data."""
    (place / "other").mkdir(exist_ok=True)
    (place / "other/a.txt").write_text("quite another text than before " * 2000)
    settings = ["training.seq_len=128", "model.rope_theta=2e6", "optimizer.lr=5e-4", 'data.paths=["other/*.txt"]',
                "data.validation=0", "schedule.warmup_steps=2"]  # fmt: skip
    run = begin(place, "next", "one/checkpoints/step-2", "--nproc", "1", *options(*settings))
    assert equal(saved(run, 0), saved(one, 2)) and not equal(saved(run, 0), saved(one, 0))
    assert Run(run).recipe.model.rope_theta == 2e6 and Run(run).ledger["weights"]["recovered"] is False
    found = rows(run)
    assert list(found) == [1, 2] and [row["lr"] for row in found.values()] == [2.5e-4, 5e-4]
    assert found[1]["tokens"] == 2 * 128
    state = {name: torch.empty(()) for name in check_contents(Run(run).checkpoint_dir(0)).tensors if "exp_avg" in name}
    for name in list(state):
        state = {name: torch.full(check_contents(Run(run).checkpoint_dir(0)).tensors[name].size, 9.0)}
        load(state, Run(run).checkpoint_dir(0), check_contents(Run(run).checkpoint_dir(0)), alone=True)
        assert not state[name].any(), name
    # It is resumed from before its first step, without the run and the directory that it came from.
    shutil.move(place / "runs/one", place / "aside")
    try:
        losses = {step: row["loss"] for step, row in found.items()}
        shutil.rmtree(Run(run).checkpoint_dir(2))
        succeed("pretrain", "--resume", "next", "--nproc", "1", cwd=place)
        assert {step: row["loss"] for step, row in rows(run).items()} == losses
        succeed("recover", "next", "--nproc", "1", cwd=place)
        succeed("strip", "next", "out", cwd=place)
    finally:
        shutil.move(place / "aside", place / "runs/one")
    config = json.loads((place / "out/config.json").read_text())
    assert config["model_type"] == "qwen3" and config["rope_parameters"]["rope_theta"] == 2e6
    assert config["max_position_embeddings"] == 2048 and config["dtype"] == "bfloat16"
    assert {weight.dtype for weight in tensors(place / "out").values()} == {torch.bfloat16}
    # The third of the chain begins with what was recovered, and its export needs no recovery before its first step.
    third = begin(place, "third", "next", "--nproc", "1", *options("lighthouse.enabled=false"))
    assert equal(saved(third, 0), saved(run, 3)) and Run(third).ledger["weights"]["recovered"] is True
    succeed("strip", "runs/third/checkpoints/step-0", "again", cwd=place)
    assert equal(tensors(place / "out"), tensors(place / "again"))


def test_a_change_between_the_start_and_the_reading_is_one_line(place, monkeypatch):
    """The launcher has read a file that the processes find changed."""
    from forked import lighthouse

    from lighthouse_core.job import launch

    shutil.copytree(place / "given", place / "moving")
    right = launch.launch

    def late(*given, **named):
        file = next((place / "moving").glob("*.safetensors"))
        content = file.read_bytes()
        file.write_bytes(content)
        return right(*given, **named)

    monkeypatch.setattr(launch, "launch", late)
    done = lighthouse("pretrain", "begin.toml", "--name", "moved", "--from", "moving", "--nproc", "1", cwd=place)
    assert done.returncode == 2 and "has changed since the run began to read it" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (place / "runs/moved").exists()
