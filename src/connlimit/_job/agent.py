"""
A web client whose requests take slots, until their answers have been delivered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal
from urllib.parse import urlsplit

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IProtocol, ITransport
from twisted.internet.protocol import connectionDone
from twisted.python.components import proxyForInterface
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgent, IBodyProducer, IResponse
from zope.interface import implementer

from connlimit._job.job import GivesSlots, Job, checked

#: Answers that send the client elsewhere.
_REDIRECTS = {301, 302, 303, 307, 308}


@implementer(IAgent)
class LimitingAgent:
    """
    Sends requests by another agent as there are slots. A slot is held until the body has been delivered, or
    the request has failed.

    Who gets an answer has to read its body, or to abort it, as always; one that is forgotten gives its
    slot back when it is collected as garbage. An answer without a body gives it back at once, and so does one
    that redirects, since nobody reads that.

    :ivar agent: the agent that sends the requests.
    :ivar limiter: the limiter, which others may share.
    """

    def __init__(
        self,
        agent: IAgent,
        limiter: GivesSlots,
        per: Literal["host"] | Callable[[bytes], Hashable] | None = "host",
        timeout: float | None = None,
    ) -> None:
        """
        :param limiter: a `connlimit.Limiter`.
        :param per: what takes the place of a peer, as ``max_per_peer`` counts: the ``host`` of the request,
            what a function returns for its URI, or, if None, nothing.
        :param timeout: how many seconds a request waits for its slot at the most, besides ``wait_timeout``.
        :raises TypeError: if *agent* is no agent or *limiter* no limiter.
        :raises ValueError: if *per* is none of these.
        """
        if not IAgent.providedBy(agent):
            raise TypeError(f"agent must provide IAgent, not {agent!r}")
        if not (per is None or per == "host" or callable(per)):
            raise ValueError(f"per must be 'host', a function of the URI, or None, not {per!r}")
        self.agent = agent
        self.limiter = checked(limiter)
        self._key: Any = _host if per == "host" else per
        self._timeout = timeout

    def __repr__(self) -> str:
        return f"<LimitingAgent of {self.agent!r}>"

    def request(
        self,
        method: bytes,
        uri: bytes,
        headers: Headers | None = None,
        bodyProducer: IBodyProducer | None = None,
    ) -> Deferred[IResponse]:
        """
        Send a request when there is a slot.

        :return: fires with the answer, or fails; with `connlimit.Refused` if there is no slot.
        """
        key = None if self._key is None else self._key(uri)
        waiting: Deferred[Any] = self.limiter.slot(key=key, timeout=self._timeout).acquire()
        return waiting.addCallback(self._request, method, uri, headers, bodyProducer)

    def _request(self, job: Job, *request: Any) -> Deferred[IResponse]:
        answering: Deferred[IResponse] = maybeDeferred(self.agent.request, *request)
        return answering.addCallbacks(self._answered, _failed, callbackArgs=(job,), errbackArgs=(job,))

    def _answered(self, response: Any, job: Job) -> Any:
        is_read = response.length != 0 and not (
            response.code in _REDIRECTS and response.headers.hasHeader(b"location")
        )
        if is_read:
            return _Response(response, self._release, job)
        self._release(job)
        return response

    def _release(self, job: Job) -> None:
        """
        Release a slot when the connection is with its pool again, or closed: that is done in the same turn of
        the reactor, or in the next.
        """
        self.limiter.clock.callLater(0, self.limiter.clock.callLater, 0, job.release)


def _failed(failure: Failure, job: Job) -> Failure:
    job.release()
    return failure


def _host(uri: bytes) -> str | None:
    """
    The host of a URI; None if that has none.
    """
    try:
        host = urlsplit(uri).hostname
    except ValueError:
        return None
    return None if host is None else host.decode("ascii", "replace")


class _Response(proxyForInterface(IResponse)):  # type: ignore[misc]
    """
    An answer whose slot is released when its body has been delivered.
    """

    def __init__(self, original: Any, release: Callable[[Job], None], job: Job) -> None:
        super().__init__(original)
        self._release = release
        self._job = job

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def deliverBody(self, protocol: IProtocol) -> None:
        self.original.deliverBody(_Body(protocol, self._release, self._job))


@implementer(IProtocol)
class _Body:  # type: ignore[misc]  # connectionMade is for makeConnection to call
    """
    Hands a body on, and releases the slot at its end.
    """

    def __init__(self, protocol: IProtocol, release: Callable[[Job], None], job: Job) -> None:
        self._protocol = protocol
        self._release = release
        self._job = job

    def makeConnection(self, transport: ITransport) -> None:
        self._protocol.makeConnection(transport)

    def dataReceived(self, data: bytes) -> None:
        self._protocol.dataReceived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        try:
            self._protocol.connectionLost(reason)
        finally:
            self._release(self._job)
