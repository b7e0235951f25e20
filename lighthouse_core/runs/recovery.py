"""Stage 2 of a run: what is to be trained. Nothing here imports torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from lighthouse_core.config import Recipe, load_recipe
from lighthouse_core.config.load import parse_override
from lighthouse_core.errors import CheckpointError, RunError, UserError
from lighthouse_core.runs.run import Newest, Run, check_resumable, with_own_tokenizer
from lighthouse_core.runs.schedule import recovery_factor
from lighthouse_core.seal import Verification


@dataclass(frozen=True)
class Recovery:
    """A stage 2 that is about to be trained.

    Attributes:
        recipe: its settings; recover.steps is its whole length.
        start, end: the switch step and the last step.
        step: of the checkpoint it goes on from.
        stopped_early: stage 1 did not reach its end.
        rates: learning rates of the last update before an extension and of its first one, where the schedule has a
            step between them.
        damaged: what is wrong with each newer checkpoint, by its step.
    """

    recipe: Recipe
    start: int
    end: int
    step: int
    stopped_early: bool
    rates: tuple[float, float] | None = None
    damaged: dict[int, str] = field(default_factory=dict)


def check_request(steps: int | None, extend: int | None, overrides: Sequence[str]) -> None:
    """Check what is asked of a recovery as far as no run is read; see plan_recovery.

    Raises:
        UserError: a number or a setting that cannot be used.
    """
    for option, number in (("--steps", steps), ("--extend", extend)):
        if number is not None and number < 1:
            raise UserError(f"{option} must be at least 1, not {number}")
    if steps is not None and extend is not None:
        raise UserError("--steps and --extend exclude each other", hint="--extend adds to a recovery begun before")
    check_resumable(overrides)


def plan_recovery(
    run: Run,
    steps: int | None = None,
    extend: int | None = None,
    overrides: Sequence[str] = (),
    strict: bool = False,
    ahead: Verification | None = None,
) -> Recovery:
    """What `lighthouse recover` has to train: a new recovery, or the rest of one that was begun. Writes nothing.

    A run that is dense from the start has one, too: more steps, or a decay of its rate.

    Args:
        run: the run.
        steps: length of the recovery; else `[recover] steps`.
        extend: steps to add to a recovery that was begun.
        overrides: `a.b=value` settings, of those that take effect on resuming.
        strict: refuse to fall back to an older checkpoint where the newest is damaged.
        ahead: of `Run.verify_ahead`, where that was begun.

    Raises:
        RunError: the recovery is complete or of another length, or the run decays by its own schedule.
        CheckpointError: there is no checkpoint to go on from.
        UserError: a number or a setting that cannot be used.
    """
    check_request(steps, extend, overrides)
    if steps is not None:
        overrides = [*overrides, f"recover.steps={steps}"]
    if run.recovering:
        # The ledger has the length; recover.toml runs ahead of it if an --extend was cut off between the two.
        overrides = [f"recover.steps={run.end - run.start}", *overrides]
    recipe = with_own_tokenizer(load_recipe(run.recipe_path, overrides, of_run=True), run.path)
    newest = partial(run.newest_checkpoint, strict, ahead)
    if not run.recovering:
        return _begin_recovery(run, recipe, extend, newest)
    recovery = _continue_recovery(run, recipe, extend, newest)
    chosen = any("decay" in parse_override(override).get("recover", {}) for override in overrides)
    if recovery.rates and not chosen:
        before, after = recovery.rates
        kept = recipe.model_copy(update={"recover": recipe.recover.model_copy(update={"decay": "none"})})
        full = recovery_rate(kept, recovery.step, recovery.start, recovery.end)
        raise UserError(
            f"with --extend {extend} the learning rate of run {run.path}, {before:.3g} at step {recovery.step}, would "
            f"rise to {after:.3g} at step {recovery.step + 1}",
            hint=f"choose: --set 'recover.decay=\"{recipe.recover.decay}\"' takes the higher rate to zero at step "
            f"{recovery.end}, as if planned so; --set 'recover.decay=\"none\"' keeps it at {full:.3g}",
        )
    return recovery


def _begin_recovery(run: Run, recipe: Recipe, extend: int | None, newest: Callable[[], Newest]) -> Recovery:
    if extend is not None:
        raise RunError(f"run {run.path} has no recovery to extend", hint="lighthouse recover --steps N begins one")
    if not recipe.recover.steps:
        raise UserError(f"the recipe of run {run.path} has no recover.steps", hint="give --steps N")
    if recipe.schedule.ends_at_zero:
        raise RunError(
            f"the rate of run {run.path} goes to zero by its own schedule.decay_steps",
            hint=f"lighthouse pretrain --resume {run.path} finishes it; a run with schedule.min_lr_factor above 0, or "
            "without a decay, can go on",
        )
    step, damaged = newest()
    return Recovery(recipe, step, step + recipe.recover.steps, step, step < run.end, damaged=damaged)


def _continue_recovery(run: Run, recipe: Recipe, extend: int | None, newest: Callable[[], Newest]) -> Recovery:
    (step, damaged), begun = newest(), run.end - run.start
    if step < run.start:
        raise CheckpointError(
            f"run {run.path} lost its checkpoint of step {run.start}, where its recovery began",
            hint="put that checkpoint back",
        )
    # Before its first checkpoint nothing of it is lost, so that a mistaken length can be corrected.
    if recipe.recover.steps != begun and step > run.start:
        raise RunError(
            f"the recovery of run {run.path} was begun with {begun} steps, not {recipe.recover.steps}",
            hint=f"without --steps it is finished at step {run.end}; --extend M adds M steps",
        )
    # What comes on top may go on at the full rate; any other change would give steps that are done another schedule.
    ends_decay = extend is not None and recipe.recover.decay == "none"
    if step > run.start and recipe.recover.decay != run.recipe.recover.decay and not ends_decay:
        before = run.recipe.recover.decay
        ends = "; --set 'recover.decay=\"none\"' ends it" if extend is not None and before != "none" else ""
        raise RunError(
            f'the recovery of run {run.path} is under way with recover.decay "{before}"',
            hint=f"--set 'recover.decay=\"{before}\"' keeps that decay{ends}",
        )
    if step >= run.end and extend is None:
        raise RunError(
            f"the recovery of run {run.path} is complete at step {step}",
            hint=f"lighthouse strip {run.path} OUT exports it; --extend M adds M steps",
        )
    length = recipe.recover.steps + (extend or 0)
    recipe = recipe.model_copy(update={"recover": recipe.recover.model_copy(update={"steps": length})})
    end, rates = run.start + length, None
    if extend is not None and step > run.start and run.recipe.recover.decay != "none":
        rates = recovery_rate(run.recipe, step - 1, run.start, run.end), recovery_rate(recipe, step, run.start, end)
    return Recovery(recipe, run.start, end, step, False, rates, damaged)


def recovery_rate(recipe: Recipe, step: int, start: int, end: int) -> float:
    """Learning rate of the update that follows `step` finished steps, of a recovery between two steps of its run."""
    return recipe.optimizer.lr * recovery_factor(recipe, start, end)(step)
