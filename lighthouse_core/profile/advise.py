"""The measurements behind advice: attention calls of all candidates, and a few steps of training."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lighthouse_core.attention import LighthouseConfig, lighthouse_attention
from lighthouse_core.config import Recipe
from lighthouse_core.errors import UserError
from lighthouse_core.profile.attention import Call, check_size, profile_call
from lighthouse_core.profile.check import check_call
from lighthouse_core.profile.dense import dense_kernels
from lighthouse_core.profile.step import StepProfile
from lighthouse_core.profile.tune import COARSEST, Advice, Plan, Prediction, Timed, candidates, predict, timed, toml
from lighthouse_core.profile.work import Shape

_REPEATS = 10


def advise(
    recipe: Recipe,
    name: str,
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
        name: of the recipe.
        floor: the least share of tokens at level 0.
        device: a GPU, or the CPU.
        say: told what begins.
        run: trains a few steps of the recipe, one micro-batch each, with these settings (`a.b=value`) over it.
        coarsest: the widest window in tokens.

    Raises:
        UserError: no pyramid is left, or the calls do not fit.
        LighthouseError: a call disagrees with plain PyTorch.
    """
    if not 0 < floor < 1:
        raise UserError(f"--floor must lie between 0 and 1, not {floor}")
    model, training = recipe.model, recipe.training
    shape = Shape(
        training.seq_len,
        model.heads,
        model.kv_heads,
        model.head_dim,
        training.dtype if device.type == "cuda" else "float32",
    )
    base = replace(recipe.lighthouse.attention(), method="pyramid", window=0, keep=0, dense_backend="auto")
    pyramids = list(candidates(shape.tokens, base, floor, coarsest))
    if not pyramids:
        raise UserError(
            f"no pyramid of {shape.tokens} tokens gathers {floor:.1%} of them at level 0, in windows of {coarsest} or "
            "less",
            hint="lower --floor, or use a longer --seq: dense attention may be all that a short one needs",
        )
    for cfg in pyramids:
        check_size(shape, cfg, device)
    say(f"{len(pyramids)} pyramids of N = {shape.tokens}: comparing with plain PyTorch, then timing")
    dtype = getattr(torch, shape.dtype)
    there, _, _ = dense_kernels(device, dtype, shape.heads, shape.kv_heads, shape.head_dim)
    # What a recipe can name.
    backends = [kernel.name for kernel in there if kernel.name not in ("fa2", "fa3")]
    calls: dict[LighthouseConfig, Call] = {}

    def time(cfg: LighthouseConfig) -> tuple[float, float]:
        if cfg not in calls:
            check_call(replace(shape, tokens=min(shape.tokens, 16384)), cfg, device)
            key = torch.zeros(3, dtype=torch.int64, device=device)

            def call(*x: Tensor) -> Tensor:
                return lighthouse_attention(*x, cfg, key=key)

            calls[cfg] = profile_call("lighthouse", "", call, shape, device, _REPEATS)
        return calls[cfg].forward_ms.median, calls[cfg].both_ms.median

    found = timed(shape.tokens, pyramids, backends, time)
    dense = {k.name: profile_call(k.name, k.label, k.call, shape, device, 3) for k in there if k.name in backends}
    times = {name: (call.forward_ms.median, call.both_ms.median) for name, call in dense.items()}
    best = found[0]
    settings = [f"lighthouse.{key}={toml(value)}" for key, value in best.settings.items()]
    say("training a few steps with the fastest of them")
    step = run([*settings, 'lighthouse.method="pyramid"', "lighthouse.window=0", "lighthouse.windows=[]"])
    plan = _plan(recipe, best, times, step)

    def predicted(forward_ms: float, both_ms: float, one: Timed) -> Prediction:
        return predict(plan, forward_ms, both_ms, one.settings["dense_backend"])

    return Advice(
        recipe=name,
        tokens=shape.tokens,
        floor=floor,
        coarsest=coarsest,
        plan=plan,
        timed=found,
        predictions=[predicted(one.forward_ms, one.both_ms, one) for one in found],
        bound=predicted(0.0, 0.0, best),
        measured_step_ms=step.seconds * 1e3,
        measured_settings=best.settings,
    )


def _plan(recipe: Recipe, trained: Timed, dense: dict[str, tuple[float, float]], step: StepProfile) -> Plan:
    """The run of a recipe, from a step of one micro-batch a process that was trained with `trained`."""
    model, training = recipe.model, recipe.training
    repeated = int(training.activation_checkpointing == "full")
    plan = Plan(
        layers=model.layers,
        dense_layers=len(model.dense_layers),
        steps=training.steps,
        recover_steps=recipe.recover.steps,
        calls=training.local_batch_size,
        repeated=repeated,
        rest_ms=0.0,
        dense=dense,
    )
    attention = plan.stage_1_step_ms(trained.forward_ms, trained.both_ms, trained.settings["dense_backend"])
    rest = max(0.0, step.seconds * 1e3 - attention)
    # An update is one a step, however many micro-batches that has.
    update = min(rest, step.update_ms)
    times = training.global_batch_size // (training.local_batch_size * step.processes)
    return replace(plan, calls=times * plan.calls, rest_ms=times * (rest - update) + update)
