"""How many processes a job has and where, and whether a recipe fits them."""

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lighthouse_core.config import Recipe
from lighthouse_core.errors import UserError
from lighthouse_core.job import network


@dataclass(frozen=True)
class Plan:
    """The processes of a job.

    Attributes:
        nproc: processes on this machine.
        nnodes: machines; each runs its own launcher.
        node_rank: of this machine; 0 makes the run and keeps its ledger.
        rdzv_endpoint: host:port of machine 0, where nnodes > 1.
    """

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    rdzv_endpoint: str = ""

    @property
    def world_size(self) -> int:
        return self.nproc * self.nnodes


# Within which the machines of a job must meet, unless titan.comm.init_timeout_seconds says otherwise.
MEET_SECONDS = 300


@dataclass(frozen=True)
class Asked:
    """What a machine was asked for.

    Attributes:
        facts: by name, what all machines must have alike; compared as JSON.
        patience: seconds without a word after which machine 0 has a machine given up.
        seconds: within which all machines must meet.
        say: is given what a person should know meanwhile.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    patience: int = 60
    seconds: int = MEET_SECONDS
    say: Callable[[str], None] = lambda text: None


def check_plan(
    nproc: str = "auto", nnodes: int = 1, node_rank: int = 0, rdzv_endpoint: str = "", *, dry_run: bool = False
) -> None:
    """Check the command line's numbers as far as no GPU is asked, so that torch is not imported.

    Args:
        nproc, nnodes, node_rank, rdzv_endpoint: of the command line.
        dry_run: the machines do not meet. The endpoint may be missing, and its name is not looked up.

    Raises:
        UserError: a number out of range, or no endpoint for several machines.
    """
    if nnodes < 1:
        raise UserError(f"--nnodes must be at least 1, not {nnodes}")
    if not 0 <= node_rank < nnodes:
        raise UserError(f"--node-rank must be between 0 and {nnodes - 1}, not {node_rank}")
    if nnodes > 1 and (rdzv_endpoint or not dry_run):
        host, port = network.endpoint(rdzv_endpoint)
        if node_rank == 0 and not dry_run:
            network.own_address(host, port)
    if nproc != "auto" and not re.fullmatch(r"[1-9]\d{0,3}", nproc):
        raise UserError(f'--nproc must be "auto" or a positive number, not {nproc!r}')


def plan(
    nproc: str = "auto", nnodes: int = 1, node_rank: int = 0, rdzv_endpoint: str = "", *, dry_run: bool = False
) -> Plan:
    """Resolve the command line's numbers; "auto" is every local GPU, or one process where there is none.

    Args:
        nproc, nnodes, node_rank, rdzv_endpoint, dry_run: as for check_plan.

    Raises:
        UserError: as check_plan, or this machine has fewer GPUs.
    """
    check_plan(nproc, nnodes, node_rank, rdzv_endpoint, dry_run=dry_run)
    if nproc == "auto":
        return Plan(local_gpus() or 1, nnodes, node_rank, rdzv_endpoint)
    gpus = local_gpus()
    if gpus and int(nproc) > gpus:
        raise UserError(f"--nproc {nproc}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}")
    return Plan(int(nproc), nnodes, node_rank, rdzv_endpoint)


def check_world(recipe: Recipe, world_size: int) -> None:
    """Raise UserError unless the recipe's batch and its [parallel] section fit this number of processes."""
    training, parallel = recipe.training, recipe.parallel
    groups = parallel.replicate * max(parallel.shard, 1) * parallel.context
    if world_size % groups or (parallel.shard > 0 and groups != world_size):
        context = f" x parallel.context ({parallel.context})" * (parallel.context > 1)
        raise UserError(
            f"parallel.shard ({parallel.shard}) x parallel.replicate ({parallel.replicate}){context} does not make "
            f"{world_size} processes"
        )
    ranks = world_size // parallel.context
    if training.global_batch_size % (training.local_batch_size * ranks):
        what = "processes" if parallel.context == 1 else f"groups of {parallel.context} processes"
        raise UserError(
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
            f"training.local_batch_size ({training.local_batch_size}) x {ranks} {what}",
            hint="use another --nproc or batch size",
        )


def check_loggers(recipe: Recipe) -> None:
    """Raise UserError if [metrics] asks for a package that is not installed."""
    # Its folder of runs, in the working directory, looks like a package to Python, but has no file to import.
    spec = importlib.util.find_spec("wandb") if recipe.metrics.wandb else None
    if recipe.metrics.wandb and (spec is None or spec.origin is None):
        raise UserError(
            "metrics.wandb needs the package wandb, which is not installed",
            hint="pip install 'lighthouse-pretrain[wandb]', or --set metrics.wandb=false",
        )


def local_gpus() -> int:
    """GPUs that the worker processes can see."""
    import torch

    return torch.cuda.device_count()


def gpu_memory() -> int | None:
    """Bytes of the smallest local GPU, used or not; None where there is none.

    By its properties: mem_get_info would begin a context on the GPU, which takes memory as long as this process lives.
    """
    import torch

    return min((torch.cuda.get_device_properties(i).total_memory for i in range(local_gpus())), default=None)
