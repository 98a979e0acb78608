"""
What the kernel knows of a connection's socket, whatever its protocols have heard.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
from typing import Any

if sys.platform != "win32":
    import fcntl
    import termios

from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.interfaces import IHalfCloseableDescriptor, IReadDescriptor, ISSLTransport
from twisted.python.failure import Failure

_DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)  # sockets of the reactor do not block anyway


def can_half_close(transport: object) -> bool:
    """
    Whether one direction can be closed alone. TLS in Twisted cannot: there the end of one is the end of both.
    """
    return IHalfCloseableDescriptor.providedBy(transport) and not ISSLTransport.providedBy(transport)


def abort(transport: Any) -> None:
    """
    End a connection without delay, or as fast as its transport can.
    """
    end = getattr(transport, "abortConnection", None) or transport.loseConnection
    end()


def end_at_once(transport: Any, reason: type[ConnectionAborted | ConnectionDone] = ConnectionAborted) -> bool:
    """
    End a connection so that its descriptor is free when this returns; one that is closed or aborted has it
    until the reactor's next turn at least. What is not written yet is lost.

    Its protocol hears of the end within this call, so none of its methods may run now but `connectionMade`.

    :return: whether its transport can do that; if not, nothing has happened.
    """
    end = lowest(transport)
    if not IReadDescriptor.providedBy(end) or socket_of(end) is None:
        return False
    abort(transport)  # what is in between, such as TLS, must know
    end.connectionLost(Failure(reason()))
    return True


def lowest(transport: Any) -> Any:
    """
    The transport that has the socket: protocols that are transports, such as TLS, have it below them.
    """
    while hasattr(transport, "wrappedProtocol") and transport.transport is not None:
        transport = transport.transport
    return transport


def socket_of(transport: Any) -> socket.socket | None:
    """
    The socket under a transport, if there is one and it is open.
    """
    sock = getattr(lowest(transport), "socket", None)
    return sock if isinstance(sock, socket.socket) and sock.fileno() >= 0 else None


def buffered(transport: Any) -> int:
    """
    How many bytes a transport has still to write.
    """
    transport = lowest(transport)
    waiting = len(getattr(transport, "dataBuffer", b"")) - getattr(transport, "offset", 0)
    return waiting + int(getattr(transport, "_tempDataLen", 0))


def unsent(transport: Any) -> int:
    """
    How many bytes that were written to a transport its peer has not acknowledged, as far as the kernel tells.
    """
    sock = socket_of(transport)
    count = buffered(transport)
    if sock is None or sys.platform == "win32" or not hasattr(termios, "TIOCOUTQ"):
        return count
    try:
        # For sockets it is SIOCOUTQ: tcp(7), unix(7).
        return count + int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return count


def is_dead(transport: Any) -> bool:
    """
    Whether the socket under a transport is closed, or was reset or closed by its peer for good.

    A peer that has closed its direction alone may still be served, so that does not count; nor does a socket
    with both directions closed, as long as the kernel delivers what was written before.
    """
    transport = lowest(transport)
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
    if not events & select.POLLHUP or unread(sock.fileno()):
        return False
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return True
    info = _tcp_info(sock)
    return info is not None and info[_STATE] == _CLOSE


def unread(descriptor: int) -> bool:
    """
    Whether the peer of the socket with this descriptor has sent something that was not read yet.
    """
    if sys.platform == "win32":
        return False
    try:
        count = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    except OSError:
        return False
    return any(count)


def progress(transport: Any) -> tuple[object, ...]:
    """
    Something that differs from what it was before if bytes have moved meanwhile.
    """
    sock = socket_of(transport)
    moved = _tcp_bytes(sock) if sock is not None else None
    return buffered(transport), unsent(transport), moved


def is_at_rest(transport: Any, quiet: float) -> bool:
    """
    Whether no byte has moved for these seconds, all have arrived, and the peer does not wait for an answer,
    since it was told something later than it said anything. False if the kernel does not tell.
    """
    sock = socket_of(transport)
    if sock is None or unsent(transport) or unread(sock.fileno()):
        return False
    info, moved = _tcp_info(sock), _tcp_bytes(sock)
    if info is None or moved is None:
        return False
    sent, received = moved
    if received and not sent:
        return False
    return quiet * 1000 <= info[_LAST_DATA_SENT] <= info[_LAST_DATA_RECEIVED]


# Linux, include/uapi/linux/tcp.h, struct tcp_info: eight bytes, the first of which is the state, and then
# numbers of four bytes each, of which these are some.
_TCP_INFO = struct.Struct("B7x13I")
_STATE, _UNACKED, _LAST_DATA_SENT, _LAST_DATA_RECEIVED = 0, 5, 10, 12
_CLOSE, _CLOSE_WAIT = 7, 8  # include/net/tcp_states.h


def _tcp_info(sock: socket.socket) -> tuple[int, ...] | None:
    if not sys.platform.startswith("linux") or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        return _TCP_INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    except (OSError, struct.error):
        return None


# Further back in the same struct, since Linux 4.1: bytes that the peer has acknowledged, and has sent.
_TCP_BYTES = struct.Struct("120x2Q")


def _tcp_bytes(sock: socket.socket) -> tuple[int, ...] | None:
    if not sys.platform.startswith("linux") or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        return _TCP_BYTES.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_BYTES.size))
    except (OSError, struct.error):
        return None


def idle(transport: Any) -> float | None:
    """
    For how many seconds the connection has moved no byte; None if the kernel does not tell.
    """
    sock = socket_of(transport)
    info = _tcp_info(sock) if sock is not None else None
    return None if info is None else min(info[_LAST_DATA_SENT], info[_LAST_DATA_RECEIVED]) / 1000


def backlog(sock: socket.socket) -> int | None:
    """
    How many connections wait to be accepted on a listening socket; None if the kernel does not tell.
    """
    # For a listening socket "unacked" is the length of its accept queue (net/ipv4/tcp.c, tcp_get_info).
    info = _tcp_info(sock)
    return None if info is None else info[_UNACKED]


def end_of(descriptor: int) -> bool | None:
    """
    Whether the peer of a socket has ended the connection for good (True) or closed its direction (False), as
    far as can be told without reading; None if neither.
    """
    sock = socket.socket(fileno=descriptor)
    try:
        info = _tcp_info(sock)
        if info is not None:
            return {_CLOSE: True, _CLOSE_WAIT: False}.get(info[_STATE])
        return None if sock.recv(1, socket.MSG_PEEK | _DONT_WAIT) else False
    except BlockingIOError:
        return None
    except OSError:
        return True
    finally:
        sock.detach()


def peer_uid(sock: socket.socket) -> int | None:
    """
    The user ID of the process at the other end of a UNIX socket; None if the kernel does not tell.
    """
    try:
        if hasattr(socket, "SO_PEERCRED"):  # Linux, unix(7): pid, uid, gid
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            return int(struct.unpack("3i", credentials)[1])
        # unix(4): struct xucred begins with version, uid
        if sys.platform == "darwin" or "bsd" in sys.platform:
            return int(struct.unpack_from("2I", sock.getsockopt(0, 1, 128))[1])
    except (OSError, struct.error):
        pass
    return None
