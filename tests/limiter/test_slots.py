"""
Who holds a slot; those who were lost, and those who are idle.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

from support.fakes import ApplicationError
from support.limiters import LimiterTestCase, SocketsTestCase

from connlimit._limiter.slots import NullConnection


class Ephemeral(NullConnection):
    """
    A connection that nobody holds but the line, and that does what it is told when it is served.
    """

    def __init__(self, serve: Callable[[Ephemeral], None]) -> None:
        super().__init__(None)
        self._serve = serve

    def serve(self) -> None:
        self._serve(self)


class HoldingTests(LimiterTestCase):
    """
    The line holds its connections, and the limiter holds nobody else.
    """

    def test_one_that_ends_while_it_is_served_and_that_nobody_holds_is_counted_once(self) -> None:
        limiter = self.limited(0)
        limiter.admission.wait(Ephemeral(limiter.admission.finish))
        limiter.max_connections = 1
        self.assert_counts(active=0, finished=1, reclaimed=0)

    def test_a_traceback_that_somebody_keeps_keeps_nobody_who_was_served_later(self) -> None:
        limiter, kept = self.limited(0), []

        def fail(connection: Ephemeral) -> None:
            try:
                raise ApplicationError
            except ApplicationError as error:
                kept.append(sys._getframe())
                kept.append(error)

        limiter.admission.wait(Ephemeral(fail))
        limiter.admission.wait(Ephemeral(lambda connection: None))
        limiter.max_connections = 2
        gc.collect()
        self.assert_counts(active=1, finished=1, reclaimed=1)


class AuditTests(SocketsTestCase):
    """
    Once a second, while somebody waits, the limiter looks at the sockets of those who are served.
    """

    def test_idle_counts_from_the_time_of_being_served(self) -> None:
        self.limited(1, idle_timeout=3)
        first, second, *_ = self.connect(3)
        self.clock.advance(2.5)
        second.idle_for = 2.5  # it has sent nothing while it waited
        self.limiter.admission.finish(first)
        for _ in range(3):
            self.clock.advance(0.9)
            second.idle_for += 0.9
            self.assertEqual(self.closed(), [])
        self.clock.advance(2)
        second.idle_for += 2
        self.clock.advance(1)
        self.assertEqual(self.closed(), [1])

    def test_idle_counts_from_the_time_of_being_served_at_once_out_of_the_backlog_too(self) -> None:
        self.limited(1, idle_timeout=3)
        self.connect()[0].idle_for = 100.0
        self.connect()
        self.clock.advance(2)
        self.assertEqual(self.closed(), [])
        self.clock.advance(2)
        self.assertEqual(self.closed(), [0])

    def test_a_timeout_that_is_set_later_counts_from_then(self) -> None:
        self.limited(1)
        self.connect(2)[0].idle_for = 100.0
        self.clock.advance(50)
        self.limiter.idle_timeout = 3
        self.clock.advance(2)
        self.assertEqual(self.closed(), [])
        self.clock.advance(2)
        self.assertEqual(self.closed(), [0])
        self.limiter.admission.finish(self.sockets[0])
        self.assertEqual(self.limiter.admission.slots.closing, set())

    def test_nobody_is_closed_for_one_whom_a_free_slot_does_not_help(self) -> None:
        self.limited(1000, idle_timeout=3, max_per_peer=2)
        for each in self.connect(100):
            each.idle_for = 100.0
        # With max_per_peer=2 only two of these are served; the others stand aside.
        self.assertEqual(self.limiter.active, 2)
        others = [self.connect(1, host=f"10.0.0.{number}")[0] for number in range(100)]
        for each in others:
            each.idle_for = 100.0
        self.sockets[0].idle_for = self.sockets[1].idle_for = 1.0
        self.clock.advance(5)
        self.assertEqual(self.closed(), [])
        self.sockets[1].idle_for = 50.0
        self.clock.advance(1)
        self.assertEqual(self.closed(), [1])  # of the same peer: that helps

    def test_nobody_is_closed_for_a_rate(self) -> None:
        self.limited(1000, idle_timeout=3, max_rate=1, max_burst=100)
        for each in self.connect(100):
            each.idle_for = 100.0
        self.connect(50)
        self.clock.pump([1] * 10)
        self.assertEqual(self.closed(), [])

    def test_no_more_are_closed_than_the_rate_lets_in(self) -> None:
        self.limited(100, idle_timeout=3, max_rate=1, max_burst=100)
        for each in self.connect(150)[:100]:
            each.idle_for = 100.0
        self.clock.advance(3)
        self.assertLessEqual(len(self.closed()), 5)
        self.assertGreater(len(self.closed()), 0)

    def test_those_that_are_still_closing_count(self) -> None:
        self.limited(10, idle_timeout=3)
        for each in self.connect(12)[:10]:
            each.idle_for = 100.0
        self.clock.pump([1] * 10)
        self.assertEqual(len(self.closed()), 2)
        self.assertEqual(self.limiter.snapshot().idle_closed, 2)
