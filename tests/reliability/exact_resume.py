"""A run whose processes are all killed with -9 ends, resumed, with every bit of one that was never interrupted.

    python tests/reliability/exact_resume.py [--out FILE]

On 1 and 2 processes, in stage 1, in stage 2 and on the way between them: every loss, gradient norm, learning rate and
validation loss, and every tensor and other value of the last checkpoint are compared with those of an uninterrupted
run. Where the number of processes changes, sums are made in another order: there losses and gradient norms agree to a
relative 1e-4, and the tokens are the same. Prints the figures; ends with 1 if one of them is wrong.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from jobs import RECIPE, TINY, Job, differences, load, newest, options, rows, succeed

from lighthouse_core.config import load_recipe
from lighthouse_core.data.loader import build_loader
from lighthouse_core.runs.listing import checkpoint_steps

STEPS, RECOVERY, EVERY = 40, 20, 10
SETTINGS = options(
    *TINY,
    "checkpoint.keep=0",
    "training.deterministic=true",
    "training.seed=2",  # in this order of documents, several end within the run
    f"checkpoint.interval={EVERY}",
    "metrics.validation_every=6",
    f"training.steps={STEPS}",
    f"recover.steps={RECOVERY}",
)
CLOSE = 1e-4
# Rows that have the first of them: what is measured, and what is known beforehand.
LOSS = "loss", ("loss", "grad_norm"), ("lr", "tokens", "stage")
VALIDATION = "val_loss", ("val_loss",), ("stage",)


def pretrain(name: str, processes: int) -> list[str]:
    return ["pretrain", str(RECIPE), "--name", name, "--nproc", str(processes), *SETTINGS]


def kill_at(job: Job, run: Path, step: int) -> str:
    """Kill the job once it has logged a step; says where that was."""
    if not job.wait_until(lambda: newest(run) >= step):
        raise RuntimeError(f"{job.words}\nthe job ended before step {step}")
    processes = job.kill()
    seen, saved = newest(run), checkpoint_steps(run)[-1]
    # Killed processes save nothing: the steps since the checkpoint are made again.
    assert saved == step // EVERY * EVERY < seen, (saved, seen)
    return f"{processes} processes killed at step {seen}, checkpoint {saved}"


def figures(run: Path, reference: Path) -> dict[str, Any]:
    """How two runs compare: of every logged row and validation, and of the last checkpoint."""
    found: dict[str, Any] = {}
    for key, measured, given in (LOSS, VALIDATION):
        seen, expected = rows(run, key), rows(reference, key)
        pairs = [(seen[step], expected[step]) for step in sorted(seen.keys() & expected.keys())]
        found[key] = {
            "compared": len(pairs),
            "alone": len(seen.keys() ^ expected.keys()),
            "differing": sum(one[column] != other[column] for one, other in pairs for column in measured),
            "wrong": sum(one[column] != other[column] for one, other in pairs for column in given),
            "apart": max(abs(one[column] / other[column] - 1) for one, other in pairs for column in measured),
        }
    state, expected = (load(path / f"checkpoints/step-{newest(reference)}") for path in (run, reference))
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    differing = differences(state, expected)
    return found | {
        "tensors": len(tensors),
        "numbers": sum(tensor.numel() for tensor in tensors),
        "values": len(state) - len(tensors),
        "differing": sum(differing.values()),
        "differing_places": sorted(differing),
    }


def tokens(run: Path, step: int, processes: int, steps: int) -> torch.Tensor:
    """The samples and labels that so many processes get in the steps after a checkpoint, in the order of the stream."""
    recipe, state = load_recipe(run / "recipe.toml"), load(run / f"checkpoints/step-{step}")
    place = {key.removeprefix("dataloader/"): value for key, value in state.items() if key.startswith("dataloader/")}
    training, loaders = recipe.training, []
    for rank in range(processes):
        loader = build_loader(
            recipe.data,
            training.seq_len,
            training.local_batch_size,
            rank,
            processes,
            training.seed,
            align=recipe.alignment,
            prefetch=0,
        )
        loader.load_state_dict(place)
        loaders.append(iter(loader))
    batches = [next(loader) for _ in range(steps * training.global_batch_size // processes) for loader in loaders]
    return torch.stack([torch.stack([inputs["input"], labels]) for inputs, labels in batches])


class Report:
    def __init__(self):
        self.cases: list[dict[str, Any]] = []

    def add(self, name: str, what: str, found: dict[str, Any], wrong: bool, words: str) -> None:
        self.cases.append({"case": name, "killed": what, "wrong": wrong} | found)
        print(f"{'WRONG: ' if wrong else ''}{name} ({what}): {words}", flush=True)

    def exact(self, name: str, what: str, run: Path, reference: Path) -> None:
        found = figures(run, reference)
        steps, validations = found["loss"], found["val_loss"]
        logged = sum(part["differing"] + part["wrong"] + part["alone"] for part in (steps, validations))
        self.add(
            name,
            what,
            found,
            bool(logged or found["differing"]),
            f"{steps['compared']} steps and {validations['compared']} validations, {logged} figures differ; "
            f"{found['tensors']} tensors of {found['numbers']} numbers and {found['values']} other values, "
            f"{found['differing']} differ",
        )

    def close(self, name: str, what: str, run: Path, reference: Path, saved: int) -> None:
        found = figures(run, reference)
        steps, validations = found["loss"], found["val_loss"]
        place = [key for key in found["differing_places"] if key.startswith(("dataloader/", "train_state/", "lr_"))]
        one, two = (tokens(run, saved, processes, STEPS - saved) for processes in (1, 2))
        same = torch.equal(one, two)
        wrong = max(steps["apart"], validations["apart"]) > CLOSE or place or not same
        wrong = wrong or any(part["wrong"] or part["alone"] for part in (steps, validations))
        self.add(
            name,
            what,
            found | {"place_differing": place, "samples": len(one), "same_tokens": same},
            bool(wrong),
            f"{steps['compared']} steps, at most {steps['apart']:.1e} apart, and {validations['compared']} "
            f"validations, at most {validations['apart']:.1e}; {len(place)} values of the place in the data and the "
            f"schedule differ; the {len(one)} samples after the checkpoint are {'' if same else 'not '}the same on 1 "
            "process and on 2",
        )


def compare(folder: Path, report: Report) -> None:
    runs = folder / "runs"

    def copy(name: str, new: str) -> Path:
        return Path(shutil.copytree(runs / name, runs / new))

    for processes in (1, 2):
        reference, name = f"whole-{processes}", f"killed-{processes}"
        succeed(*pretrain(reference, processes), cwd=folder)
        what = kill_at(Job(*pretrain(name, processes), cwd=folder), runs / name, 2 * EVERY + 3)
        other = copy(name, f"{name}-then-{3 - processes}")
        saved = checkpoint_steps(other)[-1]
        succeed("pretrain", "--resume", name, "--nproc", str(processes), cwd=folder)
        report.exact(f"stage 1, nproc {processes}", what, runs / name, runs / reference)
        succeed("pretrain", "--resume", other.name, "--nproc", str(3 - processes), cwd=folder)
        report.close(f"stage 1, nproc {processes}, then {3 - processes}", what, other, runs / reference, saved)

    reference, late, early = (copy("whole-1", name) for name in ("recovered", "late", "early"))
    succeed("recover", reference.name, "--nproc", "1", cwd=folder)

    recover = ["recover", late.name, "--nproc", "1"]
    what = kill_at(Job(*recover, cwd=folder), late, STEPS + EVERY + 3)
    succeed(*recover, cwd=folder)
    report.exact("stage 2", what, late, reference)

    recover = ["recover", early.name, "--nproc", "1"]
    job = Job(*recover, cwd=folder)
    job.wait_until(lambda: len(json.loads((early / "ledger.json").read_text())["stages"]) > 1)
    job.kill()
    assert newest(early) == STEPS
    what = kill_at(Job(*recover, cwd=folder), early, STEPS + 3)
    succeed(*recover, cwd=folder)
    report.exact("the switch", f"killed before the first dense step, then {what}", early, reference)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="for the figures, as JSON")
    arguments = parser.parse_args()
    report, begun = Report(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), report)
    wrong = sum(case["wrong"] for case in report.cases)
    print(f"{len(report.cases)} cases, {wrong} wrong, {time.monotonic() - begun:.0f} s")
    if arguments.out:
        arguments.out.write_text(json.dumps({"cases": report.cases}, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
