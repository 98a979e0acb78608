"""
The end of a limiter: those who wait are refused, those who are served may finish.
"""

from __future__ import annotations

from support.limiters import LimiterTestCase, SocketsTestCase, Work


class DrainTests(LimiterTestCase):
    """
    A limiter can be emptied.
    """

    def test_draining_refuses_newcomers_and_the_line_and_waits_for_the_active(self) -> None:
        limiter = self.limited(2)
        clients = self.connect(4)
        done = limiter.drain()
        self.turn()
        self.connect()
        self.assertEqual([client.closed for client in self.clients], [False, False, True, True, True])
        self.close(clients[0])
        self.assertNoResult(done)
        self.close(clients[1])
        self.successResultOf(done)
        self.assert_counts(active=0, waiting=0, finished=2, refused={"draining": 3})

    def test_what_does_not_end_in_time_is_aborted(self) -> None:
        limiter = self.limited(2)
        first, second = self.connect(2)
        done = limiter.drain(10)
        self.close(first)
        self.clock.advance(10)
        self.turn()
        self.successResultOf(done)
        self.assertTrue(second.closed)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_drain_that_ends_early_leaves_no_timer(self) -> None:
        limiter = self.limited(1)
        client = self.connect()[0]
        done = limiter.drain(10)
        self.close(client)
        self.successResultOf(done)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_an_idle_limiter_is_drained_at_once(self) -> None:
        self.successResultOf(self.limited(1).drain(10))
        self.assertTrue(self.limiter.snapshot().draining)

    def test_nobody_in_the_line_is_served_by_the_end_of_another_while_it_is_refused(self) -> None:
        limiter = self.limited(0)
        self.connect(5, at_once=True)
        limiter.max_connections = 0
        limiter.drain()
        self.assertEqual(self.served(), [])
        self.assert_counts(refused={"draining": 5})


class WorkTests(LimiterTestCase):
    """
    What is no connection ends a drain, too.
    """

    def test_work_may_end_and_is_aborted_when_it_does_not_in_time(self) -> None:
        limiter = self.limited(2)
        short, long, waiting = (Work(limiter).begin() for _ in range(3))
        done = limiter.drain(10)
        self.assertEqual(waiting.events, ["refuse draining"])
        self.clock.advance(5)
        limiter.admission.finish(short)
        self.assertNoResult(done)
        self.clock.advance(5)
        self.successResultOf(done)
        self.assertEqual((short.events, long.events), ([], ["abort"]))
        self.assertEqual(self.clock.getDelayedCalls(), [])


class DeadTests(SocketsTestCase):
    """
    Those whose sockets are gone end a drain, too.
    """

    def test_a_drain_finds_the_dead_although_nobody_waits(self) -> None:
        self.limited(2)
        self.connect(2)[0].dead = True
        done = self.limiter.drain()
        self.clock.advance(1)
        self.assertEqual(self.limiter.active, 1)
        self.assertNoResult(done)
        self.limiter.admission.finish(self.sockets[1])
        self.successResultOf(done)
        self.assertEqual(self.clock.getDelayedCalls(), [])
