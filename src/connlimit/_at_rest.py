"""
Whether a connection is between two requests, so that to close it cuts nothing.
"""

from __future__ import annotations

import sys
from typing import Any

from connlimit import _sockets


def is_at_rest(protocol: Any, transport: Any, quiet: float | None) -> bool:
    """
    Whether a connection is at rest: one of HTTP if it has no request, any other if no byte has moved for a
    while, nothing is on its way, and it was not the client who spoke last.

    :param quiet: how many seconds that while is; None if only protocols are asked.
    """
    sock = _sockets.socket_of(transport)
    if sock is not None and _sockets.unread(sock.fileno()):
        return False
    has_request = _has_request(protocol)
    if has_request is not None:
        return not has_request
    return quiet is not None and _sockets.is_at_rest(transport, quiet)


def _has_request(protocol: Any) -> bool | None:
    """
    Whether a connection of HTTP has a request that is being received or answered; None if it is none of HTTP.
    """
    http = sys.modules.get("twisted.web.http")
    if http is None:  # then nothing can be of it
        return None
    while protocol is not None:
        if isinstance(protocol, http.HTTPChannel):
            return bool(protocol.requests or protocol._buffer)
        if type(protocol).__module__ == "twisted.web._http2":
            return bool(getattr(protocol, "streams", True))
        inner = vars(protocol).get("_channel") if hasattr(protocol, "__dict__") else None
        protocol = inner if inner is not None else getattr(protocol, "wrappedProtocol", None)
    return None
