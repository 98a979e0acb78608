"""
Listening behind a limiter as a service, and stopping.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from pytest_twisted import ensureDeferred
from support.fakes import RecordingFactory
from support.sockets import connected, listening, patiently, tcp, until
from support.web import Holding
from twisted.application.internet import (
    SSLServer,
    StreamServerEndpointService,
    TCPClient,
    TCPServer,
    UNIXServer,
)
from twisted.application.service import Application, IService, MultiService, Service
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory, Protocol
from twisted.web.server import Site

from connlimit import (
    LimitedService,
    Limiter,
    LimitingEndpoint,
    LimitingFactory,
    RequestLimitingFactory,
    limit_service,
)


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


class Bitwise(Protocol):
    """
    Produces ten bytes, one in a tenth of a second, and then no more.
    """

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)
        self.produce(10)

    def produce(self, count: int) -> None:
        self.transport.write(b"x")
        if count > 1:
            reactor.callLater(0.1, self.produce, count - 1)
        else:
            self.transport.unregisterProducer()

    def resumeProducing(self) -> None: ...

    def pauseProducing(self) -> None: ...

    def stopProducing(self) -> None: ...


@ensureDeferred
async def test_what_is_still_produced_at_the_end_of_a_drain_is_not_cut_between_two_writes() -> None:
    limiter = Limiter(1)
    async with listening(limiter, server=Factory.forProtocol(Bitwise)) as (_, where):
        client = await connected(where)
        await until(lambda: limiter.active == 1)
        await patiently(limiter.drain(0.05))
        await client.is_closed()
        assert client.received == b"x" * 10


@pytest.mark.parametrize("wrong", [-1, float("inf"), float("nan")])
def test_a_wrong_drain_timeout_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="drain_timeout must be a number of seconds"):
        LimitedService(tcp(), RecordingFactory(), Limiter(), drain_timeout=wrong)


def test_a_service_has_a_place_in_an_application() -> None:
    application = Application("limited")
    service = LimitedService(tcp(), RecordingFactory(), Limiter())
    service.setServiceParent(application)
    assert list(IService(application)) == [service]


# Services of others


def services() -> tuple[MultiService, list[object]]:
    """
    A tree of services, and those in it that listen, in all the ways there are.
    """
    outer, inner = MultiService(), MultiService()
    inner.setServiceParent(outer)
    listening = [
        StreamServerEndpointService(
            serverFromString(reactor, "tcp:81:interface=127.0.0.1"), RecordingFactory()
        ),
        StreamServerEndpointService(serverFromString(reactor, "haproxy:tcp6:82"), RecordingFactory()),
        StreamServerEndpointService(serverFromString(reactor, "unix:/run/83"), RecordingFactory()),
        TCPServer(84, RecordingFactory(), 50, "127.0.0.1"),
        TCPServer(85, RecordingFactory(), interface="127.0.0.1"),
        SSLServer(86, RecordingFactory(), None),
        UNIXServer("/run/87", factory=RecordingFactory()),
    ]
    for number, service in enumerate([*listening, Service(), TCPClient("localhost", 1, None)]):
        service.setServiceParent((outer, inner)[number % 2])
    return outer, listening


def factory_of(service: object) -> object:
    if isinstance(service, StreamServerEndpointService):
        return service.factory
    return service.kwargs["factory"] if "factory" in service.kwargs else service.args[1]


@pytest.mark.parametrize(
    ("skip", "left_out"),
    [
        ([], []),
        (["tcp:81"], [0]),
        (["tcp:81:interface=127.0.0.1", "tcp:82"], [0, 1]),
        (["unix:/run/83", "tcp:84", "unix:/run/../run/87"], [2, 3, 6]),
        (["tcp:85:interface=127.0.0.1", "tcp:86"], [4, 5]),
    ],
)
def test_all_that_listens_in_a_tree_of_services_is_limited_but_for_what_is_skipped(
    skip: list[str], left_out: list[int]
) -> None:
    tree, listening = services()
    limiter = Limiter(3)
    limited = limit_service(tree, limiter, skip=skip)
    assert {*limited} == {each for number, each in enumerate(listening) if number not in left_out}
    for number, each in enumerate(listening):
        factory = factory_of(each)
        assert isinstance(factory, RecordingFactory if number in left_out else LimitingFactory)
        assert number in left_out or factory.limiter is limiter


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"skip": ["tcp:80"]},
            r"skip must say where something listens \(tcp:8.*tcp:81:interface=127.0.0.1, .*not 'tcp:80'",
        ),
        ({"skip": ["tcp:81:interface=127.0.0.2"]}, "skip must say where something listens"),
        ({"skip": ["tcp:70000"]}, "skip must be an endpoint such as tcp:8080"),
        ({"when_full": "never"}, "when_full must be refuse or stop-accepting, not 'never'"),
        (
            {"when_full": "stop-accepting"},
            "when_full must be refuse, not stop-accepting, for this, which listens",
        ),
    ],
)
def test_what_cannot_be_limited_is_left_as_it_is(settings: dict[str, object], words: str) -> None:
    tree, listening = services()
    with pytest.raises(ValueError, match=rf"\A{words}"):
        limit_service(tree, Limiter(1), **settings)
    assert all(isinstance(factory_of(each), RecordingFactory) for each in listening)


def test_nothing_takes_two_slots_of_one_limiter() -> None:
    tree, listening = services()
    limiter, other = Limiter(1), Limiter(1)
    limit_service(tree, limiter, skip=["tcp:81"])
    limited = [factory_of(each) for each in listening]
    with pytest.raises(
        ValueError, match=r"listens behind this limiter already, so a connection would need two"
    ):
        limit_service(tree, limiter)
    assert [factory_of(each) for each in listening] == limited
    limit_service(tree, other)
    assert all(factory_of(each).limiter is other for each in listening)
    service = StreamServerEndpointService(LimitingEndpoint(tcp(), limiter), RecordingFactory())
    with pytest.raises(ValueError, match="listens behind this limiter already"):
        limit_service(service, limiter)


def test_a_tree_in_which_nothing_listens_cannot_be_limited() -> None:
    for tree in (MultiService(), Service(), Application("idle")):
        with pytest.raises(ValueError, match="this has no service that listens"):
            limit_service(tree, Limiter(1))


@ensureDeferred
async def test_an_application_is_limited_until_it_is_started() -> None:
    application = Application("echo")
    endpoint, limiter = KnownPort(), Limiter(1)
    StreamServerEndpointService(endpoint, RecordingFactory()).setServiceParent(application)
    limit_service(application, limiter, "stop-accepting")
    service = IService(application)
    service.startService()
    first = await connected(endpoint.where)
    await until(lambda: limiter.active == 1)
    second = await connected(endpoint.where)
    second.transport.write(b"hello")
    await until(lambda: limiter.waiting == 1)
    assert limiter.snapshot().backlog == 0
    with pytest.raises(ValueError, match="listens already; it must be limited before it is started"):
        limit_service(application, limiter)
    await first.close()
    await second.receives(b"hello")
    await service.stopService()
    await patiently(limiter.drain(0))


@ensureDeferred
async def test_a_service_limits_requests_if_told_so_and_drains_them() -> None:
    with pytest.raises(TypeError, match="if the factory is one of HTTP"):
        LimitedService(KnownPort(), RecordingFactory(), Limiter(), per="request")
    with pytest.raises(ValueError, match="per must be connection or request, not 'requests'"):
        LimitedService(KnownPort(), Site(None), Limiter(), per="requests")
    page, limiter, endpoint = Holding(), Limiter(1), KnownPort()
    service = LimitedService(endpoint, Site(page), limiter, drain_timeout=20, per="request")
    service.privilegedStartService()
    service.startService()
    clients = [await connected(endpoint.where) for _ in range(3)]
    for client in clients[:2]:
        client.transport.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    await until(lambda: (limiter.active, limiter.waiting) == (1, 1))
    stopped = service.stopService()
    await until(lambda: sum(client.received.startswith(b"HTTP/1.1 503 ") for client in clients) == 1)
    assert not stopped.called
    page.answer()
    await patiently(stopped)
    await until(lambda: sum(client.received.startswith(b"HTTP/1.1 200 ") for client in clients) == 1)
    for client in clients:
        await client.close()


def test_the_requests_of_a_tree_of_services_are_limited_if_all_of_them_make_any() -> None:
    tree, other = MultiService(), MultiService()
    web = StreamServerEndpointService(tcp(), Site(None))
    web.setServiceParent(tree)
    TCPServer(0, RecordingFactory()).setServiceParent(other)
    with pytest.raises(ValueError, match="per must be connection, not request: "):
        limit_service(other, Limiter(), per="request")
    assert limit_service(tree, Limiter(), per="request") == [web]
    assert isinstance(web.factory, RequestLimitingFactory)
