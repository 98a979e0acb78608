"""
The endpoint with a limiter: right before the protocol, or next to the socket.

Next to the socket is beneath TLS, PROXY headers and whatever else an endpoint puts around a protocol.
"""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from zope.interface import directlyProvides, providedBy

from connlimit._connection.factory import LimitingFactory
from connlimit._limiter.limiter import Limiter
from connlimit._limiter.values import one_of
from connlimit._listening.ports import WatchedEndpoint, check_when_full, watched
from connlimit._request.factory import RequestLimitingFactory

#: What takes a slot.
PER = one_of("connection", "request")


def check_per(value: object, name: str = "per") -> None:
    """
    :param name: what the value is called where it was given.
    :raises ValueError: if the value is not one of `PER`; TypeError if it is no text.
    """
    PER.of_code(name, value)


def limited(
    factory: IProtocolFactory, limiter: Limiter, per: str
) -> LimitingFactory | RequestLimitingFactory:
    """
    The factory behind a limiter.

    :param per: one of `PER`.
    :raises TypeError: if its requests are to be limited, and it makes none.
    """
    make = RequestLimitingFactory if per == "request" else LimitingFactory
    return make(factory, limiter)


@attrs.frozen
class LimitingEndpoint(WatchedEndpoint):
    """
    An endpoint that puts a limiter before whatever listens on it.

    :ivar endpoint: where to listen.
    :ivar limiter: the limiter; every factory that listens here shares it.
    :ivar when_full: ``refuse``, or ``stop-accepting``: while nobody can be served or wait, the port accepts
        nobody, and the kernel's backlog holds those who come.
    :ivar per: what takes a slot, ``connection`` or ``request``; see `RequestLimitingFactory`.
    """

    per: str = attrs.field(
        default="connection", validator=lambda instance, attribute, value: check_per(value)
    )

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[IListeningPort]:
        """
        Listen on the endpoint, the limiter before the factory.
        """
        return WatchedEndpoint.listen(self, self.limit(protocolFactory))

    def limit(self, factory: IProtocolFactory) -> IProtocolFactory:
        """
        Put the limiter before a factory.
        """
        return limited(factory, self.limiter, self.per)


class SocketLimitingEndpoint(LimitingEndpoint):
    """
    An endpoint whose limiter stands next to the socket: its inner endpoint was made with a `LimitingReactor`.
    """

    def limit(self, factory: IProtocolFactory) -> IProtocolFactory:
        """
        Leave the factory as it is: it is limited where its port is made.
        """
        return factory


class LimitingReactor:
    """
    A reactor that puts a limiter before every factory that it is told to listen for.
    """

    def __init__(self, reactor: Any, limiter: Limiter, when_full: str | None = None) -> None:
        """
        :param when_full: what the ports do then; None if somebody else sees to that.
        """
        self._reactor = reactor
        self._limiter = limiter
        self._when_full = when_full
        directlyProvides(self, providedBy(reactor))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def _limited(self, factory: IProtocolFactory) -> LimitingFactory:
        return LimitingFactory(factory, self._limiter)

    def _watched(self, port: Any) -> Any:
        return port if self._when_full is None else watched(port, self._limiter, self._when_full)

    def listenTCP(self, port: int, factory: IProtocolFactory, *args: Any, **kwargs: Any) -> Any:
        return self._watched(self._reactor.listenTCP(port, self._limited(factory), *args, **kwargs))

    def listenUNIX(self, address: str, factory: IProtocolFactory, *args: Any, **kwargs: Any) -> Any:
        return self._watched(self._reactor.listenUNIX(address, self._limited(factory), *args, **kwargs))

    def listenSSL(
        self, port: int, factory: IProtocolFactory, contextFactory: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from twisted.protocols.tls import TLSMemoryBIOFactory

        return self.listenTCP(port, TLSMemoryBIOFactory(contextFactory, False, factory), *args, **kwargs)

    def adoptStreamPort(self, fileDescriptor: int, addressFamily: int, factory: IProtocolFactory) -> Any:
        return self._watched(
            self._reactor.adoptStreamPort(fileDescriptor, addressFamily, self._limited(factory))
        )


def limit_reactor(reactor: Any, limiter: Limiter, when_full: str = "refuse") -> Any:
    """
    A reactor for programs that are given one and call its ``listenTCP``, ``listenSSL`` or ``listenUNIX``.

    Whatever they listen with, also by endpoints that they make of it, is behind the limiter; all else is the
    reactor's own. The reactor itself is left as it is, so those that import it are not limited.

    :param reactor: the real one.
    :param limiter: the limiter; all that listens shares it. It stands next to the socket, beneath TLS.
    :param when_full: see `LimitingEndpoint`.
    :raises ValueError: for a wrong *when_full*.
    """
    check_when_full(when_full)
    return LimitingReactor(reactor, limiter, when_full)
