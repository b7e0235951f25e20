"""Signals at random instants of a run on two processes, which each time saves one step, ends, and is gone on with.

    python tests/reliability/preempt.py [--trials 20] [--seed 0] [--out FILE]

SIGTERM, SIGINT or SIGUSR1 goes to the launcher, to either training process, or to all processes of the job as a batch
system does it: during start-up, in a step, during an evaluation, and while a checkpoint is saved asynchronously. Every
trial goes on with the run of the one before; at its end the run must have each loss of one that was never interrupted.
Prints a line for each trial; ends with 1 if one of them is wrong.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs import RECIPE, TINY, Job, newest, options, rows, succeed

from lighthouse_core.runs.listing import checkpoint_steps
from lighthouse_core.seal import damage

EVERY = 5  # steps between two evaluations
SETTINGS = options(
    *TINY,
    "checkpoint.keep=0",
    "training.steps=100000",
    "training.deterministic=true",
    "checkpoint.interval=3",
    "checkpoint.async_save=true",
    "metrics.validation_batches=100",
    f"metrics.validation_every={EVERY}",
)
PHASES = ("start-up", "step", "evaluation", "asynchronous save")
TARGETS = ("launcher", "rank 0", "rank 1", "every process")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def reach(phase: str, job: Job, run: Path, chance: random.Random) -> bool:
    """Wait for the phase to have begun. False if the job ended before."""
    if phase == "start-up":
        return job.wait_until(lambda: len(job.workers()) == 2) and not time.sleep(chance.uniform(0, 4))
    begun = newest(run)
    if not job.wait_until(lambda: newest(run) >= begun + 2):
        return False
    if phase == "step":
        time.sleep(chance.uniform(0, 0.3))
        return True
    if phase == "asynchronous save":
        return job.wait_until(lambda: any(run.glob("checkpoints/.step-*.saving")))

    def evaluating() -> bool:
        step = newest(run)
        return step > begun and step % EVERY == 0 and step not in rows(run, "val_loss")

    return job.wait_until(evaluating) and not time.sleep(0.3) and evaluating()


def trial(number: int, run: Path, chance: random.Random) -> dict[str, Any]:
    """Interrupt the run once; what was seen, with everything that is wrong under "wrong"."""
    phase, target = PHASES[number % 4], TARGETS[(number // 4) % 4]
    sent = chance.choice(SIGNALS)
    before = newest(run)
    start = ["pretrain", "--resume", run.name] if run.exists() else ["pretrain", str(RECIPE), "--name", run.name]
    job = Job(*start, *(() if run.exists() else SETTINGS), "--nproc", "2", cwd=run.parents[1])
    reached = reach(phase, job, run, chance)
    pids = job.pids()
    ranks = job.workers()
    aims = {"launcher": pids[:1], "rank 0": ranks[:1], "rank 1": ranks[1:], "every process": pids}[target]
    at = newest(run)
    begun = time.monotonic()
    for pid in aims:
        os.kill(pid, sent)
    code = job.wait(120)
    seconds = time.monotonic() - begun
    steps = checkpoint_steps(run)
    last = newest(run)
    expected = (130,) if sent == signal.SIGINT and target in ("launcher", "every process") else (143,)
    if phase == "start-up":
        # A process that Python has not started yet ends of the signal itself.
        expected = (130, 143)
    checks = {
        f"{phase} was not reached": reached,
        f"exit code {code}": code in expected,
        f"the newest checkpoint is of step {steps[-1:]}, the newest row of {last}": steps[-1:] == [last] or not last,
        f"{last - at} steps after the signal": last - at <= 2,
        f"step {before} was lost": last >= before,
        "a checkpoint is damaged": all(damage(run / f"checkpoints/step-{step}") is None for step in steps[-2:]),
        "a save was left unfinished": not any(run.glob("checkpoints/.step-*")),
        "a traceback": "Traceback" not in job.words,
        "a process lives on": not any(Path(f"/proc/{pid}/cmdline").exists() and _of(pid, run) for pid in pids[1:]),
    }
    wrong = [what for what, well in checks.items() if not well]
    return {
        "phase": phase,
        "target": target,
        "signal": sent.name,
        "code": code,
        "seconds": round(seconds, 2),
        "steps_after": last - at,
        "step": last,
        "wrong": wrong,
        "words": job.words if wrong else "",
    }


def _of(pid: int, run: Path) -> bool:
    """Whether the process is of this run: its number may have gone to another."""
    try:
        return run.name in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    trials = []
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "runs/preempted"
        for number in range(arguments.trials):
            seen = trial(number, run, chance)
            trials.append(seen)
            print(
                f"{seen['phase']:<17}  {seen['signal']:<7} to {seen['target']:<13}  exit {seen['code']} after "
                f"{seen['seconds']:5.2f} s, {seen['steps_after']} steps  {'; '.join(seen['wrong']) or 'well'}",
                flush=True,
            )
            if seen["wrong"]:
                print(seen["words"], flush=True)
        # The same run without a signal; its last step, too, is validated only if it is one of those.
        steps = newest(run) // EVERY * EVERY
        whole = run.with_name("whole")
        settings = options(f"training.steps={steps}", "checkpoint.interval=100000")
        succeed("pretrain", str(RECIPE), "--name", whole.name, *SETTINGS, *settings, "--nproc", "2", cwd=run.parents[1])
        compared = differing = 0
        for key in ("loss", "grad_norm", "val_loss"):
            one, other = rows(whole, key), {step: row for step, row in rows(run, key).items() if step <= steps}
            compared += len(one)
            differing += len(one.keys() ^ other.keys())
            differing += sum(one[step][key] != other[step][key] for step in one.keys() & other.keys())
    well = sum(not seen["wrong"] for seen in trials)
    slowest = max(seen["seconds"] for seen in trials)
    print(
        f"{well} of {len(trials)} interruptions saved their step and ended, at most {slowest:.1f} s after the signal; "
        f"{compared} figures of {steps} steps compared with an uninterrupted run's: {differing} differ"
    )
    if arguments.out:
        figures = {"trials": trials, "compared": compared, "differing": differing, "steps": steps}
        Path(arguments.out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(well != len(trials) or differing > 0 or not compared)


if __name__ == "__main__":
    sys.exit(main())
