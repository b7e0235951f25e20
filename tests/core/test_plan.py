"""How many processes a job has, and which recipes fit them."""

from types import SimpleNamespace

import pytest
import torch
from tiny_recipe import RECIPE

from lighthouse_core.config import loads_recipe
from lighthouse_core.errors import UserError
from lighthouse_core.job import plan as planning
from lighthouse_core.job.plan import Plan, check_world, plan

# Of batches of 12 sequences, two at a time.
BATCH = ["training.local_batch_size=2", "training.global_batch_size=12"]


@pytest.fixture
def gpus(monkeypatch):
    return lambda number: monkeypatch.setattr(planning, "local_gpus", lambda: number)


def test_auto_is_every_gpu_or_one_process(gpus):
    gpus(0)
    assert plan() == Plan(1)
    gpus(8)
    assert plan() == Plan(8)
    assert plan("2", 3, 1, "host:29500") == Plan(2, 3, 1, "host:29500")
    assert plan("2", 3, 1, "host:29500").world_size == 6


def test_any_number_of_processes_without_gpus(gpus):
    gpus(0)
    assert plan("5").nproc == 5


@pytest.mark.parametrize(
    "arguments",
    [
        ("0",),
        ("-1",),
        ("two",),
        ("1.5",),
        ("",),
        ("4",),
        ("1", 0),
        ("1", 2, 2, "host:1"),
        ("1", 2, -1, "host:1"),
        ("1", 2, 0, ""),
        ("1", 2, 0, "host"),
    ],
)
def test_numbers_out_of_range(gpus, arguments):
    gpus(2)
    with pytest.raises(UserError, match="--"):
        plan(*arguments)


@pytest.mark.parametrize(
    ("world", "settings", "fits"),
    [
        (1, [], True),
        (2, [], True),
        (3, [], True),
        (4, [], False),
        (6, [], True),
        (2, ["parallel.shard=2"], True),
        (2, ["parallel.shard=1"], False),
        (6, ["parallel.shard=3", "parallel.replicate=2"], True),
        (6, ["parallel.replicate=2"], True),
        (3, ["parallel.replicate=2"], False),
    ],
)
def test_batch_and_processes_must_fit(world, settings, fits):
    recipe = loads_recipe(RECIPE, [*BATCH, *settings])
    if fits:
        check_world(recipe, world)
    else:
        with pytest.raises(UserError, match=r"multiple of|does not make"):
            check_world(recipe, world)


def test_the_smallest_gpu_is_what_a_run_has_to_fit(gpus, monkeypatch):
    gpus(0)
    assert planning.gpu_memory() is None
    gpus(2)
    sizes = (SimpleNamespace(total_memory=size) for size in (80, 40))
    monkeypatch.setattr(torch.cuda, "get_device_properties", dict(enumerate(sizes)).get)
    assert planning.gpu_memory() == 40
