"""
A relay: each client has a connection of its own to the backend, made at its turn.
"""

from __future__ import annotations

import socket
from pathlib import Path

from pytest_twisted import ensureDeferred
from support.logs import Log
from support.relays import Backend, PendingBackend, RelayTestCase, pytest_generate_tests, relayed, way  # noqa: F401  # for pytest
from support.sockets import connected, listening, until
from twisted.internet import reactor, task
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint, clientFromString
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.protocol import Factory
from twisted.logger import capturedLogs
from twisted.python.failure import Failure

from connlimit import Limiter
from connlimit._twistd.targets.relay import RelayFactory


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


class ConnectingTests(RelayTestCase):
    """
    The time between the client's turn and the backend's answer.
    """

    def test_nothing_is_read_before_the_backend_is_connected(self) -> None:
        self.assertEqual(self.transport.producerState, "paused")
        self.answer()
        self.assertEqual(self.transport.producerState, "producing")

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

    def test_a_client_that_says_all_while_it_connects_is_closed(self) -> None:
        self.client.readConnectionLost()
        self.assertTrue(self.transport.disconnecting)
