"""
The place next to the socket: beneath TLS, PROXY headers and whatever else an endpoint puts around a protocol.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IProtocolFactory
from zope.interface import directlyProvides, providedBy

from connlimit._factory import LimitingFactory
from connlimit._limiter import Limiter
from connlimit._service import LimitingEndpoint


class LimitingReactor:
    """
    A reactor that puts a limiter before every factory that it is told to listen for.
    """

    def __init__(self, reactor: Any, limiter: Limiter) -> None:
        self._reactor = reactor
        self._limiter = limiter
        directlyProvides(self, providedBy(reactor))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def _limited(self, factory: IProtocolFactory) -> LimitingFactory:
        return LimitingFactory(factory, self._limiter)

    def listenTCP(self, port: int, factory: IProtocolFactory, *args: Any, **kwargs: Any) -> Any:
        return self._reactor.listenTCP(port, self._limited(factory), *args, **kwargs)

    def listenUNIX(self, address: str, factory: IProtocolFactory, *args: Any, **kwargs: Any) -> Any:
        return self._reactor.listenUNIX(address, self._limited(factory), *args, **kwargs)

    def listenSSL(
        self, port: int, factory: IProtocolFactory, contextFactory: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from twisted.protocols.tls import TLSMemoryBIOFactory

        return self.listenTCP(port, TLSMemoryBIOFactory(contextFactory, False, factory), *args, **kwargs)

    def adoptStreamPort(self, fileDescriptor: int, addressFamily: int, factory: IProtocolFactory) -> Any:
        return self._reactor.adoptStreamPort(fileDescriptor, addressFamily, self._limited(factory))


class SocketLimitingEndpoint(LimitingEndpoint):
    """
    An endpoint whose limiter stands next to the socket: its inner endpoint was made with a `LimitingReactor`.
    """

    def limit(self, factory: IProtocolFactory) -> IProtocolFactory:
        """
        Leave the factory as it is: it is limited where its port is made.
        """
        return factory
