from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from lighthouse_core.config import dump_recipe, load_recipe, loads_recipe
from lighthouse_core.config.lengths import IN_STEPS
from lighthouse_core.errors import RecipeError
from lighthouse_core.runs.schedule import Decay, lr_factor, recovery_factor
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
    factors = [lr_factor(step, warmup=2, decay=Decay(10, 14)) for step in range(9, 15)]
    assert factors == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0.0]),
        ("1-sqrt", [1.0, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0.0]),
    ],
)
@pytest.mark.parametrize("least", [0.0, 0.1])
def test_shapes_of_a_decay(shape, expected, least):
    factors = [lr_factor(step, warmup=2, decay=Decay(10, 14, shape, least)) for step in range(9, 17)]
    whole = [1.0, *expected, 0.0, 0.0]
    assert factors == pytest.approx([least + (1 - least) * factor for factor in whole], abs=1e-15)
    assert factors[:2] == [1.0, 1.0] and factors[-3:] == [least] * 3


def rates(settings, stages):
    """Of every step of stages, (start, end, whether a recovery), as the trainer's schedulers give them."""
    recipe = load_recipe("recipes/quickstart.toml", ["optimizer.lr=1e-3", *settings])
    found = []
    for start, end, recovery in stages:
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        schedulers = _build_schedulers(
            SimpleNamespace(recipe=recipe, recovery=recovery, start=start, end=end), [optimizer], None, None
        )
        for step in range(end):
            if step >= start:
                found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedulers.step()
    return found


DENSE = ["lighthouse.enabled=false", "training.steps=10", "schedule.warmup_steps=2", "schedule.decay_steps=4"]


def test_a_dense_run_decays_over_its_last_steps():
    assert rates(DENSE, [(0, 10, False)]) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_a_recovery_begins_with_the_rate_that_stage_1_has_come_to():
    stage_1 = ["training.steps=10", "schedule.warmup_steps=2", "schedule.decay_steps=8", 'schedule.decay="cosine"']
    settings = [*stage_1, "schedule.min_lr_factor=0.1", 'recover.decay="linear"']
    found = rates(settings, [(0, 10, False), (10, 14, True)])
    # One more update of stage 1 would have a tenth; it is the first of the recovery.
    assert found[10:] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert found[2] == 1.0 and all(a > b for a, b in pairwise(found[2:]))
    # One that begins early: in the middle of the cosine.
    early = rates(settings, [(0, 6, False), (6, 8, True)])
    assert early[:6] == found[:6] and early[6:] == pytest.approx([0.55, 0.275])
    kept = rates([*settings, 'recover.decay="none"'], [(0, 10, False), (10, 14, True)])
    assert kept[10:] == pytest.approx([0.1] * 4)


def test_an_early_recovery_goes_on_with_the_warm_up():
    recipe = load_recipe("recipes/quickstart.toml", ["schedule.warmup_steps=8", 'recover.decay="1-sqrt"'])
    factor = recovery_factor(recipe, 4, 8)
    assert [factor(step) for step in range(4, 7)] == pytest.approx(
        [5 / 8, 6 / 8 * (1 - 0.25**0.5), 7 / 8 * (1 - 0.5**0.5)]
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["schedule.decay_steps=4"], r"schedule\.decay_steps takes the rate of stage 1 to 0"),
        (["lighthouse.enabled=false", "schedule.decay_steps=10000"], r"schedule\.decay_steps are longer"),
        (
            ['schedule.decay="cosine"'],
            r"schedule\.decay needs schedule\.decay_steps above 0; 90 are all steps after the warm-up",
        ),
        (
            ["schedule.decay_steps=91", "schedule.min_lr_factor=0.1"],
            r"after the warm-up of 10 of 100 steps, schedule\.decay_steps \(91\) can be at most 90",
        ),
        (["schedule.min_lr_factor=0.1"], r"schedule\.min_lr_factor needs schedule\.decay_steps"),
        (["schedule.min_lr_factor=1.0"], r"schedule\.min_lr_factor must be below 1"),
        (['recover.decay="cosin"'], r"did you mean cosine\?"),
    ],
)
def test_schedules_that_are_refused(settings, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe("recipes/quickstart.toml", settings)


# quickstart.toml has 8192 tokens a step and 100 steps.
@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("819200 tokens", 100),
        ("819201 tokens", 101),
        ("1 tokens", 1),
        ("1M tokens", 123),
        ("1.5K tokens", 1),
        ("1.5e6 tokens", 184),
        ("1_000_000tokens", None),
        ("2 B tokens", 244141),
        ("2e9 tokens", 244141),
        ("819200", None),
        ("-5 tokens", None),
        ("1,5M tokens", None),
        ("nan tokens", None),
    ],
)
@pytest.mark.parametrize("key", [f"{section}.{key}" for section, key in IN_STEPS])
def test_lengths_in_tokens(key, text, steps):
    settings = [f'{key}="{text}"', "lighthouse.enabled=false"]
    if key.startswith("schedule."):
        settings.append("training.steps=1000000")
    if steps is None:
        with pytest.raises(RecipeError, match=rf"{key} must be a number of steps, or of tokens"):
            load_recipe("recipes/quickstart.toml", settings)
        return
    section, name = key.split(".")
    recipe = load_recipe("recipes/quickstart.toml", settings)
    assert recipe.training.seq_len * recipe.training.global_batch_size == 8192
    assert getattr(getattr(recipe, section), name) == steps
    # A run's own recipe has the steps.
    assert getattr(getattr(loads_recipe(dump_recipe(recipe)), section), name) == steps


def test_lengths_in_tokens_beside_other_faults():
    for setting in ('training.seq_len="x"', "training.global_batch_size=0", 'training="x"'):
        with pytest.raises(RecipeError, match=setting.partition("=")[0]):
            load_recipe("recipes/quickstart.toml", ['recover.steps="1M tokens"', setting])
    with pytest.raises(RecipeError, match="is not a TOML value") as found:
        load_recipe("recipes/quickstart.toml", ["training.steps=1M tokens"])
    assert found.value.hint == "write --set 'training.steps=\"1M tokens\"'"
