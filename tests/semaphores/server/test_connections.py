"""
One client's connection to the server of semaphores, event by event.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

pytest.importorskip("httptools")

from connlimit.semaphores.server.site import SemaphoreSite
from connlimit.semaphores.server.state import State
from connlimit.semaphores.server.store import MemoryStore

#: Seconds that a turn of the reactor takes.
TURN = 2.0**-20

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class Transport(StringTransport):
    """
    A transport that does not close at once.

    :ivar aborted: whether it was told to.
    """

    aborted = False

    def abortConnection(self) -> None:
        self.aborted = True
        super().abortConnection()

    def sent(self) -> bytes:
        """
        What was written since this was asked last.
        """
        data = self.value()
        self.clear()
        return data


class Turns(Clock):
    """
    Time in which what is to happen at once happens in the next turn, as in a reactor.
    """

    def callLater(self, when: float, what: Any, *arguments: Any, **named: Any) -> Any:
        return super().callLater(max(when, TURN), what, *arguments, **named)

    def turn(self) -> None:
        self.advance(TURN)


class Server:
    """
    A site with a clock of the test's, and its connections.
    """

    def __init__(self) -> None:
        self.clock = Turns()
        self.store = MemoryStore(State(), self.clock, self.clock.seconds)
        self.store.submit("configure", {"A": (1, 0)}, 1_000_000)
        self.site = SemaphoreSite(self.store, self.clock)
        self.site._seconds = self.clock.seconds

    def connect(self) -> tuple[Any, Transport]:
        connection, transport = self.site.buildProtocol(None), Transport()
        connection.makeConnection(transport)
        return connection, transport

    def go_on(self, seconds: float) -> None:
        """
        Let time go by, half a second at a time.
        """
        self.clock.pump([0.5] * int(seconds * 2))


@pytest.fixture
def server() -> Server:
    return Server()


def test_a_head_that_drips_is_told_that_it_is_late_and_cut_off(server: Server) -> None:
    connection, transport = server.connect()
    for byte in HEALTH[:3]:
        connection.dataReceived(bytes([byte]))
        server.go_on(5)
    assert transport.sent() == b""
    server.go_on(6)
    assert transport.sent().startswith(b"HTTP/1.1 408 ")
    server.go_on(3)
    assert transport.disconnecting


def test_a_body_that_drips_is_late_as_well(server: Server) -> None:
    connection, transport = server.connect()
    connection.dataReceived(b"POST /new_peer HTTP/1.1\r\nContent-Length: 100\r\n\r\n")
    for _ in range(21):
        connection.dataReceived(b" ")
        server.go_on(1)
    assert transport.sent().startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_says_nothing_is_closed_and_one_that_is_kept_has_longer(server: Server) -> None:
    connection, transport = server.connect()
    server.go_on(19)
    assert not transport.disconnecting
    server.go_on(2)
    assert transport.disconnecting
    assert transport.sent() == b""
    connection, transport = server.connect()
    for _ in range(3):
        connection.dataReceived(HEALTH)
        server.go_on(50)
        assert not transport.disconnecting
    server.go_on(11)
    assert transport.disconnecting


def test_the_next_request_is_late_by_its_own_first_byte(server: Server) -> None:
    connection, transport = server.connect()
    connection.dataReceived(HEALTH)
    transport.sent()
    server.go_on(40)
    connection.dataReceived(HEALTH[:5])
    server.go_on(19)
    assert transport.sent() == b""
    server.go_on(2)
    assert transport.sent().startswith(b"HTTP/1.1 408 ")


def test_a_request_that_waits_for_its_lock_is_never_late(server: Server) -> None:
    server.store.submit("new_peer", 1, 1e6)
    server.store.submit("new_peer", 2, 1e6)
    server.store.submit("acquire", 1, "A", 1, None)
    connection, transport = server.connect()
    connection.dataReceived(
        b"PUT /peers/2/A?block_for=1h HTTP/1.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1\r\n\r\n1"
    )
    server.go_on(3000)
    assert transport.sent() == b""
    server.store.submit("release", 1, "A")
    server.go_on(1)
    assert transport.sent().startswith(b"HTTP/1.1 200 ")


def test_who_sends_more_while_its_request_waits_may_wait_a_minute(server: Server) -> None:
    server.store.submit("new_peer", 1, 1e6)
    server.store.submit("new_peer", 2, 1e6)
    server.store.submit("acquire", 1, "A", 1, None)
    acquire = (
        b"PUT /peers/2/A?block_for=%ds HTTP/1.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1\r\n\r\n1"
    )
    patient, transport = server.connect()
    patient.dataReceived(acquire % 50)
    patient.dataReceived(HEALTH)
    server.go_on(51)
    assert transport.sent().endswith(b"Ok")
    assert transport.producerState == "producing"
    server.go_on(55)
    assert not transport.disconnecting
    # Nothing is read of one that waits longer, so it cannot be seen whether it is there still.
    gone, transport = server.connect()
    gone.dataReceived(acquire % 3600)
    gone.dataReceived(HEALTH)
    server.go_on(59)
    assert not transport.aborted
    server.go_on(2)
    assert transport.aborted
    assert len(server.site._polls) == 1
    gone.connectionLost()
    assert len(server.site._polls) == 0


def test_who_goes_away_while_waiting_leaves_nothing_but_the_place(server: Server) -> None:
    server.store.submit("new_peer", 1, 1e6)
    server.store.submit("acquire", 1, "A", 1, None)
    for peer in range(2, 50):
        server.store.submit("new_peer", peer, 1e6)
        connection, _ = server.connect()
        connection.dataReceived(
            b"PUT /peers/%d/A?block_for=1h HTTP/1.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1\r\n\r\n1" % peer
        )
        connection.connectionLost()
    assert len(server.site._polls) == 0
    assert server.site._in_flight == 0
    server.go_on(1)
    assert not server.clock.getDelayedCalls()[1:]  # but for the expiry of the peers
    server.store.submit("remove", 1)
    assert server.store.submit("is_acquired", 2)


def test_who_does_not_read_is_not_read_and_cut_off_in_the_end(server: Server) -> None:
    connection, transport = server.connect()
    connection.pauseProducing()
    assert transport.producerState == "paused"
    connection.dataReceived(HEALTH)
    server.go_on(59)
    assert transport.sent() == b""
    connection.resumeProducing()
    server.go_on(1)
    assert transport.sent().endswith(b"Ok")
    assert transport.producerState == "producing"
    connection.pauseProducing()
    server.go_on(61)
    assert transport.aborted


def test_who_does_not_let_itself_be_closed_is_cut_off(server: Server) -> None:
    connection, transport = server.connect()
    connection.dataReceived(b"GET /health HTTP/1.0\r\n\r\n")
    assert transport.disconnecting
    assert transport.producer is None
    server.go_on(61)
    assert transport.aborted


def test_requests_that_come_together_are_answered_one_in_each_turn(server: Server) -> None:
    connection, transport = server.connect()
    connection.dataReceived(HEALTH * 100)
    for _ in range(100):
        assert transport.sent().count(b"Ok") == 1
        server.clock.turn()
    assert transport.sent() == b""


def test_all_peers_are_listed_in_slices_as_they_are_read(server: Server) -> None:
    for peer in range(100_000):
        server.store.submit("new_peer", peer, 1e6)
    connection, transport = server.connect()
    slices, longest = [], 0.0
    connection.dataReceived(b"GET /peers/ HTTP/1.1\r\n\r\n")
    connection.pauseProducing()
    server.clock.turn()
    assert len(transport.value()) < 100_000
    # Those that go meanwhile are not listed.
    server.store.submit("remove", 99_999)
    connection.resumeProducing()
    while not transport.value().endswith(b"0\r\n\r\n"):
        slices.append(transport.sent())
        began = time.perf_counter()
        server.clock.turn()
        longest = max(longest, time.perf_counter() - began)
    slices.append(transport.sent())
    head, _, chunks = b"".join(slices).partition(b"\r\n\r\n")
    assert b"\r\nTransfer-Encoding: chunked\r\n" in head
    body = b""
    while not chunks.startswith(b"0\r\n"):
        size, _, chunks = chunks.partition(b"\r\n")
        body, chunks = body + chunks[: int(size, 16)], chunks[int(size, 16) + 2 :]
    assert [each["id"] for each in json.loads(body)] == list(range(99_999))
    assert len(slices) > 200
    assert longest < 0.5


def test_a_large_page_is_the_same_for_all_who_read_it_slowly(server: Server) -> None:
    server.store.submit("configure", {f"{number} {'x' * 50}": (1, 0) for number in range(5000)}, None)
    clients = [server.connect() for _ in range(100)]
    for connection, _ in clients:
        connection.dataReceived(b"GET /metrics HTTP/1.1\r\n\r\n")
        server.clock.turn()
        connection.pauseProducing()
    assert sum(len(transport.value()) for _, transport in clients) < 100 * 150_000
    assert len({id(pieces) for _, pieces in server.site._shared._made.values()}) == 1
