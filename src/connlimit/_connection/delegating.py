"""
One connection's life: the protocol that delegates, first to the one that waits, then to the real one.

Whatever an application raises is caught where it would reach others: even ``SystemExit``, as in the reactor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any
from typing import Protocol as TypingProtocol

from twisted.internet.address import UNIXAddress
from twisted.internet.interfaces import (
    IAddress,
    IFileDescriptorReceiver,
    IHalfCloseableProtocol,
    IHandshakeListener,
    ILoggingContext,
    IProtocol,
    ISSLTransport,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.protocols.policies import ProtocolWrapper
from twisted.python.failure import Failure
from zope.interface import implementer, providedBy

from connlimit._connection import departures
from connlimit._connection.at_rest import close, is_at_rest, is_producing
from connlimit._connection.closing import MOST, QUIET, Patience
from connlimit._limiter.limiter import Limiter
from connlimit._limiter.peers import UNIXPeer
from connlimit._system import descriptors, sockets
from connlimit._system.bounded_log import BoundedLog
from connlimit.interfaces import IConnection, ISlotKeeper

#: How many pieces are kept that a transport delivers although it is paused.
_MOST_KEPT = 64

_set_class = object.__dict__["__class__"].__set__


@lru_cache(maxsize=1024)
def _wrapper_called(name: str) -> type[ProtocolWrapper]:
    """
    The class of wrappers by another name.
    """
    return type(name, (ProtocolWrapper,), {})


class IFactory(TypingProtocol):
    """
    What a connection needs of the factory that made it: `connlimit.LimitingFactory` has it.
    """

    limiter: Limiter
    wrappedFactory: Any
    connection_log: BoundedLog
    is_tls: bool

    def first_protocol(self, connection: DelegatingProtocol) -> IProtocol | None: ...

    def learn_from(self, protocol: IProtocol | None) -> None: ...

    def departs_on_half_close(self) -> bool: ...

    def build_refusal(self, address: IAddress, reason: str) -> IProtocol | None: ...


@implementer(IConnection, IProtocol, ILoggingContext)
class DelegatingProtocol:  # type: ignore[misc]  # connectionMade is for makeConnection to call
    """
    What Twisted takes for the protocol of a connection; hands every event on to its delegate.

    The delegate, ``wrappedProtocol``, is either the real protocol or the `WaitingProtocol` that holds
    its place. It gets the real transport, not this object.

    Per event it costs one call. The delegate's method is looked up each time, since real protocols
    replace their own methods while they run.

    Protocols that take a connection over look whether they find a ``ProtocolWrapper``, and set its
    ``wrappedProtocol``. So this says that it is one, and is none: by its ``__getattr__``, which is of no use
    here, each of the attributes that an event needs would take several times as long to find. It says, too,
    that it is called as the delegate's class, since that is what transports call themselves after.

    There can be tens of thousands, so it is as small as an object can be.

    :ivar factory: the factory that made it, and has set what is known from the beginning.
    :ivar address: the client's address.
    :ivar slot: set by the limiter while the connection is active.
    :ivar connected: 1 as long as there is a connection.
    :ivar closing: when it is given up, if the limiter has had it closed.
    """

    __slots__ = (
        "__weakref__",
        "address",
        "closing",
        "connected",
        "factory",
        "slot",
        "transport",
        "wrappedProtocol",
    )

    factory: IFactory
    address: Any
    # Any: what these two provide depends on the transport and on the delegate.
    transport: Any
    wrappedProtocol: Any
    slot: Any
    connected: int
    closing: Patience | None

    def become(self, cls: type[DelegatingProtocol]) -> None:
        """
        Be of this class from now on.
        """
        _set_class(self, cls)

    __class__ = property(lambda self: _wrapper_called(self.wrappedProtocol.__class__.__name__), become)

    def logPrefix(self) -> str:
        """
        The log prefix that the delegate would have without us.
        """
        delegate: Any = self.wrappedProtocol
        if isinstance(delegate, Protocol) or ILoggingContext.providedBy(delegate):
            prefix: str = delegate.logPrefix()
            return prefix
        name: str = delegate.__class__.__name__
        return name

    # Events, in the order of a connection's life

    def delegate_to(self, protocol: IProtocol) -> None:
        """
        Let the protocol have all further events, and provide what it provides.
        """
        self.wrappedProtocol = protocol
        address = self.address
        self.become(class_for(providedBy(protocol)))
        self.address = address
        self.has_delegate()

    def has_delegate(self) -> None:
        """
        A protocol has taken the place of the one that waited.
        """

    def makeConnection(self, transport: Any) -> None:
        self.transport = transport
        self.connected = 1
        fileno = getattr(transport, "fileno", None)
        if fileno is not None and (number := fileno()) >= descriptors.reserve_begins:
            descriptors.saw(number)
        # Another protocol may take the transport over, and all its events; so the end is learnt from
        # the transport itself. Set on the instance and not wrapped around it: this is the real one.
        lost: Any = self._transport_lost
        try:
            if transport.connectionLost.__self__ is not transport:
                lost = partial(lost, outer=transport.connectionLost)
        except AttributeError:
            lost = partial(lost, outer=getattr(transport, "connectionLost", None))
        transport.connectionLost = lost
        self.wrappedProtocol.makeConnection(transport)

    def dataReceived(self, data: bytes) -> None:
        self.wrappedProtocol.dataReceived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.connected = 0
        if self.closing is not None:
            self.closing.stop()
        try:
            self.wrappedProtocol.connectionLost(reason)
        finally:
            self.factory.limiter.finish(self)

    def _transport_lost(self, reason: Failure = connectionDone, outer: Any = None) -> None:
        """
        Be the ``connectionLost`` of our transport: it is over, whoever has its events.

        :param outer: what somebody else has put in its place before.
        """
        try:
            if outer is not None:
                outer(reason)
            else:
                transport = self.transport
                del transport.connectionLost
                transport.connectionLost(reason)
        finally:
            if self.connected:
                self.connected = 0
                if self.closing is not None:
                    self.closing.stop()
                self.factory.limiter.depart(self)
                self.factory.limiter.reclaim(self, "its transport was taken over by another protocol")

    # What the limiter decides, see IConnection

    def serve(self) -> None:
        """
        Put the real protocol in the place of the one that waits.

        The transport is reading again before the real protocol sees it: one that pauses it in
        ``connectionMade`` must stay paused. What arrived during the wait follows ``connectionMade``.
        """
        waiting: WaitingProtocol = self.wrappedProtocol
        waiting.stop_watching()
        try:
            protocol: Any = self.factory.wrappedFactory.buildProtocol(self.address)
            self.factory.learn_from(protocol)
            if not self._put_in_place(protocol):
                return
            self.take_names(WaitingProtocol)
        except BaseException:
            self.factory.connection_log.failure("{connection} could not be served", connection=self)
            self.abort()
            return
        try:
            protocol.makeConnection(self.transport)
        except BaseException:
            # As without us: Twisted logs it and leaves the connection open.
            self.factory.connection_log.failure("{protocol} failed to make its connection", protocol=protocol)
        try:
            for data in waiting.kept:
                if self.connected and not self.transport.disconnecting:
                    self.dataReceived(data)
        except BaseException:
            self.factory.connection_log.failure(
                "{protocol} failed to receive what it was sent", protocol=protocol
            )
            self.abort()

    def refuse(self, reason: str) -> None:
        """
        Put the protocol that refuses in the place of the one that waits.
        """
        waiting: WaitingProtocol = self.wrappedProtocol
        waiting.stop_watching()
        try:
            protocol: Any = self.factory.build_refusal(self.address, reason)
            if not self._put_in_place(protocol):
                return
            protocol.makeConnection(self.transport)
            for data in waiting.kept:
                self.dataReceived(data)
        except BaseException:
            self.factory.connection_log.failure("{connection} could not be refused", connection=self)
            self.abort()

    def _put_in_place(self, protocol: IProtocol | None) -> bool:
        """
        Let a protocol have the place of the one that waits, and reading resume; close if there is none.

        :return: whether there is one, and the connection is still there.
        """
        if protocol is None:
            self.transport.loseConnection()
            return False
        self.transport.resumeProducing()
        if not self.connected:
            return False
        self.delegate_to(protocol)
        return True

    def close(self, gave_up: Callable[[], None] | None = None) -> None:
        """
        Close the connection, and abort it when nothing moves on it any more or it takes too long.
        """
        if self.closing is not None or not self.connected:
            return
        give_up = partial(self._give_up, gave_up)
        self.closing = Patience(
            self.transport, self.factory.limiter.clock, give_up, QUIET, MOST, self._lose_connection
        )
        try:
            if is_producing(self.wrappedProtocol, self.transport):
                return  # until it pauses
        except Exception:
            self.factory.connection_log.failure("{connection} could not be asked", connection=self)
        self._lose_connection()

    def _lose_connection(self) -> None:
        try:
            close(self.wrappedProtocol, self.transport)
        except Exception:
            self.factory.connection_log.failure("{connection} could not be closed", connection=self)

    def _give_up(self, gave_up: Callable[[], None] | None) -> None:
        if gave_up is not None:
            gave_up()
        self.abort()

    def is_at_rest(self, quiet: float | None) -> bool:
        """
        Whether it is between two requests, so that to close it cuts nothing.
        """
        return is_at_rest(self.wrappedProtocol, self.transport, quiet)

    def notify(self, data: bytes) -> None:
        """
        Write to a client that waits, unless it is still to shake hands.
        """
        if not self.is_tls:
            self.transport.write(data)

    @property
    def is_tls(self) -> bool:
        """
        Whether the client speaks TLS.
        """
        return self.factory.is_tls or ISSLTransport.providedBy(self.transport)

    def abort(self) -> None:
        """
        End the connection without delay, or as fast as the transport can.
        """
        try:
            sockets.abort(self.transport)
        except BaseException:
            self.factory.connection_log.failure("{connection} could not be ended", connection=self)

    def idle(self) -> float | None:
        """
        For how many seconds the socket has moved no byte; None if the kernel does not tell.
        """
        return None if self.closing is not None else sockets.idle(self.transport)

    def reconsider(self) -> None:
        """
        A setting has changed that decides whether the client has departed.
        """
        if isinstance(self.wrappedProtocol, WaitingProtocol):
            self.wrappedProtocol.reconsider()

    def is_dead(self) -> bool:
        """
        Whether the socket is gone or was reset.
        """
        return sockets.is_dead(self.transport)

    def take_names(self, placeholder: type) -> None:
        """
        Let the transport log and show itself under the name of the real protocol, as if that had been there
        at first.

        :param placeholder: what was there at first.
        """
        transport = sockets.lowest(self.transport)
        was, prefix = placeholder.__name__, self.logPrefix()
        # Inside TLS the first is "WaitingProtocol (BufferingTLSTransport),7,127.0.0.1".
        if getattr(transport, "logstr", "").startswith(was):
            transport.logstr = prefix + transport.logstr[len(was) :]
        if getattr(transport, "repstr", "").startswith(f"<{was} "):
            name = self.wrappedProtocol.__class__.__name__
            transport.repstr = f"<{name}{transport.repstr[len(was) + 1 :]}"


class _Addressless(DelegatingProtocol):
    """
    A connection that keeps no address, as it waits and its transport has it, too.
    """

    __slots__ = ()

    @property
    def address(self) -> Any:
        return self.transport.getPeer()


@implementer(IProtocol)
class ArrivingProtocol:  # type: ignore[misc]  # connectionMade is for makeConnection to call
    """
    Holds the place of a connection on a UNIX socket until there is a transport, as that alone shows the peer.

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
        connection.delegate_to(protocol)
        connection.take_names(ArrivingProtocol)
        protocol.makeConnection(transport)

    def dataReceived(self, data: bytes) -> None:
        """
        Nothing is read before there is a transport, nor after it was closed.
        """

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """
        There was no protocol for it, and nobody waits or is served.
        """


@implementer(IProtocol)
class WaitingProtocol:  # type: ignore[misc]  # connectionMade is for makeConnection to call
    """
    Holds a connection's place while it waits: nothing is read, and nothing that still comes is lost.

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
            connection.factory.limiter.run_in(reactor)
            self._departures = departures.of(reactor)
            self._departures.watch(self._descriptor, self)
            if isinstance(connection.address, UNIXPeer):
                pass
            elif isinstance(connection.address, UNIXAddress):
                connection.address = UNIXPeer(connection.address.name, sockets.peer_uid(sock))
            else:
                del connection.address
                connection.become(_Addressless)
        connection.factory.limiter.wait(connection)

    def dataReceived(self, data: bytes) -> None:
        # Seldom, and never more than twice: what TLS had decrypted already.
        self.kept += (data,)
        if len(self.kept) > _MOST_KEPT:
            self.connection.factory.connection_log.warn(
                "{transport} delivers without end while it is paused; ended",
                transport=self.connection.transport,
            )
            self.client_departed()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.stop_watching()
        self.connection.factory.limiter.depart(self.connection)

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
            self.connection.factory.limiter.depart(self.connection)
        finally:
            self.connection.abort()

    def stop_watching(self) -> None:
        """
        It does not wait any more.
        """
        if self._departures is not None:
            self._departures.unwatch(self._descriptor, self)
            self._departures = None


# An event that the real protocol hears only if it provides an interface must reach it then, and must
# be none of ours otherwise. So the class of a connection is put together of what its delegate provides.


@implementer(IHalfCloseableProtocol)
class _HalfCloseable(DelegatingProtocol):
    __slots__ = ()

    def readConnectionLost(self) -> None:
        self.wrappedProtocol.readConnectionLost()

    def writeConnectionLost(self) -> None:
        self.wrappedProtocol.writeConnectionLost()


@implementer(IHandshakeListener)
class _HandshakeListener(DelegatingProtocol):
    __slots__ = ()

    def handshakeCompleted(self) -> None:
        self.wrappedProtocol.handshakeCompleted()


@implementer(IFileDescriptorReceiver)
class _FileDescriptorReceiver(DelegatingProtocol):
    __slots__ = ()

    def fileDescriptorReceived(self, descriptor: int) -> None:
        self.wrappedProtocol.fileDescriptorReceived(descriptor)


class _SlotKept(DelegatingProtocol):
    """
    Its delegate says when the slot is free.
    """

    __slots__ = ()

    def has_delegate(self) -> None:
        self.wrappedProtocol.keep_slot(self._release_slot)

    def makeConnection(self, transport: Any) -> None:
        self.has_delegate()
        super().makeConnection(transport)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.connected = 0
        try:
            self.wrappedProtocol.connectionLost(reason)
        except BaseException:
            self._release_slot()
            raise

    def _release_slot(self) -> None:
        self.factory.limiter.finish(self)

    def is_dead(self) -> bool:
        return bool(self.wrappedProtocol.is_over())

    def abort(self) -> None:
        try:
            self.wrappedProtocol.abort_all()
        except BaseException:
            self.factory.connection_log.failure("{connection} could not be ended", connection=self)
        super().abort()


_forwarding = {
    IHalfCloseableProtocol: _HalfCloseable,
    IHandshakeListener: _HandshakeListener,
    IFileDescriptorReceiver: _FileDescriptorReceiver,
    ISlotKeeper: _SlotKept,
}


@lru_cache(maxsize=1024)
def class_for(provided: Any) -> type[DelegatingProtocol]:
    """
    The class for connections whose delegate provides the interfaces.

    Cached, since it is asked for each connection: a declaration is one object for all instances of a class.
    """
    return _combined(tuple(cls for interface, cls in _forwarding.items() if provided.isOrExtends(interface)))


@cache
def _combined(classes: tuple[type[DelegatingProtocol], ...]) -> type[DelegatingProtocol]:
    if not classes:
        return DelegatingProtocol
    return type("DelegatingProtocol", classes, {"__doc__": DelegatingProtocol.__doc__, "__slots__": ()})
