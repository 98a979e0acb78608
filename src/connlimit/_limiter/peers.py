"""
Peers: what counts as one client, and which of them are exempt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from functools import lru_cache
from heapq import nlargest
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, TypeVar

import attrs
from twisted.internet.address import UNIXAddress
from twisted.internet.interfaces import IAddress

from connlimit.interfaces import IOccupant
from connlimit.limits import Key

Network = IPv4Network | IPv6Network
T = TypeVar("T")

#: How many connections are looked at in one step.
_STEP = 200


class UNIXPeer(UNIXAddress):
    """
    The address of a client on a UNIX socket, with the user ID that its process has.
    """

    def __init__(self, name: bytes | None, uid: int | None) -> None:
        super().__init__(name)
        self.uid = uid

    def __eq__(self, other: object) -> bool:
        # To code that knows of no users it is the address that it would be without us.
        if isinstance(other, UNIXPeer) and self.uid != other.uid:
            return False
        return bool(UNIXAddress(self.name) == other)

    __hash__ = UNIXAddress.__hash__


def prefix_lengths(value: Sequence[int]) -> tuple[int, int]:
    """
    The prefix lengths of IPv4 and IPv6.

    :raises TypeError: if these are not two whole numbers.
    :raises ValueError: if one is out of range.
    """
    ipv4, ipv6 = value
    if type(ipv4) is not int or type(ipv6) is not int:
        raise TypeError
    if not (0 <= ipv4 <= 32 and 0 <= ipv6 <= 128):
        raise ValueError
    return ipv4, ipv6


def peer_key(prefix: tuple[int, int]) -> Callable[[IAddress], Hashable]:
    """
    The function that gives the peer of an address: a network of IPv4 or IPv6, as text, or whatever else tells
    clients apart; None if nothing does, as on UNIX sockets.
    """

    @lru_cache(maxsize=4096)
    def network(host: str) -> str:
        try:
            address = _address(host)
        except ValueError:
            return host
        length = prefix[0] if address.version == 4 else prefix[1]
        if length == address.max_prefixlen:
            return str(address)
        return str(ip_network((address, length), strict=False))

    whole = prefix[0] == 32

    def peer(address: IAddress) -> Hashable:
        host = getattr(address, "host", None)
        if host is not None:
            # An IPv4 address alone is written in one way only, so nothing has to be found out.
            return host if whole and ":" not in host else network(host)
        return address.key if isinstance(address, Key) else getattr(address, "uid", None)

    return peer


def busiest(
    peer: Callable[[IAddress], Hashable],
    active: Sequence[IAddress],
    waiting: Sequence[IOccupant],
    count: int,
) -> Generator[None, None, list[tuple[Hashable, int, int]]]:
    """
    Find the peers with the most connections, a step at a time; return each with how many are active and wait.

    :param peer: tells the peer of an address.
    :param active: the addresses of those that are active.
    """
    served: Counter[Hashable] = Counter()
    waits: Counter[Hashable] = Counter()
    for start in range(0, len(active), _STEP):
        served.update(map(peer, active[start : start + _STEP]))
        yield
    for start in range(0, len(waiting), _STEP):
        waits.update(peer(each.address) for each in waiting[start : start + _STEP])
        yield
    peers = list(served.keys() | waits.keys())
    busiest: list[Hashable] = []
    for start in range(0, len(peers), _STEP):
        busiest = nlargest(
            count, busiest + peers[start : start + _STEP], key=lambda each: served[each] + waits[each]
        )
        yield
    return [(each, served[each], waits[each]) for each in busiest]


def exhausted(generator: Generator[Any, Any, T]) -> T:
    """
    What a generator returns.
    """
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _address(host: str) -> Any:
    """
    The IP address; of an IPv4-mapped IPv6 address, the IPv4 one (RFC 4291, 2.5.5.2).
    """
    address = ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


@attrs.frozen(repr=False)
class Networks:
    """
    Says whether an address is in one of these networks.
    """

    networks: tuple[Network, ...]

    def __repr__(self) -> str:
        return ",".join(map(str, self.networks))

    def __call__(self, address: IAddress) -> bool:
        host = getattr(address, "host", None)
        if host is None:
            return False
        try:
            ip = _address(host)
        except ValueError:
            return False
        return any(ip in network for network in self.networks)


def exempt_or_none(value: Iterable[str] | Callable[[IAddress], bool] | None) -> Any:
    """
    What says whether an address is exempt; None if none is.

    :param value: networks, or a callable.
    :raises TypeError: if it is neither.
    :raises ValueError: if one is no network.
    """
    if callable(value):
        return value
    if isinstance(value, str):
        raise TypeError
    given = tuple(value or ())
    if not all(isinstance(each, (str, IPv4Network, IPv6Network)) for each in given):
        raise TypeError  # a number would be an address
    networks = tuple(map(ip_network, given))
    return Networks(networks) if networks else None
