"""What several GPUs of one machine do: time, memory and communication of a step, and the losses of shared sequences.

    python recipes/scaling.py OUT             every cell that this machine has the GPUs for
    python recipes/scaling.py OUT CELL...     these
    python recipes/scaling.py OUT --table     of what OUT holds

A cell is a short run of a recipe; it leaves OUT/CELL.json. `fsdp-*` has a sequence a GPU, `context-*` one sequence that
all GPUs share: its losses are compared with those of the one GPU that has the sequence alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lighthouse_core.annotations import COMMUNICATION
from lighthouse_core.errors import LighthouseError
from lighthouse_core.profile.step import run_step
from lighthouse_core.python import run_module
from lighthouse_core.runs.rows import read_rows
from lighthouse_core.runs.run import Run

_HERE = Path(__file__).parent
_COUNTS = (1, 2, 4, 8)
# With those that warm up and the traced one, ten steps.
_TIMED = 6
_WIDEST = ["lighthouse.phases=[]", "lighthouse.window=49152"]
_NARROWEST = ["lighthouse.phases=[]", "lighthouse.window=2048"]
_LEFT_OUT = ("breakdown", "trace", "stacks", "run")
# Recipe and settings by the name of what runs.
_RUNS: dict[str, tuple[str, list[str]]] = {
    "pyramid": ("530m_98k", []),
    "window-2048": ("530m_98k_growing", _NARROWEST),
    "window-49152": ("530m_98k_growing", _WIDEST),
    "dense": ("530m_98k_dense", []),
    "1m": ("272m_1m", []),
    "1m-full": ("272m_1m", ['training.activation_checkpointing="full"']),
}


def cells(gpus: int) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """What can be run on so many GPUs, by name."""
    found: dict[str, Callable[[Path], dict[str, Any]]] = {}
    for count in (n for n in _COUNTS if n <= gpus):
        for name in _RUNS:
            if not name.startswith("1m"):
                found[f"fsdp-{name}-{count}"] = _step(name, count, 1)
            if count > 1 or name.startswith("1m"):
                found[f"context-{name}-{count}"] = _step(name, count, count)
        found[f"recovery-1m-{count}"] = _recovery(count)
    return found


def _settings(name: str, count: int, context: int) -> list[str]:
    return [
        *_RUNS[name][1],
        *([f"parallel.context={context}"] if context > 1 else []),
        f"training.global_batch_size={count // context}",
        "checkpoint.interval=100000",
        "schedule.warmup_steps=2",
        "optimizer.lr=3e-4",
    ]


def _step(name: str, count: int, context: int) -> Callable[[Path], dict[str, Any]]:
    def run(folder: Path) -> dict[str, Any]:
        recipe = _HERE / f"{_RUNS[name][0]}.toml"
        found = run_step(recipe, _settings(name, count, context), folder, count, print, timed=_TIMED)
        costs = found.breakdown
        return {
            **{
                key: value
                for key, value in found.as_json().items()
                if key not in ("breakdown", "trace", "stacks", "run")
            },
            "context": context,
            "tokens_per_second_per_gpu": found.tokens_per_second / count,
            "exposed_communication_ms": costs.ms(COMMUNICATION),
            "hidden_communication_ms": costs.hidden_ms,
            "traced_ms": costs.wall_ms,
            "losses": [row["loss"] for row in _rows(found.run)],
            "rows": {cost.name: cost.ms for cost in costs.rows},
        }

    return run


def _recovery(count: int) -> Callable[[Path], dict[str, Any]]:
    """One dense step of a million tokens: minutes."""

    def run(folder: Path) -> dict[str, Any]:
        settings = [
            *_settings("1m", count, count),
            "lighthouse.enabled=false",
            "training.steps=1",
            "schedule.warmup_steps=1",
            "metrics.every=1",
        ]
        place = f"output.dir={json.dumps(str(folder))}"
        options = [part for setting in [*settings, place] for part in ("--set", setting)]
        command = [*run_module("lighthouse_cli"), "pretrain", str(_HERE / "272m_1m.toml"), "--name", "run"]
        done = subprocess.run(
            [*command, "--nproc", str(count), *options], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            raise LighthouseError(f"exit code {done.returncode}: {done.stderr[-2000:]}")
        (row,) = _rows(folder / "run")
        conditions = Run(folder / "run").ledger["stages"][-1]["conditions"]
        ran = {"recipe": "272m_1m", "settings": settings, "stage": "dense", "conditions": conditions}
        figures = {key: row[key] for key in ("loss", "seconds", "memory_gib")}
        return {**ran, "processes": count, "context": count, **figures}

    return run


def _rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]


def table(folder: Path) -> str:
    """Losses first, then times, as Markdown."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    lines = ["| losses of shared sequences | GPUs | steps | largest difference from one GPU's |", "|---|---|---|---|"]
    for name, cell in found.items():
        what, alone = name.removeprefix("context-").rpartition("-")[0], None
        if cell["context"] > 1 and "losses" in cell:
            alone = found.get(f"fsdp-{what}-1") or found.get(f"context-{what}-1")
        if alone and "losses" in alone:
            apart = [abs(a - b) for a, b in zip(cell["losses"], alone["losses"], strict=True)]
            lines.append(f"| {what} | {cell['context']} | {len(apart)} | {max(apart):.2g} |")
    lines += [
        "",
        "| step | GPUs | s | tok/s a GPU | of one GPU's | peak GiB | communication ms: exposed | hidden |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in found.items():
        if "tokens_per_second_per_gpu" not in cell:
            continue
        kind, _, what = name.rpartition("-")[0].partition("-")
        alone = found.get(f"fsdp-{what}-1") or found.get(f"context-{what}-1")
        speed = cell["tokens_per_second_per_gpu"]
        exposed, hidden = cell["exposed_communication_ms"], cell["hidden_communication_ms"]
        share = f"{speed / alone['tokens_per_second_per_gpu']:.2f}" if alone else "-"
        lines.append(
            f"| {kind} {what} | {cell['processes']} | {cell['seconds']:.3f} | {speed:,.0f} | {share} | "
            f"{cell['memory_gib']:.1f} | {exposed:.0f} | {hidden:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run cells, or print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("cells", nargs="*", metavar="CELL")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if not asked.table:
        there = cells(torch.cuda.device_count())
        asked.out.mkdir(parents=True, exist_ok=True)
        failed = False
        for name in asked.cells or there:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = there[name](Path(folder))
                except LighthouseError as error:
                    failed = True
                    print(f"{name}: {error}", file=sys.stderr)
                    continue
            device = torch.cuda.get_device_name()
            found |= {"gpu": device, "torch": torch.__version__, "commit": os.environ.get("COMMIT")}
            (asked.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if failed:
            sys.exit(1)
    print(table(asked.out))


if __name__ == "__main__":
    main()
