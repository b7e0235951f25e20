from types import SimpleNamespace

import pytest
import torch

from lighthouse_core.config import load_recipe
from lighthouse_core.errors import RecipeError
from lighthouse_core.runs.schedule import lr_factor
from lighthouse_core.titan.trainer import _build_schedulers


def test_warm_up_is_linear_then_constant():
    factors = [lr_factor(step, warmup=4) for step in range(8)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert lr_factor(10**6, warmup=4) == 1.0


def test_no_warm_up_starts_at_the_full_rate():
    assert lr_factor(0, warmup=0) == 1.0


def test_warm_up_longer_than_the_stage_is_not_shortened():
    assert lr_factor(99, warmup=2000) == pytest.approx(0.05)


def test_linear_decay_runs_from_the_switch_to_zero_at_the_end():
    factors = [lr_factor(step, warmup=2, decay=(10, 14)) for step in range(9, 15)]
    assert factors == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_dense_run_decays_over_its_last_steps():
    settings = ["lighthouse.enabled=false", "training.steps=10", "schedule.warmup_steps=2", "schedule.decay_steps=4"]
    recipe = load_recipe("recipes/quickstart.toml", settings)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    stage = SimpleNamespace(recipe=recipe, recovery=False, start=0, end=10)
    schedulers = _build_schedulers(stage, [optimizer], None, None)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedulers.step()
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_a_decay_is_for_dense_runs():
    for settings in (["schedule.decay_steps=4"], ["lighthouse.enabled=false", "schedule.decay_steps=10000"]):
        with pytest.raises(RecipeError, match=r"schedule\.decay_steps"):
            load_recipe("recipes/quickstart.toml", settings)
