"""
Requests that take slots, wait, depart and end, in every order of events.
"""

from __future__ import annotations

import gc
from contextvars import ContextVar

from support.fakes import ApplicationError, FakeConnection
from support.web import RequestTestCase
from twisted.internet.task import Clock
from twisted.web import http
from twisted.web.resource import Resource
from zope.interface.verify import verifyObject

from connlimit.interfaces import IOccupant
from connlimit.observers import LimiterObserver

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


class Quick(Resource):
    """
    Answers at once.
    """

    isLeaf = True

    def render_GET(self, request: object) -> bytes:
        return b"quick"


class Failing(Resource):
    """
    Raises.
    """

    isLeaf = True

    def render_GET(self, request: object) -> bytes:
        raise ApplicationError


class SlotTests(RequestTestCase):
    """
    A slot is held from the end of the request to the end of the response.
    """

    def test_an_idle_connection_holds_none(self) -> None:
        self.limited(1)
        clients = self.connect(5)
        self.assert_counts(active=0)
        for client in clients * 3:
            self.ask(client)
            self.assert_counts(active=1, waiting=0)
            self.page.answer()
            self.assert_counts(active=0)
        self.assert_counts(finished=15, waits=0)

    def test_the_others_wait_unprocessed_and_are_served_in_the_order_of_their_arrival(self) -> None:
        self.limited(2)
        clients = self.connect(5)
        for number, client in enumerate(clients):
            self.ask(client, path=f"/{number}")
        self.assertEqual(self.page.paths, [b"/0", b"/1"])
        self.assert_counts(active=2, waiting=3)
        while self.page.requests:
            self.page.answer()
        self.assertEqual(self.page.paths, [b"/0", b"/1", b"/2", b"/3", b"/4"])
        self.assertEqual(self.page.most, 2)
        self.assertEqual([self.answers(client) for client in clients], [[b"200"]] * 5)
        self.assert_counts(active=0, waiting=0, finished=5, waits=3)

    def test_a_slow_head_or_upload_holds_none(self) -> None:
        self.limited(1)
        head, body, chunked, quick = self.connect(4)
        head.send(b"GET / HTTP/1.1\r\nHost:")
        body.send(b"POST /body HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n01234")
        chunked.send(b"POST /chunks HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n")
        self.turn()
        self.assert_counts(accepted=0)
        self.ask(quick)
        self.assert_counts(active=1)
        body.send(b"56789")
        chunked.send(b"5\r\n56789\r\n0\r\n\r\n")
        self.turn()
        self.assert_counts(active=1, waiting=2)
        for _ in range(3):
            self.page.answer()
        self.assertEqual(self.page.bodies, [b"", b"0123456789", b"0123456789"])

    def test_pipelined_requests_are_answered_in_their_order_one_at_a_time(self) -> None:
        self.limited(3)
        (client,) = self.connect()
        client.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n" % number for number in range(5)))
        self.turn()
        for number in range(5):
            self.assert_counts(active=1, waiting=0)
            self.page.answer(body=b"answer %d" % number)
        self.assertEqual(self.page.paths, [b"/%d" % number for number in range(5)])
        positions = [client.received.index(b"answer %d" % number) for number in range(5)]
        self.assertEqual(positions, sorted(positions))

    def test_a_pipelining_client_does_not_overtake_the_queue(self) -> None:
        self.limited(1)
        pipelining, other = self.connect(2)
        pipelining.send(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n" * 2)
        self.turn()
        self.ask(other, path="/b")
        for _ in range(3):
            self.page.answer()
        self.assertEqual(self.page.paths, [b"/a", b"/b", b"/a"])

    def test_a_pipelined_request_finds_the_slot_of_the_one_before_free(self) -> None:
        self.limited(1, max_waiting=0)
        (client,) = self.connect()
        client.send(GET * 2)
        self.turn()
        self.page.answer()
        self.page.answer()
        self.assertEqual(self.answers(client), [b"200", b"200"])

    def test_http_1_0_is_answered_and_closed_as_ever(self) -> None:
        self.limited(1)
        clients = self.connect(2)
        for client in clients:
            client.send(b"GET / HTTP/1.0\r\n\r\n")
            self.turn()
        self.assert_counts(active=1, waiting=1)
        for client in clients:
            self.page.answer()
            self.turn()
            self.assertTrue(client.closed)
            self.assertTrue(client.received.endswith(b"\r\n\r\nyes"))

    def test_thousands_that_are_answered_at_once_at_their_turn_do_not_recurse(self) -> None:
        self.limited(0)
        self.site.resource = Quick()
        clients = self.connect(2000)
        for client in clients:
            client.protocol.dataReceived(GET * 2)
        self.assert_counts(waiting=2000)
        self.limiter.max_connections = 1
        self.assert_counts(active=0, waiting=0, finished=4000)
        self.assertEqual(clients[-1].received.count(b"quick"), 2)

    def test_it_is_an_occupant_with_its_clients_address(self) -> None:
        seen: list[object] = []

        class Observer(LimiterObserver):
            def waiting(self, limiter: object, connection: object) -> None:
                seen.append(connection)

        self.limited(0, observers=[Observer()])
        (client,) = self.connect()
        self.ask(client)
        (occupant,) = seen
        verifyObject(IOccupant, occupant)
        self.assertEqual(occupant.address, client.address)
        self.assertIs(occupant.factory, self.factory)
        self.assertEqual(self.limiter.first_waiting(1), [(client.address, 0.0)])

    def test_requests_of_a_peer_at_its_cap_do_not_block_those_of_others(self) -> None:
        self.limited(None, max_per_peer=1)
        first, second = self.connect(2, host="10.0.0.1")
        (other,) = self.connect(host="10.0.0.2")
        self.ask(first, second, other)
        self.assert_counts(active=2, waiting=1)
        self.page.answer()
        self.assert_counts(active=2, waiting=0)

    def test_an_exempt_peer_takes_none(self) -> None:
        self.limited(0, exempt=["10.0.0.0/8"])
        (exempt,) = self.connect(host="10.0.0.1")
        self.ask(exempt, *self.connect())
        self.assert_counts(active=0, exempt=1, waiting=1)
        self.page.answer()
        self.assert_counts(exempt=0)


class EndTests(RequestTestCase):
    """
    However a request ends, its slot is free, and nobody waits for nothing.
    """

    def test_who_leaves_while_it_waits_has_departed(self) -> None:
        self.limited(1)
        clients = self.connect(4)
        self.ask(*clients)
        clients[1].reset()
        clients[2].close()
        self.turn()
        self.assert_counts(active=1, waiting=1, departed=2)
        self.page.answer()
        self.page.answer()
        self.assertEqual([len(self.answers(client)) for client in clients], [1, 0, 0, 1])

    def test_who_leaves_while_it_is_answered_frees_its_slot(self) -> None:
        self.limited(1)
        clients = self.connect(2)
        self.ask(*clients)
        self.close(clients[0])
        self.assert_counts(active=1, waiting=0, finished=1)
        self.assertEqual(len(self.page.requests), 1)

    def test_one_that_fails_while_it_is_rendered_is_answered_as_ever(self) -> None:
        self.limited(0)
        self.site.resource = Failing()
        clients = self.connect(2)
        self.ask(*clients)
        self.limiter.max_connections = 1
        self.ask(clients[0])
        self.assertEqual([self.answers(client) for client in clients], [[b"500", b"500"], [b"500"]])
        self.assert_counts(active=0, finished=3)
        self.assertEqual(len(self.flushLoggedErrors(ApplicationError)), 3)

    def test_one_that_cannot_be_processed_ends_its_connection_as_without_us(self) -> None:
        class Unprocessed(http.Request):
            def process(self) -> None:
                raise ApplicationError

        self.limited(1)
        self.site.requestFactory = Unprocessed
        (at_once,) = self.connect()
        self.ask(at_once)
        self.assertTrue(at_once.closed)
        self.limiter.max_connections = 0
        (later,) = self.connect()
        self.ask(later)
        self.limiter.max_connections = 1
        self.turn()
        self.assertTrue(later.closed)
        self.assert_counts(active=0, waiting=0, finished=2)
        self.assertEqual(len(self.flushLoggedErrors(ApplicationError)), 1)

    def test_a_time_out_of_the_channel_does_not_strike_who_waits(self) -> None:
        self.limited(1)
        clients = self.connect(2)
        self.ask(*clients)
        self.clock.advance(3600)
        self.page.answer()
        self.page.answer()
        self.assertEqual([self.answers(client) for client in clients], [[b"200"], [b"200"]])
        self.clock.advance(59)
        self.assertEqual([client.closed for client in clients], [False, False])
        self.clock.advance(1)
        self.turn()
        self.assertEqual([client.closed for client in clients], [True, True])

    def test_one_whose_connection_was_forgotten_frees_its_slot(self) -> None:
        self.limited(1)
        self.ask(*self.connect())
        self.page.requests.clear()
        self.clients.clear()
        gc.collect()
        self.assert_counts(active=0, reclaimed=1)

    def test_one_that_is_over_is_not_left_to_the_garbage_collector(self) -> None:
        self.limited(1)
        self.site.resource = Quick()
        (client,) = self.connect()
        self.ask(client)
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        before = sum(isinstance(each, http.Request) for each in gc.get_objects())
        for _ in range(5):
            self.ask(client)
        self.assertEqual(sum(isinstance(each, http.Request) for each in gc.get_objects()), before)

    def test_a_drain_waits_for_requests_and_ends_what_is_left(self) -> None:
        self.limited(2)
        clients = self.connect(3)
        self.ask(*clients)
        drained = self.limiter.drain(10)
        self.turn()
        self.assertEqual(self.answers(clients[2]), [b"503"])
        self.page.answer()
        self.turn()
        self.assertNoResult(drained)
        self.clock.pump([1] * 60)
        self.successResultOf(drained)
        self.assert_counts(active=0, refused={"draining": 1})
        self.assertEqual(self.answers(clients[0]), [b"200"])
        self.assertTrue(clients[1].closed)


class ContextTests(RequestTestCase):
    """
    A request that has waited sees nothing of the one that made room.
    """

    def test_it_is_processed_in_the_context_in_which_it_came(self) -> None:
        user: ContextVar[str] = ContextVar("user", default="nobody")
        seen = []

        class Seeing(Resource):
            isLeaf = True

            def render_GET(self, request: object) -> bytes:
                seen.append(user.get())
                return b""

        self.limited(1)
        first, second = self.connect(2)
        self.ask(first)
        self.site.resource = Seeing()
        self.ask(second)
        token = user.set("somebody")
        self.page.answer()
        user.reset(token)
        self.assertEqual(seen, ["nobody"])


class MalformedTests(RequestTestCase):
    """
    What Twisted answers to what is no request, it answers here.
    """

    SENT = (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : h\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: a\r\n" * 600 + b"\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 1\r\n\r\nx",
    )

    def test_it_is_answered_as_by_the_bare_site(self) -> None:
        for sent in self.SENT:
            answers = []
            for is_limited in (False, True):
                self.limited(1)
                clock = Clock()
                client = FakeConnection(clock).connect(self.factory if is_limited else self.site)
                client.send(sent)
                clock.pump([0] * 5)
                answers.append((client.received, client.closed, len(self.page.requests)))
                self.assert_counts(active=len(self.page.requests) if is_limited else 0, waiting=0)
            self.assertEqual(answers[0], answers[1], sent[:60])
