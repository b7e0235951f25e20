"""A sweep: several runs of one recipe, each with settings of its own."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from lighthouse_core.config.load import load_recipe, parse_override, read_toml
from lighthouse_core.config.positions import spelled
from lighthouse_core.config.recipe import Recipe
from lighthouse_core.config.section import (
    MOST_TOKENS,
    NonNegative,
    PathText,
    Positive,
    PositiveTokens,
    Section,
    Strings,
    conflict,
)
from lighthouse_core.errors import RecipeError, did_you_mean, nearest
from lighthouse_core.measures import parse_measures
from lighthouse_core.reading import parse_toml

_RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class RunSection(Section):
    """One run: `set` overrides the recipe; `recover` steps follow (0 for none), with `recover_set`.

    `stage_1` names another run of the sweep, whose first stage this one begins from, as it was after `at` steps (0 for
    its end): several recoveries of one. A run that is dense from the start has such, too: decays of its rate. With a
    `set` of `lighthouse.phases` this one goes on with the stage 1 of the other one in other phases: those up to step
    `at` are the same.
    """

    set: Strings = ()
    recover: NonNegative = 0
    recover_set: Strings = ()
    stage_1: str = ""
    at: NonNegative = 0

    @property
    def other_phases(self) -> bool:
        """Whether it goes on with another run's stage 1 in phases of its own."""
        return bool(self.stage_1 and self.set)


class EvaluateSection(Section):
    """What `lighthouse eval` measures at the end of each run, and at the switch: see its options.

    `recipe` is a file beside the sweep, whose held-out text it is instead of the run's own, with `set`.
    """

    tokens: PositiveTokens
    sequences: Positive = 16
    context: Annotated[int, Field(ge=2, le=MOST_TOKENS, multiple_of=2)] = 2048
    trials: Positive = 10
    only: str = ""
    at_switch: str = "loss,leak,switch"
    recipe: str = ""
    set: Strings = ()

    @property
    def named(self) -> tuple[str, ...]:
        """Measures that `only` asks for; none where it leaves the choice."""
        return parse_measures(self.only) if self.only else ()

    @model_validator(mode="after")
    def _check(self) -> "EvaluateSection":
        for key in ("only", "at_switch"):
            try:
                parse_measures(getattr(self, key))
            except ValueError as error:
                raise conflict(key, f"evaluate.{key} {error}") from None
        if "context" in self.named and self.context >= self.tokens - 1:
            raise conflict("context", f"evaluate.context ({self.context}) is not below evaluate.tokens ({self.tokens})")
        if self.set and not self.recipe:
            raise conflict("set", "evaluate.set changes the recipe that evaluate.recipe names")
        return self


class Sweep(Section):
    """A whole sweep. `recipe` is a path beside the file; `set` holds for all runs; `about` goes into what is collected:
    what is asked, and what is expected. More than one run `per_gpu` fill the time in which one of them compiles, but
    what a step takes is then not measured."""

    recipe: PathText
    about: str = ""
    per_gpu: Annotated[int, Field(gt=0, le=64)] = 1
    set: Strings = ()
    evaluate: EvaluateSection | None = None
    runs: Annotated[dict[_RunName, RunSection], Field(min_length=1)]

    def settings(self, name: str) -> list[str]:
        """What the first stage of a run sets, be it another run's."""
        run = self.runs[name]
        return [*self.set, *(self.runs[run.stage_1].set if run.stage_1 else ()), *run.set]

    def branches(self, name: str) -> list[int]:
        """Steps of a run's first stage that `at` of others names."""
        return sorted({run.at for run in self.runs.values() if run.stage_1 == name and run.at})


def load_sweep(path: Path) -> Sweep:
    """The sweep in a file; every run's recipe is valid.

    Raises:
        RecipeError: unreadable, invalid, or asking for something impossible.
    """
    try:
        table: dict[str, Any] = parse_toml(read_toml(path))
    except ValueError as error:
        raise RecipeError(f"cannot read {path}: not valid TOML: {error}") from None
    try:
        sweep = Sweep.model_validate(table)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_first_problem(error)}") from None
    base = path.parent / sweep.recipe
    for name, run in sweep.runs.items():
        parent = sweep.runs.get(run.stage_1) if run.stage_1 else None
        if run.stage_1 and parent is None:
            meant = did_you_mean(run.stage_1, sweep.runs)
            raise RecipeError(f"{path}: run {name}: stage_1 names {run.stage_1!r}, which is no run of the sweep{meant}")
        if parent and parent.stage_1:
            raise RecipeError(
                f"{path}: run {name}: the stage 1 of {run.stage_1} is that of {parent.stage_1}: name that"
            )
        if parent and not run.set and not run.recover:
            raise RecipeError(
                f"{path}: run {name}: with stage_1 there is a recover, or a set of lighthouse.phases that follow"
            )
        if run.other_phases and any(map(_sets_more_than_phases, run.set)):
            raise RecipeError(
                f"{path}: run {name}: with stage_1 only lighthouse.phases can be set: the rest is of {run.stage_1}",
                hint="recover_set holds for the recovery",
            )
        if run.at and not parent:
            raise RecipeError(f"{path}: run {name}: at is a step of the run that stage_1 names, and there is none")
        try:
            recipe = load_recipe(base, sweep.settings(name))
            # Which keys a recovery may set, lighthouse_core.sweep.check knows.
            load_recipe(base, [*sweep.settings(name), *run.recover_set])
            keeping = [recipe, load_recipe(base, [*sweep.settings(name), *parent.recover_set])] if parent else []
            if run.other_phases:
                _check_other_phases(run, load_recipe(base, sweep.settings(run.stage_1)), recipe)
        except RecipeError as error:
            raise RecipeError(f"{path}: run {name}: {error}", hint=error.hint) from None
        if run.recover and recipe.schedule.ends_at_zero:
            wrong = "recover must be 0 where schedule.decay_steps takes the rate to 0; see recover.decay"
            raise RecipeError(f"{path}: run {name}: {wrong}")
        if any("steps" in parse_override(override).get("recover", {}) for override in run.recover_set):
            raise RecipeError(f"{path}: run {name}: recover_set: the steps of a recovery are its recover")
        if any(one.checkpoint.keep for one in keeping):
            raise RecipeError(f"{path}: run {name}: stage_1 needs checkpoint.keep=0 in the run {run.stage_1}")
        if run.at > recipe.training.steps:
            raise RecipeError(
                f"{path}: run {name}: the run {run.stage_1} ends at step {recipe.training.steps}, before {run.at}"
            )
        dense_at_the_end = run.recover or recipe.phases[-1].dense
        if sweep.evaluate and "switch" in sweep.evaluate.named and dense_at_the_end:
            raise RecipeError(
                f"{path}: run {name}: evaluate.only has switch, and the run ends dense",
                hint="evaluate.at_switch has it",
            )
        if sweep.evaluate and sweep.evaluate.tokens > recipe.training.seq_len:
            raise RecipeError(
                f"{path}: run {name}: evaluate.tokens ({sweep.evaluate.tokens}) is above training.seq_len "
                f"({recipe.training.seq_len})"
            )
    if sweep.evaluate and sweep.evaluate.recipe:
        held_out = path.parent / sweep.evaluate.recipe
        try:
            load_recipe(held_out, sweep.evaluate.set)
        except RecipeError as error:
            raise RecipeError(f"{path}: evaluate.recipe: {error}", hint=error.hint) from None
        evaluate = sweep.evaluate.model_copy(update={"recipe": str(held_out)})
        sweep = sweep.model_copy(update={"evaluate": evaluate})
    return sweep


def _sets_more_than_phases(override: str) -> bool:
    addition = parse_override(override)
    return addition.keys() != {"lighthouse"} or addition["lighthouse"].keys() != {"phases"}


def _check_other_phases(run: RunSection, parent: Recipe, own: Recipe) -> None:
    """Raise RecipeError unless two recipes have the same stage 1 up to a step that ends a phase in both."""
    for recipe, whose in ((parent, f"the run {run.stage_1}"), (own, "its own lighthouse.phases")):
        ends = [phase.end for phase in recipe.phases[:-1]]
        if run.at not in ends:
            steps = f"phases end after {', '.join(map(str, ends))}" if ends else "there is one phase"
            raise RecipeError(
                f"at = {run.at} is no step that a phase of {whose} ends with before the last one: {steps}"
            )
    for one, other in zip(parent.phases, own.phases, strict=False):
        if one.end <= run.at and one != other:
            raise RecipeError(
                f"phase {one.number} is another than that of the run {run.stage_1}, up to whose step {run.at} the two "
                "are to be the same"
            )
    if parent.alignment != own.alignment:
        raise RecipeError(
            f"its phases pad documents to {own.alignment} tokens and those of the run {run.stage_1} to "
            f"{parent.alignment}, so that they see other data",
            hint="set data.align for both, a common multiple",
        )


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    # A key that is misspelt says more than the one that is missing for it.
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    *table, key = problem["loc"]
    where = spelled(problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
    # At the top, in [evaluate], and in a [runs.NAME].
    section = (Sweep, EvaluateSection, RunSection)[len(table)]
    near = nearest(str(key), section.model_fields)
    return f"unknown key {where}" + (f"; did you mean {spelled([*table, near])}?" if near else "")
