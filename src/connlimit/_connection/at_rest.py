"""
Whether a connection is between two requests, so that to close it cuts nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from connlimit._system import sockets


def is_at_rest(protocol: Any, transport: Any, quiet: float | None) -> bool:
    """
    Whether a connection is at rest: one of HTTP if it has no request, any other if no byte has moved for a
    while, nothing is on its way, and it was not the client who spoke last.

    :param quiet: how many seconds that while is; None if only protocols are asked.
    """
    sock = sockets.socket_of(transport)
    if sock is not None and sockets.unread(sock.fileno()):
        return False
    has_request = _has_request(protocol)
    if has_request is not None:
        return not has_request
    return quiet is not None and sockets.is_at_rest(transport, quiet)


def is_producing(protocol: Any, transport: Any) -> bool:
    """
    Whether something is being written to a connection bit by bit, as far as that can be told: closed now, it
    would be cut between two of them.
    """
    has_request = _has_request(protocol)
    if has_request is not None:
        return has_request
    return getattr(sockets.lowest(transport), "producer", None) is not None


def close(protocol: Any, transport: Any) -> None:
    """
    Close a connection in good order. One of HTTP does it by itself: it is a producer as long as it lives, for
    which TLS would wait.
    """
    http = sys.modules.get("twisted.web.http")
    channel = _channel(protocol)
    if http is not None and isinstance(channel, http.HTTPChannel) and not channel.requests:
        channel.loseConnection()
    transport.loseConnection()


def _has_request(protocol: Any) -> bool | None:
    """
    Whether a connection of HTTP has a request that is being received or answered; None if it is none of HTTP.
    """
    http = sys.modules.get("twisted.web.http")
    if http is None:  # then nothing can be of it
        return None
    channel = _channel(protocol)
    if isinstance(channel, http.HTTPChannel):
        return bool(channel.requests or channel._buffer)
    if type(channel).__module__ == "twisted.web._http2":
        return bool(getattr(channel, "streams", True))
    return None


def _channel(protocol: Any) -> Any:
    """
    The innermost protocol: that of HTTP, if it is one.
    """
    while True:
        inner = vars(protocol).get("_channel") if hasattr(protocol, "__dict__") else None
        if inner is None:
            inner = getattr(protocol, "wrappedProtocol", None)
        if inner is None:
            return protocol
        protocol = inner
