"""The checkpoint to export: which one, whether its recovery is done, and its model weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lighthouse_core.checkpoint import check_contents, check_model, read_contents
from lighthouse_core.checkpoint_reader import load
from lighthouse_core.config.budget import Measurement
from lighthouse_core.errors import CheckpointError
from lighthouse_core.models.family import Entry
from lighthouse_core.runs.find import split_checkpoint
from lighthouse_core.runs.run import Run
from lighthouse_core.seal import damage

# The name of the part of a checkpoint that only a run with [lighthouse.budget] has.
BUDGET = "budget"


@dataclass(frozen=True)
class Source:
    """A checkpoint of a run."""

    run: Run
    step: int

    @property
    def path(self) -> Path:
        return self.run.checkpoint_dir(self.step)

    @property
    def recovered(self) -> bool:
        """Whether the weights were trained with every layer dense, if only for one step."""
        ledger = self.run.ledger
        if self.step == 0:
            return ledger.get("weights", {}).get("recovered", False)
        dense_from_start = ledger["stages"][0]["stage"] == "dense"
        return dense_from_start or (self.run.recovering and self.step > self.run.start)

    @property
    def dtype(self) -> str:
        """That an export's weights have unless another is asked for."""
        # What trains in float16 may have no bfloat16, which would also keep fewer digits.
        drawn = "float16" if self.run.recipe.training.dtype == "float16" else "bfloat16"
        return self.run.ledger.get("weights", {}).get("dtype", drawn)

    @property
    def others(self) -> dict[str, str]:
        """That of the tensors of an export which have another than `dtype`, by their names there."""
        return self.run.ledger.get("weights", {}).get("others", {})


def find_source(checkpoint: Path, *, verify: bool = True) -> Source:
    """The checkpoint at a run directory (its newest) or at .../checkpoints/step-N.

    Args:
        checkpoint: that directory.
        verify: compare every byte with its seal.

    Raises:
        RunError: the directory is not a run.
        CheckpointError: the run has no checkpoint, or this one is incomplete, damaged or holds what none does.
    """
    folder, step = split_checkpoint(checkpoint.resolve())
    run = Run(folder)
    steps = run.checkpoint_steps()
    if step is None:
        # Nobody wants an older model than the run has, unasked.
        step = steps[-1] if steps else run.newest_checkpoint().step
    source = Source(run, step)
    others = ", ".join(f"step-{step}" for step in steps if step != source.step)
    hint = f"the run has {others}" if others else None
    if source.step not in steps:
        raise CheckpointError(f"{source.path} is missing", hint=hint)
    if verify and (reason := damage(source.path)):
        raise CheckpointError(f"{source.path} is damaged: {reason}", hint=hint)
    check_contents(source.path)
    return source


def load_weights(source: Source, table: list[Entry]) -> dict[str, Tensor]:
    """The model's tensors by their names in the checkpoint, float32, on the CPU; no other state is read.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape, or cannot be read.
    """
    contents = check_model(source.path, {entry.source: entry.shape for entry in table}, source.run.recipe_path)
    weights = {entry.source: torch.empty(entry.shape, dtype=torch.float32) for entry in table}
    load(weights, source.path, contents, alone=True)
    for name, weight in weights.items():
        _check_finite(name, weight, source)
    return weights


def _check_finite(name: str, weight: Tensor, source: Source) -> None:
    if not weight.isfinite().all():
        raise CheckpointError(f"{name} of {source.path} holds NaN or infinity", hint="export an earlier checkpoint")


def last_sources(source: Source, count: int) -> list[Source]:
    """A checkpoint and those before it, `count` in all, oldest first; all are of dense training, or none is.

    Raises:
        CheckpointError: there are fewer, or one of them is incomplete, damaged or holds what none does.
    """
    if count == 1:
        return [source]
    steps = [step for step in source.run.checkpoint_steps() if 0 < step < source.step]
    alike = [step for step in steps if Source(source.run, step).recovered == source.recovered]
    if len(alike) < count - 1:
        there = ", ".join(map(str, [*alike, source.step]))
        kind = "of dense training" if source.recovered else "of stage 1"
        raise CheckpointError(
            f"{source.run.path} has no {count} checkpoints {kind} up to step {source.step}: it has {there}",
            hint="checkpoint.interval decides how many a run saves, and checkpoint.keep how many stay",
        )
    found = []
    for left, step in zip(range(count - 1, 0, -1), alike[-(count - 1) :], strict=True):
        try:
            found.append(find_source(source.run.checkpoint_dir(step)))
        except CheckpointError as error:
            raise CheckpointError(str(error), hint=f"--average {left} leaves it out") from error
    return [*found, source]


def load_mean(sources: list[Source], table: list[Entry]) -> dict[str, Tensor]:
    """`load_weights` of the mean of several checkpoints, all of one weight. It holds one tensor more than one has.

    Raises:
        CheckpointError: as `load_weights` does.
    """
    means = load_weights(sources[0], table)
    for number, source in enumerate(sources[1:], start=2):
        contents = check_model(source.path, {entry.source: entry.shape for entry in table}, source.run.recipe_path)
        for name, mean in means.items():
            weight = torch.empty_like(mean)
            load({name: weight}, source.path, contents, alone=True)
            _check_finite(name, weight, source)
            mean.lerp_(weight, 1 / number)
    return means


def load_measurement(source: Source) -> Measurement:
    """The last measurement of the run before a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or has numbers that no training leaves.
    """
    model, contents = source.run.recipe.model, read_contents(source.path)
    state = Measurement.none(model.layers, model.kv_heads)._asdict()
    if any(name.startswith(f"{BUDGET}.") for name in contents.values):
        nested = {BUDGET: state}
        load(nested, source.path, contents, alone=True)
        state = nested[BUDGET]
    return checked_measurement(Measurement(**state))


def checked_measurement(found: Measurement) -> Measurement:
    """The measurement that a checkpoint holds.

    Raises:
        CheckpointError: it has numbers that no training leaves.
    """
    if found.step < 0 or not all(0 <= share <= 1 for heads in found.shares for share in heads):
        raise CheckpointError(
            "the checkpoint's shares of attention beyond the window are not all from 0 to 1",
            hint="take another checkpoint of the run",
        )
    return found
