"""The measurements behind advice: attention calls of all candidates, and a few steps of training."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from lighthouse_core.attention import LighthouseConfig, dense_attention
from lighthouse_core.attention.methods.pyramid import Pyramid
from lighthouse_core.config import Recipe
from lighthouse_core.config.dump import toml_value
from lighthouse_core.errors import LighthouseError, UserError
from lighthouse_core.profile.attention import check_size, profile_call, profile_lighthouse
from lighthouse_core.profile.check import check_call
from lighthouse_core.profile.dense import dense_kernels
from lighthouse_core.profile.step import StepProfile
from lighthouse_core.profile.tune import COARSEST, Advice, Plan, Timed, amdahl, candidates, ranked, timed
from lighthouse_core.profile.work import Shape

_REPEATS = 10
_PYRAMID = Pyramid()


def advise(
    recipe: Recipe,
    name_of_recipe: str,
    floor: float,
    device: torch.device,
    say: Callable[[str], None],
    run: Callable[[list[str]], StepProfile],
    *,
    coarsest: int = COARSEST,
) -> Advice:
    """Search the settings of stage 1 for a recipe's model and length, and predict what they gain.

    The fastest pyramid trains a few steps; what these take beyond their attention calls is the same for the others.

    Args:
        recipe: gives the model, N, the batch and the steps.
        name_of_recipe: for the report.
        floor: the least share of tokens at level 0.
        device: a GPU, or the CPU.
        say: told what begins.
        run: trains a few steps of the recipe, one micro-batch each, with these settings (`a.b=value`) over it.
        coarsest: the widest window in tokens.

    Raises:
        UserError: no pyramid is left, or the calls do not fit.
        LighthouseError: a call disagrees with plain PyTorch.
    """
    model, training = recipe.model, recipe.training
    dtype = training.dtype if device.type == "cuda" else "float32"
    shape = Shape(training.seq_len, model.heads, model.kv_heads, model.head_dim, dtype)
    trained = recipe.phases[-1].attention
    # A pyramid's settings, whatever the recipe's method is.
    base = replace(trained, method=_PYRAMID.name, window=0, keep=0, rotate="before", dense_backend="auto")
    own = None
    try:
        proposals = candidates(shape.tokens, base, floor, coarsest)
        kept = trained.pools and base.pooling * base.topk >= floor * shape.tokens
        if kept and (as_it_is := _PYRAMID.proposal(base, shape.tokens)):
            own = base.pooling, base.levels, base.topk
            proposals += [as_it_is] * (as_it_is not in proposals)
    except ValueError as error:
        raise UserError(str(error), hint="use a smaller --seq") from None
    pyramids = [one for one in proposals if one.gathered is not None]
    if not pyramids:
        raise UserError(
            f"no pyramid of {shape.tokens} tokens gathers {floor:.1%} of them at level 0, in windows of {coarsest} or "
            "less",
            hint="lower --floor, or use a longer --seq: dense attention may be all that a short one needs",
        )
    for one in pyramids:
        check_size(shape, replace(base, **one.call), device)
    say(f"{len(pyramids)} pyramids of N = {shape.tokens}: comparing with plain PyTorch, then timing")
    there, _ = dense_kernels(device, shape)
    backends = [kernel.name for kernel in there if kernel.trains] or ["auto"]

    def time(cfg: LighthouseConfig) -> tuple[float, float]:
        check_call(shape, cfg, device)
        call = profile_lighthouse(cfg, shape, device, _REPEATS)
        say(f"  {cfg.rule.summary(vars(cfg))}, {cfg.dense_backend}: {call.both_ms.median:.2f} ms")
        return call.forward_ms.median, call.both_ms.median

    found = timed(base, proposals, backends, time)
    dense = {}
    for name in backends:
        call = profile_call(name, name, partial(dense_attention, backend=name), shape, device, 3)
        dense[name] = call.forward_ms.median, call.both_ms.median
    fastest = next(one for one in found if one.gathered is not None)
    if device.type == "cuda":
        # The training process needs it.
        torch.cuda.empty_cache()
    say("training a few steps with the fastest of them")
    settings = {"enabled": True, "phases": [], **fastest.settings}
    # The pyramids that are searched have no window, and the calls that are timed no documents.
    packing = 'data.packing="concat"'
    step = run([packing, *(f"lighthouse.{key}={toml_value(value)}" for key, value in settings.items())])
    plan = _plan(recipe, fastest, dense, step)
    best = ranked(plan, found)
    return Advice(
        recipe=name_of_recipe,
        tokens=shape.tokens,
        floor=floor,
        coarsest=coarsest,
        plan=plan,
        timed=[one for one, _ in best],
        predictions=[prediction for _, prediction in best],
        bound=amdahl(plan),
        measured_step_ms=step.seconds * 1e3,
        measured_settings=fastest.settings,
        dense_layers=tuple(model.dense_layers),
        own=own,
        documents=recipe.data.packing == "documents",
    )


def _plan(recipe: Recipe, trained: Timed, dense: dict[str, tuple[float, float]], step: StepProfile) -> Plan:
    """The run of a recipe, from a step of one micro-batch a process that was trained with `trained`.

    Raises:
        LighthouseError: that step took less time than its attention alone.
    """
    model, training = recipe.model, recipe.training
    plan = Plan(
        layers=model.layers,
        dense_layers=len(model.dense_layers),
        steps=training.steps,
        recover_steps=recipe.recover.steps,
        calls=training.local_batch_size,
        repeated=int(training.activation_checkpointing == "full"),
        rest_ms=0.0,
        dense=dense,
    )
    attention = plan.stage_1_step_ms(trained.forward_ms, trained.both_ms, trained.settings["dense_backend"])
    rest = step.seconds * 1e3 - attention
    if rest <= 0:
        raise LighthouseError(
            f"a step of {step.seconds * 1e3:.0f} ms took less than its attention calls alone, {attention:.0f} ms",
            hint="something else is at work on this machine: try again when it is not",
        )
    # An update is one a step, however many micro-batches that has.
    update = min(rest, step.update_ms)
    times = training.global_batch_size // (training.local_batch_size * step.processes)
    return replace(plan, calls=times * plan.calls, rest_ms=times * (rest - update) + update)
