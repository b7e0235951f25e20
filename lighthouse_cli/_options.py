"""Options that several commands share."""

import math
from typing import Annotated

import typer


def finite(value: float | None) -> float | None:
    """Refuses NaN and the infinities, which compare with no limit as a number does."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; the value is TOML. Repeatable."),
]
Nproc = Annotated[
    str, typer.Option("--nproc", metavar="N", help="Processes on this machine; auto: one per GPU, else one.")
]
# Of what is counted: numbers that no use comes near, and below what arithmetic in 64 bits can hold.
MOST = 10**9
MOST_TOKENS = 2**30
Nnodes = Annotated[
    int | None,
    typer.Option(
        "--nnodes",
        metavar="N",
        min=1,
        max=10**5,
        help="Machines; run the same command on each. Else those of Slurm's srun, or 1.",
        show_default=False,
    ),
]
NodeRank = Annotated[
    int | None, typer.Option("--node-rank", metavar="R", help="Number of this machine, from 0.", show_default=False)
]
RdzvEndpoint = Annotated[
    str, typer.Option("--rdzv-endpoint", metavar="HOST:PORT", help="Where machine 0 can be reached.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the resolved recipe and its costs, check that it could start, and stop."),
]
GpuMemory = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory",
        metavar="GIB",
        callback=finite,
        min=0.001,
        max=MOST,
        help="With --dry-run: say what fits a GPU of so many GiB, rather than this machine's.",
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse to go on from an older checkpoint where the newest is damaged.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and the final line only.")]
Json = Annotated[bool, typer.Option("--json", help="Print each logged row on stdout as a JSON object.")]
