"""
A relay: what a client sends goes to another server, and what that answers comes back.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import (
    IAddress,
    IHalfCloseableProtocol,
    IStreamClientEndpoint,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit._descriptors import counted
from connlimit._sockets import can_half_close
from connlimit._splice import can_splice, splice


class RelayFactory(Factory):
    """
    Relays each of its connections to a backend, over a connection of its own.

    :ivar backend: how the backend is reached.
    :ivar name: what the backend is called in the log.
    :ivar opens_descriptors: how many descriptors are opened for a connection, besides its own.
    """

    noisy = False
    opens_descriptors = 1

    def __init__(self, backend: IStreamClientEndpoint, name: str) -> None:
        self.backend = counted(backend)
        self.name = name

    def buildProtocol(self, addr: IAddress | None) -> _ClientEnd:
        """
        The client's end of a relay. It connects to the backend once it is connected itself.
        """
        return _ClientEnd(self)

    def logPrefix(self) -> str:
        """
        What the log calls the port.
        """
        return f"relay to {self.name}"


@implementer(IHalfCloseableProtocol)
class _End(Protocol):
    """
    One end of a relay.

    Each end's transport is the producer of the other's: a reader who stops reading stops the writer,
    and no more is held in between than a transport's buffer.

    Between plain sockets the kernel moves the bytes. What it can't move then, for the moment or because it is
    an end and no bytes, goes the ordinary way: read by the transport, received here, written to the other.

    :ivar other: the other end; None unless both are connected.
    :ivar said_all: whether the peer on this side has closed its direction.
    """

    # Any: besides ITransport, each is a consumer, a producer and, mostly, a half-closeable descriptor.
    transport: Any
    other: _End | None = None
    said_all = False

    def join(self, other: _End) -> None:
        """
        Send all that comes from the peer on this side to the other side from now on.
        """
        self.other = other
        self.transport.registerProducer(other.transport, True)
        if can_splice(self.transport, other.transport):
            # The reactor calls this for each event: the transport's own is called from there when needed.
            self.transport.doRead = self._do_read

    def _do_read(self) -> Any:
        """
        Be the ``doRead`` of our transport.
        """
        other = self.other
        if other is not None and splice(self.transport, other.transport):
            return None
        return type(self.transport).doRead(self.transport)

    def dataReceived(self, data: bytes) -> None:
        if self.other is not None:
            self.other.transport.write(data)

    def readConnectionLost(self) -> None:
        """
        The peer on this side has said all it had to say: say so to the other side, and go on the other way.
        """
        self.said_all = True
        other = self.other
        if other is None:
            self.transport.loseConnection()
            return
        other.transport.unregisterProducer()
        if other.said_all:
            other.transport.loseConnection()
            self.transport.loseConnection()
        elif can_half_close(other.transport):
            other.transport.loseWriteConnection()
        else:
            other.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        """
        The peer on this side has got all that the other side said.
        """

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.transport.__dict__.pop("doRead", None)  # nobody must hold the other any more
        other, self.other = self.other, None
        if other is not None:
            other.other = None
            if not self.said_all:
                other.transport.unregisterProducer()
            other.transport.loseConnection()


class _ClientEnd(_End):
    """
    The client's end, which reads nothing before there is somebody to tell it.
    """

    _log = Logger()

    def __init__(self, relay: RelayFactory) -> None:
        self._relay = relay
        self._connecting: Deferred[Any] | None = None

    def connectionMade(self) -> None:
        self.transport.pauseProducing()
        self._connecting = self._relay.backend.connect(_backend_factory)
        self._connecting.addCallbacks(self._connected, self._not_connected)

    def _connected(self, backend: _End) -> None:
        self._connecting = None
        self.join(backend)
        backend.join(self)
        self.transport.resumeProducing()

    def _not_connected(self, failure: Failure) -> None:
        self._connecting = None
        if failure.check(CancelledError):
            return
        self._log.warn(
            "{backend} cannot be reached, so {client} is closed: {error}",
            backend=self._relay.name,
            client=self.transport.getPeer(),
            error=failure.getErrorMessage(),
        )
        self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        super().connectionLost(reason)


_backend_factory = Factory.forProtocol(_End)
_backend_factory.noisy = False
