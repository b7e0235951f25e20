"""What Slurm says of the machines of a job. Nothing here imports torch."""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from lighthouse_core.errors import UserError

# Below the ports that systems give to connections by themselves.
_FIRST_PORT, _PORTS = 15000, 15000
# Between the ports of two jobs that follow each other: far from the few steps that each of them has.
_APART = 7919
# Numbers of steps from here on are Slurm's own, as that of the shell that `salloc` starts (4294967290).
_OWN_STEPS = 0xFFFFFFF0
_SCONTROL_SECONDS = 30


@dataclass(frozen=True)
class Step:
    """The tasks that one `srun` started, one on each machine.

    Attributes:
        nnodes: machines.
        node_rank: of this one.
        host: the first machine.
        port: that no other step of the cluster is likely to have.
    """

    nnodes: int
    node_rank: int
    host: str
    port: int


def step(environment: Mapping[str, str]) -> Step | None:
    """The step that this process is a task of; None outside of `srun`, and on one machine.

    Raises:
        UserError: several tasks on a machine, or Slurm does not say which machine is the first.
    """
    # A batch script has these of its job, and not of a step.
    if not _within_step(environment) or "SLURM_PROCID" not in environment:
        return None
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_NTASKS_PER_NODE", "1")
    # As in 2(x3),1.
    most = max((int(number) for number in re.findall(r"(?<!x)\b\d+", tasks)), default=1)
    if most > 1:
        raise UserError(
            f"srun starts {most} tasks on a machine, and each would train the whole run",
            hint="srun --ntasks-per-node=1: lighthouse starts a process for each GPU. --nnodes 1 keeps tasks apart",
        )
    nnodes = _number(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    if nnodes == 1:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job, number = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    port = _FIRST_PORT + (_APART * job + number) % _PORTS
    return Step(nnodes, _number(environment, "SLURM_NODEID"), _first(nodes), port)


def machines_of_job(environment: Mapping[str, str]) -> int:
    """The machines of a job in whose script this process runs without `srun`; 1 within a step, or without Slurm."""
    text = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES", "")
    return int(text) if text.isdigit() and not _within_step(environment) else 1


def _within_step(environment: Mapping[str, str]) -> bool:
    """Whether `srun` started this process, and not a script of Slurm or the shell of `salloc`."""
    text = environment.get("SLURM_STEP_ID", "")
    return bool(text) and not (text.isdigit() and int(text) >= _OWN_STEPS)


def _number(environment: Mapping[str, str], *names: str) -> int:
    text = next((environment[name] for name in names if name in environment), "")
    if not text.isdigit():
        raise UserError(
            f"{names[0]} of Slurm is {text!r}, and no number",
            hint="give --nnodes, --node-rank and --rdzv-endpoint yourself",
        )
    return int(text)


def _first(nodes: str) -> str:
    """The first machine of a list in Slurm's writing, as `node[01-03,7],other`."""
    hint = "give --rdzv-endpoint HOST:PORT, where HOST is the first machine"
    if "[" not in nodes:
        name = nodes.partition(",")[0]
        reason = "it is empty"
    else:
        command = ("scontrol", "show", "hostnames", nodes)
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_SECONDS)
        except FileNotFoundError:
            raise UserError(f"there is no scontrol to ask for the first machine of {nodes}", hint=hint) from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"scontrol cannot be asked for the first machine of {nodes}: {error}", hint=hint) from None
        name = answer.stdout.partition("\n")[0].strip() if answer.returncode == 0 else ""
        reason = answer.stderr.strip().partition("\n")[0] or "no answer"
    if not name:
        raise UserError(f"Slurm does not say which machine is the first of {nodes!r}: {reason}", hint=hint)
    return name
