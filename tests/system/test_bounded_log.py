"""
Events that clients bring about: each kind is said once, then counted, then over.
"""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.logger import Logger, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from connlimit._system.bounded_log import BoundedLog


class BoundedLogTests(SynchronousTestCase):
    """
    A log with a clock, and what it says.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        self.events: list[dict[str, object]] = []
        self.log = BoundedLog(Logger("connlimit.test", observer=self.events.append), self.clock, 60.0)

    def said(self) -> list[str]:
        """
        The lines since the last call.
        """
        texts = [formatEvent(event) for event in self.events]
        self.events.clear()
        return texts

    def fail(self) -> None:
        """
        Log an exception, as the code that caught it does.
        """
        try:
            raise ValueError("wrong")
        except ValueError:
            self.log.failure("{what} failed", what="it")

    def test_the_first_of_a_kind_is_logged_as_it_is(self) -> None:
        self.log.warn("{who} is late", who="A")
        (event,) = self.events
        self.assertEqual(event["who"], "A")
        self.assertEqual(event["log_level"].name, "warn")
        self.assertEqual(self.said(), ["A is late"])

    def test_one_that_stays_alone_leaves_no_timer(self) -> None:
        self.log.warn("{who} is late", who="A")
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_those_that_follow_are_counted_and_one_of_them_is_the_example(self) -> None:
        for number in range(1000):
            self.log.warn("{who} is late", who=number)
        self.assertEqual(self.said(), ["0 is late"])
        self.clock.advance(60)
        self.assertEqual(self.said(), ["999 is late (999 times in the last 60 s)"])
        self.clock.advance(59)
        self.log.warn("{who} is late", who="A")
        self.clock.advance(1)
        self.assertEqual(self.said(), ["A is late (1 times in the last 60 s)"])

    def test_a_minute_without_any_ends_it_and_the_next_is_logged_as_it_is(self) -> None:
        self.log.warn("{who} is late", who="A")
        self.log.warn("{who} is late", who="B")
        self.clock.pump([60, 60])
        self.assertEqual(
            self.said()[1:],
            ["B is late (1 times in the last 60 s)", "not again for 60 s, after 2 times: B is late"],
        )
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.log.warn("{who} is late", who="C")
        self.assertEqual(self.said(), ["C is late"])

    def test_one_a_minute_is_logged_as_it_is(self) -> None:
        for number in range(3):
            self.log.info("{who} is late", who=number)
            self.clock.advance(60)
        self.assertEqual(self.said(), ["0 is late", "1 is late", "2 is late"])

    def test_kinds_are_counted_apart(self) -> None:
        self.log.warn("{who} is late", who="A")
        self.log.error("{who} is early", who="A")
        self.assertEqual(self.said(), ["A is late", "A is early"])

    def test_only_the_first_exception_of_a_kind_has_its_traceback(self) -> None:
        self.fail()
        self.fail()
        self.clock.advance(60)
        first, count = self.events
        self.assertIn("log_failure", first)
        self.assertNotIn("log_failure", count)
        self.assertEqual(
            self.said(), ["it failed", "it failed: ValueError('wrong') (1 times in the last 60 s)"]
        )

    def test_what_is_counted_keeps_no_facts(self) -> None:
        self.log.warn("{who} is late", who="A")
        fact = type("Fact", (), {"__repr__": lambda self: "B"})()
        self.log.warn("{who} is late", who=fact)
        held = [kind.last for kind in self.log._kinds.values()]
        self.assertEqual(held, ["B is late"])

    def test_its_end_is_said_once_and_with_the_count(self) -> None:
        for _ in range(5):
            self.log.warn("{who} is late", who="A")
        self.clock.advance(2)
        for _ in range(5):
            self.log.over("{who} is late", "{who} is here after {count} times and {seconds:.0f} s", who="A")
        self.assertEqual(self.said(), ["A is late", "A is here after 5 times and 2 s"])
        self.clock.advance(200)
        self.assertEqual(self.said(), [])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_the_end_of_what_has_not_happened_is_not_said(self) -> None:
        self.log.over("{who} is late", "{who} is here", who="A")
        self.log.warn("{who} is early", who="A")
        self.log.over("{who} is late", "{who} is here", who="A")
        self.assertEqual(self.said(), ["A is early"])

    def test_what_comes_and_goes_all_the_time_has_a_few_lines_a_minute(self) -> None:
        for _ in range(600):
            self.log.warn("{who} is late", who="A")
            self.log.over("{who} is late", "{who} is here", who="A")
            self.clock.advance(1)
        self.assertLess(len(self.said()), 3 * 600 / 60)
        self.clock.pump([60, 60])
        self.assertIn("not again", self.said()[-1])

    def test_a_reactor_that_does_not_run_keeps_nothing_from_being_said(self) -> None:
        now = 0.0
        self.clock.seconds = lambda: now
        for now in range(0, 601, 10):
            self.log.warn("{who} is late", who=now)
        self.assertEqual(self.said()[:2], ["0 is late", "120 is late (12 times in the last 60 s)"])

    def test_without_a_clock_the_reactor_counts(self) -> None:
        log = BoundedLog(Logger("connlimit.test", observer=self.events.append), interval=1000.0)
        log.warn("late")
        log.warn("late")
        (kind,) = log._kinds.values()
        self.assertTrue(kind.timer.active())
        kind.timer.cancel()
