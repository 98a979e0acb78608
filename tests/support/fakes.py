"""
Connections without sockets, for every order of events: a transport that behaves as a TCP one, and its client.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IPushProducer, ITransport
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer


@implementer(ITransport, IPushProducer)
class FakeConnection:
    """
    A connection as its client sees it, and as the transport that the server sees.

    As on a real socket, what the client sends or does while the transport is paused stays in the kernel:
    it shows when reading resumes. What the server does to the connection takes effect in the next turn
    of the clock or, if *at_once*, before the call returns.

    :ivar received: what the server sent.
    :ivar lost: why the server was told that it is over; None before.
    :ivar closed: whether the socket is gone.
    """

    def __init__(
        self, clock: Clock, *, at_once: bool = False, number: int = 0, host: str = "127.0.0.1"
    ) -> None:
        self.clock = clock
        self.at_once = at_once
        self.address = IPv4Address("TCP", host, 10000 + number)
        self.protocol: IProtocol | None = None
        self.received = b""
        self.closed = False
        self.lost: Failure | None = None
        self.reading = True
        self.disconnecting = False
        self._incoming: list[bytes] = []
        self._end: Exception | None = None

    # The client

    def connect(self, factory: IProtocolFactory) -> FakeConnection:
        """
        Do what a port does with a connection that it has accepted.
        """
        self.protocol = factory.buildProtocol(self.address)
        if self.protocol is None:
            self.closed = True
            return self
        self.protocol.makeConnection(self)
        return self

    def send(self, data: bytes) -> None:
        """
        The client sends.
        """
        self._incoming.append(data)
        self._turn(self._deliver)

    def close(self) -> None:
        """
        The client closes.
        """
        self._end = ConnectionDone()
        self._turn(self._deliver)

    def reset(self) -> None:
        """
        The client resets the connection: what it has sent is gone as well.
        """
        self._incoming.clear()
        self._end = ConnectionLost()
        self._turn(self._deliver)

    def deliver_although_paused(self, data: bytes) -> None:
        """
        Do what TLS and IOCP do with what they had read before they were paused.
        """
        self.protocol.dataReceived(data)

    @property
    def has_ended(self) -> bool:
        """
        Whether the client has closed or reset the connection.
        """
        return self._end is not None

    @property
    def sends(self) -> bool:
        """
        Whether something that the client sent is still in the kernel.
        """
        return bool(self._incoming)

    # The kernel

    def _turn(self, event: Callable[[], None]) -> None:
        self.clock.callLater(0, event)

    def _deliver(self) -> None:
        while self.reading and not self.closed and not self.disconnecting and self._incoming:
            try:
                self.protocol.dataReceived(self._incoming.pop(0))
            except ApplicationError as error:
                self._lose(error)
        if self.reading and not self.closed and not self.disconnecting and self._end is not None:
            self._lose(self._end)

    def _lose(self, error: Exception) -> None:
        if self.closed:
            return
        self.closed = True
        self.lost = Failure(error)
        with suppress(ApplicationError):  # the reactor logs it, and goes on
            self.protocol.connectionLost(self.lost)

    # The transport

    def write(self, data: bytes) -> None:
        if not self.closed:
            self.received += data

    def writeSequence(self, data: list[bytes]) -> None:
        self.write(b"".join(data))

    def loseConnection(self) -> None:
        if not self.disconnecting and not self.closed:
            self.disconnecting = True
            self._finish(ConnectionDone())

    def abortConnection(self) -> None:
        if not self.closed:
            self.disconnecting = True
            self._finish(ConnectionAborted())

    def _finish(self, error: Exception) -> None:
        if self.at_once:
            self._lose(error)
        else:
            self._turn(lambda: self._lose(error))

    def pauseProducing(self) -> None:
        self.reading = False

    def resumeProducing(self) -> None:
        if not self.disconnecting and not self.closed:
            self.reading = True
            if self.sends or self.has_ended:
                self._turn(self._deliver)

    def stopProducing(self) -> None:
        self.loseConnection()

    def registerProducer(self, producer: object, streaming: bool) -> None:
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def getPeer(self) -> IPv4Address:
        return self.address

    def getHost(self) -> IPv4Address:
        return IPv4Address("TCP", "127.0.0.1", 80)


class ApplicationError(Exception):
    """
    What a failing server raises.
    """


class RecordingProtocol(Protocol):
    """
    An echo server that tells its factory what happens to it.
    """

    factory: RecordingFactory

    def connectionMade(self) -> None:
        self.factory.live.append(self)
        self.factory.events.append("made")
        self.factory.most_live = max(self.factory.most_live, len(self.factory.live))

    def dataReceived(self, data: bytes) -> None:
        self.factory.events.append(data)
        self.transport.write(data)

    def connectionLost(self, reason: Failure) -> None:
        self.factory.live.remove(self)
        self.factory.events.append("lost")


class RecordingFactory(Factory):
    """
    Builds echo servers and records their events.

    :ivar live: the protocols between connectionMade and connectionLost.
    :ivar most_live: how many there were at the most.
    :ivar events: what happened to them, in order.
    """

    noisy = False
    protocol = RecordingProtocol

    def __init__(self) -> None:
        self.live: list[RecordingProtocol] = []
        self.most_live = 0
        self.events: list[str | bytes] = []
        self.addresses: list[IPv4Address] = []

    def buildProtocol(self, addr: IPv4Address) -> Protocol | None:
        self.addresses.append(addr)
        return super().buildProtocol(addr)
