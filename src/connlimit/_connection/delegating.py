"""
What Twisted takes for the protocol of a connection, and what the limiter decides about.

Its delegate is first the one that waits, then the real protocol. Whatever an application raises is caught
where it would reach others: even ``SystemExit``, as in the reactor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from typing import Protocol as TypingProtocol

from twisted.internet.interfaces import IAddress, ILoggingContext, IProtocol, ISSLTransport
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from zope.interface import Interface, implementer

from connlimit._connection.at_rest import close, is_at_rest, is_producing
from connlimit._connection.closing import MAX, QUIET, Patience
from connlimit._connection.names import class_called, log_prefix
from connlimit._limiter.admission import Admission
from connlimit._system import descriptors, sockets
from connlimit._system.bounded_log import BoundedLog
from connlimit.interfaces import IConnection

_set_class = object.__dict__["__class__"].__set__


class IFactory(TypingProtocol):
    """
    What a connection needs of the factory that made it: `connlimit.LimitingFactory` has it.
    """

    admission: Admission
    wrappedFactory: Any
    connection_log: BoundedLog
    is_tls: bool

    def first_protocol(self, connection: DelegatingProtocol) -> IProtocol | None: ...

    def learn_from(self, protocol: IProtocol | None) -> None: ...

    def departs_on_half_close(self) -> bool: ...

    def build_refusal(self, address: IAddress, reason: str) -> IProtocol | None: ...


class IPlaceholder(Interface):
    """
    A delegate that stands for the real protocol while the connection waits. None of these raises.
    """

    def serve() -> None:
        pass

    def refuse(reason: str) -> None:
        pass

    def reconsider() -> None:
        pass


@implementer(IConnection, IProtocol, ILoggingContext)
class DelegatingProtocol:  # type: ignore[misc]  # connectionMade is for makeConnection to call
    """
    What Twisted takes for the protocol of a connection; hands every event on to its delegate.

    The delegate, ``wrappedProtocol``, is either the real protocol or an `IPlaceholder` that stands for it.
    It gets the real transport, not this object.

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

    __class__ = property(lambda self: class_called(self.wrappedProtocol.__class__.__name__), become)

    def logPrefix(self) -> str:
        """
        The log prefix that the delegate would have without us.
        """
        return log_prefix(self.wrappedProtocol)

    # Events, in the order of a connection's life

    def has_delegate(self) -> None:
        """
        A protocol has replaced the one that waited.
        """

    def makeConnection(self, transport: Any) -> None:
        self.transport = transport
        self.connected = 1
        fileno = getattr(transport, "fileno", None)
        if fileno is not None and (number := fileno()) >= descriptors.told_from:
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
            self.factory.admission.finish(self)

    def _transport_lost(self, reason: Failure = connectionDone, outer: Any = None) -> None:
        """
        Be the ``connectionLost`` of our transport: it is over, whatever protocol has its events.

        :param outer: what somebody else has replaced it with before.
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
                self.factory.admission.depart(self)
                self.factory.admission.reclaim(self, "its transport was taken over by another protocol")

    # What the limiter decides, see IConnection

    def serve(self) -> None:
        """
        Replace the protocol that waits with the real one.
        """
        self.wrappedProtocol.serve()

    def refuse(self, reason: str) -> None:
        """
        Replace the protocol that waits with the one that refuses.
        """
        self.wrappedProtocol.refuse(reason)

    def close(self, gave_up: Callable[[], None] | None = None) -> None:
        """
        Close the connection, and abort it when nothing moves on it any more or it takes too long.
        """
        if self.closing is not None or not self.connected:
            return
        give_up = partial(self._give_up, gave_up)
        self.closing = Patience(
            self.transport, self.factory.admission.clock, give_up, QUIET, MAX, self._lose_connection
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
        if IPlaceholder.providedBy(self.wrappedProtocol):
            self.wrappedProtocol.reconsider()

    def is_dead(self) -> bool:
        """
        Whether the socket is gone or was reset.
        """
        return sockets.is_dead(self.transport)
