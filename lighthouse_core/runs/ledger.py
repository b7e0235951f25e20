"""What a run has cost, and what a dense one of the same steps would have. Nothing here imports torch."""

import statistics
from typing import TYPE_CHECKING, Any

from lighthouse_core.estimate import flops_per_token
from lighthouse_core.runs.rows import read_rows

if TYPE_CHECKING:
    from lighthouse_core.runs.run import Run

Row = dict[str, Any]
# Of a stage, what does not follow from metrics.jsonl. `conditions` are those of its newest launch; `data` is the
# fingerprint of its text and of its order: with the same one, seed and seq_len, runs see the same tokens.
# `sources_since_start` are the sequences taken of each source of text since the run began, those of earlier stages
# counted, and the epoch that each is in, from 1, at the newest end. `unread` are the files that could not be read when
# a launch ended, and their sizes.
GIVEN = ("stage", "start", "end", "data", "conditions", "measured_dense", "sources_since_start", "unread")


def account(run: "Run") -> dict[str, Any]:
    """The run's ledger with its costs, worked out anew from metrics.jsonl: steps that a crash made training repeat are
    counted once, and neither saves nor evaluations count.

    Returns:
        The ledger; each of its `stages` with `steps` finished, `tokens`, `seconds` of training and model `flops`. Steps
        that no row is of, before an interruption, count as typical ones.
        Of a run that began with Lighthouse also `dense_step`, seconds of one dense step and how they are known, and
        `dense`, `seconds` and `flops` of as many dense steps. "recovery" is the median of the recovery's own steps,
        "measured" the time before the first step, without the update, both under the conditions of stage 1;
        "estimated" takes as many FLOPs a second as stage 1. Before the first logged step there are no costs.
    """
    stages = [{key: stage[key] for key in GIVEN if key in stage} for stage in run.ledger["stages"]]
    ledger = {key: value for key, value in run.ledger.items() if key not in ("dense", "dense_step")}
    rows = _rows(run)
    if any("steps" not in row for row in rows):
        # Of an earlier release.
        return ledger | {"stages": stages}
    training = run.recipe.training
    per_step = training.global_batch_size * training.seq_len
    ends = [stage["start"] for stage in stages[1:]] + [stages[-1]["end"]]
    own = [
        [row for row in rows if row["stage"] == stage["stage"] and stage["start"] < row["step"] <= end]
        for stage, end in zip(stages, ends, strict=True)
    ]
    for stage, end, timed in zip(stages, ends, own, strict=True):
        if timed:
            saved = [step for step in run.checkpoint_steps() if stage["start"] < step <= end]
            steps = max(timed[-1]["step"], *saved, 0) - stage["start"]
            untimed = steps - sum(row["steps"] for row in timed)
            finished = stage["start"] + 1, stage["start"] + steps
            flops = _counted(timed, "flops_per_token") or flops_per_token(run.recipe, stage["stage"], finished)
            stage |= {
                "steps": steps,
                "tokens": steps * per_step,
                "seconds": sum(row["steps"] * row["seconds"] for row in timed) + untimed * _typical(timed),
                "flops": steps * per_step * flops,
            }
    ledger["stages"] = stages
    if stages[0]["stage"] == "lighthouse" and own[0]:
        steps = sum(stage.get("steps", 0) for stage in stages)
        counted = _counted([row for timed in own for row in timed], "dense_flops_per_token")
        flops = per_step * (counted or flops_per_token(run.recipe, "dense"))
        seconds, how = _dense_step(stages, own, flops)
        ledger["dense_step"] = {"seconds": seconds, "how": how}
        ledger["dense"] = {"seconds": steps * seconds, "flops": steps * flops}
    return ledger


def _counted(rows: list[Row], key: str) -> float | None:
    """FLOPs per token as the rows have them, where documents are kept apart; else None."""
    there = [row for row in rows if key in row]
    return sum(row["steps"] * row[key] for row in there) / sum(row["steps"] for row in there) if there else None


def _dense_step(stages: list[dict[str, Any]], own: list[list[Row]], flops: float) -> tuple[float, str]:
    """Seconds of a dense step of so many FLOPs, and how they are known."""
    first, last = stages[0], stages[-1]
    conditions = first.get("conditions")
    settled = any("first_of_launch" not in row for row in own[-1])
    if len(stages) > 1 and settled and last.get("conditions") == conditions:
        return _typical(own[-1]), "recovery"
    measured = first.get("measured_dense")
    if measured and measured["conditions"] == conditions:
        return measured["seconds"], "measured"
    return _typical(own[0]) * first["steps"] * flops / first["flops"], "estimated"


def _typical(rows: list[Row]) -> float:
    """Median of the seconds of a step. The first of a launch, which compiles, counts where there is no other."""
    settled = [row["seconds"] for row in rows if "first_of_launch" not in row]
    return statistics.median(settled or [row["seconds"] for row in rows])


def _rows(run: "Run") -> list[Row]:
    """The training rows of metrics.jsonl."""
    return read_rows(run.path / "metrics.jsonl", ("loss", "stage", "seconds"))
