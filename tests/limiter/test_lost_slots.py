"""
A slot is bound to its socket: whatever the server does, it is free within a second of the socket's end.
"""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.clients import port_of, reset
from support.fakes import ApplicationError, RecordingFactory
from support.logs import Log
from support.sockets import Client, connected, listening, patiently, until
from support.tls import talk_tls, wrap_server_tls
from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.interfaces import IHalfCloseableProtocol, IHandshakeListener, IListeningPort
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread
from twisted.protocols.policies import ThrottlingFactory, TimeoutFactory, WrappingFactory
from zope.interface import implementer

from connlimit import Limiter, LimitingFactory


async def free_within_a_second(limiter: Limiter) -> None:
    """
    Wait until nobody is active, which must come within a second and the time of a look.
    """
    began = reactor.seconds()
    await until(lambda: limiter.active == 0)
    assert reactor.seconds() - began < 1.2


@implementer(IHalfCloseableProtocol)
class Failing(Protocol):
    """
    Fails in the method that its factory names.
    """

    def act(self, where: str) -> None:
        if self.factory.fails_in == where:
            raise ApplicationError(where)

    def makeConnection(self, transport: object) -> None:
        super().makeConnection(transport)
        self.act("makeConnection")

    def connectionMade(self) -> None:
        self.act("connectionMade")

    def dataReceived(self, data: bytes) -> None:
        self.act("dataReceived")

    def readConnectionLost(self) -> None:
        self.transport.loseConnection()
        self.act("readConnectionLost")

    def writeConnectionLost(self) -> None:
        self.act("writeConnectionLost")

    def connectionLost(self, reason: object) -> None:
        self.act("connectionLost")


class FailingFactory(Factory):
    """
    Builds protocols that fail, or fails to.
    """

    noisy = False
    protocol = Failing

    def __init__(self, fails_in: str) -> None:
        self.fails_in = fails_in

    def buildProtocol(self, addr: object) -> Protocol | None:
        if self.fails_in == "buildProtocol":
            raise ApplicationError
        return None if self.fails_in == "None" else super().buildProtocol(addr)


async def make_wait(limiter: Limiter, wait: bool) -> None:
    """
    Let the only client have waited, if it must, before it is served.
    """
    if wait:
        await until(lambda: limiter.waiting == 1)
        limiter.max_connections = 1


@pytest.mark.parametrize("wait", [False, True], ids=["with room", "after a wait"])
@pytest.mark.parametrize(
    "fails_in",
    [
        "buildProtocol",
        "None",
        "makeConnection",
        "connectionMade",
        "dataReceived",
        "readConnectionLost",
        "connectionLost",
    ],
)
@ensureDeferred
async def test_an_exception_in_the_server_loses_no_slot(fails_in: str, wait: bool) -> None:
    limiter = Limiter(0 if wait else 1)
    async with listening(limiter, server=FailingFactory(fails_in)) as (_, where):
        for _ in range(2):
            limiter.max_connections = 0 if wait else 1
            client = await connected(where)
            client.transport.write(b"hello")
            await make_wait(limiter, wait)
            await until(lambda: limiter.snapshot().served > 0)
            await client.close()
            await free_within_a_second(limiter)
        assert limiter.snapshot().finished == 2


@pytest.mark.parametrize("wait", [False, True], ids=["with room", "after a wait"])
@pytest.mark.parametrize("times", [1, 2])
@ensureDeferred
async def test_a_transport_that_another_protocol_takes_over_gives_its_slot_back(
    times: int, wait: bool
) -> None:
    takeovers: list[Protocol] = []

    class TakenOver(Protocol):
        def dataReceived(self, data: bytes) -> None:
            for _ in range(times):
                other = RecordingFactory().buildProtocol(self.transport.getPeer())
                takeovers.append(other)
                self.transport.protocol = other
                other.makeConnection(self.transport)

    limiter = Limiter(0 if wait else 1)
    with Log() as log:
        async with listening(limiter, server=Factory.forProtocol(TakenOver)) as (_, where):
            client = await connected(where)
            client.transport.write(b"take it")
            await make_wait(limiter, wait)
            await until(lambda: len(takeovers) == times)
            client.transport.write(b"still there?")
            await client.receives(b"still there?")
            assert limiter.active == 1
            address = client.transport.getHost()
            await client.close()
            await free_within_a_second(limiter)
            assert takeovers[-1].factory.events[-1] == "lost"
            assert limiter.snapshot().reclaimed == 1
    (warning,) = log.warnings()
    assert warning["peer"].port == address.port


@pytest.fixture
def collected_by_hand() -> Iterator[None]:
    """
    The garbage collector does not run by itself.
    """
    gc.disable()
    yield
    gc.enable()


class Sleeping(Protocol):
    """
    Pauses its transport, and does nothing ever after.
    """

    def connectionMade(self) -> None:
        self.transport.pauseProducing()


@ensureDeferred
async def test_a_server_that_does_not_notice_a_reset_loses_its_slot_to_whoever_waits() -> None:
    limiter = Limiter(1)
    server = Factory.forProtocol(Sleeping)
    # Held by the application, unlike a transport that is forgotten.
    kept = []
    build = server.buildProtocol
    server.buildProtocol = lambda address: kept.append(build(address)) or kept[-1]
    with Log() as log:
        async with listening(limiter, server=server) as (_, where):
            client = socket.create_connection(("127.0.0.1", port_of(where)))
            await until(lambda: limiter.active == 1)
            second = await connected(where)
            await until(lambda: limiter.waiting == 1)
            reset(client)
            began = reactor.seconds()
            await until(lambda: limiter.snapshot().served == 2)
            assert reactor.seconds() - began < 1.2
            assert limiter.snapshot().reclaimed == 1
            second.transport.abortConnection()
    assert len(log.warnings()) >= 1


@pytest.mark.parametrize("wait", [False, True], ids=["with room", "after a wait"])
@ensureDeferred
async def test_a_transport_that_is_forgotten_is_closed_and_its_slot_is_free(
    wait: bool, collected_by_hand: None
) -> None:
    limiter = Limiter(0 if wait else 1)
    with Log() as log:
        async with listening(limiter, server=Factory.forProtocol(Sleeping)) as (_, where):
            client = await connected(where)
            await make_wait(limiter, wait)
            await until(lambda: limiter.snapshot().served == 1)
            second = await connected(where)
            await until(lambda: limiter.waiting == 1)
            with pytest.warns(ResourceWarning, match="unclosed"):
                gc.collect()
            await client.is_closed()
            began = reactor.seconds()
            await until(lambda: limiter.snapshot().served == 2)
            assert reactor.seconds() - began < 1.2
            assert limiter.snapshot().reclaimed == 1
            second.transport.abortConnection()
            with pytest.warns(ResourceWarning, match="unclosed"):
                gc.collect()
    assert any("garbage" in warning["why"] for warning in log.warnings())


@ensureDeferred
async def test_a_socket_that_is_closed_under_its_transport_gives_its_slot_to_whoever_waits() -> None:
    limiter = Limiter(1)
    async with listening(limiter) as (server, where):
        await connected(where)
        await until(lambda: server.live)
        second = await connected(where)
        second.transport.write(b"hello")
        await until(lambda: limiter.waiting == 1)
        lost = server.live[0].transport
        lost.stopReading()
        lost.socket.close()
        await second.receives(b"hello")
        assert limiter.snapshot().reclaimed == 1
        server.live[:] = [protocol for protocol in server.live if protocol.transport is not lost]


NESTINGS: dict[str, Callable[[Factory, Limiter], object]] = {
    "in TimeoutFactory": lambda server, limiter: TimeoutFactory(LimitingFactory(server, limiter), 60),
    "around TimeoutFactory": lambda server, limiter: LimitingFactory(TimeoutFactory(server, 60), limiter),
    "in ThrottlingFactory": lambda server, limiter: ThrottlingFactory(LimitingFactory(server, limiter)),
    "around ThrottlingFactory": lambda server, limiter: LimitingFactory(ThrottlingFactory(server), limiter),
    "in WrappingFactory": lambda server, limiter: WrappingFactory(LimitingFactory(server, limiter)),
    "in another": lambda server, limiter: LimitingFactory(LimitingFactory(server, Limiter(1)), limiter),
    "around another": lambda server, limiter: LimitingFactory(LimitingFactory(server, limiter), Limiter(3)),
}


@pytest.mark.parametrize("nesting", NESTINGS)
@ensureDeferred
async def test_nested_with_other_wrapping_factories_it_loses_no_slot(nesting: str) -> None:
    limiter, server = Limiter(1), RecordingFactory()
    endpoint = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
    port = await endpoint.listen(NESTINGS[nesting](server, limiter))
    where = f"tcp:127.0.0.1:{port.getHost().port}"
    for _ in range(3):
        first, second = await connected(where), await connected(where)
        second.transport.write(b"second")
        first.transport.write(b"first")
        await first.receives(b"first")
        assert len(server.live) == 1
        await first.close()
        await second.receives(b"second")
        await second.close()
        await free_within_a_second(limiter)
    assert (limiter.snapshot().finished, limiter.snapshot().reclaimed) == (6, 0)
    await patiently(port.stopListening())


async def full_server(nesting: str) -> tuple[Limiter, IListeningPort, str, Client]:
    """
    A limiter with one slot, its port, where clients find it, and the one who is served.
    """
    limiter = Limiter(1, max_waiting=0)
    endpoint = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
    port = await endpoint.listen(NESTINGS[nesting](RecordingFactory(), limiter))
    where = f"tcp:127.0.0.1:{port.getHost().port}"
    first = await connected(where)
    await until(lambda: limiter.active == 1)
    return limiter, port, where, first


@pytest.mark.parametrize("nesting", [name for name in NESTINGS if name.startswith("around")])
@ensureDeferred
async def test_around_other_wrapping_factories_whoever_is_refused_is_closed(nesting: str) -> None:
    limiter, port, where, first = await full_server(nesting)
    refused = await connected(where)
    await refused.is_closed()
    await first.close()
    await free_within_a_second(limiter)
    assert limiter.snapshot().refused["full"] == 1
    await patiently(port.stopListening())


@pytest.mark.parametrize("nesting", ["in TimeoutFactory", "in ThrottlingFactory", "in WrappingFactory"])
@ensureDeferred
async def test_in_other_wrapping_factories_whoever_is_refused_holds_no_slot(nesting: str) -> None:
    limiter, port, where, first = await full_server(nesting)
    # Twisted's WrappingFactory does not see that there is no protocol, and leaves the client connected.
    refused = await connected(where)
    await until(lambda: limiter.snapshot().refused["full"] == 1)
    await first.close()
    await free_within_a_second(limiter)
    await refused.close()
    assert limiter.snapshot().accepted == 2
    await patiently(port.stopListening())


@implementer(IHandshakeListener)
class FailingHandshake(RecordingFactory.protocol):
    """
    Fails when the TLS handshake is done.
    """

    def handshakeCompleted(self) -> None:
        raise ApplicationError


@pytest.mark.parametrize("place", ["inside TLS", "next to TCP"])
@pytest.mark.parametrize("how", ["plain text", "stalls", "vanishes", "handshakeCompleted fails"])
@ensureDeferred
async def test_a_tls_handshake_that_comes_to_nothing_loses_no_slot(
    how: str, place: str, certificate: Path
) -> None:
    pytest.importorskip("OpenSSL")
    from twisted.internet.ssl import DefaultOpenSSLContextFactory
    from twisted.protocols.tls import TLSMemoryBIOFactory

    context = DefaultOpenSSLContextFactory(str(certificate), str(certificate))
    limiter, server = Limiter(1), RecordingFactory()
    if how == "handshakeCompleted fails":
        server.protocol = FailingHandshake
    tcp = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
    if place == "inside TLS":
        manager = listening(limiter, wrap_server_tls(context, tcp), server)
    else:
        manager = listening(limiter, tcp, TLSMemoryBIOFactory(context, False, server))
    async with manager as (_, where):
        if how == "handshakeCompleted fails":
            with suppress(OSError):
                assert await deferToThread(talk_tls, port_of(where), certificate, b"hello") == b""
        else:
            client = await connected(where)
            await until(lambda: limiter.active == 1)
            if how == "plain text":
                client.transport.write(b"GET / HTTP/1.0\r\n\r\n")
                await client.is_closed()
            elif how == "vanishes":
                client.transport.abortConnection()
            else:
                await client.close()
        await free_within_a_second(limiter)


@implementer(IHalfCloseableProtocol)
class AnsweringLate(Protocol):
    """
    Answers at length when its client has said all, closes its direction, and leaves the rest to the kernel.
    """

    answer = b"0123456789abcdef" * 262144

    def readConnectionLost(self) -> None:
        self.transport.write(self.answer)
        self.transport.loseWriteConnection()

    def writeConnectionLost(self) -> None: ...


@pytest.mark.parametrize("where", ["tcp", "unix"])
@ensureDeferred
async def test_an_answer_between_closed_directions_is_not_cut_off_and_its_slot_is_free_then(
    where: str, tmp_path: Path
) -> None:
    limiter = Limiter(1)
    where = f"unix:{tmp_path / 'socket'}" if where == "unix" else "tcp:0:interface=127.0.0.1"
    async with listening(limiter, where, Factory.forProtocol(AnsweringLate)) as (_, where):
        if where.startswith("unix:"):
            client = socket.socket(socket.AF_UNIX)
            client.connect(where.removeprefix("unix:"))
        else:
            client = socket.create_connection(("127.0.0.1", port_of(where)))
        client.shutdown(socket.SHUT_WR)
        other = await connected(where)
        await until(lambda: limiter.waiting == 1)

        def read_slowly() -> bytes:
            received, has_slept = bytearray(), False
            while chunk := client.recv(65536):
                received += chunk
                if len(received) > len(AnsweringLate.answer) - 2_000_000 and not has_slept:
                    has_slept = True
                    time.sleep(2.5)  # longer than from one look to the next
            return bytes(received)

        assert await patiently(deferToThread(read_slowly)) == AnsweringLate.answer
        client.close()
        await until(lambda: limiter.waiting == 0)
        assert limiter.snapshot().finished == 1
        await other.close()
