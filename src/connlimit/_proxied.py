"""
Endpoints behind a load balancer: a connection begins when its PROXY header has told whose it is.

In Twisted's own ``haproxy:`` endpoint the factory is asked for a protocol before that, and is given the
balancer's address; a limiter would take all clients for one peer.
"""

from __future__ import annotations

from typing import Any

import attrs
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

#: Seconds within which the header must have come.
HEADER_TIMEOUT = 10.0

_PREFIX = "haproxy:"


def server_from_string(reactor: Any, description: str) -> IStreamServerEndpoint:
    """
    What Twisted's function of that name returns, so that a factory is given the clients' own addresses.
    """
    endpoint: IStreamServerEndpoint = serverFromString(reactor, description)
    if description.lower().startswith(_PREFIX):
        return AfterHeader(endpoint, reactor)
    return endpoint


@implementer(IStreamServerEndpoint)
@attrs.frozen
class AfterHeader:
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
        return self.endpoint.listen(_AfterHeaderFactory(protocolFactory, self.clock))


class _AfterHeaderFactory(Factory):
    """
    Stands for another factory until the header has come.
    """

    noisy = False

    def __init__(self, wrappedFactory: IProtocolFactory, clock: Any) -> None:
        self.wrappedFactory = wrappedFactory
        self.clock = clock

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
    Waits for the header, and lets the real protocol take its place.
    """

    _log = Logger()
    factory: _AfterHeaderFactory
    # Any: Twisted's wrapper that reads the header, for which there is no public name.
    transport: Any

    def __init__(self, factory: _AfterHeaderFactory) -> None:
        self.factory = factory
        self._timer: IDelayedCall | None = None

    def connectionMade(self) -> None:
        self._timer = self.factory.clock.callLater(HEADER_TIMEOUT, self._give_up)
        # A header that is followed by nothing is not told of, so each delivery is followed by an empty one,
        # which reaches us when there is no header to wait for any more.
        self._read_header = self.transport.dataReceived
        self.transport.dataReceived = self._deliver

    def _deliver(self, data: bytes) -> None:
        transport = self.transport
        self._read_header(data)
        if transport.wrappedProtocol is self and not transport.disconnecting:
            self._read_header(b"")

    def dataReceived(self, data: bytes) -> None:
        transport = self.transport
        self._stop_timer()
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
        self._stop_timer()

    def _give_up(self) -> None:
        self._timer = None
        self._log.info("{peer} is closed: its PROXY header did not come", peer=self.transport.getPeer())
        self.transport.abortConnection()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
