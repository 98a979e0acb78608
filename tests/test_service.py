"""
Listening behind a limiter as a service, and stopping.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fakes import RecordingFactory
from pytest_twisted import ensureDeferred
from sockets import connected, patiently, until
from twisted.application.service import Application, IService
from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.internet.protocol import Factory
from zope.interface.verify import verifyObject

from connlimit import LimitedService, Limiter, LimitingEndpoint


def tcp(port: int = 0) -> TCP4ServerEndpoint:
    return TCP4ServerEndpoint(reactor, port, interface="127.0.0.1")


class KnownPort:
    """
    An endpoint that remembers where it listens.
    """

    def __init__(self) -> None:
        self._endpoint = tcp()

    def listen(self, factory: Factory) -> object:
        def remember(port: object) -> object:
            self.where = f"tcp:127.0.0.1:{port.getHost().port}"
            self.port = port.getHost().port
            return port

        return self._endpoint.listen(factory).addCallback(remember)


@asynccontextmanager
async def started(limiter: Limiter, **settings: float) -> AsyncIterator[tuple[LimitedService, str]]:
    """
    A started service with an echo server, and where its clients find it.
    """
    endpoint = KnownPort()
    service = LimitedService(endpoint, RecordingFactory(), limiter, **settings)
    service.startService()
    try:
        yield service, endpoint.where
    finally:
        if service.running:
            await service.stopService()
        await patiently(limiter.drain(0))


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
async def test_a_service_limits_its_server() -> None:
    limiter = Limiter(1)
    async with started(limiter) as (_, where):
        first, second = await connected(where), await connected(where)
        second.transport.write(b"hello")
        await until(lambda: limiter.waiting == 1)
        await first.close()
        await second.receives(b"hello")


@ensureDeferred
async def test_a_service_that_cannot_listen_does_not_start() -> None:
    port = await tcp().listen(RecordingFactory())
    for _ in range(2):
        service = LimitedService(tcp(port.getHost().port), RecordingFactory(), Limiter())
        with pytest.raises(CannotListenError):
            service.startService()
    await port.stopListening()


@ensureDeferred
async def test_a_service_can_be_stopped_and_started_again() -> None:
    limiter = Limiter(1)
    async with started(limiter, drain_timeout=0) as (service, where):
        await connected(where)
        await until(lambda: limiter.active == 1)
        await service.stopService()
        assert limiter.active == 0
        service.privilegedStartService()
        service.startService()
        client = await connected(service.endpoint.endpoint.where)
        client.transport.write(b"again")
        await client.receives(b"again")


@ensureDeferred
async def test_a_stopped_service_refuses_those_who_wait_and_leaves_the_active_alone() -> None:
    limiter = Limiter(1)
    async with started(limiter) as (service, where):
        active, waiting = await connected(where), await connected(where)
        await until(lambda: limiter.waiting == 1)
        await service.stopService()
        await waiting.is_closed()
        assert limiter.snapshot().refused["draining"] == 1
        active.transport.write(b"still here")
        await active.receives(b"still here")


@ensureDeferred
async def test_a_service_with_a_drain_timeout_waits_for_its_connections() -> None:
    limiter = Limiter(2)
    async with started(limiter, drain_timeout=20) as (service, where), started(limiter) as (_, elsewhere):
        mine, other = await connected(where), await connected(elsewhere)
        await until(lambda: limiter.active == 2)
        stopped = service.stopService()
        mine.transport.write(b"last words")
        await mine.receives(b"last words")
        assert not stopped.called
        await mine.close()
        await patiently(stopped)
        other.transport.write(b"not concerned")
        await other.receives(b"not concerned")


@ensureDeferred
async def test_what_is_left_after_the_drain_timeout_is_aborted() -> None:
    limiter = Limiter(1)
    async with started(limiter, drain_timeout=0.05) as (service, where):
        client = await connected(where)
        await until(lambda: limiter.active == 1)
        await patiently(service.stopService())
        await client.is_closed()
        assert limiter.active == 0


@pytest.mark.parametrize("wrong", [-1, float("inf"), float("nan")])
def test_a_wrong_drain_timeout_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="drain_timeout must be a number of seconds"):
        LimitedService(tcp(), RecordingFactory(), Limiter(), drain_timeout=wrong)


def test_a_service_has_a_place_in_an_application() -> None:
    application = Application("limited")
    service = LimitedService(tcp(), RecordingFactory(), Limiter())
    service.setServiceParent(application)
    assert list(IService(application)) == [service]
