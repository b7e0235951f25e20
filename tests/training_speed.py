"""Training steps on this machine's GPUs, Lighthouse and dense, through the command line:

    python tests/training_speed.py recipes/272m_98k.toml --kernels cudnn fa4 --out speed.json

One sequence a step. A row has the median of the steps after the third, and the peak memory of all; a ratio is that of
two runs with the same dense kernel, made one after the other.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

# The first compile, and the clocks settle.
WARM_UP = 3


def train(recipe: str, steps: int, settings: list[str], folder: Path) -> dict:
    """Medians of a run's steps, and under which conditions they were."""
    settings = [
        *(f"training.steps={steps}", "data.validation=0", "metrics.every=1", "metrics.tensorboard=false"),
        *settings,
    ]
    where = ["--set", f'output.dir="{folder}"']
    options = ["--name", "run", *(part for setting in settings for part in ("--set", setting))]
    print("lighthouse pretrain", recipe, *options, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "lighthouse_cli", "pretrain", recipe, *options, *where]
    subprocess.run(command, check=True, timeout=900, stdout=subprocess.DEVNULL)
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(row["loss"] is not None for row in rows), "a loss is not finite"
    found = {
        key: statistics.median(row[key] for row in rows[WARM_UP:])
        for key in ("tokens_per_second", "seconds", "mfu", "data_seconds")
        if key in rows[0]
    }
    environment = json.loads((run / "environment.json").read_text())
    return {
        **found,
        "memory_gib": max(row["memory_gib"] for row in rows),
        "loss": [row["loss"] for row in rows],
        "leaky": rows[0]["leaky"],
        "seconds_of_each_step": [row["seconds"] for row in rows],
        "command": ["lighthouse", "pretrain", recipe, *options],
        "conditions": json.loads((run / "ledger.json").read_text())["stages"][0]["conditions"],
        "versions": environment["versions"],
        "git_commit": environment["git_commit"],
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("recipes", nargs="+")
    options.add_argument("--kernels", nargs="+", default=["cudnn"], help="dense kernels, each forced")
    options.add_argument("--steps", type=int, nargs=2, default=(12, 7), help="of Lighthouse and of dense training")
    options.add_argument("--set", dest="settings", action="append", default=[], help="as of lighthouse pretrain")
    options.add_argument("--out", type=Path, required=True)
    args = options.parse_args()
    if min(args.steps) <= WARM_UP:
        options.error(f"--steps must be above {WARM_UP}, of which nothing is measured")
    results = []
    print("| recipe | attention | dense kernel | tok/s | step s | MFU | peak GiB | data wait ms | ratio |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for recipe in args.recipes:
        for kernel in args.kernels:
            of_kernel = []
            for steps, dense in zip(args.steps, (False, True), strict=True):
                settings = [
                    *("training.global_batch_size=1", f'lighthouse.dense_backend="{kernel}"'),
                    *(["lighthouse.enabled=false"] if dense else []),
                    *args.settings,
                ]
                with tempfile.TemporaryDirectory() as folder:
                    row = train(recipe, steps, settings, Path(folder))
                of_kernel.append(row | {"recipe": Path(recipe).stem, "dense": dense, "kernel": kernel})
                results.append(of_kernel[-1])
                mfu = f"{row['mfu']:.1%}" if "mfu" in row else "-"
                ratio = f"{of_kernel[0]['tokens_per_second'] / row['tokens_per_second']:.2f}x" if dense else ""
                print(
                    f"| {Path(recipe).stem} | {'dense' if dense else 'Lighthouse'} | {kernel} "
                    f"| {row['tokens_per_second']:,.0f} | {row['seconds']:.3f} | {mfu} "
                    f"| {row['memory_gib']:.1f} | {1e3 * row['data_seconds']:.1f} | {ratio} |",
                    flush=True,
                )
                args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
