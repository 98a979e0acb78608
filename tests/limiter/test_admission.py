"""
Who is served, who waits and who is refused.
"""

from __future__ import annotations

import gc

from support.fakes import ApplicationError, FakeConnection, RecordingFactory
from support.limiters import LimiterTestCase, Work

from connlimit import LimitingFactory
from connlimit._system import descriptors
from connlimit._system.descriptors import Budget


class ServingTests(LimiterTestCase):
    """
    Slots are taken and freed.
    """

    def test_so_many_are_served_and_the_others_wait(self) -> None:
        self.limited(2)
        self.connect(5)
        self.assertEqual(self.served(), [0, 1])
        self.assert_counts(active=2, waiting=3, accepted=5, served=2)

    def test_each_freed_slot_goes_to_the_longest_waiting(self) -> None:
        self.limited(2)
        clients = self.connect(5)
        self.close(clients[1])
        self.assertEqual(self.served(), [0, 1, 2])
        self.close(clients[0], clients[2])
        self.assertEqual(self.served(), [0, 1, 2, 3, 4])
        self.assertEqual(self.server.most_live, 2)

    def test_a_newcomer_does_not_overtake_the_line(self) -> None:
        self.limited(1)
        first, _ = self.connect(2)
        first.close()
        self.clients += [FakeConnection(self.clock, number=2).connect(self.factory)]
        self.turn()
        self.assertEqual(self.served(), [0, 1])

    def test_without_limits_it_serves_everybody_and_counts(self) -> None:
        self.limited()
        clients = self.connect(100)
        self.close(*clients[:40])
        self.assert_counts(active=60, waiting=0, accepted=100, served=100, finished=40)

    def test_a_limit_of_zero_serves_nobody_until_it_is_raised(self) -> None:
        limiter = self.limited(0)
        self.connect(3)
        self.assert_counts(active=0, waiting=3)
        limiter.max_connections = 2
        self.assertEqual(self.served(), [0, 1])

    def test_a_raise_admits_at_once(self) -> None:
        limiter = self.limited(1)
        self.connect(5)
        limiter.max_connections = 4
        self.assertEqual(self.served(), [0, 1, 2, 3])

    def test_taking_the_limit_away_admits_all(self) -> None:
        limiter = self.limited(1)
        self.connect(5)
        limiter.max_connections = None
        self.assert_counts(active=5, waiting=0)

    def test_a_cut_ends_nobody_and_admits_nobody_until_there_is_room(self) -> None:
        limiter = self.limited(3)
        clients = self.connect(5)
        limiter.max_connections = 1
        self.assert_counts(active=3, waiting=2)
        self.close(clients[0], clients[1])
        self.assert_counts(active=1, waiting=2)
        self.close(clients[2])
        self.assertEqual(self.served(), [0, 1, 2, 3])

    def test_a_limit_that_comes_while_running_counts_those_who_are_there(self) -> None:
        limiter = self.limited()
        clients = self.connect(3)
        limiter.max_connections = 2
        self.connect()
        self.close(clients[0])
        self.assert_counts(active=2, waiting=1)
        self.close(clients[1])
        self.assert_counts(active=2, waiting=0)

    def test_factories_that_share_a_limiter_share_its_limit(self) -> None:
        limiter = self.limited(2)
        other = RecordingFactory()
        first, _ = self.connect(2)
        third = FakeConnection(self.clock).connect(LimitingFactory(other, limiter))
        self.assertEqual(other.live, [])
        self.close(first)
        self.assertEqual(len(other.live), 1)
        self.close(third)
        self.assertEqual(limiter.active, 1)


class QueueTests(LimiterTestCase):
    """
    The queue has an end.
    """

    def test_a_full_line_refuses(self) -> None:
        self.limited(1, max_waiting=2)
        clients = self.connect(5)
        self.assertEqual([client.closed for client in clients], [False, False, False, True, True])
        self.assert_counts(active=1, waiting=2, refused={"full": 2})

    def test_with_no_place_in_the_line_only_those_with_a_slot_stay(self) -> None:
        self.limited(1, max_waiting=0)
        first, second = self.connect(2)
        self.assertTrue(second.closed)
        self.close(first)
        self.connect()
        self.assert_counts(active=1, finished=1, refused={"full": 1})

    def test_a_shorter_line_refuses_newcomers_and_nobody_who_waits(self) -> None:
        limiter = self.limited(1, max_waiting=3)
        self.connect(4)
        limiter.max_waiting = 1
        self.connect()
        self.assert_counts(waiting=3, refused={"full": 1})

    def test_a_connection_that_finds_the_last_place_taken_when_it_is_made_is_refused(self) -> None:
        self.limited(0, max_waiting=1)
        slow = self.factory.buildProtocol(FakeConnection(self.clock).address)
        self.connect()
        late = FakeConnection(self.clock)
        late.protocol = slow
        slow.makeConnection(late)
        self.turn()
        self.assertTrue(late.closed)
        self.assert_counts(waiting=1, refused={"full": 1})

    def test_a_connection_that_finds_room_when_it_is_made_is_served(self) -> None:
        limiter = self.limited(0)
        late = self.factory.buildProtocol(FakeConnection(self.clock).address)
        limiter.max_connections = 1
        late.makeConnection(FakeConnection(self.clock))
        self.assert_counts(active=1, waiting=0)

    def test_clients_whose_descriptors_would_be_missed_are_refused(self) -> None:
        self.limited(1)
        self.patch(descriptors, "left_for_waiting", lambda kept: False)
        clients = self.connect(2)
        self.assertEqual([client.closed for client in clients], [False, True])
        self.assert_counts(active=1, refused={"descriptors": 1})


class ManyTests(LimiterTestCase):
    """
    What happens to one connection can happen to ten thousand in one call.
    """

    MANY = 10_000

    def test_ten_thousand_that_close_when_they_are_served_all_get_their_turn(self) -> None:
        for at_once, many in ((True, self.MANY), (False, 1_000)):
            with self.subTest(at_once=at_once):
                self.limited(1)
                self.server.protocol = Closing
                blocker = self.connect()[0]
                self.limiter.max_connections = 0
                self.turn()
                self.connect(many, at_once=at_once)
                self.assert_counts(waiting=many)
                self.limiter.max_connections = 1
                self.turn()
                self.assertTrue(blocker.closed)
                self.assertEqual(self.served(), list(range(many + 1)))
                self.assert_counts(active=0, waiting=0, finished=many + 1)
                self.assertEqual(self.server.most_live, 1)


class Closing(RecordingFactory.protocol):
    """
    A server that closes every connection as soon as it is made.
    """

    def connectionMade(self) -> None:
        super().connectionMade()
        self.transport.loseConnection()


class ExemptTests(LimiterTestCase):
    """
    The exempt are served at once, take no slot, and are counted apart.
    """

    def test_they_pass_a_full_limiter_and_delay_nobody(self) -> None:
        self.limited(1, exempt=["192.0.2.0/24"])
        first = self.connect(2)[0]
        exempt = self.connect(3, host="192.0.2.7")
        self.assert_counts(active=1, waiting=1, exempt=3, exempted=3, accepted=2)
        self.close(exempt[0])
        self.assert_counts(active=1, waiting=1, exempt=2, finished=0)
        self.close(first)
        self.assert_counts(active=1, waiting=0, exempt=2, finished=1)

    def test_a_callable_can_tell_who_is_exempt(self) -> None:
        self.limited(0, exempt=lambda address: address.port == 10001)
        self.connect(3)
        self.assert_counts(active=0, waiting=2, exempt=1)

    def test_if_it_fails_nobody_is(self) -> None:
        def fail(address: object) -> bool:
            raise ApplicationError

        self.limited(0, exempt=fail)
        self.connect()
        self.assert_counts(waiting=1, exempt=0)
        self.assertEqual(len(self.flushLoggedErrors(ApplicationError)), 1)

    def test_who_waits_already_is_served_when_it_becomes_exempt(self) -> None:
        limiter = self.limited(1, wait_timeout=30)
        self.connect(1)
        self.connect(2, host="192.168.1.1")
        self.connect(1, host="10.0.0.1")
        limiter.exempt = ["192.168.0.0/16"]
        self.turn()
        self.assertEqual(self.served(), [0, 1, 2])
        self.assert_counts(active=1, waiting=1, exempt=2)

    def test_one_that_was_forgotten_and_collected_is_not_counted_twice(self) -> None:
        limiter = self.limited(1, exempt=["127.0.0.0/8"])
        client = FakeConnection(self.clock).connect(self.factory)
        self.server.live.clear()
        client.protocol = None
        del client
        gc.collect()
        self.assertEqual((limiter.active, len(limiter.admission.slots.lost)), (0, 1))
        self.assert_counts(active=0, exempt=0)

    def test_a_drained_limiter_has_no_exempt(self) -> None:
        self.limited(1, exempt=["127.0.0.1"])
        self.limiter.drain()
        self.assertTrue(self.connect()[0].closed)


class RetryAfterTests(LimiterTestCase):
    """
    When to come again is told by the rate of the last releases.
    """

    def test_it_is_the_time_that_the_line_will_take(self) -> None:
        self.limited(1)
        for _ in range(30):
            self.limiter.admission.retry_after()
            active = self.connect()[0]
            self.clock.advance(2)
            self.close(active)
        self.connect(10)
        self.assertAlmostEqual(self.limiter.admission.retry_after(), 20, delta=3)

    def test_it_is_a_second_before_anything_is_known(self) -> None:
        self.limited(0)
        self.assertEqual(self.limiter.admission.retry_after(), 1.0)


class WorkTests(LimiterTestCase):
    """
    What is no connection takes slots as one does, and is never asked what only sockets have.
    """

    def test_it_waits_in_the_queue_with_connections(self) -> None:
        limiter = self.limited(1)
        client = self.connect()[0]
        first = Work(limiter).begin()
        self.connect()
        second = Work(limiter).begin()
        self.close(client)
        self.assertEqual((first.events, self.served()), (["serve"], [0]))
        limiter.admission.finish(first)
        self.assertEqual((second.events, self.served()), ([], [0, 1]))
        self.assert_counts(active=1, waiting=1, finished=2, waits=2)

    def test_its_key_has_a_cap(self) -> None:
        limiter = self.limited(max_per_peer=1)
        first, second, other = (Work(limiter, key).begin() for key in ("a", "a", "b"))
        self.assertEqual((second.slot is None, other.slot is None), (True, False))
        limiter.admission.finish(first)
        self.assertEqual(second.events, ["serve"])

    def test_it_is_refused_with_a_reason(self) -> None:
        limiter = self.limited(0, wait_timeout=5)
        work = Work(limiter).begin()
        self.clock.advance(5)
        self.assertEqual(work.events, ["refuse timeout"])

    def test_an_audit_a_notice_and_new_settings_leave_it_alone(self) -> None:
        limiter = self.limited(1, notice=(1, b"please wait"), idle_timeout=1)
        active, waiting = Work(limiter).begin(), Work(limiter).begin()
        self.clock.pump([1] * 5)
        limiter.reconfigure(departed_on_half_close=True, notice=None)
        limiter.notice = (1, b"please wait")
        self.clock.pump([1] * 5)
        self.assertEqual((active.events, waiting.events), ([], []))
        self.assert_counts(active=1, waiting=1)

    def test_it_needs_no_descriptor_to_wait(self) -> None:
        limiter = self.limited(1)
        active = Work(limiter).begin()
        self.patch(Budget, "may_wait", lambda budget, slots: False)
        waiting = Work(limiter).begin()
        self.connect()
        self.assertEqual((active.events, waiting.events), ([], []))
        self.assert_counts(active=1, waiting=1, refused={"descriptors": 1})
