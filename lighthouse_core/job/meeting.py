"""How the processes of a job find each other: through a file on one machine, at a port of machine 0 on several."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lighthouse_core.errors import LighthouseError, PatchError, UserError
from lighthouse_core.job.environment import MEETING
from lighthouse_core.job.network import endpoint, own_address


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Within, whoever calls torch.distributed.init_process_group joins the job that the launcher describes.

    By itself torch would have the process of rank 0 listen on every network interface, and obey whoever connects.

    Raises:
        UserError: machine 0 cannot listen where it is to.
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
        store = _store(os.environ[MEETING], rank, processes, timeout)
        begin(store=store, rank=rank, world_size=processes, timeout=timeout, **settings)
        joined.append(rank)

    return init_process_group


def _store(place: str, rank: int, processes: int, timeout: timedelta) -> dist.Store:
    if os.path.isabs(place):
        return dist.FileStore(place, processes)
    host, port = endpoint(place)
    if rank == 0:
        family, address = own_address(host, port)
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address, port))
        except OSError as error:
            raise UserError(f"--rdzv-endpoint: cannot listen at {host}, port {port}: {error.strerror}") from None
        listening.listen(2 * processes)
        # torch closes it.
        return dist.TCPStore(
            address, port, processes, is_master=True, timeout=timeout, master_listen_fd=listening.detach()
        )
    try:
        return dist.TCPStore(host, port, processes, timeout=timeout)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise LighthouseError(f"machine 0 does not answer at {host}, port {port}: {reason}") from None
