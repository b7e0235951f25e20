"""Network interfaces: the one of this machine alone, and the one on which several machines meet."""

import contextlib
import ctypes
import ipaddress
import re
import socket
import sys
from collections.abc import Iterator

from lighthouse_core.errors import UserError

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
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
    """The address of this machine that others know as `host`. Of several, one that other machines reach.

    Raises:
        UserError: it is none of this machine, or other machines cannot reach it.
    """
    hint = "HOST is the address, or its name, of the network interface of machine 0 that the others reach"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise UserError(f"--rdzv-endpoint: this machine knows no {host}", hint=hint) from None
    own = []
    for family, _, _, _, place in found:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((place[0], 0, *place[2:]))
            own.append((family, str(place[0])))
    if not own:
        raise UserError(f"--rdzv-endpoint: {host} is no address of this machine, which is machine 0", hint=hint)
    if any(_parsed(address).is_unspecified for _, address in own):
        raise UserError(f"--rdzv-endpoint: {host} is every network interface, and no address of one", hint=hint)
    # The first one of the farthest reach: /etc/hosts may have a loopback address before the one that others know.
    family, address = min(own, key=lambda one: (_parsed(one[1]).is_loopback, _parsed(one[1]).is_link_local))
    if _parsed(address).is_loopback and host not in (address, "localhost"):
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
    """Name of the interface through which this machine reaches a host; None where that cannot be told.

    Of a host with several addresses, the first one that leads out of this machine.
    """
    found = []
    with contextlib.suppress(OSError, UnicodeError):
        for family, _, _, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target[0], _PORT, *target[2:]))
                found.append(interface_of(probe.getsockname()[0]))
    names = [name for name in found if name is not None]
    return min(names, key=lambda name: name == loopback(), default=None)


def interface_of(address: str) -> str | None:
    """Name of the interface that has an address of this machine; None where none has it that others could reach.

    The loopback interface has other addresses than its own on some clusters. Collectives that listen there would take
    the interface's first address, which no other machine reaches.
    """
    wanted = _parsed(address)
    if wanted.is_loopback:
        return loopback()
    return next((name for name, own in _addresses() if own == wanted and name != loopback()), None)


def _parsed(address: str) -> _Address:
    """An address without the interface that one of IPv6 may name."""
    return ipaddress.ip_address(address.partition("%")[0])


class _Entry(ctypes.Structure):
    """struct ifaddrs of Linux's getifaddrs(3)."""

    _fields_ = (
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("flags", ctypes.c_uint),
        ("address", ctypes.c_void_p),
    )


def _addresses() -> Iterator[tuple[str, _Address]]:
    """Every interface of this machine with each of its addresses, secondary ones too; nothing but on Linux."""
    if sys.platform != "linux":
        return
    # Of a struct sockaddr: where the address begins, and its length.
    places: dict[int, tuple[int, int]] = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}
    library = ctypes.CDLL(None)
    first = ctypes.c_void_p()
    if library.getifaddrs(ctypes.byref(first)):
        return
    try:
        at = first.value
        while at:
            entry = _Entry.from_address(at)
            place = entry.address
            family = ctypes.c_ushort.from_address(place).value if place else 0
            start, length = places.get(family, (0, 0))
            if length:
                yield entry.name.decode(), ipaddress.ip_address(ctypes.string_at(place + start, length))
            at = entry.next
    finally:
        library.freeifaddrs(first)
