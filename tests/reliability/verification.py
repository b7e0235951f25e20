"""What verifying a checkpoint costs, beside loading it.

    python tests/reliability/verification.py [--parameters 53e7] [--folder DIR] [--out FILE]

Saves a checkpoint of a model of that many parameters with AdamW's moments, in float32, through the trainer's own
checkpointer. Then, nine times by turns: reads every byte against its SHA-256; loads it into tensors through the same
checkpointer; and starts a launcher up to where it knows its GPUs, with the verification begun beside that, as a
resumption does it, and measures how long it waits for that. Prints the medians; ends with 1 where it waits for
5 % of a load or more. All of it lies in memory, as far as the machine has room.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lighthouse_core.seal import damage, sealed_bytes
from lighthouse_core.titan import runtime  # before torchtitan
from lighthouse_core.titan.checkpointer import Checkpointer

assert runtime
from torchtitan.config import JobConfig  # noqa: E402

LAYERS = 24
LAUNCHER = """
import sys, time
from pathlib import Path
from lighthouse_core import seal
from lighthouse_core.job import plan
begin = time.perf_counter()
ahead = seal.Verification(Path(sys.argv[1]))
waited = time.perf_counter() - begin
plan.local_gpus()
begin = time.perf_counter()
assert ahead.result() is None
print(waited + time.perf_counter() - begin)
"""


class Part:
    """A stateful part of a job: as many tensors as a model has matrices."""

    def __init__(self, size: int):
        self.tensors = {f"layer{i}": torch.full((size // LAYERS,), float(i)) for i in range(LAYERS)}

    def state_dict(self):
        return self.tensors

    def load_state_dict(self, state):
        pass


def seconds(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def waiting(folder: Path) -> float:
    """Seconds that a launcher waits for the verification."""
    command = [sys.executable, "-c", LAUNCHER, str(folder)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=53e7)
    parser.add_argument("--folder", help="of the checkpoint; else a temporary one")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    size = int(arguments.parameters)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        torch.distributed.init_process_group("gloo", init_method=f"file://{name}/store", rank=0, world_size=1)
        config = JobConfig().checkpoint
        config.enable, config.folder, config.last_save_model_only = True, "checkpoints", False
        model = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(size // LAYERS)) for _ in range(LAYERS))
        saver = Checkpointer(None, [model], Part(2 * size), Part(LAYERS), {}, config, None, name)
        saved = seconds(lambda: saver.save(1, last_step=True))
        folder = Path(name) / "checkpoints/step-1"
        verified, loaded, waited = [], [], []
        for _ in range(9):
            verified.append(seconds(lambda: damage(folder)))
            loaded.append(seconds(lambda: saver.load(step=1)))
            waited.append(waiting(folder))
        assert damage(folder) is None
        gigabytes = sealed_bytes(folder) / 1e9
        saver.close()
    verify, load, wait = map(statistics.median, (verified, loaded, waited))
    print(
        f"{gigabytes:.2f} GB, {len(os.sched_getaffinity(0))} cores: saved in {saved:.2f} s, loaded in {load:.2f} s, "
        f"verified in {verify:.2f} s, of which a resumption waits {wait:.3f} s: {wait / load:.1%} of the load"
    )
    if arguments.out:
        figures = {"gigabytes": gigabytes, "save_s": saved, "verify_s": verified, "load_s": loaded, "wait_s": waited}
        Path(arguments.out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(wait >= 0.05 * load)


if __name__ == "__main__":
    sys.exit(main())
