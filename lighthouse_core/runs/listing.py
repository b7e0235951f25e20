"""Where the runs on the disk stand. Standard library only: completion waits for it.

Runs are read as they are, half-written files included: nothing here raises for what a file holds.
"""

import contextlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lighthouse_core.reading import is_count, read_json, read_regular
from lighthouse_core.runs.rows import parse_row


@dataclass(frozen=True)
class Summary:
    """Where a run stands; None for what its files do not tell (yet).

    Attributes:
        name, path: of the run.
        stage: "lighthouse" or "dense".
        step, end: of the newest row or checkpoint, and the last one of the stage.
        saved: step of the newest published checkpoint, whose bytes are not compared here.
        loss, leaky: of the newest training row, in nats per token, and whether later tokens took part in it.
        val_loss, val_leaky: of the newest validation row.
        updated: when it was last trained, UTC, ISO 8601.
    """

    name: str
    path: str
    stage: str | None
    step: int | None
    end: int | None
    saved: int | None
    loss: float | None
    leaky: bool | None
    val_loss: float | None
    val_leaky: bool | None
    updated: str


def run_dirs(output_dir: Path | str = "runs") -> list[Path]:
    """The runs under a directory, newest first: by the modification time of theirs, which training renews."""
    times = {}
    for file in Path(output_dir).glob("*/recipe.toml"):
        # One may be removed meanwhile.
        with contextlib.suppress(OSError):
            times[file.parent] = file.parent.stat().st_mtime_ns
    return sorted(times, key=lambda path: (-times[path], path.name))


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the published checkpoints, oldest first. One that is still being written has another name."""
    folders = (path for path in run_dir.glob("checkpoints/step-*") if path.is_dir())
    # As training writes it: a step-007 that somebody made is not the checkpoint step-7.
    return sorted(int(path.name[5:]) for path in folders if re.fullmatch(r"step-(0|[1-9][0-9]{0,15})", path.name))


def summarize(run_dir: Path) -> Summary:
    """Where a run stands."""
    row, validation = _newest_rows(run_dir / "metrics.jsonl")
    stage = _last_stage(run_dir / "ledger.json")
    step, saved = row.get("step"), next(reversed(checkpoint_steps(run_dir)), None)
    return Summary(
        name=run_dir.name,
        path=str(run_dir),
        stage=stage.get("stage", row.get("stage")),
        # Not every step is logged.
        step=max((found for found in (step, saved) if found is not None), default=None),
        end=stage.get("end"),
        saved=saved,
        loss=row.get("loss"),
        leaky=row.get("leaky"),
        val_loss=validation.get("val_loss"),
        val_leaky=validation.get("leaky"),
        updated=_updated(run_dir),
    )


def _newest_rows(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest training row and the newest validation row of a metrics file; {} for none."""
    found: dict[str, dict[str, Any]] = {}
    try:
        lines = read_regular(path).splitlines()
    except OSError:
        lines = []
    for line in reversed(lines):
        missing = [key for key in ("loss", "val_loss") if key not in found and f'"{key}"'.encode() in line]
        row = parse_row(line) if missing else None
        found.update({key: row for key in missing if row is not None and key in row})
        if len(found) == 2:
            break
    return found.get("loss", {}), found.get("val_loss", {})


def _last_stage(path: Path) -> dict[str, Any]:
    """`stage` and `end` of a ledger's last stage; without what it does not tell."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        stage = read_json(path)["stages"][-1]
        known = {"stage": stage.get("stage") in ("lighthouse", "dense"), "end": is_count(stage.get("end"))}
        return {key: stage[key] for key, sound in known.items() if sound}
    return {}


def _updated(run_dir: Path) -> str:
    times = [0.0]
    for path in (run_dir, run_dir / "metrics.jsonl"):
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    # A calendar ends with the year 9999, a file system does not.
    return datetime.fromtimestamp(min(max(times), 253e9), UTC).isoformat(timespec="seconds")
