"""
What stands for the real protocol of a connection until its turn comes.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.address import UNIXAddress
from twisted.internet.interfaces import IProtocol
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit._connection.delegating import DelegatingProtocol, IPlaceholder
from connlimit._connection.forwarding import delegate_to
from connlimit._connection.names import take_names
from connlimit._limiter.peers import UNIXPeer
from connlimit._system import departures, sockets

#: How many pieces are kept that a transport delivers although it is paused.
_MAX_KEPT = 64


class _Addressless(DelegatingProtocol):
    """
    A connection that keeps no address, as it waits and its transport has it, too.
    """

    __slots__ = ()

    @property
    def address(self) -> Any:
        return self.transport.getPeer()


@implementer(IProtocol, IPlaceholder)
class WaitingProtocol:  # type: ignore[misc]  # connectionMade is for makeConnection to call
    """
    Stands for the real protocol while a connection waits: nothing is read, and nothing is lost.

    There can be tens of thousands, so it is as small as an object can be.

    :ivar kept: what the transport delivered although it was paused, in order.
    """

    __slots__ = ("_departures", "_descriptor", "connection", "kept")

    def __init__(self, connection: DelegatingProtocol) -> None:
        self.connection = connection
        self.kept: tuple[bytes, ...] = ()
        self._departures: Any = None

    def makeConnection(self, transport: Any) -> None:
        transport.pauseProducing()
        connection = self.connection
        sock = sockets.socket_of(transport)
        if sock is not None:
            self._descriptor = sock.fileno()
            reactor = sockets.lowest(transport).reactor
            connection.factory.admission.run_in(reactor)
            self._departures = departures.of(reactor)
            self._departures.watch(self._descriptor, self)
            if isinstance(connection.address, UNIXPeer):
                pass
            elif isinstance(connection.address, UNIXAddress):
                connection.address = UNIXPeer(connection.address.name, sockets.peer_uid(sock))
            else:
                del connection.address
                connection.become(_Addressless)
        connection.factory.admission.wait(connection)

    def dataReceived(self, data: bytes) -> None:
        # Seldom, and never more than twice: what TLS had decrypted already.
        self.kept += (data,)
        if len(self.kept) > _MAX_KEPT:
            self.connection.factory.connection_log.warn(
                "{transport} delivers without end while it is paused; it is closed",
                transport=self.connection.transport,
            )
            self.client_departed()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.stop_watching()
        self.connection.factory.admission.depart(self.connection)

    # What the departures ask and tell

    def departs_with(self, unread: bool) -> bool:
        """
        Whether a client has departed that closed its direction: if it sent something, that may be all it
        had to say. TLS cannot even shake hands with such a client.
        """
        connection = self.connection
        return not unread or connection.is_tls or connection.factory.departs_on_half_close()

    def reconsider(self) -> None:
        """
        What `departs_with` says may have changed.
        """
        if self._departures is not None:
            self._departures.look_again(self._descriptor, self)

    def client_departed(self) -> None:
        """
        The client went away.
        """
        self.stop_watching()
        try:
            self.connection.factory.admission.depart(self.connection)
        finally:
            self.connection.abort()

    def stop_watching(self) -> None:
        """
        It does not wait any more.
        """
        if self._departures is not None:
            self._departures.unwatch(self._descriptor, self)
            self._departures = None

    # What the limiter decides, see IConnection

    def serve(self) -> None:
        """
        Its turn has come: let the real protocol replace this one.

        The transport is reading again before the real protocol sees it: one that pauses it in
        ``connectionMade`` must stay paused. What arrived during the wait follows ``connectionMade``.
        """
        self.stop_watching()
        connection, factory = self.connection, self.connection.factory
        try:
            protocol: Any = factory.wrappedFactory.buildProtocol(connection.address)
            factory.learn_from(protocol)
            if not self._put_in_place(protocol):
                return
            take_names(connection.transport, WaitingProtocol, protocol)
        except BaseException:
            factory.connection_log.failure("{connection} could not be served", connection=connection)
            connection.abort()
            return
        try:
            protocol.makeConnection(connection.transport)
        except BaseException:
            # As without us: Twisted logs it and leaves the connection open.
            factory.connection_log.failure("{protocol} failed to make its connection", protocol=protocol)
        try:
            for data in self.kept:
                if connection.connected and not connection.transport.disconnecting:
                    connection.dataReceived(data)
        except BaseException:
            factory.connection_log.failure("{protocol} failed to receive what it was sent", protocol=protocol)
            connection.abort()

    def refuse(self, reason: str) -> None:
        """
        It will not be served: let the protocol that refuses replace this one.
        """
        self.stop_watching()
        connection, factory = self.connection, self.connection.factory
        try:
            protocol: Any = factory.build_refusal(connection.address, reason)
            if not self._put_in_place(protocol):
                return
            protocol.makeConnection(connection.transport)
            for data in self.kept:
                connection.dataReceived(data)
        except BaseException:
            factory.connection_log.failure("{connection} could not be refused", connection=connection)
            connection.abort()

    def _put_in_place(self, protocol: IProtocol | None) -> bool:
        """
        Let a protocol replace this one, and reading resume; close if there is none.

        :return: whether there is one, and the connection is still there.
        """
        connection = self.connection
        if protocol is None:
            connection.transport.loseConnection()
            return False
        connection.transport.resumeProducing()
        if not connection.connected:
            return False
        delegate_to(connection, protocol)
        return True


@implementer(IProtocol)
class ArrivingProtocol:  # type: ignore[misc]  # connectionMade is for makeConnection to call
    """
    Stands for the protocol on a UNIX socket until there is a transport, as that alone shows the peer.

    The limiter is asked then, and decides as it would have before.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: DelegatingProtocol) -> None:
        self._connection = connection

    def makeConnection(self, transport: Any) -> None:
        connection = self._connection
        sock = sockets.socket_of(transport)
        if sock is not None:
            connection.address = UNIXPeer(connection.address.name, sockets.peer_uid(sock))
        protocol: Any = connection.factory.first_protocol(connection)
        if protocol is None:
            transport.loseConnection()
            return
        delegate_to(connection, protocol)
        take_names(transport, ArrivingProtocol, protocol)
        protocol.makeConnection(transport)

    def dataReceived(self, data: bytes) -> None:
        """
        Nothing is read before there is a transport, nor after it was closed.
        """

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """
        There was no protocol for it, and nobody waits or is served.
        """
