"""
What a refused request is answered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from connlimit.interfaces import DESCRIPTORS, DRAINING, FULL, PEER, TIMEOUT

#: What each reason is called.
WORDS: Mapping[str, str] = {
    FULL: "Too many requests, try again later",
    TIMEOUT: "Too busy, try again later",
    PEER: "Too many requests from your address",
    DESCRIPTORS: "Too many requests, try again later",
    DRAINING: "Shutting down, try again later",
}

#: The reasons for which a connection that could live on is not kept.
_LAST = {DESCRIPTORS, DRAINING}


def refuse(request: Any, reason: str, retry_after: float) -> None:
    """
    Answer a request by a 503. In HTTP/1.1 its connection is kept, unless the server is being stopped.

    What an application does when it writes is passed over: it has not begun.

    :param retry_after: seconds after which the client should try again.
    """
    from twisted.web import http

    body = f"{WORDS[reason]}.\n".encode()
    request.setResponseCode(http.SERVICE_UNAVAILABLE)
    headers = {
        b"Date": http.datetimeToString(),
        b"Content-Type": b"text/plain",
        b"Content-Length": b"%d" % len(body),
        b"Retry-After": b"%d" % math.ceil(retry_after),
    }
    if reason in _LAST and request.clientproto == b"HTTP/1.1":
        headers[b"Connection"] = b"close"
        request.channel.persistent = False
    for name, value in headers.items():
        request.responseHeaders.setRawHeaders(name, [value])
    http.Request.write(request, body)
    http.Request.finish(request)
