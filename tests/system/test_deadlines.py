"""
Many who wait have one timer.
"""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from connlimit._system.deadlines import Sweep


class DeadlinesTests(SynchronousTestCase):
    """
    Some wait for a second, others for ten.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        self.sweep = Sweep(self.clock)
        self.called: list[tuple[object, float]] = []
        self.short = self.sweep.deadlines(1.0, self.call)
        self.long = self.sweep.deadlines(10.0, self.call)

    def call(self, each: object) -> None:
        self.called.append((each, round(self.clock.seconds(), 2)))

    def timers(self) -> int:
        return len(self.clock.getDelayedCalls())

    def test_each_is_called_for_when_it_is_due(self) -> None:
        self.long.add("long")
        self.short.add("a")
        self.clock.advance(0.25)
        self.short.add("b")
        self.clock.pump([0.125] * 100)
        self.assertEqual(self.called, [("a", 1.0), ("b", 1.25), ("long", 10.0)])
        self.assertEqual(self.timers(), 0)

    def test_there_is_one_timer_whatever_is_added_and_discarded(self) -> None:
        for number in range(1000):
            self.long.add(number)
            self.short.add(number)
            self.assertEqual(self.timers(), 1)
            self.clock.advance(0.004)
            self.short.discard(number)
        self.clock.advance(20)
        self.assertEqual([each for each, _ in self.called], list(range(1000)))

    def test_what_is_discarded_is_not_called_for_and_makes_nobody_late(self) -> None:
        self.short.add("a")
        self.clock.advance(0.5)
        self.short.discard("a")
        self.short.discard("a")
        self.assertEqual(self.timers(), 1)
        self.short.add("b")
        self.clock.pump([0.25] * 10)
        self.assertEqual(self.called, [("b", 1.5)])

    def test_it_rests_only_when_there_is_nothing(self) -> None:
        self.long.add("a")
        self.sweep.rest()
        self.assertEqual(self.timers(), 1)
        self.long.discard("a")
        self.sweep.rest()
        self.sweep.rest()
        self.assertEqual(self.timers(), 0)
        self.short.add("b")
        self.clock.advance(1)
        self.assertEqual(self.called, [("b", 1.0)])

    def test_what_is_called_may_add_discard_and_rest(self) -> None:
        def call(each: str) -> None:
            self.call(each)
            self.long.discard("never")
            self.sweep.rest()
            if len(self.called) < 3:
                again.add(each)
                self.sweep.deadlines(0.5, self.call).add("other")

        again = self.sweep.deadlines(2.0, call)
        again.add("again")
        self.long.add("never")
        self.clock.pump([0.25] * 60)
        self.assertEqual(self.called, [("again", 2.0), ("other", 2.5), ("again", 4.0)])
        self.assertEqual(self.timers(), 0)

    def test_what_is_added_by_a_call_is_called_for_later_however_short_its_time(self) -> None:
        def call(each: str) -> None:
            self.call(each)
            soon.add(each)

        soon = self.sweep.deadlines(1e-9, call)
        soon.add("a")
        for _ in range(3):
            self.clock.advance(1e-9)
        self.assertEqual(len(self.called), 3)

    def test_one_that_fails_makes_nobody_miss_its_time(self) -> None:
        def fail(each: object) -> None:
            raise RuntimeError(each)

        failing = self.sweep.deadlines(0.5, fail)
        failing.add("a")
        failing.add("b")
        self.short.add("c")
        self.assertRaises(RuntimeError, self.clock.advance, 0.5)
        self.assertRaises(RuntimeError, self.clock.advance, 0)
        self.clock.advance(0.5)
        self.assertEqual(self.called, [("c", 1.0)])
