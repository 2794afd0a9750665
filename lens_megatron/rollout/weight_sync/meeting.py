"""Where the group of a pipeline stage meets: at its leader's machine, by an address that each server can reach.

Every leader finds its own: one address cannot be that of two machines, the way to one server need not be the way to another,
and 127.0.0.1 is the leader's own machine, where servers that the run started are only if rank 0 is there too.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch.distributed as dist

from lens_megatron.errors import UsageError

_SIOCGIFADDR = 0x8915  # of Linux: an interface's IPv4 address
_LONGEST_INTERFACE = 15


@dataclass(frozen=True)
class Place:
    """Of a rank."""

    host: str
    interface: str | None  # its address on the interface that rollout.sync.address names, if it does
    knows: bool = True  # else that is neither an interface here nor a name or address


def agree_on_places(configured: str | None) -> list[Place]:
    """Of all ranks, on every rank."""
    address = interface_address(configured) if configured else None
    mine = Place(socket.gethostname(), address, configured is None or address is not None or _resolves(configured))
    places = [mine] * dist.get_world_size()
    dist.all_gather_object(places, mine)
    return places


def refuse_what_cannot_meet(leaders: Sequence[Place], configured: str | None, urls: Sequence[str]) -> None:
    """UsageError for leaders on several machines that the servers would look for in the wrong place. Rank 0 leads first."""
    if not leaders[0].knows:
        raise UsageError(
            f"rollout.sync.address {configured}: neither a network interface of {leaders[0].host} nor an address or name"
        )
    elsewhere = [leader.host for leader in leaders if leader.host != leaders[0].host]
    if not elsewhere:
        return
    if configured is None:
        for url in urls:
            if _is_loopback(url):
                raise UsageError(
                    f"rollout.sync: the server at {url} would look for {elsewhere[0]}, which leads a pipeline stage, on "
                    f"{leaders[0].host}: set rollout.sync.address to a network interface (eth0), or "
                    "rollout.sync.transport: disk"
                )
    elif without := [leader.host for leader in leaders if leader.interface is None]:
        raise UsageError(
            f"rollout.sync.address: pipeline stages are led from {leaders[0].host} and {elsewhere[0]}, and {without[0]} has no "
            f"network interface {configured}: name one that each of them has, or leave it out"
        )


def own_address(place: Place, configured: str | None, url: str) -> str:
    """This machine's, for the server at `url`."""
    if configured is not None:
        return place.interface or configured
    return address_towards(url)


def address_towards(url: str) -> str:
    """This machine's address as the server at `url` can reach it."""
    parts = urlsplit(url)
    if _is_loopback(url):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing: only picks the route
        return str(probe.getsockname()[0])


def interface_address(name: str) -> str | None:
    """Of this machine's interface of that name, if it has one."""
    if len(name.encode()) > _LONGEST_INTERFACE:
        return None
    request = struct.pack("256s", name.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or "localhost"
    return host in ("localhost", "::1") or host.startswith("127.")
