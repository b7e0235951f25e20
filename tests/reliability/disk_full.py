"""A disk that is full: the save fails, the run ends with a message, and the checkpoints before it stay sound.

    python tests/reliability/disk_full.py [--out FILE]

The runs lie on a small tmpfs, which needs `unshare` and user namespaces (else: exit code 2). Once there is no room for
a checkpoint before its save begins; once the disk fills while it is written; once while it is written in the
background. Prints the figures; ends with 1 if one of them is wrong.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from jobs import RECIPE, TINY, Job, newest, options

from lighthouse_core.config import load_recipe
from lighthouse_core.estimate import estimate
from lighthouse_core.runs.listing import checkpoint_steps
from lighthouse_core.seal import damage

INSIDE = "LIGHTHOUSE_TEST_INSIDE"
EVERY = 5
# A checkpoint of about 38 MB, which takes a while to write.
SETTINGS = [
    *TINY,
    "checkpoint.keep=0",
    "model.ffn_dim=5376",
    "training.deterministic=true",
    "training.global_batch_size=2",
    "data.validation=0",
    f"checkpoint.interval={EVERY}",
    f"training.steps={3 * EVERY}",
]


class Disk:
    """A tmpfs with room for so many checkpoints, for a run and for what else fills it."""

    def __init__(self, path: Path, checkpoint: int, room: float):
        self.path, self.checkpoint, self.run = path, checkpoint, path / "run"
        # And some for what a run writes besides.
        self.size = round(room * checkpoint) + (2 << 20)

    def __enter__(self) -> "Disk":
        self.path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.path)], check=True)
        return self

    def __exit__(self, *error) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    @property
    def free(self) -> int:
        return shutil.disk_usage(self.path).free

    def fill(self, left: float = 0) -> None:
        """Leave room for `left` checkpoints."""
        with (self.path / "other").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while (more := self.free - round(left * self.checkpoint)) > 0:
                file.write(bytes(min(more, 1 << 20)))

    def make_room(self) -> None:
        (self.path / "other").unlink()


def pretrain(disk: Disk, *settings: str) -> list[str]:
    own = options(*SETTINGS, f"output.dir={json.dumps(str(disk.path))}", *settings)
    return ["pretrain", str(RECIPE), "--name", disk.run.name, "--nproc", "1", "--quiet", *own]


def outcome(disk: Disk, job: Job) -> dict[str, Any]:
    """How a run ended."""
    code, words, steps = job.wait(), job.words.splitlines(), checkpoint_steps(disk.run)
    return {
        "exit_code": code,
        "errors": [line for line in words if line.startswith("error: ")],
        "other_words": [line for line in words if not line.startswith("error: ")],
        "last_step": newest(disk.run),
        "checkpoints": steps,
        "damaged": sum(damage(disk.run / f"checkpoints/step-{step}") is not None for step in steps),
        "folders": sorted(path.name for path in disk.run.glob("checkpoints/*")),
    }


def resumed(disk: Disk, folder: Path) -> dict[str, Any]:
    """How the run goes on once there is room."""
    disk.make_room()
    found = outcome(disk, Job("pretrain", "--resume", str(disk.run), "--nproc", "1", "--quiet", cwd=folder))
    whole = [EVERY, 2 * EVERY, 3 * EVERY]
    return found | {"wrong": bool(found["exit_code"] or found["checkpoints"] != whole or found["damaged"])}


def refused(folder: Path, checkpoint: int) -> dict[str, Any]:
    """No room before the save begins."""
    with Disk(folder / "refused", checkpoint, 3.5) as disk:
        disk.fill(left=2.5)
        found = outcome(disk, Job(*pretrain(disk), cwd=folder))
        told = re.search(r"a checkpoint needs ([\d.]+) GB, but .* has ([\d.]+) GB free", " ".join(found["errors"]))
        needed, free = (float(x) * 1e9 for x in told.groups()) if told else (0, 0)
        wrong = (
            found["exit_code"] != 1
            # They have three digits, and the log goes on.
            or abs(needed / checkpoint - 1) > 0.05
            or abs(free / disk.free - 1) > 0.05
            or found["other_words"]
            or found["folders"] != [f"step-{2 * EVERY}", f"step-{EVERY}"]
            or found["damaged"]
            or found["last_step"] != 3 * EVERY
        )
        found |= {"needed": needed, "free": free, "again": resumed(disk, folder)}
    return found | {"wrong": bool(wrong or found["again"]["wrong"])}


def filled(folder: Path, checkpoint: int, asynchronous: bool) -> dict[str, Any]:
    """Room for the checkpoint when its save begins, but not until its end."""
    failing, ended = 2 * EVERY, threading.Event()
    with Disk(folder / f"filled-{asynchronous}", checkpoint, 3.5) as disk:
        checkpoints = disk.run / "checkpoints"

        def wait_for(path: Path) -> None:
            while not path.exists() and not ended.wait(0.001):
                pass

        def fill() -> None:
            wait_for(checkpoints / f"step-{EVERY}/manifest.json")
            # Little is left to be taken once the save has begun.
            disk.fill(left=1.1)
            wait_for(checkpoints / f".step-{failing}.saving")
            disk.fill()

        other = threading.Thread(target=fill)
        other.start()
        try:
            job = Job(*pretrain(disk, f"checkpoint.async_save={str(asynchronous).lower()}"), cwd=folder)
            found = outcome(disk, job)
        finally:
            ended.set()
            other.join()
        named = f"error: checkpoint {checkpoints}/step-{failing} could not be written: no space left on the device"
        wrong = (
            found["exit_code"] != 1
            or found["errors"] != [named]
            or found["other_words"]
            or [name for name in found["folders"] if not name.startswith(".")] != [f"step-{EVERY}"]
            or found["damaged"]
            or not failing <= found["last_step"] <= failing + (2 if asynchronous else 0)
        )
        found["failing"] = failing
        if asynchronous:
            found["again"] = resumed(disk, folder)
            wrong = wrong or found["again"]["wrong"]
    return found | {"wrong": bool(wrong)}


def show(name: str, found: dict[str, Any]) -> None:
    words = " / ".join(found["errors"] + found["other_words"]) or "no word"
    text = (
        f"{'WRONG: ' if found['wrong'] else ''}{name}: ended at step {found['last_step']} with exit code "
        f"{found['exit_code']} and {words!r}; checkpoints {found['checkpoints']}, {found['damaged']} damaged, folders "
        f"{', '.join(found['folders'])}"
    )
    if "again" in found:
        again = found["again"]
        text += f"; resumed with room: checkpoints {again['checkpoints']}, exit code {again['exit_code']}"
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="for the figures, as JSON")
    arguments = parser.parse_args()
    if INSIDE not in os.environ:
        # Only in a mount namespace of its own may a user mount anything.
        command = ["unshare", "--mount", "--map-root-user"]
        if not shutil.which("unshare") or subprocess.run([*command, "true"], stderr=subprocess.DEVNULL).returncode:
            print("unshare cannot make a mount namespace here, so that there is no small disk to fill", file=sys.stderr)
            return 2
        sys.stdout.flush()
        os.execvpe(command[0], [*command, sys.executable, *sys.argv], os.environ | {INSIDE: "1"})
    begun = time.monotonic()
    # Weights and two moments.
    checkpoint = 12 * estimate(load_recipe(RECIPE, SETTINGS)).parameters.total
    with tempfile.TemporaryDirectory() as temporary:
        folder, found = Path(temporary), {}
        for name, case in (
            ("no room for a checkpoint", lambda: refused(folder, checkpoint)),
            ("the disk fills during a save", lambda: filled(folder, checkpoint, False)),
            ("the disk fills during a save in the background", lambda: filled(folder, checkpoint, True)),
        ):
            found[name] = case()
            show(name, found[name])
    wrong = sum(case["wrong"] for case in found.values())
    print(f"checkpoints of {checkpoint / 1e6:.1f} MB, {wrong} wrong, {time.monotonic() - begun:.0f} s")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
