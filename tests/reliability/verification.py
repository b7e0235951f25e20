"""What verifying a checkpoint costs, beside loading it and beside the whole of a restart.

    python tests/reliability/verification.py [--parameters 53e7] [--folder DIR] [--out FILE]

Saves a checkpoint of a model of that many parameters with AdamW's moments, in float32, through the trainer's own
checkpointer; then reads it three times by turns: every byte against its SHA-256, as before every resumption, and into
the tensors of the job. Prints the medians. What a restart takes beside (starting Python, torch and the processes) is
measured as an interpreter that imports the trainer.
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
        verified, loaded = [], []
        for _ in range(3):
            verified.append(seconds(lambda: damage(folder)))
            loaded.append(seconds(lambda: saver.load(step=1)))
        assert damage(folder) is None
        gigabytes = sealed_bytes(folder) / 1e9
        saver.close()
    start = seconds(lambda: subprocess.run([sys.executable, "-c", "import lighthouse_core.titan"], check=True))
    verify, load = statistics.median(verified), statistics.median(loaded)
    print(
        f"{gigabytes:.2f} GB, {len(os.sched_getaffinity(0))} cores: saved in {saved:.2f} s, verified in {verify:.2f} s, "
        f"loaded in {load:.2f} s ({verify / load:.1%}); with the import of the trainer, {start:.1f} s: "
        f"{verify / (load + start):.1%}"
    )
    if arguments.out:
        figures = {"gigabytes": gigabytes, "save_s": saved, "verify_s": verified, "load_s": loaded, "import_s": start}
        Path(arguments.out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
