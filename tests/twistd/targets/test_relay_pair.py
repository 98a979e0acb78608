"""
The two ends of a relayed connection: each side hears of the other's end, and the slot is free in time.
"""

from __future__ import annotations

import select
import socket
import threading

import pytest
from pytest_twisted import ensureDeferred
from support.patience import PATIENCE
from support.relays import RelayTestCase, client_gone, pytest_generate_tests, relayed, way  # noqa: F401  # for pytest
from support.sockets import connected, listening, until
from twisted.internet import reactor, task
from twisted.internet.endpoints import clientFromString
from twisted.internet.error import ConnectionDone, ConnectionRefusedError
from twisted.python.failure import Failure

from connlimit import Limiter
from connlimit._system.sockets import is_dead, unsent
from connlimit._twistd.targets.relay import RelayFactory


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
    :ivar maximum: how many there were at the most.
    :ivar accepted: how many there were in all.
    """

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.where = f"tcp:127.0.0.1:{self.listener.getsockname()[1]}"
        self.live: dict[int, socket.socket] = {}
        self.maximum = self.accepted = 0

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
            self.maximum = max(self.maximum, len(self.live))

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
        assert backend.maximum == 5


class PairTests(RelayTestCase):
    """
    What becomes of one side, and of the slot, when the other is over.
    """

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
