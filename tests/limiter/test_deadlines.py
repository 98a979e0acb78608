"""
Those who wait too long, notices and audits.
"""

from __future__ import annotations

from support.limiters import LimiterTestCase, SocketsTestCase

from connlimit.interfaces import IConnection


class TimeoutTests(LimiterTestCase):
    """
    Those who wait have patience, and one timer.
    """

    def test_who_waits_too_long_is_refused_and_nobody_else(self) -> None:
        self.limited(1, wait_timeout=10)
        first = self.connect(2)[1]
        self.clock.advance(4)
        second = self.connect()[0]
        self.clock.advance(6)
        self.turn()
        self.assertEqual((first.closed, second.closed), (True, False))
        self.clock.advance(4)
        self.turn()
        self.assertTrue(second.closed)
        self.assert_counts(active=1, waiting=0, refused={"timeout": 2})

    def test_the_number_of_timers_does_not_grow_with_the_line(self) -> None:
        self.limited(1, wait_timeout=10)
        self.connect(2)
        few = len(self.clock.getDelayedCalls())
        self.connect(100)
        self.assertEqual(len(self.clock.getDelayedCalls()), few)

    def test_an_empty_line_has_no_timer(self) -> None:
        self.limited(1, wait_timeout=10)
        first, _ = self.connect(2)
        self.close(first)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_line_that_its_last_client_left_has_no_timer(self) -> None:
        self.limited(1, wait_timeout=10)
        _, waiting = self.connect(2)
        waiting.abortConnection()
        self.turn()
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assert_counts(departed=1)

    def test_a_timeout_that_is_changed_holds_for_those_who_wait(self) -> None:
        limiter = self.limited(1)
        waiting = self.connect(2)[1]
        self.clock.advance(100)
        limiter.wait_timeout = 200
        self.clock.advance(99)
        self.assertFalse(waiting.disconnecting)
        limiter.wait_timeout = 50
        self.turn()
        self.assertTrue(waiting.closed)

    def test_a_timeout_that_is_taken_away_refuses_nobody(self) -> None:
        limiter = self.limited(1, wait_timeout=1)
        waiting = self.connect(2)[1]
        limiter.wait_timeout = None
        self.clock.advance(1000)
        self.assertFalse(waiting.disconnecting)

    def test_ten_thousand_time_out_together(self) -> None:
        self.limited(0, wait_timeout=5)
        self.connect(10_000, at_once=True)
        self.clock.advance(5)
        self.turn()
        self.assert_counts(waiting=0, refused={"timeout": 10_000})


class NoticeTests(LimiterTestCase):
    """
    A waiting client can be told something, once.
    """

    def test_each_is_told_after_its_own_wait(self) -> None:
        self.limited(0, notice=(5, b"please wait"))
        first = self.connect()[0]
        self.clock.advance(2)
        second = self.connect()[0]
        self.clock.advance(3)
        self.assertEqual((first.received, second.received), (b"please wait", b""))
        self.clock.advance(60)
        self.assertEqual((first.received, second.received), (b"please wait", b"please wait"))

    def test_who_is_served_before_is_told_nothing(self) -> None:
        self.limited(0, notice=(5, b"please wait"))
        first = self.connect()[0]
        self.limiter.max_connections = 1
        self.clock.advance(5)
        self.assertEqual(first.received, b"")

    def test_it_can_be_made_for_each(self) -> None:
        self.limited(0, notice=(1, lambda connection: str(connection.address.port).encode()))
        self.connect(2)
        self.clock.advance(1)
        self.assertEqual([client.received for client in self.clients], [b"10000", b"10001"])

    def test_one_that_is_set_later_is_given_to_those_who_wait_already(self) -> None:
        limiter = self.limited(1)
        _, waiting = self.connect(2)
        self.clock.advance(10)
        limiter.notice = (5, b"please wait")
        self.turn()
        self.clock.advance(0.1)
        self.assertEqual(waiting.received, b"please wait")

    def test_who_departs_by_the_notice_of_another_harms_nobody(self) -> None:
        def what(connection: IConnection) -> bytes:
            for each in self.clients[2:]:
                self.limiter.admission.depart(each.protocol)
            return b"please wait"

        self.limited(1, notice=(5, what))
        self.connect(4)
        self.clock.advance(5)
        self.assertEqual([each.received for each in self.clients], [b"", b"please wait", b"", b""])
        self.assert_counts(active=1, waiting=1, departed=2)

    def test_a_failure_harms_nobody(self) -> None:
        self.limited(0, notice=(1, lambda connection: 1 / 0))
        self.connect(2)
        self.clock.advance(1)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assert_counts(waiting=2)


class AuditTimesTests(SocketsTestCase):
    """
    Audits come once a second, and whoever is always due does not keep the reactor busy.
    """

    def test_a_look_that_is_due_stays_due_though_the_queue_is_empty_for_instants(self) -> None:
        self.limited(2, idle_timeout=1)
        dead, _busy = self.connect(2)
        for _ in range(12):
            waiting = self.connect()[0]
            dead.dead = True
            self.clock.advance(0.09)
            self.limiter.reconfigure(max_waiting=self.limiter.active + 10, wait_timeout=5 + len(self.sockets))
            self.limiter.admission.depart(waiting)
            self.limiter.admission.finish(waiting)
        self.assertEqual(self.limiter.snapshot().reclaimed, 1)

    def test_an_overloaded_adaptive_queue_with_some_aside_refuses_the_others_and_rests(self) -> None:
        self.limited(1, order="adaptive", adaptive_target=0.5, adaptive_interval=2, max_per_peer=1)
        self.connect(2)
        self.limiter.max_connections = 2
        self.connect(1, host="10.0.0.1")
        self.connect(20, host="10.0.0.2")
        looks = []
        expired = self.limiter.admission.queue.expired
        self.limiter.admission.queue.expired = lambda now: looks.append(now) or expired(now)
        self.clock.pump([0.01] * 500)
        self.assertLess(len(looks), 100)
        self.assertEqual(self.limiter.snapshot().refused["timeout"], 20)
        self.assertEqual(self.limiter.waiting, 1)  # its own peer makes it wait
