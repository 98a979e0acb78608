"""
The site that no client can use up.
"""

from __future__ import annotations

from collections.abc import Callable

from support.clocks import TurnsClock
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request

from connlimit._system import descriptors
from connlimit.status.guarded_site import (
    MAX,
    MAX_PER_PEER,
    READ_TIMEOUT,
    REQUEST_TIMEOUT,
    GuardedSite,
    is_near,
)

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Transport(StringTransport):
    """
    A transport whose client reads when it is told to.
    """

    size = 0

    def __init__(self, address: object) -> None:
        super().__init__(peerAddress=address)
        self.aborted = False

    def write(self, data: bytes) -> None:
        super().write(data)
        self.size += len(data)
        if self.size > 2**16 and self.producer is not None:
            self.producer.pauseProducing()

    def read(self) -> None:
        self.size = 0
        self.producer.resumeProducing()

    def abortConnection(self) -> None:
        self.aborted = True
        self.protocol.connectionLost(Failure(ConnectionAbortedError()))

    def loseConnection(self) -> None:
        super().loseConnection()
        if self.size == 0:
            self.protocol.connectionLost(Failure(ConnectionAbortedError()))


class Page(Resource):
    """
    Answers with so many bytes, or not at all.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.size = 10
        self.when_asked: Callable[[], object] = lambda: None

    def render(self, request: Request) -> object:
        self.asked += 1
        self.when_asked()
        return b"x" * self.size if self.size else NOT_DONE_YET


class SiteTests(SynchronousTestCase):
    """
    Whatever one client does, others are answered.
    """

    def setUp(self) -> None:
        self.clock = TurnsClock()
        self.page = Page()
        self.site = GuardedSite(self.page, self.clock)

    def connect(self, host: str | None = "127.0.0.1") -> Transport:
        address = UNIXAddress(b"/x") if host is None else IPv4Address("TCP", host, 1)
        transport = Transport(address)
        transport.protocol = self.site.buildProtocol(address)
        transport.protocol.makeConnection(transport)
        return transport

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.clock.advance(self.clock.turn)

    def test_requests_of_one_connection_are_answered_in_turns(self) -> None:
        client = self.connect()
        client.protocol.dataReceived(GET * 50)
        for expected in range(1, 50):
            self.turns(2)
            self.assertEqual(self.page.asked, expected)
        self.turns(10)
        self.assertEqual(client.value().count(b"200 OK"), 50)

    def test_one_is_answered_in_each_turn_however_many_ask(self) -> None:
        clients = [self.connect() for _ in range(20)]
        for client in clients:
            client.protocol.dataReceived(GET)
        for expected in range(1, 20):
            self.turns(1)
            self.assertEqual(self.page.asked, expected)

    def test_nothing_is_read_while_an_answer_is_not_sent(self) -> None:
        self.page.size = 70_000
        client = self.connect()
        client.protocol.dataReceived(GET * 1000)
        self.turns(20)
        self.assertEqual(self.page.asked, 1)
        self.assertEqual(client.producerState, "paused")
        client.read()
        self.turns(5)
        self.assertEqual(self.page.asked, 2)

    def test_a_client_that_never_reads_its_answer_is_given_up(self) -> None:
        self.page.size = 70_000
        client = self.connect()
        client.protocol.dataReceived(GET)
        self.turns(2)
        self.clock.advance(READ_TIMEOUT - 1)
        self.assertFalse(client.aborted)
        self.clock.advance(1)
        self.assertTrue(client.aborted)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_connection_that_is_to_close_and_is_not_read_is_given_up(self) -> None:
        self.page.size = 60_000
        client = self.connect()
        client.protocol.dataReceived(b"GET / HTTP/1.0\r\n\r\n")
        self.turns(3)
        self.assertTrue(client.disconnecting)
        self.clock.advance(READ_TIMEOUT)
        self.assertTrue(client.aborted)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_header_that_drips_gets_no_more_time(self) -> None:
        client = self.connect()
        for byte in range(REQUEST_TIMEOUT):
            self.assertFalse(client.disconnecting)
            client.protocol.dataReceived(GET[byte : byte + 1])
            self.clock.advance(1)
        self.assertTrue(client.disconnecting)

    def test_each_request_of_a_connection_has_its_time(self) -> None:
        client = self.connect()
        for expected in range(1, 4):
            self.clock.advance(REQUEST_TIMEOUT - 1)
            client.protocol.dataReceived(GET)
            self.turns(3)
            self.assertEqual(client.value().count(b"200 OK"), expected)
        self.clock.advance(REQUEST_TIMEOUT)
        self.assertTrue(client.disconnecting)

    def test_bodies_are_not_taken(self) -> None:
        for header in (b"Content-Length: 1000000", b"Transfer-Encoding: chunked"):
            client = self.connect()
            client.protocol.dataReceived(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n" + header)
            client.protocol.dataReceived(b"\r\n\r\nfff\r\n" + b"x" * 1000)
            self.turns(3)
            self.assertTrue(client.value().startswith(b"HTTP/1.1 413 "))
            self.assertEqual(client.value().count(b"HTTP"), 1)
            self.assertTrue(client.disconnecting)
        self.assertEqual(self.page.asked, 0)

    def test_too_many_headers_and_too_long_ones_are_not_taken(self) -> None:
        for headers in (b"a: b\r\n" * 101, b"a: " + b"b" * 17_000 + b"\r\n", b" x" * 10_000):
            client = self.connect()
            client.protocol.dataReceived(b"GET / HTTP/1.1\r\n" + headers + b"\r\n")
            self.turns(3)
            self.assertTrue(client.disconnecting)
        self.assertEqual(self.page.asked, 0)

    def test_whoever_comes_takes_the_place_of_the_longest_idle(self) -> None:
        clients = [self.connect() for _ in range(MAX)]
        clients[0].protocol.dataReceived(GET)
        self.turns(3)
        self.connect()
        self.assertEqual([client.disconnecting for client in clients[:3]], [False, True, False])

    def test_one_that_is_being_answered_keeps_its_place(self) -> None:
        self.page.size = 0
        clients = [self.connect() for _ in range(MAX)]
        for client in clients:
            client.protocol.dataReceived(GET)
        self.turns(MAX)
        self.assertTrue(self.connect().disconnecting)
        self.assertFalse(any(client.disconnecting for client in clients))
        clients[5].abortConnection()
        self.assertFalse(self.connect().disconnecting)

    def test_one_peer_takes_its_own_places_and_not_those_of_loopback(self) -> None:
        near, other = self.connect(), self.connect("192.0.2.1")
        crowd = [self.connect("192.0.2.2") for _ in range(100)]
        self.assertEqual(sum(not client.disconnecting for client in crowd), MAX_PER_PEER)
        self.assertFalse(near.disconnecting)
        self.assertFalse(other.disconnecting)

    def test_many_peers_take_the_places_of_one_another_only(self) -> None:
        near = self.connect(None)
        crowd = [self.connect(f"192.0.2.{number}") for number in range(200)]
        self.assertEqual(sum(not client.disconnecting for client in crowd), MAX)
        self.assertFalse(near.disconnecting)
        for client in crowd:
            if not client.disconnecting:
                client.abortConnection()
        self.assertEqual(self.site._peers, {})

    def test_the_only_connection_of_a_peer_makes_room_for_its_next(self) -> None:
        crowd = [self.connect(f"192.0.2.{number}") for number in range(MAX)]
        again = self.connect("192.0.2.0")
        self.assertTrue(crowd[0].disconnecting)
        again.abortConnection()
        self.assertEqual(len(self.site._peers), MAX - 1)

    def test_one_that_gives_way_and_does_not_read_is_ended(self) -> None:
        self.page.size = 60_000
        first = self.connect()
        first.protocol.dataReceived(GET)
        self.turns(3)
        for _ in range(MAX):
            self.connect()
        self.assertTrue(first.disconnecting)
        self.clock.advance(1)
        self.assertTrue(first.aborted)

    def test_all_together_take_their_share_of_the_descriptors(self) -> None:
        self.patch(descriptors, "limit", lambda: 256)
        crowd = [self.connect() for _ in range(50)] + [self.connect(f"192.0.2.{each}") for each in range(50)]
        self.assertEqual(sum(not client.disconnecting for client in crowd), descriptors.share(256))

    def test_when_descriptors_run_short_a_new_one_takes_the_place_of_another(self) -> None:
        first = self.connect()
        self.patch(descriptors, "left_in_reserve", lambda: False)
        second = self.connect()
        self.assertTrue(first.disconnecting)
        self.assertFalse(second.disconnecting)
        self.assertTrue(self.connect("192.0.2.1").disconnecting)

    def test_a_client_that_leaves_before_its_turn_is_not_answered(self) -> None:
        client = self.connect()
        client.protocol.dataReceived(GET)
        client.abortConnection()
        self.turns(3)
        self.assertEqual(self.page.asked, 0)

    def test_an_answer_that_fails_does_not_stop_the_others(self) -> None:
        def fail() -> None:
            self.page.when_asked = lambda: None
            raise ValueError("no")

        self.page.when_asked = fail
        clients = [self.connect() for _ in range(2)]
        for client in clients:
            client.protocol.dataReceived(GET)
        self.turns(4)
        self.assertIn(b"500 Internal", clients[0].value())
        self.assertNotIn(b"Traceback", clients[0].value())
        self.assertIn(b"200 OK", clients[1].value())
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)

    def test_it_closes_all(self) -> None:
        clients = [self.connect(), self.connect("192.0.2.1")]
        self.site.close()
        self.assertTrue(all(client.disconnecting for client in clients))

    def test_inside_tls_it_speaks_http_1(self) -> None:
        self.assertEqual(self.site.acceptableProtocols(), [b"http/1.1"])


def test_near_is_what_is_on_this_machine() -> None:
    near = ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")
    assert all(is_near(IPv4Address("TCP", host, 1)) for host in near)
    assert not any(is_near(IPv4Address("TCP", host, 1)) for host in ("192.0.2.1", "2001:db8::1", "odd"))
    assert is_near(UNIXAddress(b"/x"))
