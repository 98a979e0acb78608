"""
The ends of a relayed connection: what one peer sends is written to the other, as fast as that takes it.
"""

from __future__ import annotations

from typing import Any
from typing import Protocol as TypingProtocol

from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit._system import departures, sockets
from connlimit._twistd.targets.splice import can_splice, splice


class IPair(TypingProtocol):
    """
    What an end tells its pair: `relay_pair.Pair` has it.
    """

    def said_all(self, end: End) -> None: ...

    def will_say_no_more(self, end: End, unread: bool) -> bool: ...

    def was_reset(self, end: End) -> None: ...

    def lost(self, end: End, reason: Failure) -> None: ...


@implementer(IHalfCloseableProtocol, IPushProducer)
class End(Protocol):
    """
    One end of a relay.

    Each end is the producer of the other's transport: a reader who stops reading stops the writer, and no
    more is held in between than a transport's buffer.

    Between plain sockets the kernel moves the bytes. What it can't move then, for the moment or because it is
    an end and no bytes, goes the ordinary way: read by the transport, received here, written to the other.

    :ivar pair: what it is an end of; None for a backend's end that is not joined yet.
    :ivar other: the other end; None unless both are connected.
    :ivar said_all: whether the peer on this side has closed its direction.
    :ivar reads: how often something came from the peer on this side.
    """

    # Any: besides ITransport, each is a consumer, a producer and, mostly, a half-closeable descriptor.
    transport: Any
    pair: IPair | None = None
    other: End | None = None
    said_all = False
    reads = 0
    _watched: int | None = None

    def join(self, other: End) -> None:
        """
        Send all that comes from the peer on this side to the other side from now on.
        """
        self.other = other
        self.transport.registerProducer(other, True)
        if can_splice(self.transport, other.transport):
            # The reactor calls this for each event: the transport's own is called from there when needed.
            self.transport.doRead = self._do_read

    def _do_read(self) -> Any:
        """
        Be the ``doRead`` of our transport.
        """
        other = self.other
        if other is not None:
            why = splice(self.transport, other.transport)
            if why is not False:
                self.reads += 1
                return why
        return type(self.transport).doRead(self.transport)

    def dataReceived(self, data: bytes) -> None:
        self.reads += 1
        if self.other is not None:
            self.other.transport.write(data)

    def readConnectionLost(self) -> None:
        """
        The peer on this side has said all it had to say.
        """
        self.said_all = True
        if self.pair is not None:
            self.pair.said_all(self)
        else:
            self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        """
        The peer on this side has got all that the other side said.
        """

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.connected = 0
        self.stop_watching()
        self.transport.__dict__.pop("doRead", None)  # nobody must hold the other any more
        other, self.other = self.other, None
        if other is not None:
            other.other = None
            if not self.said_all:
                other.transport.unregisterProducer()
        if self.pair is not None:
            self.pair.lost(self, reason)

    # What the other side's transport asks, when it cannot take more

    def pauseProducing(self) -> None:
        """
        Read nothing for now; the kernel tells if the connection ends meanwhile.
        """
        self.transport.pauseProducing()
        self.watch()

    def resumeProducing(self) -> None:
        """
        Read again.
        """
        self.stop_watching()
        if not self.said_all:
            self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """
        The other side's transport is gone, which its end will hear.
        """

    # What the departures tell, while nothing is read

    def watch(self) -> None:
        """
        Let the kernel report the end of the connection.
        """
        if self._watched is None:
            sock = sockets.socket_of(self.transport)
            if sock is not None:
                self._watched = sock.fileno()
                departures.of(sockets.lowest(self.transport).reactor).watch(self._watched, self)

    def stop_watching(self) -> None:
        """
        Nothing is to be told any more: somebody reads again, or it is over.
        """
        descriptor, self._watched = self._watched, None
        if descriptor is not None:
            departures.of(sockets.lowest(self.transport).reactor).unwatch(descriptor, self)

    def departs_with(self, unread: bool) -> bool:
        """
        The peer on this side has closed its direction, as is seen before it is read.
        """
        return self.pair is not None and self.pair.will_say_no_more(self, unread)

    def client_departed(self) -> None:
        """
        The connection on this side was reset.
        """
        self.stop_watching()
        if self.pair is not None:
            self.pair.was_reset(self)

    # How it ends

    def unsent(self) -> int:
        """
        How many bytes the peer on this side has not got yet, as far as can be told.
        """
        return sockets.unsent(self.transport)

    def lose(self) -> None:
        """
        Close the connection when everything is written.
        """
        self.stop_watching()
        self.transport.loseConnection()

    def abort(self) -> None:
        """
        Reset the connection.
        """
        self.stop_watching()
        sockets.abort(self.transport)
