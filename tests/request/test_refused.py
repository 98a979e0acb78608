"""
What a refused request is answered.
"""

from __future__ import annotations

from support.fakes import FakeConnection
from support.web import RequestTestCase

from connlimit._request.refused import WORDS
from connlimit.interfaces import REASONS

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


def parts(answer: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """
    The status line, the headers and the body of an answer.
    """
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    return first, dict(line.split(b": ", 1) for line in lines), body


class RefusedTests(RequestTestCase):
    """
    A refused request is answered by a 503, and its connection lives on.
    """

    def refused(self, sent: bytes) -> FakeConnection:
        self.limited(0, max_waiting=0)
        (client,) = self.connect()
        client.send(sent)
        self.turn()
        return client

    def test_it_is_answered_by_a_503_that_says_when_to_try_again(self) -> None:
        client = self.refused(GET)
        first, headers, body = parts(client.received)
        self.assertEqual(first, b"HTTP/1.1 503 Service Unavailable")
        self.assertEqual(body, b"Too many requests, try again later.\n")
        self.assertEqual(headers[b"Content-Length"], b"%d" % len(body))
        self.assertEqual(headers[b"Retry-After"], b"1")
        self.assertEqual(headers[b"Content-Type"], b"text/plain")
        self.assertIn(b"Date", headers)
        self.assertNotIn(b"Connection", headers)
        self.assert_counts(refused={"full": 1})
        self.assertEqual(self.page.paths, [])

    def test_its_connection_lives_on(self) -> None:
        client = self.refused(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc" * 2)
        self.limiter.max_connections = 1
        self.ask(client)
        self.page.answer()
        self.assertEqual(self.answers(client), [b"503", b"503", b"200"])
        self.assertFalse(client.closed)

    def test_retry_after_is_measured(self) -> None:
        self.limited(1, max_waiting=2)
        clients = self.connect(4)
        self.ask(*clients[:3])
        for _ in range(5):
            self.clock.advance(11)
            asking = next(client for client in clients if self.page.requests[0].client == client.address)
            self.page.answer()
            self.ask(asking, clients[3])
        self.assertEqual(self.answers(clients[3]), [b"503"] * 5)
        _, headers, _ = parts(clients[3].received[clients[3].received.rindex(b"HTTP/1.1") :])
        self.assertEqual(headers[b"Retry-After"], b"33")

    def test_a_head_has_no_body_and_http_1_0_is_closed(self) -> None:
        client = self.refused(b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n")
        first, headers, body = parts(client.received)
        self.assertEqual((first, body), (b"HTTP/1.1 503 Service Unavailable", b""))
        self.assertEqual(headers[b"Content-Length"], b"36")
        client = self.refused(b"GET / HTTP/1.0\r\n\r\n")
        self.turn()
        self.assertTrue(client.received.startswith(b"HTTP/1.0 503 "))
        self.assertTrue(client.closed)

    def test_one_that_has_waited_too_long_is_told_so(self) -> None:
        self.limited(1, wait_timeout=5)
        clients = self.connect(2)
        self.ask(*clients)
        self.clock.advance(5)
        self.assertIn(b"Too busy, try again later.\n", clients[1].received)
        self.page.answer()
        self.ask(clients[1])
        self.page.answer()
        self.assertEqual(self.answers(clients[1]), [b"503", b"200"])

    def test_a_server_that_is_being_stopped_closes_the_connection_after_it(self) -> None:
        self.limited(0)
        waiting, late = self.connect(2)
        self.ask(waiting)
        self.limiter.drain()
        self.turn()
        self.ask(late)
        for client in (waiting, late):
            _, headers, body = parts(client.received)
            self.assertEqual((headers[b"Connection"], body), (b"close", b"Shutting down, try again later.\n"))
            self.assertTrue(client.closed)

    def test_a_peer_at_its_cap_that_does_not_wait_is_told_so(self) -> None:
        self.limited(None, max_per_peer=1, over_peer="refuse")
        first, second = self.connect(2)
        self.ask(first, second)
        self.assertIn(b"Too many requests from your address.\n", second.received)

    def test_there_are_words_for_every_reason(self) -> None:
        self.assertEqual(WORDS.keys(), set(REASONS))

    def test_the_access_log_has_it(self) -> None:
        self.limited(0, max_waiting=0)
        logged = []
        self.site.log = lambda request: logged.append(request.code)
        self.ask(*self.connect())
        self.assertEqual(logged, [503])
