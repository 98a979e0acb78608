"""
What the kernel knows of a connection's socket, whatever its protocols have heard.
"""

from __future__ import annotations

import select
import socket
from typing import Any


def is_dead(transport: Any) -> bool:
    """
    Whether the socket under a transport is closed, or was reset or closed by its peer for good.

    A peer that has closed its direction alone may still be served, so that does not count.
    """
    # Protocols that are transports, such as TLS, have the socket's own transport below them.
    while hasattr(transport, "wrappedProtocol") and transport.transport is not None:
        transport = transport.transport
    sock = getattr(transport, "socket", None)
    if sock is None:
        # Twisted's transports delete theirs when they are lost.
        return getattr(transport, "connected", 1) == 0 and getattr(transport, "disconnected", 0) == 1
    if not isinstance(sock, socket.socket):
        return False
    if sock.fileno() < 0:
        return True
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sock, 0)
    events = sum(event for _, event in poll.poll(0))
    if events & (select.POLLERR | select.POLLNVAL):
        return True
    return bool(events & select.POLLHUP) and not _has_unread(sock)


def _has_unread(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False
