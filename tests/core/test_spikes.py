"""Loss spikes: what stands out, and what does not."""

import math
import random

import pytest

from lighthouse_core.titan.spikes import Spikes


def falling(steps: int) -> list[float]:
    """A loss that falls as in training, with noise."""
    noise = random.Random(0)
    return [2 + 4 * math.exp(-step / 50) + noise.gauss(0, 0.03) for step in range(steps)]


def test_a_loss_that_falls_with_noise_has_no_spike():
    spikes = Spikes()
    assert [spikes.score(loss) for loss in falling(2000)] == [None] * 2000


@pytest.mark.parametrize("step, height", [(20, 10.0), (100, 5.0), (300, 1.5), (1999, 1.5)])
def test_a_spike_is_scored_and_what_follows_it_is_none(step, height):
    losses = falling(2000)
    losses[step] += height
    spikes = Spikes()
    scores = [spikes.score(loss) for loss in losses]
    assert [i for i, score in enumerate(scores) if score] == [step]
    if step == 1999:
        # 1.5 over the noise of 0.03, of which 64 samples give some tenths.
        assert 35 < scores[step] < 75


def test_losses_that_are_not_finite_neither_are_spikes_nor_hide_one():
    losses = falling(300)
    for step in range(200, 260):
        losses[step] = (math.nan, math.inf, -math.inf)[step % 3]
    losses[260] += 1.0
    spikes = Spikes()
    scores = [spikes.score(loss) for loss in losses]
    assert [i for i, score in enumerate(scores) if score] == [260]


def test_nothing_is_said_of_the_first_losses_nor_of_rounding():
    spikes = Spikes()
    assert spikes.score(1.0) is None and spikes.score(50.0) is None
    spikes = Spikes()
    assert [spikes.score(3.0 + 1e-7 * (i % 2)) for i in range(100)] == [None] * 100
