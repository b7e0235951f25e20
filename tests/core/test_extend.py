"""The learning rate of a recovery that is extended: it goes on as it was, or its user has chosen otherwise."""

import typing
from math import cos, pi

import pytest
from test_runs import save
from tiny_recipe import RECIPE

from lighthouse_core.config import loads_recipe
from lighthouse_core.config.recover import RecoverSection
from lighthouse_core.errors import RunError, UserError
from lighthouse_core.runs.create import create_run
from lighthouse_core.runs.recovery import plan_recovery, recovery_rate
from lighthouse_core.runs.run import Run

DECAYS = typing.get_args(RecoverSection.model_fields["decay"].annotation)
LINEAR, NONE = ['recover.decay="linear"'], ['recover.decay="none"']
# Shape, steps, factors before and after, and the last step: of recoveries that are complete, and of some under way.
RISES = [
    ("linear", 4, 0.25, 0.5, 108),
    ("linear", 10, 0.7, 10 / 14, 114),
    ("cosine", 4, (1 - 0.5**0.5) / 2, 0.5, 108),
    ("cosine", 10, (1 + cos(0.3 * pi)) / 2, (1 + cos(pi * 4 / 14)) / 2, 114),
    ("1-sqrt", 4, 1 - 0.75**0.5, 1 - 0.5**0.5, 108),
    ("1-sqrt", 10, 1 - 0.3**0.5, 1 - (4 / 14) ** 0.5, 114),
]


@pytest.fixture
def recovered(tmp_path):
    """A run with 4 steps of a recovery behind it, of `steps`."""

    def make(decay: str, steps: int = 4, *settings: str) -> Run:
        recipe = loads_recipe(RECIPE, [f"output.dir='{tmp_path}/runs'", *settings])
        run = create_run(recipe, "tiny", f"{decay}-{steps}")
        save(run, 100)
        run.write_recovery(plan_recovery(run, steps, overrides=[f'recover.decay="{decay}"']))
        save(run, 104)
        return Run(run.path)

    return make


def test_every_kind_of_decay_is_tested_here():
    assert set(DECAYS) == {"none", *(shape for shape, *_ in RISES)}


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("settings", [(), ("schedule.warmup_steps=102",)])
def test_without_a_decay_the_rate_goes_on(recovered, steps, settings):
    run = recovered("none", steps, *settings)
    plan = plan_recovery(run, extend=4)
    assert plan.rates is None
    old = recovery_rate(run.recipe, 103, run.start, run.end)
    assert recovery_rate(plan.recipe, plan.step, plan.start, plan.end) == pytest.approx(old) == pytest.approx(1e-3)


@pytest.mark.parametrize(("shape", "steps", "before", "after", "end"), RISES)
def test_a_rate_that_would_rise_is_refused_with_both_rates_and_the_choices(recovered, shape, steps, before, after, end):
    run, same = recovered(shape, steps), [f'recover.decay="{shape}"']
    files = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        plan_recovery(run, extend=4)
    words = str(caught.value)
    assert f"{before * 1e-3:.3g} at step 104" in words and f"rise to {after * 1e-3:.3g} at step 105" in words
    assert all(choice in caught.value.hint for choice in (*same, *NONE, f"zero at step {end}", "0.001"))
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == files
    for choice, expected in ((same, after), (NONE, 1.0)):
        plan = plan_recovery(run, extend=4, overrides=choice)
        assert plan.end == end and plan.rates == pytest.approx((before * 1e-3, expected * 1e-3))
        assert recovery_rate(plan.recipe, plan.step, plan.start, plan.end) == plan.rates[1]


def test_what_was_chosen_holds_for_the_rest(recovered):
    run = recovered("linear")
    run.write_recovery(plan_recovery(run, extend=4, overrides=NONE))
    again = plan_recovery(Run(run.path))
    assert (again.recipe.recover.decay, again.end, again.rates) == ("none", 108, None)
    assert plan_recovery(Run(run.path), extend=1).rates is None


def test_a_recovery_that_has_not_begun_has_no_rate_to_keep(tmp_path):
    run = create_run(loads_recipe(RECIPE, [f"output.dir='{tmp_path}/runs'"]), "tiny", "new")
    save(run, 100)
    run.write_recovery(plan_recovery(run, 4, overrides=LINEAR))
    plan = plan_recovery(Run(run.path), extend=4)
    assert plan.rates is None and recovery_rate(plan.recipe, 100, plan.start, plan.end) == 1e-3


def test_a_decay_cannot_begin_in_the_past(recovered):
    with pytest.raises(RunError, match="under way"):
        plan_recovery(recovered("none"), extend=4, overrides=LINEAR)
    with pytest.raises(RunError, match="under way") as found:
        plan_recovery(recovered("linear", 10), overrides=NONE)
    assert found.value.hint == "--set 'recover.decay=\"linear\"' keeps that decay"
    with pytest.raises(RunError, match="under way") as found:
        plan_recovery(recovered("cosine"), extend=4, overrides=LINEAR)
    assert found.value.hint == (
        "--set 'recover.decay=\"cosine\"' keeps that decay; --set 'recover.decay=\"none\"' ends it"
    )


def test_after_a_stage_1_that_decays_the_full_rate_is_what_it_came_to(recovered):
    stage_1 = ("schedule.decay_steps=50", "schedule.min_lr_factor=0.2")
    run = recovered("linear", 4, *stage_1)
    with pytest.raises(UserError, match=r"5e-05 at step 104, would rise to 0.0001 at step 105") as caught:
        plan_recovery(run, extend=4)
    assert "keeps it at 0.0002" in caught.value.hint
    # A dense run that decays to 0 has no rate to go on with; one that decays to more has.
    dense = ("lighthouse.enabled=false", "schedule.decay_steps=50")
    assert recovered("none", 5, *dense, "schedule.min_lr_factor=0.2").end == 105
    with pytest.raises(RunError, match=r"goes to zero by its own schedule\.decay_steps"):
        recovered("none", 6, *dense)
