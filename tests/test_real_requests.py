"""
Web servers whose requests are limited, and their clients, on real sockets.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from klein import Klein
from pytest_twisted import ensureDeferred
from support.http2 import connect_http2
from support.programs import require_program
from support.sockets import Client, connected, patiently, until
from support.web import Holding
from twisted.internet import reactor, task
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import serverFromString
from twisted.internet.task import Clock
from twisted.internet.utils import getProcessOutput
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
from twisted.web.wsgi import WSGIResource

from connlimit import Limiter, LimitingFactory, RequestLimitingFactory

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


@asynccontextmanager
async def serving(limiter: Limiter, factory: Any, tls: Path | None = None) -> AsyncIterator[int]:
    """
    A server whose requests are limited; the number of its port. All its requests end with the context.
    """
    kind = f"ssl:0:privateKey={tls}:certKey={tls}" if tls else "tcp:0"
    endpoint = serverFromString(reactor, f"{kind}:interface=127.0.0.1")
    port = await endpoint.listen(RequestLimitingFactory(factory, limiter))
    try:
        yield port.getHost().port
    finally:
        await port.stopListening()
        await patiently(limiter.drain(0))


class Page(Resource):
    """
    Takes four milliseconds.

    :ivar most: how many were being answered at once.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def render_GET(self, request: Any) -> object:
        self.now += 1
        self.most = max(self.most, self.now)
        reactor.callLater(0.004, self._answer, request)
        return NOT_DONE_YET

    def _answer(self, request: Any) -> None:
        self.now -= 1
        request.write(b"page")
        request.finish()


@ensureDeferred
async def test_a_hundred_clients_that_keep_their_connections_alive_are_all_answered() -> None:
    """
    None of those who are idle keeps a slot from another.
    """
    page, limiter = Page(), Limiter(10)
    async with serving(limiter, Site(page)) as port:
        clients = [await connected(f"tcp:127.0.0.1:{port}") for _ in range(100)]
        for _ in range(3):
            answered = [client.received.count(b"page") + 1 for client in clients]
            for client in clients:
                client.transport.write(GET)
            for client, count in zip(clients, answered, strict=True):
                await until(partial(_has_pages, client, count))
        assert page.most == 10
        assert limiter.snapshot().finished == 300
        for client in clients:
            await client.close()


def _has_pages(client: Client, count: int) -> bool:
    return client.received.count(b"page") == count


@ensureDeferred
async def test_curl_keeps_its_connection_through_a_refusal(tmp_path: Path) -> None:
    """
    It says by itself when it connects anew.
    """
    curl = require_program("curl")
    limiter = Limiter(0, max_waiting=0)
    async with serving(limiter, Site(Holding())) as port:
        url = f"http://127.0.0.1:{port}/"
        said = "%{http_code} %{num_connects} %header{retry-after}\\n"
        output = await getProcessOutput(
            curl, ["-s", "-o", "/dev/null", "-w", said, url, "-o", "/dev/null", url]
        )
        assert output.decode().splitlines() == ["503 1 1", "503 0 1"]


@ensureDeferred
async def test_curl_is_answered_in_http_2(certificate: Path) -> None:
    """
    As without a limiter, and with one for connections outside.
    """
    curl = require_program("curl")
    page, limiter, connections = Page(), Limiter(1), Limiter(5)
    endpoint = serverFromString(
        reactor, f"ssl:0:privateKey={certificate}:certKey={certificate}:interface=127.0.0.1"
    )
    factory = LimitingFactory(RequestLimitingFactory(Site(page), limiter), connections)
    port = await endpoint.listen(factory)
    url = f"https://localhost:{port.getHost().port}/"
    urls = [each for number in range(10) for each in ("-o", "/dev/null", f"{url}{number}")]
    options = ["-s", "-Z", "--no-progress-meter", "--http2", "--cacert", str(certificate)]
    options += ["-w", "%{http_code} %{http_version}\\n"]
    output = await getProcessOutput(curl, [*options, *urls])
    assert output.decode().splitlines() == ["200 2"] * 10
    assert page.most == 1
    assert (limiter.snapshot().finished, limiter.active) == (10, 0)
    assert connections.snapshot().accepted >= 1
    await port.stopListening()
    await patiently(connections.drain(0))


@ensureDeferred
async def test_fifty_streams_of_one_connection_take_three_slots(certificate: Path) -> None:
    """
    A stream that was reset while it waited is never processed.
    """
    page, limiter = Holding(), Limiter(3)
    async with serving(limiter, Site(page), certificate) as port:
        client = await connect_http2(port, certificate)
        streams = [client.ask(f"/{number}") for number in range(50)]
        await until(lambda: limiter.waiting == 47)
        assert limiter.active == len(page.requests) == 3
        for stream in streams[10:20]:
            client.reset(stream)
        await until(lambda: limiter.snapshot().departed == 10)
        client.reset(streams[0])
        await until(lambda: limiter.snapshot().finished == 1)
        while len(page.paths) < 40 or page.requests:
            page.answer()
        await until(lambda: len(client.ended) == 39)
        assert page.most == 3
        assert b"/15" not in page.paths
        assert limiter.snapshot().finished == 40
        assert not client.is_lost
        await client.close()


@ensureDeferred
async def test_a_stream_is_refused_alone(certificate: Path) -> None:
    """
    The others of its connection go on.
    """
    page, limiter = Holding(), Limiter(1, max_waiting=0)
    async with serving(limiter, Site(page), certificate) as port:
        client = await connect_http2(port, certificate)
        served, refused = client.ask(body=b"x" * 1000), client.ask(body=b"y" * 1000)
        await until(lambda: refused in client.ended)
        assert client.status(refused) == "503"
        assert client.heads[refused]["retry-after"] == "1"
        assert client.bodies[refused] == b"Too many requests, try again later.\n"
        page.answer()
        await until(lambda: served in client.ended)
        assert client.status(served) == "200"
        assert page.bodies == [b"x" * 1000]
        await client.close()


@ensureDeferred
async def test_the_time_out_of_http_2_does_not_strike_while_a_stream_waits(certificate: Path) -> None:
    """
    It is in force again when none does.
    """
    clock, page, limiter = Clock(), Holding(), Limiter(0)
    async with serving(limiter, Site(page, reactor=clock), certificate) as port:
        client = await connect_http2(port, certificate)
        stream = client.ask()
        await until(lambda: limiter.waiting == 1)
        clock.advance(3600)
        limiter.max_connections = 1
        page.answer()
        await until(lambda: stream in client.ended)
        held = client.ask()
        await until(lambda: limiter.active == 1)
        waiting = client.ask()
        await until(lambda: limiter.waiting == 1)
        client.reset(waiting)
        await until(lambda: limiter.waiting == 0)
        clock.pump([3600, 15])
        await patiently(client.lost)
        assert held not in client.ended


@ensureDeferred
async def test_a_server_that_resets_a_stream_frees_its_slot(certificate: Path) -> None:
    """
    Nobody tells the request of that.
    """
    page, limiter = Holding(), Limiter(1)
    async with serving(limiter, Site(page), certificate) as port:
        client = await connect_http2(port, certificate)
        first, second = client.ask("/first"), client.ask("/second")
        await until(lambda: limiter.waiting == 1)
        page.requests[0].channel.abortConnection()
        await until(lambda: page.paths == [b"/first", b"/second"])
        page.answer(page.requests[1])
        await until(lambda: second in client.ended)
        assert client.resets == [first]
        assert (limiter.active, limiter.snapshot().finished) == (0, 2)
        page.requests.clear()
        await client.close()


@ensureDeferred
async def test_a_connection_of_many_streams_that_is_lost_frees_all(certificate: Path) -> None:
    """
    Those that wait have departed.
    """
    page, limiter = Holding(), Limiter(2)
    async with serving(limiter, Site(page), certificate) as port:
        client = await connect_http2(port, certificate)
        for _ in range(20):
            client.ask()
        await until(lambda: limiter.waiting == 18)
        client.transport.abortConnection()
        await until(lambda: (limiter.active, limiter.waiting) == (0, 0))
        assert (limiter.snapshot().departed, limiter.snapshot().finished) == (18, 2)
        assert len(page.paths) == 2


@pytest.mark.parametrize("pipelined", [0, 100_000])
@pytest.mark.parametrize("how", ["close", "reset"])
@ensureDeferred
async def test_who_leaves_while_it_waits_is_noticed_at_once(how: str, pipelined: int) -> None:
    """
    Also if so much was pipelined behind it that the channel does not read.
    """
    limiter = Limiter(0)
    async with serving(limiter, Site(Holding())) as port:
        client = await connected(f"tcp:127.0.0.1:{port}")
        client.transport.write(GET + b"x" * pipelined)
        await until(lambda: limiter.waiting == 1)
        if how == "reset":
            client.transport.socket.setsockopt(*LINGER)
        await client.close()
        await until(lambda: limiter.waiting == 0)
        assert limiter.snapshot().departed == 1


LINGER = (1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER: close resets


@ensureDeferred
async def test_one_that_is_never_finished_holds_its_slot_until_its_connection_ends() -> None:
    """
    And no longer.
    """
    page, limiter = Holding(), Limiter(1)
    async with serving(limiter, Site(page)) as port:
        first, second = [await connected(f"tcp:127.0.0.1:{port}") for _ in range(2)]
        first.transport.write(GET)
        await until(lambda: limiter.active == 1)
        second.transport.write(GET)
        await until(lambda: limiter.waiting == 1)
        await first.close()
        await until(lambda: len(page.paths) == 2)
        page.answer(page.requests[-1])
        await until(lambda: second.received.endswith(b"0\r\n\r\n"))
        assert limiter.snapshot().finished == 2
        await second.close()


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def websocket(kind: str) -> Resource:
    """
    A resource that takes the connection over and answers nothing.
    """
    if kind == "autobahn":
        from autobahn.twisted.resource import WebSocketResource
        from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol

        factory = WebSocketServerFactory()
        factory.protocol = WebSocketServerProtocol
        factory.setProtocolOptions(closeHandshakeTimeout=0)
        return WebSocketResource(factory)
    websocket = pytest.importorskip("twisted.web.websocket")

    class Silent:
        def buildProtocol(self, request: object) -> Any:
            return SilentProtocol()

    class SilentProtocol:
        def negotiationStarted(self, transport: object) -> None: ...
        def negotiationFinished(self) -> None: ...
        def bytesMessageReceived(self, data: bytes) -> None: ...
        def textMessageReceived(self, data: str) -> None: ...
        def connectionLost(self, reason: object) -> None: ...
        def pongReceived(self, payload: bytes) -> None: ...

    resource: Resource = websocket.WebSocketResource(Silent())
    resource.isLeaf = True
    return resource


@pytest.mark.parametrize("kind", ["autobahn", "twisted"])
@pytest.mark.parametrize("outer", [False, True])
@ensureDeferred
async def test_a_websocket_holds_its_slot_until_its_connection_ends(kind: str, outer: bool) -> None:
    """
    Whoever has taken the transport over, and nothing is said to be reclaimed.
    """
    limiter, connections = Limiter(1), Limiter(5)
    factory: Any = RequestLimitingFactory(Site(websocket(kind)), limiter)
    if outer:
        factory = LimitingFactory(factory, connections)
    port = await serverFromString(reactor, "tcp:0:interface=127.0.0.1").listen(factory)
    where = f"tcp:127.0.0.1:{port.getHost().port}"
    clients: list[Client] = []
    for _ in range(3):
        clients.append(await connected(where))
        clients[-1].transport.write(UPGRADE)
        await until(lambda: limiter.snapshot().accepted == len(clients))
    await until(lambda: clients[0].received.startswith(b"HTTP/1.1 101 "))
    assert (limiter.active, limiter.waiting) == (1, 2)
    clients[2].transport.abortConnection()
    await until(lambda: limiter.waiting == 1)
    clients[0].transport.abortConnection()
    await until(lambda: clients[1].received.startswith(b"HTTP/1.1 101 "))
    clients[1].transport.abortConnection()
    await until(lambda: limiter.active == 0)
    snapshot = limiter.snapshot()
    assert (snapshot.finished, snapshot.departed, snapshot.reclaimed) == (2, 1, 0)
    await port.stopListening()
    await patiently(connections.drain(0))


@ensureDeferred
async def test_klein_is_limited() -> None:
    """
    Also where it answers by a Deferred.
    """
    app, now, most = Klein(), 0, 0

    @app.route("/<name>")
    async def page(request: object, name: str) -> str:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await task.deferLater(reactor, 0.002)
        now -= 1
        return f"hello {name}"

    limiter = Limiter(2)
    async with serving(limiter, Site(app.resource())) as port:
        clients = [await connected(f"tcp:127.0.0.1:{port}") for _ in range(10)]
        for client in clients:
            client.transport.write(b"GET /you HTTP/1.1\r\nHost: h\r\n\r\n")
        await until(lambda: all(b"hello you" in client.received for client in clients))
        assert most == 2
        for client in clients:
            await client.close()


@ensureDeferred
async def test_wsgi_is_limited() -> None:
    """
    Its threads are asked for no more at once than there are slots.
    """
    lengths: list[int] = []

    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        lengths.append(len(environ["wsgi.input"].read()))
        start_response("200 OK", [("Content-Length", "4")])
        return [b"wsgi"]

    limiter = Limiter(1)
    resource = WSGIResource(reactor, reactor.getThreadPool(), application)
    async with serving(limiter, Site(resource)) as port:
        clients = [await connected(f"tcp:127.0.0.1:{port}") for _ in range(5)]
        for client in clients:
            client.transport.write(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc")
        await until(lambda: all(client.received.endswith(b"\r\n\r\nwsgi") for client in clients))
        assert lengths == [3] * 5
        assert limiter.snapshot().waits == 4
        await patiently(gatherResults([_closed(client) for client in clients]))


def _closed(client: Client) -> Deferred[None]:
    client.transport.loseConnection()
    return client.lost
