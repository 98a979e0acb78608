"""
Outgoing connections hold slots for as long as they live.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from support.clients import free_port
from support.fakes import RecordingFactory
from support.sockets import Client, connected, listening, patiently, until
from support.tls import make_certificate
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.endpoints import (
    HostnameEndpoint,
    TCP4ClientEndpoint,
    clientFromString,
    connectProtocol,
    serverFromString,
    wrapClientTLS,
)
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import Certificate, optionsForClientTLS
from twisted.internet.task import Clock
from zope.interface import implementer

from connlimit import Limiter, LimitingClientEndpoint, Refused


@ensureDeferred
async def test_no_more_connections_are_open_than_there_are_slots() -> None:
    limiter = Limiter(3)
    async with listening(Limiter()) as (server, where):
        endpoint = LimitingClientEndpoint(clientFromString(reactor, where), limiter)
        connecting = [connectProtocol(endpoint, Client()) for _ in range(30)]
        clients = [await patiently(each) for each in connecting[:3]]
        assert (limiter.active, limiter.waiting) == (3, 27)
        for each in connecting[3:]:
            clients.pop(0).transport.loseConnection()
            clients.append(await patiently(each))
            assert limiter.active <= 3
        for client in clients:
            client.transport.loseConnection()
        await until(lambda: not limiter.active)
        assert (limiter.snapshot().finished, limiter.snapshot().reclaimed) == (30, 0)
        await until(lambda: not server.live)


@ensureDeferred
async def test_the_protocol_is_the_real_one_with_the_real_transport() -> None:
    limiter = Limiter(1)
    async with listening(Limiter()) as (_, where):
        client = await connected(LimitingClientEndpoint(clientFromString(reactor, where), limiter))
        assert type(client) is Client
        assert client.transport.protocol is client or client.transport.protocol._wrappedProtocol is client
        client.transport.write(b"hello")
        await client.receives(b"hello")
        await client.close()
        await until(lambda: not limiter.active)


@ensureDeferred
async def test_a_server_that_closes_frees_the_slot() -> None:
    limiter = Limiter(1)
    async with listening(Limiter()) as (server, where):
        endpoint = LimitingClientEndpoint(clientFromString(reactor, where), limiter)
        first = await connected(endpoint)
        second = connectProtocol(endpoint, Client())
        await until(lambda: server.live)
        server.live[0].transport.abortConnection()
        await first.is_closed()
        await (await patiently(second)).close()
        await until(lambda: not limiter.active)


@ensureDeferred
async def test_a_connection_that_another_protocol_takes_over_holds_its_slot_to_the_end() -> None:
    limiter = Limiter(1)
    async with listening(Limiter()) as (_, where):
        client = await connected(LimitingClientEndpoint(clientFromString(reactor, where), limiter))
        other = Client()
        transport = client.transport
        transport.protocol = other
        other.makeConnection(transport)
        transport.write(b"hello")
        await other.receives(b"hello")
        assert limiter.active == 1
        await other.close()
        await until(lambda: not limiter.active)


@ensureDeferred
async def test_a_server_that_cannot_be_reached_frees_the_slot() -> None:
    limiter = Limiter(1)
    endpoint = LimitingClientEndpoint(TCP4ClientEndpoint(reactor, "127.0.0.1", free_port()), limiter)
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            await patiently(connectProtocol(endpoint, Client()))
    assert limiter.snapshot().finished == 3


@ensureDeferred
async def test_one_over_tls_holds_it_too(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    limiter = Limiter(1)
    server = RecordingFactory()
    port = await serverFromString(
        reactor, f"ssl:0:interface=127.0.0.1:privateKey={certificate}:certKey={certificate}"
    ).listen(server)
    try:
        authority = Certificate.loadPEM((tmp_path / "certificate.pem").read_bytes())
        plain = HostnameEndpoint(reactor, b"localhost", port.getHost().port)
        tls = wrapClientTLS(optionsForClientTLS("localhost", authority), plain)
        for endpoint in (
            LimitingClientEndpoint(tls, limiter),
            wrapClientTLS(
                optionsForClientTLS("localhost", authority), LimitingClientEndpoint(plain, limiter)
            ),
        ):
            client = await connected(endpoint)
            client.transport.write(b"hello")
            await client.receives(b"hello")
            assert limiter.active == 1
            await client.close()
            await until(lambda: not limiter.active)
    finally:
        await port.stopListening()
        await until(lambda: not server.live)
    assert limiter.snapshot().reclaimed == 0


@implementer(IStreamClientEndpoint)
class Connects:
    """
    A client endpoint whose connections are made as the test wants.
    """

    def __init__(self, how: Any) -> None:
        self._how = how

    def connect(self, factory: Any) -> Any:
        return self._how(factory)


class Slotted(Protocol):
    """
    A protocol on which nothing more can be set.
    """

    __slots__ = ("transport",)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("transport", "connected", "factory"):
            raise AttributeError(name)
        super().__setattr__(name, value)


@ensureDeferred
async def test_a_protocol_on_which_nothing_can_be_set_has_its_slot_held() -> None:
    limiter = Limiter(1)
    async with listening(Limiter()) as (_, where):
        endpoint = LimitingClientEndpoint(clientFromString(reactor, where), limiter)
        protocol = await patiently(endpoint.connect(Factory.forProtocol(Slotted)))
        assert limiter.active == 1
        protocol.transport.abortConnection()
        await until(lambda: not limiter.active)
        assert limiter.snapshot().reclaimed == 0


def test_one_that_is_cancelled_while_it_waits_or_connects_frees_the_slot() -> None:
    cancelled: list[object] = []
    limiter = Limiter(1, clock=Clock())
    endpoint = LimitingClientEndpoint(Connects(lambda factory: Deferred(cancelled.append)), limiter)
    connecting, waiting = (endpoint.connect(Factory.forProtocol(Protocol)) for _ in range(2))
    for each in (waiting, connecting):
        each.cancel()
        each.addErrback(lambda failure: failure.trap(CancelledError))
    assert len(cancelled) == 1
    assert (limiter.active, limiter.waiting) == (0, 0)


def test_an_endpoint_that_raises_frees_the_slot() -> None:
    limiter = Limiter(1, clock=Clock())
    failures: list[Any] = []
    endpoint = LimitingClientEndpoint(Connects(lambda factory: 1 / 0), limiter)
    endpoint.connect(Factory.forProtocol(Protocol)).addErrback(failures.append)
    assert failures[0].check(ZeroDivisionError)
    assert limiter.active == 0


def test_it_waits_by_its_key_and_its_time_out() -> None:
    clock = Clock()
    limiter = Limiter(max_per_peer=1, clock=clock)
    refused: list[Any] = []
    for key in ("a", "b"):
        endpoint = LimitingClientEndpoint(Connects(lambda factory: Deferred()), limiter, key=key, timeout=5)
        connecting = [endpoint.connect(Factory.forProtocol(Protocol)) for _ in range(2)]
        for each in connecting:
            each.addErrback(refused.append)
    assert (limiter.active, limiter.waiting) == (2, 2)
    clock.advance(5)
    assert [each.value.reason for each in refused] == ["timeout", "timeout"]
    assert all(each.check(Refused) for each in refused)


def test_what_is_no_endpoint_and_no_limiter_is_said() -> None:
    with pytest.raises(TypeError, match="endpoint must provide IStreamClientEndpoint, not 5"):
        LimitingClientEndpoint(5, Limiter(1))
    with pytest.raises(TypeError, match="limiter must be a Limiter, not 5"):
        LimitingClientEndpoint(TCP4ClientEndpoint(reactor, "127.0.0.1", 1), 5)


def test_all_connect_at_once_where_there_is_room() -> None:
    limiter = Limiter(10, clock=Clock())
    made: list[Any] = []
    endpoint = LimitingClientEndpoint(Connects(lambda factory: made.append(factory) or Deferred()), limiter)
    waiting = gatherResults([endpoint.connect(Factory.forProtocol(Protocol)) for _ in range(10)])
    assert len(made) == 10
    assert not waiting.called
