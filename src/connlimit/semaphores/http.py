"""
What the client asks a server of semaphores: one HTTP request at a time, bounded in time and in memory.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from io import BytesIO
from typing import Any
from urllib.parse import unquote, urlsplit

import attrs
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web.client import URI, Agent, FileBodyProducer, HTTPConnectionPool, ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgentEndpointFactory, IResponse
from zope.interface import implementer

#: Seconds in which the server must answer.
PATIENCE = 10.0

#: Bytes that an answer may have, with its head: those of such a server have some hundreds.
_MAX = 64 * 1024


class SemaphoreError(Exception):
    """
    The server refuses a request, and would refuse it again.

    :ivar status: the HTTP status.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class UnknownPeer(Exception):
    """
    The server has forgotten the peer, or everything.
    """


class Unreachable(Exception):
    """
    The server does not answer, or not now.
    """


class Requests:
    """
    Asks one server.

    :ivar url: that of the server, without what it is asked with.
    """

    _log = Logger(namespace="connlimit.semaphores")

    def __init__(self, url: str, headers: Mapping[str, str], reactor: Any) -> None:
        """
        :param url: that of the server; ``user:password@`` before its host is sent as Basic authentication.
        :param headers: what else is sent with each request.
        :raises ValueError: for a wrong value.
        """
        credentials, self.url = _split(url)
        if self.url.startswith("https:"):
            try:
                import twisted.internet.ssl  # noqa: F401
            except ImportError:
                raise ValueError("url with https needs pyOpenSSL: pip install 'connlimit[tls]'") from None
        self._headers = _headers(headers)
        if credentials is not None:
            self._headers.setRawHeaders("Authorization", [b"Basic " + b64encode(credentials.encode())])
        self._reactor = reactor
        self._pool = HTTPConnectionPool(reactor)
        self._pool.maxPersistentPerHost = 8
        self._agent = Agent.usingEndpointFactory(reactor, _Endpoints(reactor), self._pool)
        self._is_away = False

    async def ask(
        self, method: str, path: str, body: object = None, seconds: float = PATIENCE
    ) -> tuple[int, str]:
        """
        Ask the server once.

        :param seconds: how long it may take.
        :return: the status and the body of a good answer.
        :raises UnknownPeer: if the server does not know the peer.
        :raises Unreachable: if there is no answer now.
        :raises SemaphoreError: if the server refuses.
        """
        asked = ensureDeferred(self._ask(method, path, body))
        try:
            status, text = await _cancellable(asked.addTimeout(seconds, self._reactor))
        except CancelledError:
            raise
        except Exception as error:  # there are many types of it, and some are private
            raise self.away(error) from None
        if status >= 500 and status != 501:
            raise self.away(SemaphoreError(status, text))
        if self._is_away:
            self._is_away = False
            self._log.info("semaphores at {url} are back", url=self.url)
        if status >= 300:  # redirects are not followed
            if text == "Unknown peer":
                raise UnknownPeer
            raise SemaphoreError(status, text)
        return status, text

    async def _ask(self, method: str, path: str, body: object) -> tuple[int, str]:
        headers, producer = self._headers, None
        if body is not None:
            headers = self._headers.copy()
            headers.setRawHeaders("Content-Type", ["application/json"])
            producer = FileBodyProducer(BytesIO(json.dumps(body).encode()))
        response = await self._agent.request(method.encode(), (self.url + path).encode(), headers, producer)
        return response.code, (await _Body().read(response)).decode("utf-8", "replace")

    def away(self, error: Exception) -> Unreachable:
        """
        The server does not answer as it should: say so once, until it does.
        """
        reasons = getattr(error, "reasons", None)
        why = str(reasons[0].value if reasons else error) or type(error).__name__
        if not self._is_away:
            self._is_away = True
            self._log.error("semaphores at {url} do not answer: {why}", url=self.url, why=why)
        return Unreachable(f"semaphores at {self.url} do not answer: {why}")

    def close(self) -> Deferred[None]:
        """
        Close the connections that are kept.
        """
        closed: Deferred[None] = self._pool.closeCachedConnections()
        return closed


def _split(url: object) -> tuple[str | None, str]:
    """
    The credentials of a URL, or None, and the URL without them.
    """
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError
        _ = parts.port
    except ValueError:
        shown = url
        if isinstance(url, str) and "@" in url:
            shown = "***@" + url.rpartition("@")[2]
        raise ValueError(
            f"url must name a server of semaphores, such as http://localhost:8000, not {shown!r}"
        ) from None
    userinfo, _, place = parts.netloc.rpartition("@")
    return unquote(userinfo) if userinfo else None, f"{parts.scheme}://{place}{parts.path}".rstrip("/")


def _headers(headers: Mapping[str, str]) -> Headers:
    made = Headers()
    try:
        for name, value in headers.items():
            if not (name and name.isprintable() and value.isprintable()):
                raise ValueError
            made.addRawHeader(name, value)
    except (AttributeError, TypeError, ValueError):
        raise ValueError("headers must be texts by their names, such as {'X-Team': 'blue'}") from None
    return made


class _Body(Protocol):
    """
    Reads the body of an answer.
    """

    transport: Any

    def read(self, response: IResponse) -> Deferred[bytes]:
        """
        The body, when it is complete. Cancelled, the connection is closed.
        """
        self._parts: list[bytes] = []
        self._read: Deferred[bytes] = Deferred(lambda _: self.transport.loseConnection())
        response.deliverBody(self)
        return self._read

    def dataReceived(self, data: bytes) -> None:
        self._parts.append(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if reason.check(ResponseDone, PotentialDataLoss):
            self._read.callback(b"".join(self._parts))
        else:
            self._read.errback(reason)


@implementer(IAgentEndpointFactory)
@attrs.frozen
class _Endpoints:
    """
    Endpoints of servers. Of those that are named by their addresses none is looked up, which takes a thread.
    """

    reactor: Any

    def endpointForURI(self, uri: URI) -> IStreamClientEndpoint:
        host = uri.host.decode().strip("[]")
        kind = (
            TCP4ClientEndpoint
            if isIPAddress(host)
            else TCP6ClientEndpoint
            if isIPv6Address(host)
            else HostnameEndpoint
        )
        endpoint: Any = kind(self.reactor, host, uri.port, timeout=PATIENCE)
        if uri.scheme == b"https":
            from twisted.internet.endpoints import wrapClientTLS
            from twisted.internet.ssl import optionsForClientTLS

            endpoint = wrapClientTLS(optionsForClientTLS(host), endpoint)
        return _Bounded(endpoint)


@implementer(IStreamClientEndpoint)
@attrs.frozen
class _Bounded:
    """
    An endpoint whose connections end when the other side says more than any answer has.
    """

    endpoint: IStreamClientEndpoint

    def connect(self, factory: Any) -> Deferred[Any]:
        wrapping = WrappingFactory(factory)
        # Each would have two lines in the log for each connection.
        wrapping.noisy = factory.noisy = False
        wrapping.protocol = _Counting
        connected: Deferred[Any] = self.endpoint.connect(wrapping)
        return connected.addCallback(lambda counting: counting.wrappedProtocol)


class _Counting(ProtocolWrapper):
    """
    Counts the bytes of an answer, which ends with the next request.
    """

    transport: Any
    _count = 0

    def dataReceived(self, data: bytes) -> None:
        self._count += len(data)
        if self._count > _MAX:
            self.transport.abortConnection()
        else:
            super().dataReceived(data)

    def write(self, data: bytes) -> None:
        self._count = 0
        super().write(data)

    def writeSequence(self, data: Any) -> None:
        self._count = 0
        super().writeSequence(data)


def _cancellable(inner: Deferred[Any]) -> Deferred[Any]:
    """
    The same, which fails with `CancelledError` and nothing else when it is cancelled.
    """

    def cancel(outer: Deferred[Any]) -> None:
        outer.errback(CancelledError())
        inner.cancel()

    outer: Deferred[Any] = Deferred(cancel)
    inner.addBoth(lambda result: None if outer.called else outer.callback(result))
    return outer
