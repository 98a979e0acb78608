"""
The factory that stands for a web server's and lets its requests through a limiter, each on its own.

Nothing of twisted.web is imported here: what was not imported is nobody's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from twisted.internet.interfaces import (
    IAddress,
    ILoggingContext,
    IProtocol,
    IProtocolFactory,
    IProtocolNegotiationFactory,
)
from twisted.logger import Logger
from zope.interface import alsoProvides, implementer

from connlimit._limiter.admission import Admission
from connlimit._limiter.limiter import IN_USE, Limiter
from connlimit._request.limited import limited
from connlimit._system.bounded_log import BoundedLog

#: How many factories or protocols around one another are looked through.
_DEPTH = 20


@implementer(IProtocolFactory, ILoggingContext)
class RequestLimitingFactory:
    """
    Serves the HTTP requests of another factory as far as a limiter allows; the others wait in its queue.

    Connections are not limited. A request takes its slot when its head and body are complete, and gives it
    back when its response is finished, or with its connection. One that is refused is answered by a 503, and
    its connection lives on.

    Whatever else is asked of it or set on it, it hands on to the wrapped factory.

    :ivar wrappedFactory: the factory whose channels make the requests, such as a `twisted.web.server.Site`.
    :ivar admission: what the limiter is told of requests.
    :ivar request_log: where failures of requests are logged.
    """

    # What is declared here is set on this object, all else on the wrapped factory.
    wrappedFactory: IProtocolFactory
    admission: Admission
    _limiter: Limiter
    request_log: BoundedLog
    _ports: int
    _limited: dict[Any, Any]

    def __init__(self, wrappedFactory: IProtocolFactory, limiter: Limiter) -> None:
        """
        :raises TypeError: if *wrappedFactory* is no factory of HTTP or *limiter* no `Limiter`.
        """
        if not isinstance(limiter, Limiter):
            raise TypeError(f"limiter must be a Limiter, not {limiter!r}")
        check_requests(wrappedFactory)
        self.request_log = BoundedLog(Logger(namespace="connlimit.request"))
        self.wrappedFactory = wrappedFactory
        self._ports = 0
        # By what makes the requests.
        self._limited = {}
        self.limiter = limiter
        if IProtocolNegotiationFactory.providedBy(wrappedFactory):
            alsoProvides(self, IProtocolNegotiationFactory)

    def __getattr__(self, name: str) -> Any:
        if name == "wrappedFactory":  # not set yet, as while it is unpickled
            raise AttributeError(name)
        return getattr(self.wrappedFactory, name)

    def __setattr__(self, name: str, value: object) -> None:
        if _is_ours(name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.wrappedFactory, name, value)

    def __delattr__(self, name: str) -> None:
        if _is_ours(name):
            object.__delattr__(self, name)
        else:
            delattr(self.wrappedFactory, name)

    def __repr__(self) -> str:
        return f"<RequestLimitingFactory of {self.wrappedFactory!r}>"

    @property
    def limiter(self) -> Limiter:
        """
        The limiter, which other factories may share.
        """
        return self._limiter

    @limiter.setter
    def limiter(self, limiter: Limiter) -> None:
        IN_USE.setdefault(id(limiter), limiter)
        self._limiter = limiter
        self.admission = limiter.admission  # bound once, since every request needs it

    def logPrefix(self) -> str:
        """
        The log prefix of the wrapped factory.
        """
        if ILoggingContext.providedBy(self.wrappedFactory):
            return self.wrappedFactory.logPrefix()
        return self.wrappedFactory.__class__.__name__

    def doStart(self) -> None:
        """
        A port begins to use this factory.
        """
        self._ports += 1
        self.wrappedFactory.doStart()

    def doStop(self) -> None:
        """
        A port ceases to use this factory. With the last, the requests that still wait are refused.
        """
        self._ports -= 1
        if self._ports == 0:
            self.admission.refuse_waiting(self.admission.waiting_for(self))
        self.wrappedFactory.doStop()

    def buildProtocol(self, address: IAddress) -> IProtocol | None:
        """
        The wrapped factory's own protocol, whose requests wait for a slot each.
        """
        protocol = self.wrappedFactory.buildProtocol(address)
        if protocol is None:
            return None
        channel = _channel(protocol)
        if channel is None:
            self.request_log.warn(
                "{protocol} makes no requests that could be limited, so its connection is closed",
                protocol=protocol,
            )
            return None
        channel.requestFactory = self._limited_factory(channel.requestFactory)
        return protocol

    def _limited_factory(self, request_factory: Any) -> Any:
        known = self._limited.get(request_factory)
        if known is None:
            if len(self._limited) >= _DEPTH:  # one that is made for each connection
                self._limited.clear()
            known = self._limited[request_factory] = limited(request_factory, self)
        return known


def check_requests(factory: Any) -> None:
    """
    Check that the channels of a factory make requests.

    :raises TypeError: if they do not, as far as it shows.
    """
    if not IProtocolFactory.providedBy(factory):
        raise TypeError(f"wrappedFactory must provide IProtocolFactory, not {factory!r}")
    http = sys.modules.get("twisted.web.http")
    for each in _inward(factory, "wrappedFactory"):
        if "connection_log" in getattr(each, "__dict__", ()):
            raise TypeError(
                f"requests are limited inside and connections outside: {each!r} must be around"
                " the RequestLimitingFactory, not in it"
            )
        if http is not None and isinstance(each, http.HTTPFactory):
            return
        if hasattr(getattr(each, "protocol", None), "requestFactory"):
            return
    raise TypeError(
        "slots can be taken per request if the factory is one of HTTP, such as a twisted.web.server.Site,"
        f" not {factory!r}"
    )


def _channel(protocol: Any) -> Any:
    """
    What makes the requests: a protocol, or one within it; None if nothing does.
    """
    for each in _inward(protocol, "wrappedProtocol"):
        if hasattr(each, "requestFactory"):
            return each
    return None


def _inward(outermost: Any, name: str) -> Iterator[Any]:
    each = outermost
    for _ in range(_DEPTH):
        if each is None:
            return
        yield each
        each = getattr(each, name, None)


def _is_ours(name: str) -> bool:
    # What Python and zope.interface note about an object has underscores.
    return name in RequestLimitingFactory.__annotations__ or name == "limiter" or name.startswith("__")
