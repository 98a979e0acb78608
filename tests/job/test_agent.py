"""
Requests to other servers hold slots until their answers have been delivered.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from support.clients import free_port
from support.sockets import patiently, tcp, until
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.web.client import (
    Agent,
    BrowserLikeRedirectAgent,
    ContentDecoderAgent,
    GzipDecoder,
    HTTPConnectionPool,
    RedirectAgent,
    readBody,
)
from twisted.web.iweb import IAgent, IAgentEndpointFactory, IResponse
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
from zope.interface import implementer
from zope.interface.verify import verifyObject

from connlimit import Limiter, LimitingAgent, Refused

# What Twisted says of its own.
pytestmark = pytest.mark.filterwarnings("ignore:Using readBody with a transport:DeprecationWarning")


class Pages(Resource):
    """
    A site that says how many of its requests are being answered.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.total = 0

    def render_GET(self, request: Any) -> Any:
        self.total += 1
        self.now += 1
        self.most = max(self.most, self.now)
        request.notifyFinish().addBoth(self.finished)
        if request.path == b"/redirect":
            request.setHeader(b"location", b"/page")
            request.setResponseCode(302)
            return b"it is elsewhere"
        if request.path == b"/empty":
            request.setResponseCode(204)
            return b""
        if request.path == b"/endless":
            request.write(b"the beginning")
            return NOT_DONE_YET
        reactor.callLater(0, self.answer, request)
        return NOT_DONE_YET

    def answer(self, request: Any) -> None:
        if not request._disconnected:
            request.write(b"a page ")
            request.write(b"in two parts")
            request.finish()

    def finished(self, result: Any) -> None:
        self.now -= 1


class Closing(Protocol):
    """
    Closes the connection as soon as something of a body is there.
    """

    def dataReceived(self, data: bytes) -> None:
        self.transport.loseConnection()


@implementer(IAgentEndpointFactory)
class Counting:
    """
    Makes endpoints, and counts the connections that they make.
    """

    def __init__(self) -> None:
        self.now = self.most = self.total = 0

    def endpointForURI(self, uri: Any) -> Any:
        counting = self

        @implementer(IStreamClientEndpoint)
        class Endpoint:
            def connect(self, factory: Any) -> Any:
                counting.now += 1
                counting.total += 1
                counting.most = max(counting.most, counting.now)
                endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", uri.port)
                return endpoint.connect(factory).addCallbacks(self.made, counting.lost)

            def made(self, protocol: Any) -> Any:
                lost = protocol.transport.connectionLost

                def connection_lost(reason: Any) -> None:
                    counting.lost(None)
                    lost(reason)

                protocol.transport.connectionLost = connection_lost
                return protocol

        return Endpoint()

    def lost(self, result: Any) -> Any:
        self.now -= 1
        return result


@asynccontextmanager
async def site(limiter: Limiter, persistent: bool = False, **how: Any) -> AsyncIterator[Any]:
    """
    A site, an agent for it, what that counts, and where the site is. All connections end with the context.
    """
    pages, counting = Pages(), Counting()
    pool = HTTPConnectionPool(reactor, persistent=persistent)
    pool.maxPersistentPerHost = 100
    factory = Site(pages)
    factory.displayTracebacks = False
    port = await tcp().listen(factory)
    agent = Agent.usingEndpointFactory(reactor, counting, pool=pool)
    try:
        where = f"http://127.0.0.1:{port.getHost().port}".encode()
        yield pages, LimitingAgent(agent, limiter, **how), counting, where
    finally:
        await patiently(pool.closeCachedConnections())
        await port.stopListening()
        await until(lambda: not counting.now)


async def get(agent: Any, uri: bytes) -> bytes:
    response = await agent.request(b"GET", uri)
    return await readBody(response)


@pytest.mark.parametrize("persistent", [False, True])
@ensureDeferred
async def test_a_thousand_requests_at_once_open_as_many_connections_as_there_are_slots(
    persistent: bool,
) -> None:
    limiter = Limiter(10)
    async with site(limiter, persistent) as (pages, agent, counting, where):
        getting = [Deferred.fromCoroutine(get(agent, where + b"/page")) for _ in range(1000)]
        bodies = await patiently(gatherResults(getting, consumeErrors=True))
        assert bodies == [b"a page in two parts"] * 1000
        assert (counting.most, pages.total) == (10, 1000)
        assert counting.total == (10 if persistent else 1000)
        assert pages.most <= 10
        await until(lambda: not limiter.active)
        snapshot = limiter.snapshot()
        assert (snapshot.finished, snapshot.reclaimed, snapshot.waiting) == (1000, 0, 0)


@ensureDeferred
async def test_each_host_has_its_cap() -> None:
    limiter = Limiter(max_per_peer=2)
    async with site(limiter) as (pages, agent, _counting, where):
        other = where.replace(b"127.0.0.1", b"LOCALHOST")
        endless = [await patiently(agent.request(b"GET", where + b"/endless")) for _ in range(2)]
        waiting = agent.request(b"GET", where + b"/page")
        assert await patiently(Deferred.fromCoroutine(get(agent, other + b"/page"))) == b"a page in two parts"
        await until(lambda: limiter.active == 2)
        assert limiter.waiting == 1
        assert [peer for peer, _, _ in limiter.busiest_peers(5)] == ["127.0.0.1"]
        for response in endless:
            response.deliverBody(Closing())
        assert await patiently(readBody(await patiently(waiting))) == b"a page in two parts"
        await until(lambda: not limiter.active)


@ensureDeferred
async def test_the_slot_is_held_until_the_body_is_delivered() -> None:
    limiter = Limiter(1)
    async with site(limiter) as (_pages, agent, _counting, where):
        response = await patiently(agent.request(b"GET", where + b"/page"))
        assert verifyObject(IResponse, response)
        assert (response.code, limiter.active) == (200, 1)
        waiting = agent.request(b"GET", where + b"/page")
        assert limiter.waiting == 1
        assert await patiently(readBody(response)) == b"a page in two parts"
        await patiently(readBody(await patiently(waiting)))
        await until(lambda: not limiter.active)


@pytest.mark.parametrize("path", [b"/empty", b"/redirect"])
@ensureDeferred
async def test_an_answer_that_nobody_reads_gives_its_slot_back(path: bytes) -> None:
    limiter = Limiter(1)
    async with site(limiter) as (_pages, agent, _counting, where):
        response = await patiently(agent.request(b"GET", where + path))
        await until(lambda: not limiter.active)
        if path == b"/redirect":
            assert await patiently(readBody(response)) == b"it is elsewhere"
        assert limiter.snapshot().reclaimed == 0


@pytest.mark.parametrize("redirecting", [RedirectAgent, BrowserLikeRedirectAgent])
@ensureDeferred
async def test_one_that_follows_redirects_needs_no_second_slot(redirecting: Any) -> None:
    limiter = Limiter(1)
    async with site(limiter) as (_pages, agent, _counting, where):
        following = ContentDecoderAgent(redirecting(agent), [(b"gzip", GzipDecoder)])
        body = await patiently(Deferred.fromCoroutine(get(following, where + b"/redirect")))
        assert body == b"a page in two parts"
        inside = LimitingAgent(redirecting(agent.agent), limiter)
        body = await patiently(Deferred.fromCoroutine(get(inside, where + b"/redirect")))
        assert body == b"a page in two parts"
        await until(lambda: not limiter.active)


@ensureDeferred
async def test_an_answer_that_is_forgotten_gives_its_slot_back() -> None:
    limiter = Limiter(1)
    async with site(limiter) as (_pages, agent, counting, where):
        response = await patiently(agent.request(b"GET", where + b"/page"))
        del response
        await until(lambda: gc.collect() >= 0 and not limiter.active)
        await patiently(Deferred.fromCoroutine(get(agent, where + b"/page")))
        assert limiter.snapshot().reclaimed == 1
        gc.collect()
        counting.now = 0  # a forgotten connection is told of nothing


@ensureDeferred
async def test_a_server_that_cannot_be_reached_gives_the_slot_back() -> None:
    limiter = Limiter(1)
    agent = LimitingAgent(Agent(reactor), limiter)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            await patiently(agent.request(b"GET", f"http://127.0.0.1:{free_port()}/".encode()))
    assert limiter.active == 0


@implementer(IAgent)
class Silent:
    """
    An agent that keeps the requests.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def request(self, *request: Any) -> Deferred[Any]:
        self.requests.append(request)
        return Deferred()


def test_it_is_an_agent_that_hands_requests_on_as_they_are() -> None:
    silent = Silent()
    agent = LimitingAgent(silent, Limiter(1, clock=Clock()))
    assert verifyObject(IAgent, agent)
    agent.request(b"POST", b"http://localhost/", "headers", "body")
    assert silent.requests == [(b"POST", b"http://localhost/", "headers", "body")]


def test_a_request_that_is_cancelled_or_takes_too_long_leaves_the_queue() -> None:
    silent, clock = Silent(), Clock()
    limiter = Limiter(1, clock=clock)
    agent = LimitingAgent(silent, limiter, timeout=5)
    results: list[Any] = []
    requests = [agent.request(b"GET", b"http://localhost/").addErrback(results.append) for _ in range(3)]
    requests[1].cancel()
    clock.advance(5)
    requests[0].cancel()
    assert [each.type for each in results] == [CancelledError, Refused, CancelledError]
    assert len(silent.requests) == 1
    assert (limiter.active, limiter.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("per", "keys"),
    [
        ("host", {"a.example": 2, "::1": 1}),
        (lambda uri: uri[-1:], {b"1": 1, b"2": 2}),
        (None, {None: 3}),
    ],
)
def test_what_has_a_cap_can_be_chosen(per: Any, keys: dict[Any, int]) -> None:
    limiter = Limiter(max_per_peer=5, clock=Clock())
    agent = LimitingAgent(Silent(), limiter, per=per)
    waiting = [
        agent.request(b"GET", b"http://" + uri) for uri in (b"A.example/1", b"a.example/2", b"[::1]:80/2")
    ]
    assert dict(limiter.admission.limits._peers.in_use()) == keys
    assert len(waiting) == 3


def test_a_uri_that_is_none_is_for_the_agent_to_refuse() -> None:
    silent = Silent()
    LimitingAgent(silent, Limiter(max_per_peer=1, clock=Clock())).request(b"GET", b"http://[half/")
    assert len(silent.requests) == 1


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(TypeError, match="agent must provide IAgent, not 5"):
        LimitingAgent(5, Limiter(1))
    with pytest.raises(TypeError, match="limiter must be a Limiter, not 5"):
        LimitingAgent(Silent(), 5)
    with pytest.raises(ValueError, match="per must be 'host', a function of the URI, or None, not 'port'"):
        LimitingAgent(Silent(), Limiter(1), per="port")
