"""What a run has cost, and what a dense one of the same steps would have. Nothing here imports torch."""

import contextlib
import statistics
from typing import TYPE_CHECKING, Any

from lighthouse_core.estimate import flops_per_token
from lighthouse_core.train.progress import parse_row

if TYPE_CHECKING:
    from lighthouse_core.runs import Run


def account(run: "Run") -> dict[str, Any]:
    """The run's ledger with its costs, worked out anew from metrics.jsonl: steps that a crash made training repeat are
    counted once, and neither checkpoints nor evaluations count.

    Returns:
        The ledger; each of its `stages` with `steps` finished, `tokens`, `seconds` of training and model `flops`.
        Of a run that began with Lighthouse also `dense_step`, seconds of one dense step and how they are known
        ("recovery": the median of its own steps, "measured": at the start, without the update, "estimated": as many
        FLOPs a second as stage 1), and `dense`, `seconds` and `flops` of as many dense steps. Before the first logged
        step, the ledger as it was.
    """
    rows = _rows(run)
    training = run.recipe.training
    per_step = training.global_batch_size * training.seq_len
    stages = []
    for stage in run.ledger["stages"]:
        own = [row for row in rows if row["stage"] == stage["stage"] and stage["start"] < row["step"] <= stage["end"]]
        if not own:
            stages.append(stage)
            continue
        steps = sum(row["steps"] for row in own)
        tokens = steps * per_step
        stages.append(
            stage
            | {
                "steps": steps,
                "tokens": tokens,
                "seconds": sum(row["steps"] * row["seconds"] for row in own),
                "flops": tokens * flops_per_token(run.recipe, stage["stage"]),
            }
        )
    ledger = run.ledger | {"stages": stages}
    first = stages[0]
    if first["stage"] == "lighthouse" and "steps" in first:
        steps = sum(stage.get("steps", 0) for stage in stages)
        flops = per_step * flops_per_token(run.recipe, "dense")
        estimate = _typical(rows, "lighthouse") * first["steps"] * flops / first["flops"]
        seconds, how = _dense_step(run, rows, estimate)
        ledger |= {
            "dense_step": {"seconds": seconds, "how": how},
            "dense": {"seconds": steps * seconds, "flops": steps * flops},
        }
    return ledger


def _dense_step(run: "Run", rows: list[dict[str, Any]], estimate: float) -> tuple[float, str]:
    """Seconds of a dense step, and how they are known."""
    if sum(row["stage"] == "dense" for row in rows) > 1:
        return _typical(rows, "dense"), "recovery"
    if "measured_dense_seconds" in run.ledger:
        return run.ledger["measured_dense_seconds"], "measured"
    return estimate, "estimated"


def _typical(rows: list[dict[str, Any]], stage: str) -> float:
    """Median of the seconds of a step; the first one, which compiles, counts where it is alone."""
    first, *others = [row["seconds"] for row in rows if row["stage"] == stage]
    return statistics.median(others or [first])


def _rows(run: "Run") -> list[dict[str, Any]]:
    """The training rows of metrics.jsonl, without one that a crash cut short."""
    path = run.path / "metrics.jsonl"
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(parse_row(line))
    return [row for row in rows if {"loss", "steps", "seconds"} <= row.keys()]
