"""
The slow page that shows how it works.
"""

from __future__ import annotations

from fakes import FakeConnection
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from connlimit import Limiter, LimitingFactory, _demonstration


class PageTests(SynchronousTestCase):
    """
    The page takes its time, and tells what happens.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        self.limiter = Limiter(1, clock=self.clock)
        site = _demonstration.site(self.limiter, self.clock)
        site.reactor = self.clock
        site.startFactory()
        self.addCleanup(site.stopFactory)
        self.factory = LimitingFactory(site, self.limiter)

    def ask(self) -> FakeConnection:
        client = FakeConnection(self.clock).connect(self.factory)
        client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        self.clock.advance(0)
        return client

    def test_it_takes_its_time_and_then_lets_the_next_in(self) -> None:
        first, second = self.ask(), self.ask()
        self.assertEqual(first.received, b"")
        self.clock.pump([_demonstration.SECONDS, 0, 0])
        self.assertIn(b"1 of 1 slots were in use", first.received)
        self.assertIn(b"1 connections waited", first.received)
        self.assertTrue(first.closed)
        self.clock.pump([_demonstration.SECONDS, 0, 0])
        self.assertIn(b"It was your turn", second.received)

    def test_without_a_limit_it_says_so(self) -> None:
        self.limiter.max_connections = None
        client = self.ask()
        self.clock.advance(_demonstration.SECONDS)
        self.assertIn(b"1 of any number of slots", client.received)

    def test_a_client_that_leaves_early_costs_nothing(self) -> None:
        client = self.ask()
        client.close()
        self.clock.pump([0, _demonstration.SECONDS])
        self.assertEqual(client.received, b"")
        self.assertEqual(self.limiter.active, 0)

    def test_hints_tell_where_to_look(self) -> None:
        first, watch, second = _demonstration.hints([_demonstration.LISTEN], _demonstration.STATUS)
        self.assertIn("http://127.0.0.1:8081/", watch)
        self.assertIn("http://127.0.0.1:8080/", first)
        self.assertIn("curl", second)
        (only,) = _demonstration.hints(["unix:/run/x"], None)
        self.assertIn("unix:/run/x", only)
