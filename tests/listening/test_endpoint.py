"""
An endpoint that limits whatever listens on it, and a reactor that does.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.fakes import RecordingFactory
from support.sockets import connected, patiently, tcp, until
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.web.resource import Resource
from twisted.web.server import Site
from zope.interface import providedBy
from zope.interface.verify import verifyObject

from connlimit import Limiter, LimitingEndpoint, limit_reactor


def test_the_endpoint_is_an_endpoint() -> None:
    verifyObject(IStreamServerEndpoint, LimitingEndpoint(tcp(), Limiter()))


@ensureDeferred
async def test_all_that_listen_on_an_endpoint_share_its_limiter() -> None:
    limiter = Limiter(1)
    endpoint = LimitingEndpoint(tcp(), limiter)
    ports = [await endpoint.listen(RecordingFactory()) for _ in range(2)]
    clients = [await connected(f"tcp:127.0.0.1:{port.getHost().port}") for port in ports]
    await until(lambda: (limiter.active, limiter.waiting) == (1, 1))
    for port in ports:
        await port.stopListening()
    await patiently(limiter.drain(0))
    for client in clients:
        await client.is_closed()


@ensureDeferred
async def test_what_listens_by_a_limited_reactor_is_limited(tmp_path: Path) -> None:
    limiter = Limiter(1)
    limited = limit_reactor(reactor, limiter)
    assert list(providedBy(limited)) == list(providedBy(reactor))
    ports = [
        limited.listenTCP(0, RecordingFactory(), interface="127.0.0.1"),
        limited.listenUNIX(str(tmp_path / "socket"), RecordingFactory()),
        await serverFromString(limited, "tcp:0:interface=127.0.0.1").listen(RecordingFactory()),
    ]
    tcp, unix, endpoint = ports
    first = await connected(f"tcp:127.0.0.1:{tcp.getHost().port}")
    await until(lambda: limiter.active == 1)
    others = [
        await connected(f"unix:{tmp_path}/socket"),
        await connected(f"tcp:127.0.0.1:{endpoint.getHost().port}"),
    ]
    for other in others:
        other.transport.write(b"hello")
    await until(lambda: limiter.waiting == 2)
    assert limiter.snapshot().backlog == 0
    await first.close()
    await until(lambda: limiter.waiting == 1)
    for other in sorted(others, key=lambda other: not other.received):
        await other.receives(b"hello")
        await other.close()
    for port in ports:
        await port.stopListening()
    with pytest.raises(ValueError, match="when_full must be refuse or stop-accepting, not 'never'"):
        limit_reactor(reactor, limiter, "never")


@ensureDeferred
async def test_an_endpoint_limits_requests_if_told_so_and_then_only_those_of_http() -> None:
    limiter = Limiter(0, max_waiting=0)
    endpoint = LimitingEndpoint(tcp(), limiter, per="request")
    with pytest.raises(TypeError, match="if the factory is one of HTTP"):
        endpoint.listen(RecordingFactory())
    port = await endpoint.listen(Site(Resource()))
    client = await connected(f"tcp:127.0.0.1:{port.getHost().port}")
    client.transport.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    await until(lambda: client.received.startswith(b"HTTP/1.1 503 "))
    assert limiter.snapshot().refused["full"] == 1
    await client.close()
    await port.stopListening()


def test_what_takes_a_slot_is_a_connection_or_a_request() -> None:
    with pytest.raises(ValueError, match="per must be connection or request, not 'requests'"):
        LimitingEndpoint(tcp(), Limiter(), per="requests")
