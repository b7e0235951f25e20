"""REPORT.md of the experiments, from what `lighthouse sweep` collected:

python recipes/evidence/report.py recipes/evidence/results/*.json
"""

import argparse
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, stdev, variance
from typing import Any, NamedTuple

from lighthouse_core import figures
from lighthouse_core.attention.methods import METHODS
from lighthouse_core.attention.settings import Settings
from lighthouse_core.config.phases import of_older_run
from lighthouse_core.config.recipe import Recipe
from lighthouse_core.config.section import Section
from lighthouse_core.evaluate import compare
from lighthouse_core.evaluate.needle import interval

HERE = Path(__file__).parent
INTRODUCTION = """# Evidence: does stage 1 and a recovery match dense training?

Written by `recipes/evidence/report.py` from the JSON in [results/](results), which `lighthouse sweep` collected.
Losses are in nats per byte on held-out text, the same sequences for every run of a table, with dense attention unless
it is said otherwise. ± is the standard error over sequences of one trained run; how much another training of the same
differs is under *Noise*, and is more than the ± of a difference. *Beside dense* is the mean paired difference from the
dense run of the same seed and as many steps, whose rate decays over as many; *beside the best dense* that from the best
of them, whatever steps its rate decays over. *Validation* is the last loss on the
validation text of the training, packages that were left out of it. *Beyond* is the loss of the tokens that have more
than a short context before them; *far context* is what they lose where they see no more than that, so more is better.
*Needles* is the share of hidden digits that are found, 0.10 by guessing. *Error of one call* is how far the output of a
layer's attention is from dense attention's of the same inputs, relative to the latter, over layers. Seconds are of
training on one GPU with torch.compile, without the time that compiling takes: every step counts with the median time of
all alike steps that were measured on such a GPU. Where a window grows, it counts with their mean, without the rows that
compile.

The text is what `base.toml` and `held-out.toml` say: Python sources of the packages that were installed, in an order of
samples that the seed decides, and, to be measured on, half of the standard library, of which packages hold copies of a
few files. Texts with the same fingerprint, whose first digits stand with each sweep, are the same; other packages are
another text, on which figures differ.

Hypotheses: (1) stage 1 reads the leak; (2) it lacks a neighbourhood at full resolution; (3) its function is not close
to dense attention; (4) heads that copy come late.
"""
NOISE = """Runs that differ in nothing but the seed, or in nothing at all, and perhaps the commit: kernels add up
gradients in an order that changes from run to run, so that a run is not repeated exactly. *Beside dense* is the
difference of each from the dense run of its own sweep."""
SAME_TIME = """Losses on the validation text of the training, the same batches every time, that of dense as a straight
line between its validations."""
SAME_TIME_DECAYED = """Losses on the held-out text of runs whose rate has gone to zero, that of dense as a straight line
between dense runs of several lengths, each of which decays over the share of its steps that stands with the run. A step
of them counts with the seconds that it takes on the GPU that the run's own seconds are of. A loss that falls ever more
slowly lies below such a line: the further apart the lengths, the more too large is the lead."""

NEEDLES = """Hidden digits found of those asked for, by about how many tokens back the digit is; by guessing, a tenth is
found. The last column has the needles that lie further back than the widest window of stage 1: the share found less
that of the best dense run of as many steps that was asked the same, with Newcombe's 95 % interval. Chosen blocks and a
pyramid see keys beyond their window. Where a phase or a layer of stage 1 is dense, no needle is out of reach (-)."""
EQUAL_LOSS = """How many times as long dense training takes to the loss that a run ends at. Its seconds to that loss are
from dense runs of several lengths whose rate decays. A power law with an offset, L = a + b t^-c, goes through the two
lengths on both sides of the loss and the next one. With two lengths, or where the three losses do not fall, a straight
line of loss over the logarithm of time takes its place (*line*). The loss of dense training lies below such a line, so
that *times as long* is then too large. Where a run ends below every dense run, dense training takes longer than the
longest of them (>). In brackets is how far below. A bound that a one-sided test of the difference does not show at 5 %
(Student's t with the degrees of freedom of the spread) is marked: *not shown*. Bounds do not rank runs. A loss above
that of the shortest is outside. Repetitions with other seeds are averaged, dense ones too. ± is a standard error. The
slope of the curve at the loss turns an error of loss into one of time. The errors of the curve's shape and of the
seconds of a step are left out. The loss of one run is taken to have the standard deviation of all repetitions
(*Noise*), with its degrees of freedom: {spread}."""


# What `Trial.decay` and `Trial.shape` tell.
_DECAY = ("schedule.decay_steps", "schedule.decay", "schedule.min_lr_factor")
# The 95 % quantile of Student's t with 1, 2, ... degrees of freedom.
_STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
# A GPU, and the versions of what ran there.
Machine = tuple[str | None, dict]
# Median seconds of alike steps, and which runs' they are.
Pace = tuple[float, tuple[str, ...]]


@dataclass(frozen=True)
class Trial:
    """A run of a sweep.

    Attributes:
        name: of it.
        run: what was collected.
        alone: whether it had a GPU to itself, and its own steps tell what they take.
        paces: seconds of alike steps of all runs that had, and where they are from: see `pace`.
        timed_on: another machine than its own, whose seconds are wanted.
    """

    name: str
    run: dict[str, Any]
    alone: bool = True
    paces: Mapping[str, Pace] = field(default_factory=dict)
    timed_on: Machine | None = None

    @property
    def end(self) -> dict | None:
        return self.run["evaluations"].get("end")

    @property
    def loss(self) -> dict:
        return self.end["loss"]["nats_per_token"]

    @property
    def dense(self) -> bool:
        return not self.run["recipe"]["lighthouse"]["enabled"]

    @property
    def _decays_in_recovery(self) -> bool:
        return self.run["settings"]["recover"] > 0 and self.run["recipe"]["recover"]["decay"] != "none"

    @property
    def decay(self) -> int:
        """Steps over which the rate goes to zero."""
        if self._decays_in_recovery:
            return self.run["settings"]["recover"]
        schedule = self.run["recipe"]["schedule"]
        return 0 if schedule.get("min_lr_factor") else schedule["decay_steps"]

    @property
    def shape(self) -> tuple:
        """Of the last decay, the part of the rate that it ends at, and of an earlier decay its steps and the same."""
        recipe, schedule = self.run["recipe"], self.run["recipe"]["schedule"]
        own = (schedule.get("decay", "linear"), schedule.get("min_lr_factor", 0.0))
        if not self._decays_in_recovery:
            return own
        steps = schedule["decay_steps"]
        return (recipe["recover"]["decay"], 0.0) + ((steps, *own) if steps else ())

    @property
    def steps(self) -> tuple[int, ...]:
        """Of each stage."""
        return tuple(stage["end"] - stage["start"] for stage in self.run["ledger"]["stages"])

    @property
    def seq_len(self) -> int:
        """Tokens."""
        return self.run["recipe"]["training"]["seq_len"]

    @property
    def text(self) -> str | None:
        """Fingerprint of what it was trained on; None where that is not known."""
        return self.run["ledger"]["stages"][0].get("data")

    @property
    def machine(self) -> Machine:
        """Where its seconds are of."""
        device = self.run["ledger"]["stages"][0].get("conditions", {}).get("device")
        return self.timed_on or (device, self.run["versions"])

    def on(self, machine: Machine) -> "Trial":
        """The same with the seconds of another machine, if its steps are known there: see `timed`."""
        return self if machine == self.machine else replace(self, alone=False, timed_on=machine)

    def part(self, row: dict) -> str:
        """Steps of one part take equally long: dense ones, or those of a stage 1 or of a phase of it, by the settings
        that its method reads; in a phase whose window grows they count as if they did."""
        given = dict(self.run["recipe"]["lighthouse"])
        phases = given.pop("phases", ())
        phase = phases[row["phase"] - 1] if "phase" in row else {}
        if row["stage"] == "dense" or phase.get("enabled") is False:
            return "dense"
        # Before there were phases, rows told the window.
        given |= phase or ({"window": row["window"]} if "window" in row else {})
        settings = {one.name: given.get(one.name, one.default) for one in fields(Settings)}
        method = METHODS[settings["method"]]
        read = {key: settings[key] for key in sorted(method.reads)}
        more = ["window_end", "growth", "dense_layers"]
        if method.chooses_blocks and given.get("budget", {}).get("every"):
            more.append("budget")
        return f"lighthouse {json.dumps(read | {key: given[key] for key in more if key in given})}"

    def pace(self, part: str) -> str:
        """What decides how long a step of a part takes."""
        keys = ("training.steps", "training.seed", "model.rope_theta", *(("model.dense_layers",) * (part == "dense")))
        return json.dumps([part, *self.machine, self.settings(("recover", "schedule", "lighthouse"), keys)])

    @cached_property
    def settled(self) -> dict[str, list[float]]:
        """Seconds of a step, as logged, by part; without those that compile where there are others."""
        found: dict[str, list[dict]] = {}
        for row in self.run["rows"]:
            if "loss" in row:
                found.setdefault(self.part(row), []).append(row)
        kept = {part: [row for row in rows if "first_of_launch" not in row] or rows for part, rows in found.items()}
        return {part: [row["seconds"] for row in rows] for part, rows in kept.items()}

    @property
    def own_paces(self) -> dict[str, float]:
        """Medians; while a window grows, the mean without what compiles."""
        return {
            part: fmean(without_compiling(seconds)) if '"window_end"' in part else median(seconds)
            for part, seconds in self.settled.items()
        }

    @property
    def known(self) -> dict[str, Pace]:
        """Of its parts, the seconds that are known of all such steps on its machine."""
        known = {part: self.paces.get(self.pace(part)) for part in self.own_paces}
        return {part: found for part, found in known.items() if found}

    @property
    def timed(self) -> bool:
        """Whether the seconds of its curve are those of a run that has a GPU to itself."""
        return self.alone or self.known.keys() == self.own_paces.keys()

    @cached_property
    def curve(self) -> compare.Curve:
        """Each part at the median seconds of its steps: what compiles, and how often, is no part of a method."""
        stages = self.run["ledger"]["stages"]
        flops = {stage["stage"]: stage["flops"] / stage["steps"] for stage in stages if stage.get("steps")}
        seconds = self.own_paces
        if self.timed:
            seconds |= {part: found for part, (found, _) in self.known.items()}
        # Of a stage whose costs are not in the ledger yet, nothing is said.
        rows = [
            row | ({"seconds": seconds[self.part(row)]} if "loss" in row else {})
            for row in self.run["rows"]
            if row["stage"] in flops
        ]
        return compare.curve(self.name, rows, stages, lambda stage, first, last: (last - first + 1) * flops[stage])

    @property
    def seconds(self) -> float:
        return self.curve.points[-1].seconds

    @property
    def validated(self) -> list[tuple[float, float]]:
        """(seconds of training, validation loss), oldest first."""
        seconds = {point.step: point.seconds for point in self.curve.points}
        return [(seconds[step], loss) for step, loss, _ in self.curve.validation if step in seconds]

    @property
    def outcome(self) -> tuple[float, float]:
        """(seconds of training, loss at the end)."""
        return self.seconds, self.loss["mean"]

    @cached_property
    def common(self) -> tuple[str | None, str]:
        """What it has in common with the dense runs that it may be held against."""
        return self.without_stage_1()

    def without_stage_1(self, *keys: str) -> tuple[str | None, str]:
        """Its text, and its settings without those of stage 1 and the recovery, and without these keys."""
        left_out = ("training.steps", "model.dense_layers", *_DECAY, *keys)
        return self.text, self.settings(("lighthouse", "recover"), left_out)

    def settings(self, sections: Sequence[str] = (), keys: Sequence[str] = ()) -> str:
        """The recipe without those sections, what changes no result, and those keys, "a.b", of other sections.

        What is as by default is left out, too: a recipe of before there was such a key says as much.
        """
        left_out = ("output", "checkpoint", "metrics", *sections)
        recipe = {
            name: {key: value for key, value in part.items() if not is_default(value, name, key)}
            for name, part in self.run["recipe"].items()
            if name not in left_out
        }
        for key in keys:
            section, name = key.split(".")
            recipe.get(section, {}).pop(name, None)
        return json.dumps({name: part for name, part in recipe.items() if part}, sort_keys=True)


def is_default(value: Any, section: str, key: str) -> bool:
    """Whether a key of a recipe has its default. A key that there is no more is off by default."""
    keys = Recipe.model_fields[section].annotation.model_fields
    default = keys[key].get_default(call_default_factory=True) if key in keys else None
    if isinstance(default, Section):
        default = default.model_dump(mode="json")
    elif isinstance(default, tuple):
        default = list(default)
    return value == default or not (value or default)


def trials(sweep: dict, paces: Mapping[str, Pace] | None = None) -> list[Trial]:
    return [Trial(name, run, sweep.get("per_gpu", 1) == 1, paces or {}) for name, run in sweep["runs"].items()]


def timed(trial: Trial, machines: Iterable[Machine]) -> Trial:
    """With seconds of its machine or, if these are not known, of the first one where they are."""
    return next((there for machine in (trial.machine, *machines) if (there := trial.on(machine)).timed), trial)


def paces(sweeps: Mapping[str, dict]) -> dict[str, Pace]:
    """Median seconds of alike steps of runs that had a GPU to themselves, and their sweeps, commits and GPUs."""
    found: dict[str, list[tuple[float, str]]] = {}
    for name, sweep in sweeps.items():
        for trial in trials(sweep):
            for part, seconds in trial.own_paces.items() if trial.alone else ():
                source = f"`{name}` (commit {str(trial.run['git_commit'])[:10]}, {trial.machine[0] or '?'})"
                found.setdefault(trial.pace(part), []).append((seconds, source))
    return {
        pace: (median(seconds for seconds, _ in alike), tuple(sorted({source for _, source in alike})))
        for pace, alike in found.items()
    }


def without_compiling(numbers: Sequence[float]) -> list[float]:
    """Each number, or the second smallest of the five nearest where that is less than two thirds of it: of five rows in
    a row, three may compile."""

    def usual(place: int) -> float:
        first = max(0, min(place - 2, len(numbers) - 5))
        return sorted(numbers[first : first + 5])[:2][-1]

    pairs = [(number, usual(place)) for place, number in enumerate(numbers)]
    return [other if number > 1.5 * other else number for number, other in pairs]


def mean(value: dict, digits: int = 4) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A table; "" without rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines]) if lines else ""


def dense_alike(trial: Trial, others: list[Trial]) -> list[Trial]:
    """The runs that are dense from the start and else alike, with as many steps; of any decay."""
    alike = [other for other in others if other.dense and other.common == trial.common]
    return [other for other in alike if sum(other.steps) == sum(trial.steps)]


def dense_of(trial: Trial, others: list[Trial]) -> Trial | None:
    """That of them whose rate decays over as many steps, and in the same way."""
    wanted = trial.decay, trial.shape
    return next((other for other in dense_alike(trial, others) if (other.decay, other.shape) == wanted), None)


def best_dense_of(trial: Trial, others: list[Trial]) -> Trial | None:
    """That of them which ended best."""
    ended = [other for other in dense_alike(trial, others) if other.end]
    return min(ended, key=lambda other: other.loss["mean"], default=None)


def but_for_the_seed(trial: Trial) -> tuple:
    """What repetitions have in common. A part of a longer stage 1 is a shorter one, and dense runs have none."""
    sections, keys = ["recover"], ["training.seed", "training.steps", *_DECAY]
    if trial.dense:
        sections.append("lighthouse")
        keys.append("model.dense_layers")
    settings = trial.settings(sections, keys)
    return (
        trial.dense,
        trial.text,
        trial.end["data"]["sha256"],
        settings,
        sum(trial.steps) if trial.dense else trial.steps,
        trial.decay,
        trial.shape,
    )


def differences(trial: Trial, dense: Trial | None) -> list[float]:
    """Of each sequence, from dense; [] where there is nothing to compare."""
    if dense is None or dense is trial or not dense.end or not trial.end:
        return []
    if trial.end["data"]["sha256"] != dense.end["data"]["sha256"]:
        raise SystemExit(f"error: {trial.name} and {dense.name} were measured on different text")
    pairs = zip(trial.end["loss"]["per_sequence"], dense.end["loss"]["per_sequence"], strict=True)
    return [a - b for a, b in pairs]


def beside(trial: Trial, dense: Trial | None) -> str:
    found = differences(trial, dense)
    if not found:
        return "" if dense is trial else "-"
    return f"{fmean(found):+.4f} ± {stdev(found) / math.sqrt(len(found)):.4f}"


def needles(end: dict) -> str:
    cells = end.get("needles", {}).get("cells", [])
    return f"{fmean(cell['right'] / cell['trials'] for cell in cells):.2f}" if cells else "-"


def results(runs: list[Trial], others: list[Trial]) -> str:
    """The runs of a sweep after their recovery. `others` have dense runs where the sweep has none."""

    def row(trial: Trial) -> list[str]:
        context = trial.end.get("context")
        return [
            trial.name,
            " + ".join(map(str, trial.steps)),
            mean(trial.loss),
            beside(trial, dense_of(trial, [*runs, *others])),
            beside(trial, best_dense_of(trial, [*runs, *others])),
            f"{trial.curve.validation[-1][1]:.4f}" if trial.curve.validation else "-",
            mean(context["full"]) if context else "-",
            mean(context["gain"]) if context else "-",
            needles(trial.end),
            f"{trial.seconds:.0f}" if trial.timed else "-",
        ]

    columns = [
        "run",
        "steps",
        "loss at the end",
        "beside dense",
        "beside the best dense",
        "validation",
        "beyond",
        "far context",
        "needles",
        "seconds",
    ]
    return table(columns, [row(trial) for trial in runs if trial.end])


def steps(runs: list[Trial]) -> str:
    """What a step takes of each stage, with the range of its logged rows, and of memory."""

    def row(trial: Trial) -> list[str]:
        memory = max(row.get("memory_gib") or 0.0 for row in trial.run["rows"] if "loss" in row)
        told = {
            part: f"{trial.own_paces[part]:.3f} ({min(rows):.3f} to {max(rows):.3f})"
            for part, rows in trial.settled.items()
        }
        seconds = (", then ".join(told[part] for part in told if part.startswith(stage)) for stage in stages)
        return [trial.name, *seconds, f"{memory:.1f}"]

    stages = ("lighthouse", "dense")
    return table(["run", "stage 1", "dense", "peak GiB"], [row(trial) for trial in runs if trial.settled])


def measured(runs: list[Trial]) -> str:
    """How much text was measured."""
    ends = [trial.end for trial in runs if trial.end]
    words = f"{ends[0]['sequences']} sequences of {ends[0]['tokens']} tokens"
    context = next((end["context"]["context"] for end in ends if "context" in end), None)
    words += f"; the short context is {context} tokens." if context else "."
    left = [trial for trial in runs if not trial.end and (trial.dense or trial.run["settings"]["recover"])]
    places = [
        f"{trial.name} (validation {trial.curve.validation[-1][1]:.4f} at step {trial.curve.validation[-1][0]})"
        for trial in left
        if trial.curve.validation
    ]
    return words + (f" Begun and not measured: {', '.join(places)}." if places else "")


def under_way(runs: list[Trial]) -> str:
    """Validation losses of runs that were to recover or decay: at the last eight steps that any has, and their last."""
    found = {
        trial.name: {row["step"]: row["val_loss"] for row in trial.run["rows"] if "val_loss" in row}
        for trial in runs
        if trial.decay or trial.run["settings"]["recover"]
    }
    places = sorted(set().union(*found.values()))[-8:]
    rows = []
    for name, losses in found.items():
        if losses:
            last = f"{losses[max(losses)]:.4f} at {max(losses)}"
            rows.append([name, *(f"{losses[step]:.4f}" if step in losses else "" for step in places), last])
    return table(["validation", *(f"step {step}" for step in places), "last"], rows)


def at_the_switch(runs: list[Trial]) -> str:
    def row(name: str, switch: dict) -> list[str]:
        leak = next((row for row in switch.get("leak", []) if row["distance"] == 0), None)
        errors = [row["relative_error"] for row in switch["switch"]["attention_errors"]]
        return [
            name,
            mean(switch["loss"]["nats_per_token"]) + (" (leaky)" if switch["leaky"] else ""),
            mean(switch["switch"]["dense"]),
            f"{switch['switch']['jump']['mean']:+.4f}",
            f"{leak['mean']:+.4f} ± {leak['standard_error']:.4f}" if leak else "-",
            f"{median(errors):.2f} ({min(errors):.2f} to {max(errors):.2f})",
        ]

    columns = [
        "run",
        "loss as trained",
        "loss dense",
        "jump",
        "leak at distance 0",
        "error of one call, median (range)",
    ]
    found = [(trial.name, trial.run["evaluations"].get("switch")) for trial in runs]
    return table(columns, [row(name, switch) for name, switch in found if switch])


def by_position(runs: list[Trial]) -> str:
    """Losses of tokens by how many are before them: every second one of the bins, each of doubling width."""
    ended = [trial for trial in runs if trial.end]
    firsts = [part["first"] for part in ended[0].end.get("by_position", [])][4::2] if ended else []
    if not firsts:
        return ""

    def row(trial: Trial) -> list[str]:
        losses = {part["first"]: part["loss"]["mean"] for part in trial.end["by_position"]}
        return [trial.name, *(f"{losses[first]:.3f}" for first in firsts)]

    return table(["run", *(f"{first} to {2 * first - 1}" for first in firsts)], map(row, ended))


def widest(trial: Trial) -> int | None:
    """How far back the widest window of its stage 1 reaches, in tokens; None where a phase or a layer of it is dense or
    has no window."""
    recipe = trial.run["recipe"]
    given = recipe["lighthouse"] | {"dense_layers": recipe.get("model", {}).get("dense_layers")}
    phases = [given | phase for phase in given.pop("phases", ()) or [{}]]
    if any(not phase["enabled"] or phase["dense_layers"] for phase in phases):
        return None
    windows = [phase.get("window_end") or phase.get("window") or 0 for phase in phases]
    return max(windows) if all(windows) else None


def apart(one: tuple[int, int], other: tuple[int, int]) -> str:
    """The difference of two shares, right of trials each, with Newcombe's 95 % interval (hybrid score, method 10)."""
    (p, low, high), (q, other_low, other_high) = ((n / of, *interval(n, of)) for n, of in (one, other))
    below = math.hypot(p - low, other_high - q)
    above = math.hypot(high - p, q - other_low)
    return f"{p - q:+.2f} ({p - q - below:+.2f} to {p - q + above:+.2f})"


def needles_by_distance(runs: list[Trial], others: list[Trial]) -> str:
    """Digits found of those asked for, by how many tokens back the needle is; and of those that the widest window of
    stage 1 does not reach, the share beside the best dense run of as many steps that was asked the same."""

    def cells(trial: Trial) -> list[dict]:
        return (trial.end or {}).get("needles", {}).get("cells", [])

    def found(trial: Trial, low: int, high: int) -> tuple[int, int]:
        there = [cell for cell in cells(trial) if low < round((1 - cell["depth"]) * cell["tokens"]) <= high]
        return sum(cell["right"] for cell in there), sum(cell["trials"] for cell in there)

    def questions(trial: Trial) -> list[tuple[int, float, int]]:
        return [(cell["tokens"], cell["depth"], cell["trials"]) for cell in cells(trial)]

    def beyond(trial: Trial) -> str:
        alike = [other for other in (*runs, *others) if questions(other) == questions(trial)]
        dense, window = best_dense_of(trial, alike), widest(trial)
        if window is None or dense is None:
            return "-"
        shares = [found(each, window, longest) for each in (trial, dense)]
        return apart(*shares) if all(trials for _, trials in shares) else "-"

    asked = [trial for trial in runs if cells(trial)]
    if not asked:
        return ""
    longest = max(cell["tokens"] for trial in asked for cell in cells(trial))
    edges = [-1, *(longest // 4**power for power in (4, 3, 2, 1)), longest // 2, longest]
    ranges = [pair for pair in itertools.pairwise(edges) if any(found(trial, *pair)[1] for trial in asked)]
    rows = [
        [
            trial.name,
            *("{} of {}".format(*found(trial, *pair)) for pair in ranges),
            str(widest(trial) or "-"),
            beyond(trial),
        ]
        for trial in asked
    ]
    columns = ["run", *(f"to {high}" for _, high in ranges), "widest window", "beyond it, beside dense"]
    return table(columns, rows)


def between(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at x of straight lines between points, in order; None outside of them."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def same_time(runs: list[Trial]) -> str:
    """Validation losses of dense runs at the seconds that the others took; not of those that decay."""
    rows = []
    for trial in runs:
        dense = dense_of(trial, runs)
        line = dense and not trial.dense and len(dense.validated) > 1
        if line and not trial.decay and trial.end and trial.timed and trial.validated:
            rows.append((trial.name, *trial.validated[-1], dense.validated))
    return equal_time("validation loss", rows)


class Line(NamedTuple):
    """Dense runs of several lengths.

    Attributes:
        share: of their steps over which the rate goes to zero.
        outcomes: seconds of training and loss of each, shortest first.
    """

    share: float
    outcomes: list[tuple[float, float]]


def beside_lines(runs: list[Trial], others: list[Trial]) -> list[tuple[Trial, Line]]:
    """The runs that decay and are not dense, each with a line of dense ones, at the seconds of its machine, measured on
    the same text: those that decay over as large a share of their steps as it does, or else over a quarter. One that
    covers its seconds goes first."""

    def share(trial: Trial) -> float:
        return trial.decay / sum(trial.steps)

    def conditions(trial: Trial) -> tuple:
        return trial.common, trial.end["data"]["sha256"]

    def decaying(trials: Iterable[Trial], dense: bool) -> list[Trial]:
        return [trial for trial in trials if trial.decay and trial.end and trial.dense == dense]

    # Of one length, the sweep's own is the last.
    dense = decaying([*runs, *others], dense=True)[::-1]
    found = []
    for trial in (trial for trial in decaying(runs, dense=False) if trial.timed):
        alike = [other.on(trial.machine) for other in dense if conditions(other) == conditions(trial)]
        alike = [other for other in alike if other.timed and other.shape == trial.shape]
        lines = []
        for wanted in (share(trial), 0.25):
            lengths = {sum(other.steps): other.outcome for other in alike if abs(share(other) - wanted) <= 0.005}
            if len(lengths) > 1:
                lines.append(Line(wanted, sorted(lengths.values())))
        if lines:
            found.append((trial, min(lines, key=lambda line: between(line.outcomes, trial.seconds) is None)))
    return found


def same_time_decayed(lines: list[tuple[Trial, Line]]) -> str:
    """Losses at the end of runs that decay, beside those of dense runs of other lengths at the same seconds."""
    rows = [(f"{trial.name} ({line.share:.0%})", *trial.outcome, line.outcomes) for trial, line in lines]
    return equal_time("loss at the end", rows)


def equal_time(what: str, rows: Iterable[tuple[str, float, float, Sequence[tuple[float, float]]]]) -> str:
    """Of (run, seconds, loss, points of dense): what dense has in between the points."""
    found = [(name, spent, loss, between(points, spent)) for name, spent, loss, points in rows]
    columns = ["run", "seconds", what, "of dense then", "difference"]
    return table(
        columns,
        [
            [name, f"{spent:.0f}", f"{loss:.4f}"]
            + (["outside", ""] if dense is None else [f"{dense:.2f}", f"{loss - dense:+.2f}"])
            for name, spent, loss, dense in found
        ],
    )


class Spread(NamedTuple):
    """Of the losses of repetitions."""

    deviation: float
    free: int  # degrees of freedom

    @property
    def shown(self) -> float:
        """Standard errors by which a difference must exceed 0, for a one-sided test at 5 %."""
        return _STUDENT[min(self.free, len(_STUDENT)) - 1]


def spread(sweeps: Iterable[list[Trial]]) -> dict[int, Spread]:
    """Standard deviation of the loss of one run among its repetitions, over all that there are; of each sequence length
    in tokens."""
    groups: dict[tuple[int, tuple], list[float]] = {}
    for trial in itertools.chain(*sweeps):
        if trial.end:
            groups.setdefault((trial.seq_len, but_for_the_seed(trial)), []).append(trial.loss["mean"])
    squares: defaultdict[int, float] = defaultdict(float)
    free: defaultdict[int, int] = defaultdict(int)
    for (seq_len, _), losses in groups.items():
        if len(losses) > 1:
            squares[seq_len] += variance(losses) * (len(losses) - 1)
            free[seq_len] += len(losses) - 1
    return {seq_len: Spread(math.sqrt(squares[seq_len] / count), count) for seq_len, count in sorted(free.items())}


class Length(NamedTuple):
    """Dense runs of one length.

    Attributes:
        seconds: of training.
        loss: mean at the end.
        runs: how many.
    """

    seconds: float
    loss: float
    runs: int


def dense_lengths(trial: Trial, others: Iterable[Trial]) -> list[Length]:
    """Dense runs alike but for the seed whose rate decays, at the seconds of the trial's machine, shortest first. Of
    several decays of one run the one that ended lowest."""

    def conditions(trial: Trial) -> tuple:
        return trial.without_stage_1("training.seed"), trial.end["data"]["sha256"]

    wanted = conditions(trial)
    found: dict[int, dict[tuple, tuple[float, float]]] = {}
    for other in others:
        if other.dense and other.decay and other.end and conditions(other) == wanted:
            there = other.on(trial.machine)
            if there.timed:
                one = (other.run["recipe"]["training"]["seed"], other.run["git_commit"])
                best = found.setdefault(sum(other.steps), {})
                best[one] = min(best.get(one, there.outcome), there.outcome, key=lambda outcome: outcome[1])
    return [
        Length(fmean(s for s, _ in runs.values()), fmean(loss for _, loss in runs.values()), len(runs))
        for _, runs in sorted(found.items())
    ]


class Needed(NamedTuple):
    """What dense training needs to a loss.

    Attributes:
        seconds: of training.
        slope: by how much the logarithm of the seconds rises for each nat that the loss is lower.
        above: the shorter of the two lengths on both sides of the loss.
        below: the longer one.
        straight: whether a straight line gave the seconds.
    """

    seconds: float
    slope: float
    above: Length
    below: Length
    straight: bool


def seconds_to(loss: float, lengths: Sequence[Length]) -> Needed | None:
    """None where no two lengths are on both sides of the loss. See EQUAL_LOSS."""
    for place, (a, b) in enumerate(itertools.pairwise(lengths)):
        if b.loss <= loss <= a.loss:
            # The next longer one, or else the one before.
            three = lengths[min(place, len(lengths) - 3) :][:3] if len(lengths) > 2 else ()
            if three and three[0].loss > three[1].loss > three[2].loss:
                return Needed(*_power_law(loss, *three), a, b, straight=False)
            slope = math.log(b.seconds / a.seconds) / (a.loss - b.loss)
            return Needed(a.seconds * math.exp(slope * (a.loss - loss)), slope, a, b, straight=True)
    return None


def _power_law(loss: float, *points: Length) -> tuple[float, float]:
    """t of L = a + b t^-c through three points, at a loss, and -d(log t)/dL there. A loss that falls as or faster than
    a straight line over the logarithm of time has c = 0 or below."""
    (t0, l0, _), (t1, l1, _), (t2, l2, _) = points
    x1, x2 = math.log(t1 / t0), math.log(t2 / t0)

    def fall(x: float, c: float) -> float:
        """(1 - e^-cx) / c, how far it has fallen at t0 e^x."""
        return -math.expm1(-c * x) / c if c else x

    low, high = -60.0 / x2, 60.0 / x2
    for _ in range(200):
        middle = (low + high) / 2
        # The larger c, the earlier it falls.
        low, high = (low, middle) if fall(x1, middle) / fall(x2, middle) > (l0 - l1) / (l0 - l2) else (middle, high)
    c = low
    b = (l0 - l2) / fall(x2, c)
    return t0 * math.exp(-math.log1p(-c * (l0 - loss) / b) / c if c else (l0 - loss) / b), 1 / (b - c * (l0 - loss))


def equal_loss(sweeps: Mapping[str, list[Trial]], noise: Mapping[int, Spread]) -> str:
    """Of all runs that decay and are not dense: how much longer dense training takes to their loss. `noise` is
    `spread`'s; without repetitions of a sequence length there is no standard error."""

    def error(trial: Trial, *parts: float) -> float | None:
        """Of a sum of means, each with the share of one run's variance that it has."""
        one = noise.get(trial.seq_len)
        return None if one is None else one.deviation * math.sqrt(sum(parts))

    def with_error(value: str, error: float | None, digits: int) -> str:
        return value if error is None else f"{value} ± {error:.{digits}f}"

    everything = list(itertools.chain(*sweeps.values()))
    groups: dict[tuple, list[tuple[str, Trial]]] = {}
    for name, runs in sweeps.items():
        for trial in runs:
            if trial.end and trial.decay and not trial.dense and trial.timed:
                # Of each machine a row: seconds of several are not averaged.
                there = json.dumps(trial.machine)
                groups.setdefault((there, *but_for_the_seed(trial)), []).append((name, trial))
    rows = []
    for group in groups.values():
        (name, trial), runs = group[0], len(group)
        lengths = dense_lengths(trial, everything)
        if len(lengths) < 2:
            continue
        loss, seconds = fmean(one.loss["mean"] for _, one in group), fmean(one.seconds for _, one in group)
        row = [trial.name, f"`{name}`", str(runs), " + ".join(map(str, trial.steps)), f"{seconds:.0f}", f"{loss:.4f}"]
        found = seconds_to(loss, lengths)
        if found is None and loss < min(length.loss for length in lengths):
            longest, lowest = lengths[-1].seconds, min(lengths, key=lambda length: length.loss)
            below, of_below = lowest.loss - loss, error(trial, 1 / runs, 1 / lowest.runs)
            bound = f"> {longest / seconds:.2f} ({with_error(f'{below:.3f}', of_below, 3)} below)"
            unproven = of_below is not None and below < noise[trial.seq_len].shown * of_below
            rows.append([*row, f"> {longest:.0f}", bound + ", not shown" * unproven])
            continue
        if found is None:
            rows.append([*row, "outside", ""])
            continue
        a, b = found.above, found.below
        share = (a.loss - loss) / (a.loss - b.loss)
        of_loss = error(trial, 1 / runs, (1 - share) ** 2 / a.runs, share**2 / b.runs)
        ratio = found.seconds / seconds
        line = " (line)" * found.straight
        of_ratio = None if of_loss is None else ratio * found.slope * of_loss
        rows.append([*row, f"{found.seconds:.0f}{line}", with_error(f"{ratio:.2f}", of_ratio, 2)])
    return table(["run", "sweep", "runs", "steps", "seconds", "loss at the end", "dense takes", "times as long"], rows)


def repetitions(sweeps: list[list[Trial]]) -> str:
    """The spread of runs that differ in nothing but the seed."""
    groups: dict[str, list[tuple[Trial, list[float]]]] = {}
    others = list(itertools.chain(*sweeps))
    for runs in sweeps:
        for trial in runs:
            if trial.end:
                groups.setdefault(but_for_the_seed(trial), []).append(
                    (trial, differences(trial, dense_of(trial, [*runs, *others])))
                )
    rows = []
    for group in groups.values():
        losses = [trial.loss["mean"] for trial, _ in group]
        apart = [fmean(found) for _, found in group if found]
        if len(group) > 1:
            rows.append(
                [
                    ", ".join(dict.fromkeys(trial.name for trial, _ in group)),
                    ", ".join(f"{trial.run['recipe']['training']['seed']}" for trial, _ in group),
                    ", ".join(f"{loss:.4f}" for loss in losses),
                    f"{stdev(losses):.4f}",
                    ", ".join(f"{difference:+.4f}" for difference in apart),
                    ", ".join(dict.fromkeys(str(trial.run["git_commit"])[:7] for trial, _ in group)),
                ]
            )
    return table(["runs", "seeds", "losses at the end", "standard deviation", "beside dense", "commits"], rows)


def machines(runs: list[Trial]) -> str:
    found = {}
    for run in (trial.run for trial in runs):
        device = run["ledger"]["stages"][0].get("conditions", {}).get("device", "?")
        versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "triton", "flash-attn-4"))
        python = f"Python {run['python']}, " if "python" in run else ""
        commit, _, dirty = str(run["git_commit"]).partition("-")
        changed = " with changes" if dirty else ""
        found[f"commit {commit[:10]}{changed}; {device}; {python}{versions}"] = None
    texts = {(trial.text or "unknown")[:8] for trial in runs}
    measured = {trial.end["data"]["sha256"][:8] for trial in runs if trial.end}
    words = f"; trained on text {', '.join(sorted(texts))}"
    return "; or ".join(found) + words + (f", measured on {', '.join(sorted(measured))}" if measured else "")


def borrowed(runs: list[Trial]) -> str:
    """Where seconds of runs that shared a GPU are from, and of which GPU if they are of several."""
    found = [trial for trial in runs if trial.timed]
    sources = sorted({source for trial in found for _, places in trial.known.values() for source in places})
    gpus: dict[str, list[str]] = {}
    for trial in found:
        gpus.setdefault(trial.machine[0] or "?", []).append(trial.name)
    if not sources:
        return ""
    words = f"; those that are there are of such steps in {', '.join(sources)}"
    if len(gpus) > 1:
        return words + f", on {'; on '.join(f'{gpu} for ' + ', '.join(names) for gpu, names in gpus.items())}"
    return words + (f", on {', '.join(gpus)}" if any(trial.timed_on for trial in found) else "")


def losses_by_time(lines: list[tuple[Trial, Line]], folder: Path) -> list[Path]:
    """Losses at the end of runs that decay against their seconds: dense ones as lines, others as points."""
    pyplot = figures.pyplot()
    if pyplot is None or not lines:
        return []
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    gpus = {trial.machine[0] for trial, _ in lines}
    drawn = {tuple(line.outcomes): trial.machine[0] for trial, line in lines}
    for style, (outcomes, gpu) in zip(itertools.cycle(("o-", "s--", "^:")), drawn.items(), strict=False):
        label = f"dense, seconds of {gpu}" if len(gpus) > 1 else "dense"
        axes.plot(*zip(*outcomes, strict=True), style, color="black", label=label)
    for trial, _ in lines:
        label = f"{trial.name}, of {trial.machine[0]}" if len(gpus) > 1 else trial.name
        axes.plot(*trial.outcome, "o", label=label)
    axes.set(xlabel="seconds of training", ylabel="nats per byte at the end")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figures.save(figure, folder / "time")


def write(files: list[Path], out: Path) -> None:
    files = sorted(files, key=lambda file: file.stem)
    sweeps = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for run in itertools.chain.from_iterable(sweep["runs"].values() for sweep in sweeps):
        run["recipe"] = of_older_run(run["recipe"])
    alone = paces({file.stem: sweep for file, sweep in zip(files, sweeps, strict=True)})
    measurements = [trials(sweep, alone) for sweep in sweeps]
    known: list[Machine] = []
    for trial in itertools.chain(*measurements):
        if trial.alone and trial.machine not in known:
            known.append(trial.machine)
    measurements = [[timed(trial, known) for trial in runs] for runs in measurements]
    everything = list(itertools.chain(*measurements))
    text = [INTRODUCTION]
    conclusions = out / "conclusions.md"
    if conclusions.exists():
        text.append(conclusions.read_text(encoding="utf-8").strip() + "\n")
    if repeated := repetitions(measurements):
        text.append(f"## Noise\n\n{NOISE}\n\n{repeated}\n")
    noise, named = spread(measurements), {file.stem: runs for file, runs in zip(files, measurements, strict=True)}
    if noise and (rows := equal_loss(named, noise)):
        of_each = " and ".join(
            f"{one.deviation:.4f} at {seq_len} tokens ({one.free})" for seq_len, one in noise.items()
        )
        text.append(f"## At equal loss\n\n{EQUAL_LOSS.format(spread=of_each)}\n\n{rows}\n")
    told: dict[str, str] = {}
    for file, sweep, runs in zip(files, sweeps, measurements, strict=True):
        name, about = file.stem, sweep["about"].strip()
        folder = out / "figures" / name
        folder.mkdir(parents=True, exist_ok=True)
        text.append(f"## {name}\n\n" + (f"As in {told[about]}." if about in told else about) + "\n")
        told.setdefault(about, name)
        command = f"lighthouse sweep recipes/evidence/{sweep['sweep']}.toml --output runs/{sweep['sweep']}"
        text.append(f"`{command}` of {machines(runs)}\n")
        if not all(trial.alone for trial in runs):
            there = borrowed(runs) if any(trial.end for trial in runs) else ""
            text.append(f"Runs shared a GPU, so that their own seconds tell nothing{there}.\n")
        if any(trial.end for trial in runs):
            text.append(f"### After recovery\n\n{measured(runs)}\n\n{results(runs, everything)}\n")
        elif all(trial.alone for trial in runs):
            text.append(f"### Seconds a step\n\n{steps(runs)}\n")
        if not any(trial.end for trial in runs) and (so_far := under_way(runs)):
            text.append(f"### Under way\n\nNone of these was trained to its end.\n\n{so_far}\n")
        if positions := by_position(runs):
            text.append(f"### By the tokens before\n\n{positions}\n")
        if far := needles_by_distance(runs, everything):
            text.append(f"### Needles by distance\n\n{NEEDLES}\n\n{far}\n")
        if switch := at_the_switch(runs):
            text.append(f"### At the switch\n\n{switch}\n")
        if equal := same_time(runs):
            text.append(f"### At equal wall-clock\n\n{SAME_TIME}\n\n{equal}\n")
        lines = beside_lines(runs, everything)
        if equal := same_time_decayed(lines):
            text.append(f"### At equal wall-clock, decayed\n\n{SAME_TIME_DECAYED}\n\n{equal}\n")
        one_clock = all(trial.timed and trial.machine == runs[0].machine for trial in runs)
        axes = {key: label for key, label in compare.AXES.items() if key != "seconds" or one_clock}
        drawn = compare.plot([trial.curve for trial in runs if trial.curve.points], folder, axes) or []
        drawn += losses_by_time(lines, folder)
        text += [f"![losses]({file.relative_to(out)})\n" for file in drawn if file.suffix == ".svg"]
    (out / "REPORT.md").write_text("\n".join(text), encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", nargs="+", type=Path)
    options.add_argument("--out", type=Path, default=HERE, help="where REPORT.md and figures/ go")
    args = options.parse_args()
    write(args.files, args.out)


if __name__ == "__main__":
    main()
