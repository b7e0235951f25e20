"""Network interfaces: the one of this machine alone, and the one on which several machines meet."""

import contextlib
import fcntl
import ipaddress
import re
import socket
import struct
import sys
from pathlib import Path

from lighthouse_core.errors import UserError

_SIOCGIFADDR = 0x8915
# Any: a datagram socket that is connected has sent nothing yet.
_PORT = 9


def loopback() -> str:
    """Name of the interface that only processes of this machine reach."""
    names = (name for _, name in socket.if_nameindex())
    return next((name for name in names if re.fullmatch(r"lo\d*", name)), "lo")


def endpoint(text: str) -> tuple[str, int]:
    """The parts of HOST:PORT; the host of an IPv6 address without its brackets.

    Raises:
        UserError: it is not of that form.
    """
    match = re.fullmatch(r"\[?(\S+?)\]?:([0-9]{1,5})", text)
    if not match or not 0 < int(match[2]) < 65536:
        raise UserError(
            "several machines need --rdzv-endpoint HOST:PORT, with a port from 1 to 65535",
            hint="HOST is the machine of --node-rank 0",
        )
    return match[1], int(match[2])


def own_address(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """The address of this machine that others know as `host`.

    Raises:
        UserError: it is none of this machine, or other machines cannot reach it.
    """
    hint = "HOST is the address, or its name, of the network interface of machine 0 that the others reach"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UserError(f"--rdzv-endpoint: this machine knows no {host}", hint=hint) from None
    for family, _, _, _, place in found:
        address = str(place[0])
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            break
    else:
        raise UserError(f"--rdzv-endpoint: {host} is no address of this machine, which is machine 0", hint=hint)
    if ipaddress.ip_address(address.partition("%")[0]).is_unspecified:
        raise UserError(f"--rdzv-endpoint: {host} is every network interface, and no address of one", hint=hint)
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback and host not in (address, "localhost"):
        raise UserError(f"--rdzv-endpoint: {host} is {address} here, which other machines cannot reach", hint=hint)
    return family, address


def listen(host: str, port: int, waiting: int) -> socket.socket:
    """A socket of machine 0 that listens at an endpoint, on that address alone.

    Args:
        host, port: the endpoint.
        waiting: how many may wait there to be let in.

    Raises:
        UserError: it is none of this machine, or another process listens there.
    """
    family, address = own_address(host, port)
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address, port))
        listening.listen(waiting)
    except OSError as error:
        listening.close()
        raise UserError(
            f"--rdzv-endpoint: cannot listen at {host}, port {port}: {error.strerror}", hint="choose another port"
        ) from None
    return listening


def interface_towards(host: str, port: int) -> str | None:
    """Name of the interface through which this machine reaches a host; None where that cannot be told."""
    with contextlib.suppress(OSError, UnicodeError):
        for family, _, _, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target[0], _PORT, *target[2:]))
                return _interface(family, probe.getsockname()[0])
    return None


def _interface(family: socket.AddressFamily, address: str) -> str | None:
    """Name of the interface that has an address."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.is_loopback:
        return loopback()
    if family == socket.AF_INET6:
        with contextlib.suppress(OSError):
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                digits, *_, name = line.split()
                if int(digits, 16) == int(wanted):
                    return name
        return None
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if answer[20:24] == wanted.packed:
                    return name
    return None
