"""kill -9 at random instants while checkpoints are saved: every restart goes on from a sound one, none is lost.

    python tests/reliability/kill_saves.py [--kills 200] [--seed 0]

A process saves a checkpoint after another, of some megabytes whose every number is the step's, and tells of each when
`save` has returned. It is killed; every checkpoint that has its name is then read to the last byte, and the next
process loads the newest and goes on. Prints the figures; ends with 1 if one of them is wrong.
"""

import argparse
import os

if __name__ == "__main__":
    # The processes are forks, in which CUDA does not work.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from lighthouse_core.runs.listing import checkpoint_steps
from lighthouse_core.seal import damage
from lighthouse_core.titan import runtime  # before torchtitan
from lighthouse_core.titan.checkpointer import Checkpointer

assert runtime
from torchtitan.config import JobConfig  # noqa: E402


class Part:
    """A stateful part of a job, all of whose numbers are the step's."""

    def __init__(self, size: int):
        self.numbers = torch.zeros(size)

    def state_dict(self):
        return {"numbers": self.numbers}

    def load_state_dict(self, state):
        self.numbers.copy_(state["numbers"])


class Step:
    step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def job(folder: Path, keep: int, asynchronous: bool) -> tuple[Checkpointer, Step, list[torch.Tensor]]:
    """What saves, the step, and the numbers that it saves. Needs a process group."""
    config = JobConfig().checkpoint
    config.enable, config.interval, config.keep_latest_k = True, 1, keep
    config.folder = "checkpoints"
    config.async_mode = "async" if asynchronous else "disabled"
    model, parts, step = torch.nn.Linear(512, 512), [Part(500_000) for _ in range(3)], Step()
    saver = Checkpointer(parts[0], [model], parts[1], parts[2], {"train_state": step}, config, None, str(folder))
    return saver, step, [*model.parameters(), *(part.numbers for part in parts)]


def save_for_ever(folder: Path, store: Path, tell: int, keep: int, asynchronous: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    saver, step, numbers = job(folder, keep, asynchronous)
    saver.load()
    if step.step and not all((x == step.step).all() for x in numbers):
        os.write(tell, b"-1\n")
        os._exit(3)
    os.write(tell, f"{step.step}\n".encode())
    while True:
        step.step += 1
        with torch.no_grad():
            for x in numbers:
                x.fill_(step.step)
        saver.save(step.step)
        if not asynchronous:
            os.write(tell, f"{step.step}\n".encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=int, default=2)
    parser.add_argument("--asynchronous", action="store_true")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    sound = lost = damaged = saves = during = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        newest = 0
        for kill in range(arguments.kills):
            heard, tell = os.pipe()
            child = os.fork()
            if not child:
                os.close(heard)
                save_for_ever(folder, folder / f"store-{kill}", tell, arguments.keep, arguments.asynchronous)
            os.close(tell)
            file = os.fdopen(heard)
            begun = int(file.readline() or -1)
            sound += begun >= newest
            time.sleep(chance.uniform(0, 0.25))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            told = [int(line) for line in file.read().splitlines()]
            during += any((folder / "checkpoints").glob(".step-*.saving"))
            steps = checkpoint_steps(folder)
            damaged += sum(damage(folder / "checkpoints" / f"step-{step}") is not None for step in steps)
            newest = steps[-1] if steps else 0
            saves += newest - max(begun, 0)
            lost += max([begun, *told]) > newest
    print(
        f"{arguments.kills} kills, {during} in the middle of a save, of {saves} checkpoints: {sound} restarts from the "
        f"newest sound checkpoint, {damaged} damaged checkpoints, {lost} published steps lost"
    )
    return int(sound != arguments.kills or damaged or lost or not during or not saves)


if __name__ == "__main__":
    sys.exit(main())
