"""
A relay: nothing is lost, nothing piles up, and each side hears of the other's end.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.clients import read_all
from support.logs import Log
from support.patience import PATIENCE
from support.programs import running
from support.sockets import Client, connected, listening, patiently, until
from twisted.internet import reactor, task
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint, clientFromString, serverFromString
from twisted.internet.error import ConnectionDone, ConnectionLost, ConnectionRefusedError
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import capturedLogs
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from connlimit import Limiter
from connlimit._system.sockets import is_dead, unsent
from connlimit._twistd.targets import splice
from connlimit._twistd.targets.relay import RelayFactory
from connlimit._twistd.targets.relay_options import RelayOptions

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
    was_reset = False

    def connectionLost(self, reason: Failure) -> None:
        self.was_reset = reason.check(ConnectionLost) is not None
        super().connectionLost(reason)

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
async def relayed(
    most: int | None = None, backend_at: str = LOCAL, **options: object
) -> AsyncIterator[Relayed]:
    """
    A relay with so many slots, whose clients and backends end with the context.
    """
    backend = Backend()
    port = await serverFromString(reactor, backend_at).listen(backend)
    host = port.getHost()
    target = f"tcp:127.0.0.1:{host.port}" if hasattr(host, "port") else f"unix:{host.name.decode()}"
    limiter = Limiter(most)
    relay = RelayFactory(clientFromString(reactor, target), target, RelayOptions(**options))
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
        with capturedLogs() as events:
            for _ in range(50):
                await (await connected(where)).is_closed()
            await until(lambda: limiter.active == 0)
        assert not [event for event in events if event["log_namespace"].startswith("connlimit")]
        backend = Backend()
        port = await TCP4ServerEndpoint(reactor, number, interface="127.0.0.1").listen(backend)
        with Log() as log:
            client = await connected(where)
            client.transport.write(b"now it is up")
            await until(lambda: backend.peers)
            await backend.peers[0].receives(b"now it is up")
        (line,) = log.texts()
        assert line.startswith(f"{target} can be reached again, after 51 connections")
        await client.close()
        await until(lambda: backend.peers[0].ended)
        backend.peers[0].transport.loseConnection()
        await port.stopListening()
        await until(lambda: limiter.active == 0)


@ensureDeferred
async def test_a_reset_by_either_side_reaches_the_other_as_a_reset() -> None:
    async with relayed(1) as relay:
        for resetting in (0, 1):
            ends = await relay.pair()
            ends[resetting].transport.write(b"the beginning of")
            await ends[1 - resetting].receives(b"the beginning of")
            ends[resetting].transport.abortConnection()
            await ends[1 - resetting].is_closed()
            assert ends[1 - resetting].was_reset
            assert not ends[1 - resetting].ended
            await until(lambda: relay.limiter.active == 0)


@ensureDeferred
async def test_what_came_before_a_reset_arrives_before_it() -> None:
    async with relayed(1) as relay:
        client, backend = await relay.pair()
        client.transport.pauseProducing()
        answer = b"x" * 500_000
        backend.transport.write(answer)
        await until(lambda: not unsent(backend.transport))
        backend.transport.abortConnection()
        # The client reads nothing, and its slot is free all the same.
        await until(lambda: relay.limiter.active == 0)
        client.transport.resumeProducing()
        await client.receives(answer)
        await client.is_closed()
        assert client.was_reset


@ensureDeferred
async def test_a_backend_that_has_answered_and_closed_frees_the_slot_before_the_client_closes() -> None:
    async with relayed(2, client_fin_timeout=0.1) as relay:
        pooled = [await relay.pair() for _ in range(2)]
        for client, backend in pooled:
            backend.transport.write(b"answer")
            backend.transport.loseConnection()
            await client.receives(b"answer")
        _, backend = await relay.pair()
        backend.transport.write(b"next")
        assert all(client.ended for client, _ in pooled)


@ensureDeferred
async def test_a_client_that_goes_on_speaking_after_the_backends_last_word_is_not_cut_off() -> None:
    async with relayed(1, client_fin_timeout=0.2) as relay:
        client, backend = await relay.pair()
        backend.transport.loseWriteConnection()
        for number in range(1, 16):
            client.transport.write(b"x")
            await backend.receives(b"x" * number)
            await task.deferLater(reactor, 0.05)
        client.transport.loseWriteConnection()
        await until(lambda: relay.limiter.active == 0)
        assert backend.ended


@ensureDeferred
async def test_a_backend_that_never_answers_a_client_that_has_said_all_is_given_up() -> None:
    async with relayed(1, server_fin_timeout=0.2) as relay:
        client, backend = await relay.pair()
        client.transport.write(b"question")
        client.transport.loseWriteConnection()
        await until(lambda: backend.ended)
        for number in range(1, 16):
            backend.transport.write(b"x")
            await client.receives(b"x" * number)
            await task.deferLater(reactor, 0.05)
        await client.is_closed()
        assert client.was_reset
        await until(lambda: is_dead(backend.transport))
        assert relay.limiter.active == 0


@ensureDeferred
async def test_a_reset_is_noticed_while_the_backend_works_on_the_last_word_of_the_client() -> None:
    async with relayed(1, server_fin_timeout=1000) as relay:
        client, backend = await relay.pair()
        client.transport.loseWriteConnection()
        await until(lambda: backend.ended)
        client.transport.abortConnection()
        await until(lambda: relay.limiter.active == 0)


class HungBackend:
    """
    A server that accepts and never reads, and counts its connections by the kernel's word alone.

    :ivar live: the sockets of those that are there.
    :ivar most: how many there were at the most.
    :ivar accepted: how many there were in all.
    """

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.where = f"tcp:127.0.0.1:{self.listener.getsockname()[1]}"
        self.live: dict[int, socket.socket] = {}
        self.most = self.accepted = 0

    def __enter__(self) -> HungBackend:
        self._epoll = select.epoll()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join(PATIENCE)
        self.listener.close()
        self._epoll.close()
        for each in self.live.values():
            each.close()

    def _run(self) -> None:
        self.listener.settimeout(0.01)
        while not self._stopped.is_set():
            try:
                connection, _ = self.listener.accept()
            except TimeoutError:
                self._bury()
                continue
            self._epoll.register(connection, 0)  # the end of both directions is always told
            self.live[connection.fileno()] = connection
            self.accepted += 1
            self._bury()
            self.most = max(self.most, len(self.live))

    def _bury(self) -> None:
        for descriptor, _ in self._epoll.poll(0):
            self._epoll.unregister(descriptor)
            self.live.pop(descriptor).close()


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="counts by epoll")
@pytest.mark.parametrize("size", [0, 1_000, 12_000_000])
@ensureDeferred
async def test_a_hung_backend_never_has_more_connections_than_slots(size: int) -> None:
    rounds, at_once = (8, 12) if size < 10_000_000 else (2, 6)
    limiter = Limiter(5)
    with HungBackend() as backend:
        relay = RelayFactory(clientFromString(reactor, backend.where), backend.where)
        async with listening(limiter, server=relay) as (_, where):
            for _ in range(rounds):
                known = backend.accepted
                clients = [await connected(where) for _ in range(at_once)]
                for client in clients:
                    client.transport.write(bytes(size))
                await until(lambda known=known: backend.accepted >= known + 5)
                if size > 10_000_000:
                    # Until nothing moves any more, and nobody reads from the clients.
                    await until(lambda clients=clients: all(unsent(each.transport) for each in clients))
                for client in clients:
                    client.transport.abortConnection()
                await until(lambda: limiter.active == 0)
            await until(lambda: not backend.live)
        assert backend.most == 5


@ensureDeferred
async def test_a_client_that_leaves_while_the_backend_connects_frees_its_slot_at_once() -> None:
    backends = []

    class Blackhole:
        def connect(self, factory: Factory) -> Deferred[object]:
            backends.append(PendingBackend())
            return backends[-1].connect(factory)

    limiter = Limiter(1)
    async with listening(limiter, server=RelayFactory(Blackhole(), "blackhole")) as (_, where):
        for leave in ("abortConnection", "loseConnection"):
            client = await connected(where)
            await until(lambda: limiter.active == 1)
            getattr(client.transport, leave)()
            await until(lambda: limiter.active == 0)
            assert backends[-1].cancelled
        # One that has said something wants it delivered.
        client = await connected(where)
        client.transport.write(b"last word")
        client.transport.loseConnection()
        await until(lambda: len(backends) == 3)
        await task.deferLater(reactor, 0.1)
        assert limiter.active == 1
        backends[-1].connecting.cancel()
        await until(lambda: limiter.active == 0)


@ensureDeferred
async def test_without_a_pipe_everything_goes_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    splice._pipe.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pipe2", fail)
        async with relayed() as relay:
            client, backend = await relay.pair()
            client.transport.write(b"question")
            await backend.receives(b"question")
            backend.transport.write(b"x" * 3_000_000)
            await client.receives(b"x" * 3_000_000)


def test_a_forked_process_has_a_pipe_of_its_own() -> None:
    if not hasattr(os, "fork") or not hasattr(os, "splice"):
        pytest.skip("there is no fork, or no splice")
    code = (
        "import os; from connlimit._twistd.targets import splice\n"
        "mine = os.fstat(splice._pipe()[0]).st_ino\n"
        "if os.fork(): raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "os._exit(os.fstat(splice._pipe()[0]).st_ino == mine)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE).returncode == 0


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
        self.clock = Clock()
        self.relay = RelayFactory(self.backend, "backend", clock=self.clock)
        self.client = self.relay.buildProtocol(None)
        self.released: list[None] = []
        self.client.keep_slot(lambda: self.released.append(None))
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
        for consumer, producer in ((self.transport, backend), (backend, self.transport)):
            self.assertTrue(consumer.streaming)
            consumer.producer.pauseProducing()
            self.assertEqual(producer.producerState, "paused")
            consumer.producer.resumeProducing()
            self.assertEqual(producer.producerState, "producing")

    def test_a_client_that_leaves_while_it_connects_cancels_the_connecting(self) -> None:
        self.client.connectionLost(Failure(ConnectionRefusedError()))
        self.assertTrue(self.backend.cancelled)
        self.assertFalse(self.transport.disconnecting)

    def test_what_arrives_before_the_backend_is_connected_is_kept(self) -> None:
        self.client.dataReceived(b"early ")
        self.client.dataReceived(b"words")
        self.assertEqual(self.answer().value(), b"early words")

    def test_a_backend_that_takes_too_long_is_given_up(self) -> None:
        with Log() as log:
            self.clock.pump([0.05, 4.9])
            self.assertFalse(self.backend.cancelled)
            self.clock.advance(0.05)
        self.assertEqual(len(log.texts()), 1)
        self.assertIn("it did not answer within 5 s", log.texts()[0])
        self.assertTrue(self.backend.cancelled)
        self.assertTrue(self.transport.disconnecting)
        self.assertEqual(len(self.released), 1)

    def test_nothing_is_timed_any_more_when_all_is_over(self) -> None:
        self.answer()
        self.client.readConnectionLost()
        self.assertTrue(self.clock.getDelayedCalls())
        self.client.other.connectionLost(Failure(ConnectionDone()))
        self.client.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(len(self.released), 1)

    def test_the_slot_is_free_when_the_backend_is_gone_and_the_client_still_takes_the_rest(self) -> None:
        self.answer()
        self.client.other.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(len(self.released), 1)
        self.assertTrue(self.transport.disconnecting)
        self.client.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(len(self.released), 1)

    def test_a_client_that_takes_the_rest_has_its_slot_until_it_has_it_when_nobody_can_come_any_more(
        self,
    ) -> None:
        self.answer()
        self.relay.doStart()
        self.relay.doStop()
        self.client.other.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(self.released, [])
        self.client.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(len(self.released), 1)

    def test_no_more_clients_take_the_rest_without_a_slot_than_descriptors_allow(self) -> None:
        self.answer()
        self.relay.lingering = 1000
        self.client.other.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(self.released, [])
        self.client.connectionLost(Failure(ConnectionDone()))
        self.assertEqual((len(self.released), self.relay.lingering), (1, 1000))

    def test_the_slot_is_not_free_before_the_backend_is_gone(self) -> None:
        backend = self.answer()
        backend_end = self.client.other
        self.client.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(self.released, [])
        self.assertTrue(backend.disconnecting)
        backend_end.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(len(self.released), 1)

    def test_a_backend_that_takes_nothing_of_a_client_that_is_gone_is_reset(self) -> None:
        backend = self.answer()
        self.client.connectionLost(Failure(ConnectionDone()))
        self.assertFalse(backend.disconnected)
        self.clock.pump([0.25] * 4)
        self.assertTrue(backend.disconnected)

    def test_a_client_that_takes_nothing_of_the_rest_is_reset_in_the_end(self) -> None:
        self.answer()
        self.client.other.connectionLost(Failure(ConnectionDone()))
        self.clock.pump([1.0] * 55)
        self.assertFalse(self.transport.disconnected)
        self.clock.pump([1.0] * 10)
        self.assertTrue(self.transport.disconnected)

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


def test_inside_tls_a_truncated_answer_does_not_end_like_a_whole_one(certificate: Path) -> None:
    def answer(connection: socket.socket) -> None:
        if connection.recv(10) == b"all of it":
            connection.sendall(b"whole")
            return
        connection.sendall(b"truncated")
        time.sleep(0.2)  # so that it arrives: a reset takes what is on its way
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    context = ssl.create_default_context(cafile=str(certificate))
    for question in (b"all of it", b"a part"):
        with (
            backend_thread(answer) as backend,
            running(
                "connlimit",
                *("--listen", f"ssl:0:interface=127.0.0.1:privateKey={certificate}:certKey={certificate}"),
                *("--forward", backend, "--max-connections", "5"),
            ) as program,
            socket.create_connection(("127.0.0.1", program.port()), PATIENCE) as raw,
            context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False) as client,
        ):
            client.sendall(question)
            if question == b"all of it":
                assert read_all(client) == b"whole"
            else:
                with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
                    read_all(client)
