"""Losses of 20 steps of every kind of stage 1, to the last digit, before and after a change that should alter none:

    python tests/golden_losses.py --out before.json
    python tests/golden_losses.py --against before.json

The figures are of one machine, one torch and this Python's own sources: another CPU adds in another order. A file that
was made elsewhere is refused.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

STEPS = 20
QUICKSTART = Path(__file__).parents[1] / "recipes/quickstart.toml"
# A layer of two is dense, the heads are grouped, and the length is no multiple of anything.
SMALL = [
    *("model.dim=64", "model.layers=3", "model.heads=4", "model.kv_heads=2", "model.head_dim=16", "model.ffn_dim=96"),
    *("model.dense_layers=[0]", "training.seq_len=1000", "lighthouse.topk=16", "lighthouse.tile_parents=8"),
]
CASES = {
    "quickstart": [],
    "norm": [*SMALL, 'lighthouse.scorer="norm"'],
    "norm, window": [*SMALL, 'lighthouse.scorer="norm"', "lighthouse.window=100"],
    "block": [*SMALL, 'lighthouse.scorer="block"'],
    "compressed, keep": [
        *SMALL,
        'lighthouse.method="compressed"',
        *("lighthouse.window=96", "lighthouse.compression=8", "lighthouse.keep=2", "lighthouse.score_block=16"),
    ],
    "sliding": [*SMALL, 'lighthouse.method="sliding"', "lighthouse.window=100"],
    "growing": [*SMALL, 'lighthouse.method="chunked"', "lighthouse.phases=[{window=64}, {window=200}, {window=500}]"],
    "dense": [*SMALL, "lighthouse.enabled=false"],
    "bfloat16, selective": [*SMALL, 'training.dtype="bfloat16"', 'training.activation_checkpointing="selective"'],
    "compiled, full": [*SMALL, "training.compile=true", 'training.activation_checkpointing="full"'],
    "two processes": [*SMALL, 'lighthouse.scorer="norm"'],
}


def conditions() -> dict[str, str]:
    """What the figures depend on."""
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "cpu": cpu.partition(": ")[2],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def train(name: str, settings: list[str], folder: Path) -> dict[str, list]:
    """Every loss and gradient norm of the run, and its validation loss."""
    settings = [
        *(f"training.steps={STEPS}", "training.deterministic=true", "metrics.every=1", "metrics.validation_batches=2"),
        *("metrics.tensorboard=false", f'output.dir="{folder}"'),
        *settings,
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    processes = "2" if name == "two processes" else "1"
    command = ["pretrain", str(QUICKSTART), "--name", name.partition(",")[0].replace(" ", "-"), "--nproc", processes]
    subprocess.run([sys.executable, "-m", "lighthouse_cli", *command, *options], check=True, timeout=900)
    (run,) = folder.iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {key: [row[key] for row in rows if key in row] for key in ("loss", "grad_norm", "val_loss")}
    assert len(found["loss"]) == STEPS and found["val_loss"]
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, help="where the figures go")
    options.add_argument("--against", type=Path, help="figures of an earlier commit")
    options.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    options.add_argument("--keep", type=Path, help="keep the runs in this folder")
    args = options.parse_args()
    before = json.loads(args.against.read_text()) if args.against else None
    if before and before["conditions"] != conditions():
        options.error(f"{args.against} was made on {before['conditions']}, and this is {conditions()}")
    losses, different = {}, []
    for name in args.only:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) if args.keep is None else args.keep / name
            folder.mkdir(parents=True, exist_ok=True)
            losses[name] = train(name, CASES[name], folder)
        verdict = "recorded"
        if before:
            earlier = before["losses"].get(name)
            verdict = "new" if earlier is None else "equal" if losses[name] == earlier else "DIFFERENT"
        different += [name] * (verdict == "DIFFERENT")
        print(f"{name:32} {losses[name]['loss'][-1]:.17g}  {verdict}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"conditions": conditions(), "losses": losses}, indent=1) + "\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
