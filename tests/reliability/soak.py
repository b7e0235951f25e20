"""A long run keeps its memory and its open files; one killed again and again keeps its metrics whole.

    python tests/reliability/soak.py [--steps 2000] [--warm-up 400] [--arenas N] [--kills 5] [--seed 0] [--out FILE]

First, many steps of a tiny model: twice a second the training process is asked for its memory and its open files. A
line through these after the warm-up gives the growth.

Every save has threads of its own, and glibc would give threads arenas of their own, of which it returns little: only
after some dozens of saves the process would have the size that it keeps. So the launcher asks for one arena for all.
`--arenas 16` does without: there, `--warm-up 2000 --steps 6000` are needed.

Then kill -9 of all processes at random instants, one of five while they start, and a resumption after each:
metrics.jsonl has every step once, up to the newest, in order. Prints the figures; ends with 1 if one of them is wrong.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jobs import RECIPE, Job, lines, newest, options

from lighthouse_core.runs.listing import checkpoint_steps

SETTINGS = options(
    "model.dim=16",
    "model.heads=2",
    "model.head_dim=8",
    "model.ffn_dim=32",
    "model.layers=2",
    "model.dense_layers=[0]",
    "lighthouse.levels=2",
    "lighthouse.topk=16",
    "lighthouse.tile_parents=8",
    "training.seq_len=128",
    "training.global_batch_size=1",
    "checkpoint.keep=2",
    "metrics.every=1",
    "metrics.validation_every=100",
    "metrics.validation_batches=1",
)
SAMPLE_SECONDS = 0.5
GROWTH = 1.0  # MB per 1000 steps
KILL_EVERY = 5
KILL_STEPS = 600


class Sample(NamedTuple):
    """Of one instant: the newest step, megabytes of memory, and open files.

    What is proportional or private also depends on who else has mapped the same libraries.
    """

    step: int
    resident: float
    anonymous: float
    proportional: float
    private: float
    files: int


def sample(pid: int, run: Path) -> Sample:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    megabytes = {name: int(value.split()[0]) * 1024 / 1e6 for name, value in fields.items()}
    return Sample(
        newest(run),
        megabytes["Rss"],
        megabytes["Anonymous"],
        megabytes["Pss"],
        megabytes["Private_Clean"] + megabytes["Private_Dirty"],
        len(os.listdir(f"/proc/{pid}/fd")),
    )


def pretrain(name: str, steps: int, every: int) -> list[str]:
    own = options(f"training.steps={steps}", f"checkpoint.interval={every}")
    return ["pretrain", str(RECIPE), "--name", name, "--nproc", "1", "--quiet", *SETTINGS, *own]


def soak(folder: Path, steps: int, warm_up: int, arenas: int) -> dict[str, Any]:
    run = folder / "runs/soak"
    environment = {"MALLOC_ARENA_MAX": str(arenas)} if arenas else {}
    job = Job(*pretrain("soak", steps, 100), cwd=folder, environment=environment)
    job.wait_until(lambda: newest(run))
    (worker,) = job.workers()
    samples = []

    def look() -> bool:
        # As it ends it has no memory to ask for.
        if newest(run) >= steps:
            return True
        samples.append(sample(worker, run))
        time.sleep(SAMPLE_SECONDS)
        return False

    reached = job.wait_until(look, 600)
    if job.wait() or not reached:
        raise RuntimeError(job.words)
    warm = [x for x in samples if x.step >= warm_up]
    at = [x.step / 1000 for x in warm]
    memory = {name: [getattr(x, name) for x in warm] for name in Sample._fields[1:-1]}
    quarters = [
        [x.files for x in samples if quarter * steps / 4 <= x.step < (quarter + 1) * steps / 4] for quarter in range(4)
    ]
    seconds = statistics.median(row["seconds"] for row in lines(run) if "loss" in row)
    found = {
        "steps": steps,
        "warm_up": warm_up,
        "arenas": arenas,
        "milliseconds_per_step": 1000 * seconds,
        "samples": len(warm),
        "megabytes": {name: [min(of), statistics.median(of), max(of)] for name, of in memory.items()},
        "megabytes_per_1000_steps": {name: float(np.polyfit(at, of, 1)[0]) for name, of in memory.items()},
        "files": [[min(of), statistics.median(of), max(of)] for of in quarters],
        "all": samples,
    }
    growth, files = found["megabytes_per_1000_steps"], found["files"]
    judged = ("resident", "anonymous")
    found["wrong"] = max(growth[name] for name in judged) >= GROWTH or files[3][1] != files[1][1]
    words = [f"{name} {found['megabytes'][name][1]:.1f} MB {growth[name]:+.2f} per 1000 steps" for name in judged]
    print(
        f"{'WRONG: ' if found['wrong'] else ''}{steps} steps of {1000 * seconds:.0f} ms, {len(warm)} samples after "
        f"step {warm_up}: {', '.join(words)}; open files by quarter (min/median/max): "
        + ", ".join("/".join(f"{x:g}" for x in of) for of in files),
        flush=True,
    )
    return found


def faults(run: Path) -> int:
    """What is wrong with the rows of a run: one that is not JSON, a step that is missing, there twice or misplaced."""
    try:
        rows = lines(run)
    except ValueError:
        return 1
    steps = [row["step"] for row in rows if "loss" in row]
    validations = [row["step"] for row in rows if "val_loss" in row]
    return sum(step != i for i, step in enumerate(steps, 1)) + len(validations) - len(set(validations))


def killed(folder: Path, kills: int, chance: random.Random) -> dict[str, Any]:
    run = folder / "runs/killed"
    path, start = run / "metrics.jsonl", 0.0
    found = {"kills": kills, "starting": 0, "saving": 0, "repeated": 0, "looks": 0, "faults": 0, "cut_rows": 0}

    def look() -> None:
        found["looks"] += 1
        found["faults"] += faults(run)

    for kill in range(kills + 1):
        saved = checkpoint_steps(run)[-1:]
        before = path.stat().st_ino if path.exists() else None
        arguments = ["pretrain", "--resume", "killed", "--nproc", "1", "--quiet"]
        job = Job(*(arguments if saved else pretrain("killed", KILL_STEPS, KILL_EVERY)), cwd=folder)

        # The file is replaced when training begins, without the steps that are made again.
        def trains(saved=saved, before=before) -> bool:
            step = saved[0] if saved else KILL_EVERY
            return path.exists() and path.stat().st_ino != before and newest(run) > step

        if kill % 5 == 4 and kill < kills:
            time.sleep(chance.uniform(0, start))
            found["starting"] += not trains()
        else:
            if not job.wait_until(trains):
                raise RuntimeError(job.words)
            start = time.monotonic() - job.begun
            look()
            if kill == kills:
                break
            time.sleep(chance.uniform(0, 3))
        job.kill()
        look()
        found["cut_rows"] += not path.read_bytes().endswith(b"\n")
        found["saving"] += any(run.glob("checkpoints/.step-*.saving"))
        found["repeated"] += newest(run) - checkpoint_steps(run)[-1]
    code = job.wait()
    look()
    found |= {"exit_code": code, "steps": newest(run)}
    found["wrong"] = bool(found["faults"] or code or found["steps"] != KILL_STEPS)
    print(
        f"{'WRONG: ' if found['wrong'] else ''}{kills} kills, {found['starting']} while starting, {found['saving']} "
        f"in the middle of a save, {found['cut_rows']} in the middle of a row, {found['repeated']} steps made again: "
        f"{found['faults']} faults of metrics.jsonl in {found['looks']} looks; {found['steps']} of {KILL_STEPS} steps",
        flush=True,
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=400)
    parser.add_argument("--arenas", type=int, default=0, help="of glibc's allocator; 0: the launcher's choice")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="for the figures, as JSON")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "soak": soak(Path(folder), arguments.steps, arguments.warm_up, arguments.arenas),
            "killed": killed(Path(folder), arguments.kills, random.Random(arguments.seed)),
        }
    print(f"{time.monotonic() - begun:.0f} s")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(part["wrong"] for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
