"""The machines of a job: from the command line, and else from Slurm."""

import os

from lighthouse_cli import _output


def machines(nnodes: int | None, node_rank: int | None, rdzv_endpoint: str) -> tuple[int, int, str]:
    """--nnodes, --node-rank and --rdzv-endpoint, each from Slurm where it is not given and `srun` started this process.

    Raises:
        UserError: Slurm started several tasks on a machine, or torchrun started this process.
    """
    from lighthouse_core.errors import UserError
    from lighthouse_core.job import slurm

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            "torchrun started this, and lighthouse starts the processes of a machine itself",
            hint="run lighthouse on each machine, with --nnodes, --node-rank and --rdzv-endpoint, without torchrun",
        )
    complete = nnodes is not None and node_rank is not None and bool(rdzv_endpoint)
    step = None if nnodes == 1 or complete else slurm.step(os.environ)
    if step is not None:
        taken = [
            *([f"--nnodes {step.nnodes}"] * (nnodes is None)),
            *([f"--node-rank {step.node_rank}"] * (node_rank is None)),
            *([f"--rdzv-endpoint {step.host}:{step.port}"] * (not rdzv_endpoint)),
        ]
        _output.say(f"from Slurm: {' '.join(taken)}")
        nnodes = step.nnodes if nnodes is None else nnodes
        node_rank = step.node_rank if node_rank is None else node_rank
        rdzv_endpoint = rdzv_endpoint or f"{step.host}:{step.port}"
    elif nnodes is None and (count := slurm.machines_of_job(os.environ)) > 1:
        _output.warn(
            f"this job of Slurm has {count} machines, and this one alone trains: srun --ntasks-per-node=1 lighthouse "
            "... takes all"
        )
    if nnodes is not None and nnodes > 1:
        # Before torch is loaded: it would tell stderr of every name that it does not find, and show where in torch a
        # connection ended, for which we have words.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return nnodes or 1, node_rank or 0, rdzv_endpoint
