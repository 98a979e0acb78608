"""
A relay: nothing is lost, nothing piles up, and each side hears of the other's end.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from sockets import Client, connected, listening, patiently, until
from support import PATIENCE, read_all, running
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint, clientFromString, serverFromString
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory
from twisted.internet.testing import StringTransport
from twisted.logger import capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from connlimit import Limiter
from connlimit._forward import RelayFactory

LOCAL = "tcp:0:interface=127.0.0.1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.fixturenames.append("way")
    metafunc.parametrize("way", ["in the kernel", "in Python"], indirect=True)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """
    Both ways in which bytes are moved, here and in programs that are run.
    """
    if request.param == "in Python":
        monkeypatch.delattr("os.splice", raising=False)
        (tmp_path / "sitecustomize.py").write_text("import os\nif hasattr(os, 'splice'): del os.splice\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@implementer(IHalfCloseableProtocol)
class Peer(Client):
    """
    A client or a backend that keeps its direction open when the other side closes its own.
    """

    ended = False

    def readConnectionLost(self) -> None:
        self.ended = True

    def writeConnectionLost(self) -> None:
        pass


class Backend(Factory):
    """
    A server whose connections are driven by the test.
    """

    noisy = False

    def __init__(self) -> None:
        self.peers: list[Peer] = []

    def buildProtocol(self, addr: object) -> Peer:
        self.peers.append(Peer())
        return self.peers[-1]


class Relayed:
    """
    A limited relay before a backend.
    """

    def __init__(self, limiter: Limiter, backend: Backend, where: str) -> None:
        self.limiter = limiter
        self.backend = backend
        self.where = where

    async def connect(self) -> Peer:
        """
        A client of the relay.
        """
        endpoint = clientFromString(reactor, self.where)
        return await patiently(endpoint.connect(Factory.forProtocol(Peer)))

    async def pair(self) -> tuple[Peer, Peer]:
        """
        A client, and the backend's end of its relay.
        """
        known = len(self.backend.peers)
        client = await self.connect()
        await until(lambda: len(self.backend.peers) > known and self.backend.peers[-1].connected)
        return client, self.backend.peers[-1]


@asynccontextmanager
async def relayed(most: int | None = None, backend_at: str = LOCAL) -> AsyncIterator[Relayed]:
    """
    A relay with so many slots, whose clients and backends end with the context.
    """
    backend = Backend()
    port = await serverFromString(reactor, backend_at).listen(backend)
    host = port.getHost()
    target = f"tcp:127.0.0.1:{host.port}" if hasattr(host, "port") else f"unix:{host.name.decode()}"
    limiter = Limiter(most)
    relay = RelayFactory(clientFromString(reactor, target), target)
    async with listening(limiter, server=relay) as (_, where):
        try:
            yield Relayed(limiter, backend, where)
        finally:
            await port.stopListening()
            for peer in backend.peers:
                peer.transport.abortConnection()
    await until(lambda: all(peer.is_lost for peer in backend.peers))


@ensureDeferred
async def test_what_is_sent_arrives_on_the_other_side_in_both_directions() -> None:
    async with relayed() as relay:
        client, backend = await relay.pair()
        client.transport.write(b"question")
        await backend.receives(b"question")
        backend.transport.write(b"answer")
        await client.receives(b"answer")


@ensureDeferred
async def test_a_backend_on_a_unix_socket_is_reached(tmp_path: Path) -> None:
    async with relayed(backend_at=f"unix:{tmp_path / 'backend'}") as relay:
        client, backend = await relay.pair()
        client.transport.write(b"question")
        await backend.receives(b"question")


@ensureDeferred
async def test_the_backend_is_connected_only_at_the_clients_turn() -> None:
    async with relayed(1) as relay:
        first, _ = await relay.pair()
        second = await relay.connect()
        second.transport.write(b"patience")
        await until(lambda: relay.limiter.waiting == 1)
        assert len(relay.backend.peers) == 1
        first.transport.abortConnection()
        await until(lambda: len(relay.backend.peers) == 2)
        await relay.backend.peers[1].receives(b"patience")


@ensureDeferred
async def test_a_client_that_has_said_all_still_hears_the_answer() -> None:
    async with relayed() as relay:
        client, backend = await relay.pair()
        client.transport.write(b"question")
        client.transport.loseWriteConnection()
        await until(lambda: backend.ended)
        assert backend.received == b"question"
        backend.transport.write(b"late answer")
        await client.receives(b"late answer")
        backend.transport.loseConnection()
        await client_gone(relay, client)


@ensureDeferred
async def test_a_backend_that_has_said_all_still_hears_the_client() -> None:
    async with relayed() as relay:
        client, backend = await relay.pair()
        backend.transport.write(b"greeting")
        backend.transport.loseWriteConnection()
        await until(lambda: client.ended)
        client.transport.write(b"late question")
        await backend.receives(b"late question")
        client.transport.loseWriteConnection()
        await client_gone(relay, client)
        await until(lambda: backend.ended)


async def client_gone(relay: Relayed, client: Peer) -> None:
    """
    Wait until the relay has let go of its only client.
    """
    await until(lambda: client.ended or client.is_lost)
    client.transport.loseConnection()
    await until(lambda: relay.limiter.active == 0)


@ensureDeferred
async def test_a_big_answer_before_the_end_arrives_whole() -> None:
    async with relayed() as relay:
        client, backend = await relay.pair()
        answer = b"x" * 3_000_000
        backend.transport.write(answer)
        backend.transport.loseConnection()
        await client.receives(answer)
        await client_gone(relay, client)


@ensureDeferred
async def test_a_reset_of_either_side_ends_the_other_and_frees_the_slot() -> None:
    async with relayed(1) as relay:
        for resetting in (0, 1):
            ends = await relay.pair()
            ends[resetting].transport.abortConnection()
            other = ends[1 - resetting]
            await until(lambda other=other: other.ended or other.is_lost)
            other.transport.loseConnection()
            await until(lambda: relay.limiter.active == 0)
        assert relay.limiter.snapshot().finished == 2


@ensureDeferred
async def test_a_backend_that_is_down_closes_the_client_and_the_service_goes_on() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        number = reserved.getsockname()[1]
    target = f"tcp:127.0.0.1:{number}"
    limiter = Limiter(1)
    relay = RelayFactory(clientFromString(reactor, target), target)
    async with listening(limiter, server=relay) as (_, where):
        with capturedLogs() as events:
            client = await connected(where)
            await client.is_closed()
            await until(lambda: limiter.active == 0)
        (warning,) = [event for event in events if event["log_namespace"].startswith("connlimit")]
        assert warning["backend"] == target
        assert "log_failure" not in warning
        backend = Backend()
        port = await TCP4ServerEndpoint(reactor, number, interface="127.0.0.1").listen(backend)
        client = await connected(where)
        client.transport.write(b"now it is up")
        await until(lambda: backend.peers)
        await backend.peers[0].receives(b"now it is up")
        await client.close()
        await until(lambda: backend.peers[0].ended)
        backend.peers[0].transport.loseConnection()
        await port.stopListening()
        await until(lambda: limiter.active == 0)


class PendingBackend:
    """
    An endpoint that is still connecting, until the test says what comes of it.
    """

    def __init__(self) -> None:
        self.cancelled = False
        self.connecting: Deferred[object] = Deferred(lambda deferred: setattr(self, "cancelled", True))

    def connect(self, factory: Factory) -> Deferred[object]:
        self.factory = factory
        return self.connecting


class ConnectingTests(SynchronousTestCase):
    """
    The time between the client's turn and the backend's answer.
    """

    def setUp(self) -> None:
        self.backend = PendingBackend()
        self.client = RelayFactory(self.backend, "backend").buildProtocol(None)
        self.transport = StringTransport(peerAddress=IPv4Address("TCP", "127.0.0.1", 5))
        self.client.makeConnection(self.transport)

    def answer(self) -> StringTransport:
        """
        The backend accepts; returns the transport to it.
        """
        backend = self.backend.factory.buildProtocol(None)
        transport = StringTransport()
        backend.makeConnection(transport)
        self.backend.connecting.callback(backend)
        return transport

    def test_nothing_is_read_before_the_backend_is_connected(self) -> None:
        self.assertEqual(self.transport.producerState, "paused")
        self.answer()
        self.assertEqual(self.transport.producerState, "producing")

    def test_each_side_is_the_producer_of_the_other(self) -> None:
        backend = self.answer()
        self.assertIs(self.transport.producer, backend)
        self.assertIs(backend.producer, self.transport)
        self.assertTrue(backend.streaming)

    def test_a_client_that_leaves_while_it_connects_cancels_the_connecting(self) -> None:
        self.client.connectionLost(Failure(ConnectionRefusedError()))
        self.assertTrue(self.backend.cancelled)
        self.assertFalse(self.transport.disconnecting)

    def test_a_client_that_says_all_while_it_connects_is_closed(self) -> None:
        self.client.readConnectionLost()
        self.assertTrue(self.transport.disconnecting)

    def test_both_sides_are_closed_when_both_have_said_all(self) -> None:
        backend = self.answer()
        backend_end = self.client.other
        backend_end.readConnectionLost()
        # A transport that cannot half-close is closed.
        self.assertTrue(self.transport.disconnecting)
        self.assertIsNone(self.transport.producer)
        self.client.readConnectionLost()
        self.assertTrue(backend.disconnecting)
        self.client.connectionLost(Failure(ConnectionRefusedError()))
        self.client.dataReceived(b"late")
        backend_end.dataReceived(b"late")
        self.assertEqual((self.transport.value(), backend.value()), (b"", b""))


# A real process: how much goes through, and how much memory it takes.

CHUNK = bytes(range(256)) * 1024
GIB = 1 << 30
MIB = 1 << 20


@contextmanager
def backend_thread(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """
    A server in a thread, for one connection; yields its endpoint.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(PATIENCE)
                serve(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        thread.join(PATIENCE)
        assert not thread.is_alive()


def pour(connection: socket.socket, count: int) -> None:
    """
    Send so many bytes, and close that direction.
    """
    for _ in range(count // len(CHUNK)):
        connection.sendall(CHUNK)
    connection.shutdown(socket.SHUT_WR)


def drink(connection: socket.socket) -> int:
    """
    Receive until the end; returns how many bytes.
    """
    buffer = bytearray(1 << 18)
    total = 0
    while count := connection.recv_into(buffer):
        total += count
    return total


def both_ways(connection: socket.socket, count: int) -> int:
    """
    Send so many bytes while everything is received; returns how many bytes that was.
    """
    pouring = threading.Thread(target=pour, args=(connection, count))
    pouring.start()
    total = drink(connection)
    pouring.join(PATIENCE)
    return total


def test_a_gibibyte_goes_through_both_ways_at_once_without_piling_up() -> None:
    received = []
    all_received = threading.Event()

    def serve(connection: socket.socket) -> None:
        received.append(both_ways(connection, GIB))
        all_received.set()

    with (
        backend_thread(serve) as backend,
        running("connlimit", "--listen", LOCAL, "--forward", backend, "--max-connections=9") as program,
        socket.create_connection(("127.0.0.1", program.port()), PATIENCE) as client,
        sampled(program.resident_memory) as memory,
    ):
        received.append(both_ways(client, GIB))
        assert all_received.wait(PATIENCE)
    assert received == [GIB, GIB]
    assert max(memory) - memory[0] < 64 * MIB


@contextmanager
def sampled(measure: Callable[[], int]) -> Iterator[list[int]]:
    """
    What a measurement gives at first, every twentieth of a second, and at last.
    """
    values = [measure()]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.05):
            values.append(measure())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield values
        values.append(measure())
    finally:
        over.set()
        thread.join()


def test_a_reader_that_stops_reading_stops_the_writer_and_loses_nothing() -> None:
    sent = 0
    stalled = threading.Event()

    def write_until_it_stalls(connection: socket.socket) -> None:
        nonlocal sent
        connection.settimeout(1.0)
        try:
            while True:
                sent += connection.send(CHUNK)
        except TimeoutError:
            stalled.set()

    with (
        backend_thread(write_until_it_stalls) as backend,
        running("connlimit", "--listen", LOCAL, "--forward", backend, "--max-connections=9") as program,
        socket.create_connection(("127.0.0.1", program.port()), PATIENCE) as client,
    ):
        before = program.resident_memory()
        assert stalled.wait(PATIENCE)
        # What was taken is in the kernel's buffers, four of them, and not in the process.
        assert program.resident_memory() - before < 8 * MIB
        assert read_all(client) == (CHUNK * (sent // len(CHUNK) + 1))[:sent]
