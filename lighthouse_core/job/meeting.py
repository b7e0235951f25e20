"""How the processes of a job find each other: through a file on one machine, the launcher of machine 0 on several."""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lighthouse_core.errors import LighthouseError, PatchError
from lighthouse_core.job.environment import MEETING
from lighthouse_core.job.machines import connect
from lighthouse_core.job.network import endpoint


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Within, whoever calls torch.distributed.init_process_group joins the job that the launcher describes.

    By itself torch would have the process of rank 0 listen on every network interface, and obey whoever connects.

    Raises:
        LighthouseError: machine 0 does not answer.
        PatchError: nobody called it: the processes met in another way, or not at all.
    """
    begin = dist.init_process_group
    joined: list[int] = []
    dist.init_process_group = _joined(begin, joined)
    try:
        yield
    finally:
        dist.init_process_group = begin
    if not joined:
        raise PatchError("the processes of the job did not meet where the launcher said")


def _joined(begin: Callable[..., None], joined: list[int]) -> Callable[..., None]:
    def init_process_group(*, timeout: timedelta, **settings: Any) -> None:
        rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _store(os.environ[MEETING], processes, timeout)
        begin(store=store, rank=rank, world_size=processes, timeout=timeout, **settings)
        joined.append(rank)

    return init_process_group


def _store(place: str, processes: int, timeout: timedelta) -> dist.Store:
    if os.path.isabs(place):
        return dist.FileStore(place, processes)
    host, port = endpoint(place)
    try:
        return dist.PrefixStore("processes", connect(host, port, timeout))
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise LighthouseError(f"machine 0 does not answer at {host}, port {port}: {reason}") from None
