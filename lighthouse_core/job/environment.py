"""What a training process is started with: its argv and its environment."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from lighthouse_core.cache import compile_caches
from lighthouse_core.errors import UserError
from lighthouse_core.job import network
from lighthouse_core.job.plan import Plan
from lighthouse_core.python import SAFE_PATH, run_module

# The folder in which the processes of a job tell their launcher of themselves.
JOB_FOLDER = "LIGHTHOUSE_JOB"
# Where the processes of a job meet: a file on one machine, HOST:PORT on several.
MEETING = "LIGHTHOUSE_MEETING"
QUIET = "LIGHTHOUSE_QUIET"
# Where a run leaves a trace of its last step; such a run saves nothing.
TRACE_FOLDER = "LIGHTHOUSE_TRACE"
# Process id of the launcher.
PARENT = "LIGHTHOUSE_PARENT"


def command(run_dir: Path) -> list[str]:
    """argv of a training process."""
    return [*run_module("lighthouse_core.worker"), str(run_dir)]


def environment(plan: Plan, base: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What the environments of all workers share: `base`, and what it leaves open.

    Args:
        plan: the processes.
        base: the launcher's own environment.
        folder: of the job, which no other user of the machine can look into.

    Raises:
        UserError: no interface of this machine is known to lead to the others, and `base` names none.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        # One thread would waste a CPU, and as many as there are cores in every process would wait for each other.
        "OMP_NUM_THREADS": str(max(1, cores // plan.nproc)),
        # Else MKL takes fewer threads when it sees fit, and sums in another order.
        "MKL_DYNAMIC": "FALSE",
        # glibc gives the threads of each save arenas of their own, of which it returns little.
        "MALLOC_ARENA_MAX": "1",
    }
    if "OMP_WAIT_POLICY" not in base:
        # Threads of torch's OpenMP (libgomp) that wait for each other spin before they sleep, by default 30 times as
        # long: on a busy machine they take the cores from those that they wait for.
        defaults["GOMP_SPINCOUNT"] = "10000"
    if "PYTORCH_CUDA_ALLOC_CONF" not in base:
        # The caching allocator's fixed segments leave gaps between a long sequence's large tensors.
        defaults["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    fixed = {
        JOB_FOLDER: str(folder),
        # Some of what libraries leave there has names that other users can guess.
        "TMPDIR": str(folder),
        PARENT: str(os.getpid()),
        **SAFE_PATH,
        # Whoever calls us may have said already what is wrong with the usual place.
        **compile_caches(base)[0],
        "WORLD_SIZE": str(plan.world_size),
        "LOCAL_WORLD_SIZE": str(plan.nproc),
    }
    if plan.nnodes == 1:
        # Whatever the environment says for jobs of several machines: others have nothing to do with this one.
        fixed |= {MEETING: str(folder / "meeting"), **_sockets(network.loopback())}
    else:
        fixed[MEETING], interface = _place(plan)
        if interface is not None:
            defaults |= _sockets(interface)
        elif (open_ := [name for name in _sockets("") if not base.get(name)]) and sys.platform == "linux":
            # By themselves gloo and NCCL take the first interface that they find.
            raise UserError(
                f"no network interface of machine {plan.node_rank} is known to lead to {plan.rdzv_endpoint}",
                hint=f"name the one that the other machines reach, by {' and '.join(open_)} in the environment",
            )
    return {**defaults, **base, **fixed}


def _place(plan: Plan) -> tuple[str, str | None]:
    """Where the processes of this machine meet those of others, and the interface that leads there, if it is known."""
    host, port = network.endpoint(plan.rdzv_endpoint)
    if plan.node_rank:
        return plan.rdzv_endpoint, network.interface_towards(host, port)
    # Where the launcher listens: the name may have other addresses here, too.
    _, address = network.own_address(host, port)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}", network.interface_of(address)


def _sockets(interface: str) -> dict[str, str]:
    """Have torch's collectives listen on one network interface alone."""
    # NCCL takes any interface whose name begins so, unless there is an equals sign.
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


def ranks(plan: Plan) -> list[dict[str, str]]:
    """What the environment of each worker of this machine has for itself."""
    return [{"RANK": str(plan.node_rank * plan.nproc + local), "LOCAL_RANK": str(local)} for local in range(plan.nproc)]
