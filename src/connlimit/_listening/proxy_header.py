"""
Endpoints behind a load balancer: a connection begins when its PROXY header has come.

In Twisted's own ``haproxy:`` endpoint the factory is asked for a protocol before that, and is given the
balancer's address; a limiter would take all clients for one peer.

Until then a connection is known here alone. It has ten seconds from its beginning, however much of the header
comes in the meantime, and all of them have a share of the descriptors. Beyond that share, the one that has
waited longest for the rest of its header is closed: a balancer sends headers at once, so that is another.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import attrs
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IListeningPort,
    IProtocolFactory,
    IStreamServerEndpoint,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit._limiter.peers import peer_key
from connlimit._system import descriptors, sockets
from connlimit._system.bounded_log import BoundedLog

#: Seconds within which the header must have come.
HEADER_TIMEOUT = 10.0

_PREFIX = "haproxy:"


def server_from_string(reactor: Any, description: str) -> IStreamServerEndpoint:
    """
    What Twisted's function of that name returns, so that a factory is given the clients' own addresses.
    """
    endpoint: IStreamServerEndpoint = serverFromString(reactor, description)
    if description.lower().startswith(_PREFIX):
        return ProxyHeaderEndpoint(endpoint, reactor)
    return endpoint


@implementer(IStreamServerEndpoint)
@attrs.frozen
class ProxyHeaderEndpoint:
    """
    An endpoint that expects PROXY headers, and asks a factory for a protocol when the header has come.

    :ivar endpoint: one that Twisted's ``haproxy:`` or ``proxyEndpoint`` has made.
    :ivar clock: times those whose header does not come.
    """

    endpoint: IStreamServerEndpoint
    clock: Any

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[IListeningPort]:
        """
        Listen on the endpoint.
        """
        return self.endpoint.listen(_HeaderFactory(protocolFactory, self.clock))


def awaited() -> int:
    """
    How many connections there are in this process whose header has not come yet.
    """
    return len(_awaited.all)


class _HeaderFactory(Factory):
    """
    Stands for another factory until the header has come.
    """

    noisy = False

    def __init__(self, wrappedFactory: IProtocolFactory, clock: Any) -> None:
        self.wrappedFactory = wrappedFactory
        self.clock = clock
        self.log = BoundedLog(Logger(namespace="connlimit.listening"), clock)

    def buildProtocol(self, addr: IAddress | None) -> Any:
        return _AwaitHeader(self)

    def logPrefix(self) -> str:
        return getattr(self.wrappedFactory, "logPrefix", self.wrappedFactory.__class__.__name__.__str__)()

    def doStart(self) -> None:
        self.wrappedFactory.doStart()

    def doStop(self) -> None:
        self.wrappedFactory.doStop()


class _AwaitHeader(Protocol):
    """
    Waits for the header, and lets the real protocol replace it.
    """

    factory: _HeaderFactory
    # Any: Twisted's wrapper that reads the header, for which there is no public name.
    transport: Any

    def __init__(self, factory: _HeaderFactory) -> None:
        self.factory = factory
        self._log = factory.log
        self._timer: IDelayedCall | None = None
        self._has_come = False

    def connectionMade(self) -> None:
        # Nothing tells when a header is followed by nothing, so each delivery is followed by an empty one,
        # which reaches us when there is no header to wait for any more.
        self._read_header = self.transport.dataReceived
        self.transport.dataReceived = self._deliver
        if not _awaited.add(self, _balancer(self.transport.getPeer())):
            self._log.info(
                "{peer} is closed: too many are sending PROXY headers already", peer=self.transport.getPeer()
            )
            self._close()
            return
        self._timer = self.factory.clock.callLater(HEADER_TIMEOUT, self._give_up)

    def _deliver(self, data: bytes) -> None:
        transport = self.transport
        try:
            self._read_header(data)
            if not self._has_come and not transport.disconnecting:
                self._read_header(b"")
        except Exception:
            if self._has_come:
                raise
            # Twisted's parser does not expect everything that a client can send.
            transport.loseConnection()
        if not self._has_come and transport.disconnecting:
            self._over()
            self._log.info("{peer} is closed: what it sent is not a PROXY header", peer=transport.getPeer())

    def dataReceived(self, data: bytes) -> None:
        transport = self.transport
        if not _is_address(transport.getPeer()):
            transport.loseConnection()
            return
        self._has_come = True
        self._over()
        del transport.dataReceived
        protocol = self.factory.wrappedFactory.buildProtocol(transport.getPeer())
        if protocol is None:
            transport.loseConnection()
            return
        transport.wrappedProtocol = protocol
        protocol.makeConnection(transport)
        if data:
            transport.wrappedProtocol.dataReceived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._over()

    def has_unread(self) -> bool:
        """
        Whether something has come that is not read yet.
        """
        sock = sockets.socket_of(self.transport)
        return sock is not None and sockets.unread(sock.fileno())

    def make_room(self) -> None:
        """
        End, since the header has not come and others need the descriptor.
        """
        self._log.info(
            "{peer} is closed: its PROXY header has not come, and others need its descriptor",
            peer=self.transport.getPeer(),
        )
        self._close()

    def _give_up(self) -> None:
        self._timer = None
        self._log.info("{peer} is closed: its PROXY header did not come", peer=self.transport.getPeer())
        self._close()

    def _close(self) -> None:
        # At once: a port accepts many in one turn of the reactor.
        self._over()
        if not sockets.end_at_once(self.transport):
            self.transport.abortConnection()

    def _over(self) -> None:
        """
        Nothing is waited for any more.
        """
        _awaited.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Awaited:
    """
    The connections of this process whose header has not come yet, in the order in which they came.

    :ivar all: all of them, and of which balancer each is.
    """

    def __init__(self) -> None:
        self.all: dict[_AwaitHeader, Any] = {}
        self._of: dict[Any, dict[_AwaitHeader, None]] = {}

    def add(self, connection: _AwaitHeader, balancer: Any) -> bool:
        """
        Let a new connection wait for its header; if need be, another is closed for it.

        :return: whether it may.
        """
        sock = sockets.socket_of(connection.transport)
        if sock is not None and sock.fileno() >= descriptors.told_from:
            descriptors.saw(sock.fileno())
        if not descriptors.HEADERS.has_room() and not self._make_room(balancer):
            return False
        self.all[connection] = balancer
        self._of.setdefault(balancer, {})[connection] = None
        descriptors.HEADERS.taken += 1
        return True

    def discard(self, connection: _AwaitHeader) -> None:
        """
        A connection does not wait any more.
        """
        if connection in self.all:
            balancer = self.all.pop(connection)
            of = self._of[balancer]
            del of[connection]
            if not of:
                del self._of[balancer]
            descriptors.HEADERS.taken -= 1

    def _make_room(self, balancer: Any) -> bool:
        """
        Let the oldest make room, or the two oldest if there are too many: of the same balancer, if half of
        them are its own.

        Many can be accepted before the first of them is read. So whatever has come is read first, as long as
        there are descriptors for those who wait, too.
        """
        for _ in range(2):
            own = self._of.get(balancer, {})
            oldest = next(iter(own if 2 * len(own) >= len(self.all) else self.all), None)
            if oldest is None or oldest.has_unread():
                return descriptors.left_for_waiting()
            oldest.make_room()
            if descriptors.HEADERS.has_room():
                break
        return True


_awaited = _Awaited()

_balancer = peer_key((32, 64))


def _is_address(address: Any) -> bool:
    """
    Whether an address that a header names is one: Twisted takes any words for it.
    """
    if not isinstance(address, (IPv4Address, IPv6Address)):
        return True
    try:
        ip_address(address.host)
    except ValueError:
        return False
    return 0 <= address.port <= 65535
