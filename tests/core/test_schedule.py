import pytest

from lighthouse_core.train.schedule import lr_factor


def test_warm_up_is_linear_then_constant():
    factors = [lr_factor(step, warmup=4) for step in range(8)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert lr_factor(10**6, warmup=4) == 1.0


def test_no_warm_up_starts_at_the_full_rate():
    assert lr_factor(0, warmup=0) == 1.0


def test_warm_up_longer_than_the_stage_is_not_shortened():
    assert lr_factor(99, warmup=2000) == pytest.approx(0.05)


def test_linear_decay_runs_from_the_switch_to_zero_at_the_end():
    factors = [lr_factor(step, warmup=2, switch=10, end=14) for step in range(9, 15)]
    assert factors == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
