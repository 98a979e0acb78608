"""
The PROXY header, version 2, by which a server is told whose connection it gets
(https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt).
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Any

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_LOCAL, _PROXY = 0x20, 0x21
_UNSPEC, _TCP4, _TCP6 = 0x00, 0x11, 0x21


def proxy_header(peer: Any, host: Any) -> bytes:
    """
    The header for a connection between two addresses.

    A client without an IP address, as on a UNIX socket, is announced as a connection of our own (LOCAL): so
    does HAProxy, which takes no other header for it.

    :param peer: the client's address.
    :param host: the address that it has connected to.
    """
    try:
        source, destination = _ip_address(peer), _ip_address(host)
        ports = struct.pack("!HH", peer.port, host.port)
    except (AttributeError, ValueError, struct.error):
        return _header(_LOCAL, _UNSPEC, b"")
    if source.version == destination.version == 4:
        return _header(_PROXY, _TCP4, source.packed + destination.packed + ports)
    return _header(_PROXY, _TCP6, _as_ipv6(source) + _as_ipv6(destination) + ports)


def _header(command: int, family: int, addresses: bytes) -> bytes:
    return _SIGNATURE + struct.pack("!BBH", command, family, len(addresses)) + addresses


def _ip_address(address: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.host.partition("%")[0])


def _as_ipv6(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    mapped = b"" if address.version == 6 else bytes(10) + b"\xff\xff"
    return mapped + address.packed
