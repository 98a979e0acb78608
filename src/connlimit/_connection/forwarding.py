"""
Connections that provide what their delegates provide, no more and no less.

An event that the real protocol hears only if it provides an interface must reach it then, and must be none of
ours otherwise. So the class of a connection is put together of what its delegate provides.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

from twisted.internet.interfaces import (
    IFileDescriptorReceiver,
    IHalfCloseableProtocol,
    IHandshakeListener,
    IProtocol,
)
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer, providedBy

from connlimit._connection.delegating import DelegatingProtocol
from connlimit.interfaces import ISlotKeeper


def delegate_to(connection: DelegatingProtocol, protocol: IProtocol) -> None:
    """
    Let a protocol have all further events of a connection, which provides from now on what it provides.
    """
    connection.wrappedProtocol = protocol
    address = connection.address
    connection.become(class_for(providedBy(protocol)))
    connection.address = address
    connection.has_delegate()


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
        self.factory.admission.finish(self)

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
