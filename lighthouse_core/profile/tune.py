"""Which settings to train with on this machine: a search by time under a floor, and what a run gains by them.

Nothing here measures, but for `timed`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lighthouse_core.attention import LighthouseConfig
from lighthouse_core.attention.dense import BACKENDS as DENSE_BACKENDS
from lighthouse_core.attention.methods import METHODS
from lighthouse_core.attention.methods.method import Proposal
from lighthouse_core.config.dump import toml_value

# A query may have to do with the mean of a window that ended this many tokens before it.
COARSEST = 256


@dataclass(frozen=True)
class Timed:
    """Settings of stage 1 and the times of one attention call with them, batch 1.

    Attributes:
        settings: as [lighthouse] takes them.
        share: of the tokens that are gathered as they are, at level 0; 1 where every token is a key somewhere.
        coarsest: tokens of the coarsest window; 1 without a pyramid.
        gathered: S; None without a pyramid.
        dense_layers: whether the model's dense layers stay.
        forward_ms, both_ms: medians; of a window that grows, those of its mean.
    """

    settings: dict[str, Any]
    share: float
    coarsest: int
    gathered: int | None
    dense_layers: bool
    forward_ms: float
    both_ms: float


@dataclass(frozen=True)
class Plan:
    """What a training run consists of, apart from the attention of its Lighthouse layers.

    Attributes:
        layers, dense_layers: of the model, and how many of them stay dense in stage 1.
        steps, recover_steps: of the two stages.
        calls: attention calls of one layer in a step of one process: its micro-batches' sequences.
        repeated: forward passes that activation checkpointing makes again, 0 or 1.
        rest_ms: of a step, all but attention.
        dense: milliseconds of a dense call, forward and both ways, by the dense kernel.
    """

    layers: int
    dense_layers: int
    steps: int
    recover_steps: int
    calls: int
    repeated: int
    rest_ms: float
    dense: dict[str, tuple[float, float]]

    def dense_step_ms(self, backend: str) -> float:
        """With every layer dense, by that kernel."""
        return self.rest_ms + self.layers * self._layer_ms(*self.dense[backend])

    def stage_1_step_ms(self, forward_ms: float, both_ms: float, backend: str) -> float:
        """With Lighthouse calls of these times in all layers that have them, and that dense kernel in the others."""
        lighthouse = (self.layers - self.dense_layers) * self._layer_ms(forward_ms, both_ms)
        return self.rest_ms + lighthouse + self.dense_layers * self._layer_ms(*self.dense[backend])

    def _layer_ms(self, forward_ms: float, both_ms: float) -> float:
        return self.calls * (both_ms + self.repeated * forward_ms)


@dataclass(frozen=True)
class Prediction:
    """How much faster a run is than a dense one of as many steps, by the dense kernel that is fastest.

    Attributes:
        step_ms: of stage 1.
        stage_1: times faster, in stage 1.
        total: times faster, recovery included.
    """

    step_ms: float
    stage_1: float
    total: float


def predict(plan: Plan, forward_ms: float, both_ms: float, backend: str) -> Prediction:
    """Of Lighthouse calls that take so long, where dense layers and the recovery have that dense kernel."""
    step, recovery = plan.stage_1_step_ms(forward_ms, both_ms, backend), plan.dense_step_ms(backend)
    dense = min(map(plan.dense_step_ms, plan.dense))
    steps = plan.steps + plan.recover_steps
    return Prediction(step, dense / step, steps * dense / (plan.steps * step + plan.recover_steps * recovery))


def amdahl(plan: Plan) -> Prediction:
    """The bound: Lighthouse calls that take no time, and the fastest dense kernel elsewhere."""
    return max((predict(plan, 0.0, 0.0, backend) for backend in plan.dense), key=lambda found: found.total)


def candidates(tokens: int, base: LighthouseConfig, floor: float, coarsest: int = COARSEST) -> list[Proposal]:
    """What every method proposes; see `Method.proposals`."""
    return [found for method in METHODS.values() for found in method.proposals(base, tokens, floor, coarsest)]


def timed(
    base: LighthouseConfig,
    proposals: Sequence[Proposal],
    backends: Sequence[str],
    time: Callable[[LighthouseConfig], tuple[float, float]],
) -> list[Timed]:
    """Every proposal by every dense kernel that trains it; the fastest call first.

    Args:
        base: settings that a proposal does not name.
        proposals: the candidates.
        backends: names of dense kernels.
        time: milliseconds forward, and forward and backward, of a call with such settings.
    """
    found = []
    for backend in backends:
        for one in proposals:
            if one.grows and not DENSE_BACKENDS[backend].documents:
                continue
            times = time(replace(base, **one.call, dense_backend=backend))
            settings = one.settings | {"dense_backend": backend}
            found.append(Timed(settings, one.share, one.coarsest, one.gathered, one.dense_layers, *times))
    return sorted(found, key=lambda one: one.both_ms)


def plan_of(plan: Plan, one: Timed) -> Plan:
    """The run with these settings."""
    return plan if one.dense_layers else replace(plan, dense_layers=0)


def ranked(plan: Plan, found: Sequence[Timed]) -> list[tuple[Timed, Prediction]]:
    """Each pyramid, and the chunks, by the dense kernel that makes the run shortest; the shortest run first, chunks
    last."""
    best: dict[str, tuple[Timed, Prediction]] = {}
    for one in found:
        backend = one.settings["dense_backend"]
        prediction = predict(plan_of(plan, one), one.forward_ms, one.both_ms, backend)
        name = str(one.settings | {"dense_backend": ""})
        if name not in best or prediction.total > best[name][1].total:
            best[name] = one, prediction
    return sorted(best.values(), key=lambda pair: (pair[0].gathered is None, -pair[1].total))


@dataclass(frozen=True)
class Advice:
    """What was searched and found.

    Attributes:
        recipe: the name of the recipe that gives the model and the steps.
        tokens: N.
        floor, coarsest: the least share of tokens at level 0, and the widest window, of a candidate.
        plan: the run.
        timed: candidates, the pyramid with the shortest run first, growing chunks last.
        predictions: of each of these, growing chunks in all layers.
        bound: Amdahl's: of Lighthouse calls that take no time.
        measured_step_ms: of the stage 1 that `plan.rest_ms` was taken from, and
        measured_settings: its settings.
        dense_layers: of the model, which stay where a candidate keeps them.
        own: pooling, levels and topk of the recipe, where it has a pyramid that keeps the floor.
        documents: whether the recipe keeps documents apart, which nothing that was measured does.
    """

    recipe: str
    tokens: int
    floor: float
    coarsest: int
    plan: Plan
    timed: list[Timed]
    predictions: list[Prediction]
    bound: Prediction
    measured_step_ms: float
    measured_settings: dict[str, Any]
    dense_layers: tuple[int, ...]
    own: tuple[int, int, int] | None = None
    documents: bool = False

    def fragment(self, number: int) -> str:
        """Lines of TOML for a recipe, with what they promise in comments."""
        one, prediction = self.timed[number], self.predictions[number]
        settings = {"enabled": True, "phases": [], **one.settings}
        bound = amdahl(plan_of(self.plan, one))
        lines = [
            f"# {self.tokens} tokens: stage 1 is predicted {prediction.stage_1:.2f} times as fast as dense training,",
            f"# {self.plan.steps} + {self.plan.recover_steps} steps {prediction.total:.2f} times; at most "
            f"{bound.stage_1:.2f} and {bound.total:.2f} if its attention took no time.",
            "# Measured with the settings below, which the recipe has to have, too:",
            f"# In [training]: seq_len = {self.tokens}",
            f"# In [model]: dense_layers = {toml_value(list(self.dense_layers) if one.dense_layers else [])}",
            *(['# In [data]: packing = "concat"'] if self.documents else []),
            "[lighthouse]  # in place of the recipe's",
        ]
        lines += [f"{key} = {toml_value(value)}" for key, value in settings.items()]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return {"tune": asdict(self) | {"fragments": [self.fragment(n) for n in range(len(self.timed))]}}
