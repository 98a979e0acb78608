"""
Who is served, who waits and who is refused.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable

import attrs
import pytest
from support.fakes import ApplicationError, FakeConnection, RecordingFactory
from support.limiters import LimiterTestCase
from support.logs import Log
from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from connlimit import Limiter, LimitingFactory
from connlimit._limiter.queue import Fair, Fifo
from connlimit._limiter.settings import FIELDS, Settings
from connlimit._limiter.slots import NullConnection
from connlimit._system import descriptors
from connlimit.interfaces import IConnection, ILimit, ILimiterObserver, IRefusingLimit
from connlimit.limits import PerKey, PerPeer, Total
from connlimit.observers import LimiterObserver
from connlimit.refusals import Say


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


class LineTests(LimiterTestCase):
    """
    The line has an end, and patience too.
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

    def test_ten_thousand_time_out_together(self) -> None:
        self.limited(0, wait_timeout=5)
        self.connect(self.MANY, at_once=True)
        self.clock.advance(5)
        self.turn()
        self.assert_counts(waiting=0, refused={"timeout": self.MANY})


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


class Closing(RecordingFactory.protocol):
    """
    A server that closes every connection as soon as it is made.
    """

    def connectionMade(self) -> None:
        super().connectionMade()
        self.transport.loseConnection()


class SettingsTests(LimiterTestCase):
    """
    Settings are checked, and changed all or none.
    """

    def test_wrong_values_are_refused_by_the_name_of_their_setting(self) -> None:
        for error, settings in [
            (ValueError, {"max_connections": -1}),
            (TypeError, {"max_connections": "10"}),
            (TypeError, {"max_connections": 1.5}),
            (TypeError, {"max_connections": True}),
            (ValueError, {"max_waiting": -5}),
            (TypeError, {"max_waiting": []}),
            (ValueError, {"wait_timeout": 0}),
            (ValueError, {"wait_timeout": -0.1}),
            (ValueError, {"wait_timeout": float("nan")}),
            (ValueError, {"wait_timeout": float("inf")}),
            (TypeError, {"wait_timeout": "30"}),
            (ValueError, {"name": ""}),
            (TypeError, {"name": None}),
            (TypeError, {"clock": "now"}),
            (TypeError, {"max_conections": 1}),
        ]:
            (name,) = settings
            with self.subTest(settings), pytest.raises(error, match=name):
                Limiter(**settings)
            if name in FIELDS:
                with self.subTest(settings), pytest.raises(error, match=name):
                    setattr(Limiter(), name, settings[name])

    def test_a_name_that_is_no_setting_cannot_be_set(self) -> None:
        with pytest.raises(AttributeError, match="max_conections"):
            Limiter().max_conections = 50
        with pytest.raises(TypeError, match="max_conections is not a setting; did you mean max_connections"):
            Limiter().reconfigure(max_conections=1)

    def test_one_wrong_value_changes_nothing(self) -> None:
        limiter = self.limited(1)
        self.connect(2)
        before = limiter.settings
        with pytest.raises(ValueError, match="max_waiting"):
            limiter.reconfigure(max_connections=5, max_waiting=-1)
        self.assertIs(limiter.settings, before)
        self.assert_counts(active=1, waiting=1)

    def test_several_settings_change_together(self) -> None:
        limiter = self.limited(1)
        limiter.reconfigure(max_connections=5, max_waiting=7, wait_timeout=3.5, name="mail")
        self.assertEqual(
            (limiter.max_connections, limiter.max_waiting, limiter.wait_timeout, limiter.name),
            (5, 7, 3.5, "mail"),
        )

    def test_the_clock_that_is_given_is_the_one_that_is_asked(self) -> None:
        clock = Clock()
        self.assertIs(Limiter(clock=clock).clock, clock)

    def test_it_shows_what_it_holds(self) -> None:
        self.limited(2, name="web")
        self.connect(3)
        self.assertEqual(repr(self.limiter), "<Limiter web: 2 of 2 served, 1 waiting>")


class SnapshotTests(LimiterTestCase):
    """
    The counters tell what happened.
    """

    def test_waits_are_counted_and_summed(self) -> None:
        self.limited(1)
        clients = self.connect(3)
        self.clock.advance(2)
        self.close(clients[0])
        self.clock.advance(3)
        self.assertEqual(self.limiter.snapshot().longest_wait, 5)
        self.close(clients[1])
        self.assert_counts(waits=2, wait_seconds=7.0, longest_wait=0.0, served=3, finished=2)

    def test_a_snapshot_does_not_change_any_more(self) -> None:
        self.limited(0, max_waiting=0)
        snapshot = self.limiter.snapshot()
        self.connect()
        self.assertEqual(snapshot.refused["full"], 0)
        with pytest.raises(AttributeError):
            snapshot.active = 5
        with pytest.raises(TypeError):
            snapshot.refused["full"] = 5


@implementer(ILimiterObserver)
class Recorder:
    """
    Writes down what an observer is told.
    """

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def __getattr__(self, event: str) -> object:
        return lambda limiter, *facts: self.told.append((event, *facts))


class ObserverTests(LimiterTestCase):
    """
    Observers hear everything and harm nothing.
    """

    def test_every_event_is_told(self) -> None:
        recorder = Recorder()
        self.limited(1, max_waiting=2, wait_timeout=5, observers=[recorder])
        first, _, third, _ = self.connect(4)
        self.clock.advance(1)
        self.close(first)
        third.abortConnection()
        self.turn()
        self.connect()
        self.clock.advance(5)
        self.turn()
        self.limiter.reconfigure(max_connections=3, max_waiting=2)
        ports = [
            tuple(fact.address.port - 10000 if hasattr(fact, "address") else fact for fact in told)
            for told in recorder.told
        ]
        self.assertEqual(
            ports,
            [
                ("served", 0, 0.0),
                ("waiting", 1),
                ("waiting", 2),
                ("refused", 3, "full"),
                ("finished", 0),
                ("served", 1, 1.0),
                ("departed", 2, 1.0),
                ("waiting", 4),
                ("refused", 4, "timeout"),
                ("reconfigured", {"max_connections": (1, 3)}),
            ],
        )

    def test_an_observer_that_raises_is_logged_and_changes_nothing(self) -> None:
        class Broken(LimiterObserver):
            def __getattribute__(self, name: str) -> object:
                raise ZeroDivisionError(name)

        recorder = Recorder()
        self.limited(1, observers=[Broken(), recorder])
        first, _ = self.connect(2)
        self.close(first)
        self.assertEqual(self.served(), [0, 1])
        self.assertEqual([event for event, *_ in recorder.told], ["served", "waiting", "finished", "served"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_observers_come_and_go(self) -> None:
        self.limited()
        recorder = Recorder()
        self.limiter.add_observer(recorder)
        self.connect()
        self.limiter.remove_observer(recorder)
        self.connect()
        self.assertEqual(len(recorder.told), 1)

    def test_the_base_class_provides_all_of_the_interface(self) -> None:
        verifyObject(ILimiterObserver, LimiterObserver())


@implementer(ILimit)
class RemoteLimit:
    """
    A limit whose slots live elsewhere: it says no while it asks, and calls back.
    """

    def __init__(self) -> None:
        self.granted = 0
        self.held: list[object] = []

    def try_acquire(self, connection: object) -> bool:
        if self.granted:
            self.granted -= 1
            self.held.append(connection)
            return True
        return False

    def release(self, connection: object) -> None:
        self.held.remove(connection)

    def subscribe(self, callback: object) -> None:
        self.callback = callback

    def grant(self, count: int) -> None:
        self.granted += count
        self.callback()


class FurtherLimitTests(LimiterTestCase):
    """
    A connection is served when it has a slot of every limit.
    """

    def test_the_line_waits_for_a_limit_that_answers_later(self) -> None:
        remote = RemoteLimit()
        self.limited(2, limits=[remote])
        clients = self.connect(3)
        self.assert_counts(active=0, waiting=3)
        remote.grant(3)
        self.assert_counts(active=2, waiting=1)
        self.assertEqual(len(remote.held), 2)
        self.close(clients[0])
        self.assert_counts(active=2, waiting=0)

    def test_a_newcomer_leaves_a_slot_that_was_not_announced_to_the_line(self) -> None:
        remote = RemoteLimit()
        self.limited(limits=[remote])
        self.connect()
        remote.granted = 1
        connection = self.factory.buildProtocol(None)
        self.assert_counts(active=0, waiting=1)
        connection.makeConnection(FakeConnection(self.clock))
        self.assertEqual(self.served(), [0])
        self.assert_counts(active=1, waiting=1)

    def test_a_limit_may_call_back_while_it_is_subscribed_to(self) -> None:
        class Eager(RemoteLimit):
            def subscribe(self, callback: Callable[[], None]) -> None:
                super().subscribe(callback)
                callback()

        for settings in ({}, {"order": "adaptive"}, {"max_rate": 5, "max_per_peer": 1}, {"dry_run": True}):
            remote = Eager()
            self.limited(2, limits=[remote], **settings)
            self.connect()
            self.assert_counts(active=0, waiting=1)
            remote.grant(1)
            self.assert_counts(active=1, waiting=0)

    def test_a_limit_that_raises_is_logged_and_has_no_room(self) -> None:
        class Broken(RemoteLimit):
            def try_acquire(self, connection: object) -> bool:
                raise ZeroDivisionError

        limiter = self.limited(2, limits=[Broken()])
        self.connect()
        self.assert_counts(active=0, waiting=1)
        self.assertEqual(limiter.active, 0)
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))

    def test_a_limit_that_raises_on_release_is_logged_and_the_others_are_released(self) -> None:
        class Broken(RemoteLimit):
            def release(self, connection: object) -> None:
                raise ZeroDivisionError

        broken = Broken()
        broken.granted = 2
        self.limited(1, limits=[broken])
        first, _ = self.connect(2)
        self.close(first)
        self.assert_counts(active=1, waiting=0)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)


@implementer(IRefusingLimit)
class FailingLimit(RemoteLimit):
    """
    A limit that can say that waiting is useless.
    """

    useless = False

    def refuses(self) -> bool:
        return self.useless


class RefusingLimitTests(LimiterTestCase):
    """
    A limit of which nobody is to wait for a slot.
    """

    def setUp(self) -> None:
        self.limit = FailingLimit()
        verifyObject(IRefusingLimit, self.limit)

    def test_those_who_wait_and_newcomers_are_refused_with_the_words_of_the_refusal(self) -> None:
        self.limited(limits=[self.limit], refusal=Say(b"come back later"))
        waiting = self.connect(3)
        self.assert_counts(waiting=3)
        self.limit.useless = True
        newcomer, *_ = self.connect()
        self.assertEqual(newcomer.received, b"come back later")
        self.assert_counts(waiting=3, refused={"full": 1})
        self.clock.advance(1)
        self.assertEqual([each.received for each in waiting], [b"come back later"] * 3)
        self.assert_counts(waiting=0, refused={"full": 4})
        self.limit.useless = False
        self.connect()
        self.assert_counts(waiting=1)
        self.limit.grant(1)
        self.assert_counts(active=1, waiting=0)

    def test_who_gets_a_slot_is_served_nevertheless(self) -> None:
        self.limited(limits=[self.limit])
        self.limit.useless = True
        self.limit.granted = 1
        self.connect(2)
        self.assert_counts(active=1, refused={"full": 1})

    def test_a_long_line_is_refused_some_at_a_time_and_in_order(self) -> None:
        self.limited(limits=[self.limit])
        refused: list[int] = []
        others: list[int] = []

        class Order(LimiterObserver):
            def refused(self, limiter: Limiter, connection: IConnection, reason: str) -> None:
                refused.append(connection.address.port - 10000)
                if len(refused) == 1:
                    limiter.clock.callLater(0, lambda: others.append(len(refused)))

        self.limiter.add_observer(Order())
        self.connect(1000)
        self.limit.useless = True
        self.clock.advance(1)
        self.assertEqual(others, [100])
        self.assertEqual(refused, list(range(1000)))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_the_rest_waits_on_if_it_becomes_useful_again_meanwhile(self) -> None:
        self.limited(limits=[self.limit])
        self.connect(150)
        self.limit.useless = True
        tell = self.limit.refuses
        self.limit.refuses = lambda: tell() and self.limiter.waiting > 120
        self.clock.advance(1)
        self.assert_counts(waiting=120, refused={"full": 30})

    def test_a_limit_that_fails_to_tell_lets_wait(self) -> None:
        self.limited(limits=[self.limit])
        self.limit.refuses = lambda: 1 / 0
        self.connect()
        self.assert_counts(waiting=1)
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))


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


class PeerTests(LimiterTestCase):
    """
    So many connections of one peer are served at once; the others let those behind them pass.
    """

    def test_a_peer_at_its_cap_does_not_block_others(self) -> None:
        self.limited(10, max_per_peer=2)
        greedy = self.connect(4, host="10.0.0.1")
        self.connect(1, host="10.0.0.2")
        self.assert_counts(active=3, waiting=2)
        self.assertEqual(self.served(), [0, 1, 4])
        self.close(greedy[0])
        self.assertEqual(self.served(), [0, 1, 4, 2])
        self.assert_counts(active=3, waiting=1)

    def test_a_newcomer_is_served_past_a_line_of_those_who_cannot_be(self) -> None:
        self.limited(10, max_per_peer=1, max_waiting=2)
        self.connect(3, host="10.0.0.1")
        self.assert_counts(active=1, waiting=2)
        self.connect(1, host="10.0.0.2")
        self.assert_counts(active=2, waiting=2, refused={})

    def test_who_let_others_pass_goes_before_those_who_came_later(self) -> None:
        self.limited(2, max_per_peer=1)
        first, blocked, other, last = (
            self.connect(1, host=host)[0] for host in ("10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.3")
        )
        self.assertEqual(self.served(), [0, 2])
        self.close(first)
        self.assertEqual(self.served(), [0, 2, 1])
        self.close(other)
        self.assertEqual(self.served(), [0, 2, 1, 3])
        self.close(blocked, last)
        self.assert_counts(active=0, waiting=0, finished=4)

    def test_when_one_that_stood_aside_leaves_the_next_of_its_peer_is_served(self) -> None:
        self.limited(2, max_per_peer=1, wait_timeout=10)
        first, *waiting = self.connect(4, host="10.0.0.1")
        waiting[0].deliver_although_paused(b"x")
        self.factory.limiter.admission.depart(waiting[0].protocol)
        self.close(first)
        self.assertEqual(self.served(), [0, 2])
        self.clock.advance(10)
        self.turn()
        self.assert_counts(waiting=0, departed=1, refused={"timeout": 1})

    def test_over_the_cap_a_peer_can_be_refused(self) -> None:
        self.limited(10, max_per_peer=1, over_peer="refuse")
        _, refused = self.connect(2, host="10.0.0.1")
        self.assertTrue(refused.closed)
        self.assert_counts(active=1, waiting=0, refused={"peer": 1})

    def test_who_waits_for_another_reason_is_refused_if_its_peer_is_at_its_cap_at_its_turn(self) -> None:
        self.limited(1, max_per_peer=1, over_peer="refuse")
        other = self.connect(1, host="10.0.0.9")[0]
        self.connect(2, host="10.0.0.1")
        self.limiter.max_connections = 3
        self.turn()
        self.assert_counts(active=2, waiting=0, refused={"peer": 1})
        self.close(other)

    def test_peers_are_networks_and_mapped_addresses_are_ipv4(self) -> None:
        self.limited(10, max_per_peer=1, peer_prefix=(24, 64))
        for host in ("10.0.0.1", "10.0.0.2", "::ffff:10.0.0.3", "10.0.1.1", "2001:db8::1", "2001:db8::2"):
            self.connect(1, host=host)
        self.assertEqual(self.served(), [0, 3, 4])

    def test_a_cap_that_is_set_while_running_counts_who_is_there(self) -> None:
        self.limited(10)
        there = self.connect(3, host="10.0.0.1")
        self.limiter.max_per_peer = 2
        self.connect(1, host="10.0.0.1")
        self.assert_counts(active=3, waiting=1)
        self.close(*there[:2])
        self.assert_counts(active=2, waiting=0)
        self.limiter.peer_prefix = (0, 0)
        self.connect(1, host="10.9.9.9")
        self.assert_counts(active=2, waiting=1)
        self.limiter.max_per_peer = None
        self.turn()
        self.assert_counts(active=3, waiting=0)

    def test_a_raised_cap_serves_those_who_stand_aside(self) -> None:
        self.limited(10, max_per_peer=1)
        self.connect(5, host="10.0.0.1")
        self.limiter.max_per_peer = 3
        self.turn()
        self.assertEqual(self.served(), [0, 1, 2])

    def test_a_limit_by_any_key_lets_others_pass_too(self) -> None:
        by_parity = PerKey(1, lambda address: address.port % 2)
        self.limited(10, limits=[by_parity])
        self.connect(4)
        self.assertEqual(self.served(), [0, 1])
        by_parity.slots = 2
        self.turn()
        self.assertEqual(self.served(), [0, 1, 2, 3])


class KeyTests(LimiterTestCase):
    """
    Several limits by keys at once, and keys that cannot be found.
    """

    def by(self, keys: dict[int, object]) -> Callable[[object], object]:
        return lambda address: keys[address.port - 10000]

    def test_who_steps_aside_for_another_key_leaves_the_room_to_the_next_of_its_first(self) -> None:
        by_colour = PerKey(1, self.by({0: "red", 1: "blue", 2: "red", 3: "red", 4: "blue", 5: "green"}))
        self.limited(10, max_per_peer=1, limits=[by_colour])
        red_and_blue = [
            self.connect(1, host="10.0.0.1")[0],  # holds peer 1 and red
            self.connect(1, host="10.0.0.2")[0],  # holds peer 2 and blue
        ]
        self.connect(1, host="10.0.0.2")  # 2: lacks peer 2, then red
        self.connect(1, host="10.0.0.3")  # 3: lacks red
        self.connect(1, host="10.0.0.2")  # 4: lacks peer 2, then blue
        self.connect(1, host="10.0.0.2")  # 5: lacks peer 2 alone
        self.assertEqual(self.served(), [0, 1])
        self.close(red_and_blue[1])
        # Peer 2 and blue are free: 2 would be first, but red is held.
        self.assertEqual(self.served(), [0, 1, 4])
        self.close(red_and_blue[0])
        self.assertEqual(self.served(), [0, 1, 4, 3])
        self.close(self.clients[4])
        self.assertEqual(self.served(), [0, 1, 4, 3, 5])
        self.close(self.clients[5])
        self.close(self.clients[3])
        self.assertEqual(self.served(), [0, 1, 4, 3, 5, 2])
        self.assert_counts(active=1, waiting=0)

    def test_a_key_that_cannot_be_found_makes_a_client_of_its_own(self) -> None:
        def country_of(address: object) -> str:
            return {"10.0.0.1": "ch", "10.0.0.2": "at"}[address.host]

        self.limited(10, limits=[PerKey(1, country_of)])
        self.connect(2, host="10.0.0.1")
        self.connect(2, host="10.0.0.9")
        self.connect(1, host="10.0.0.2")
        self.assertEqual(self.served(), [0, 2, 3, 4])
        self.close(*self.clients)
        self.assert_counts(active=0, waiting=0)
        self.assertTrue(self.flushLoggedErrors(KeyError))

    def test_a_slot_is_given_back_under_the_key_that_it_was_taken_under(self) -> None:
        answers = iter(["a", "b", "c", "d", "e", "f", "g", "h"])
        by_whim = PerKey(1, lambda address: next(answers))
        self.limited(10, limits=[by_whim])
        client, *_ = self.connect(1)
        self.assertEqual(dict(by_whim.in_use()), {"a": 1})
        self.close(client)
        self.assertEqual(dict(by_whim.in_use()), {})

    def test_a_limit_shared_by_two_limiters_serves_whoever_waits_in_the_other(self) -> None:
        shared = PerKey(1, lambda address: address.host)
        self.limited(10, limits=[shared])
        first, *_ = self.connect(1)
        other = Limiter(10, limits=[shared], clock=self.clock)
        server = RecordingFactory()
        FakeConnection(self.clock, number=50).connect(LimitingFactory(server, other))
        self.turn()
        self.assertEqual(server.addresses, [])
        self.close(first)
        self.assertEqual(len(server.addresses), 1)

    def test_a_total_shared_by_two_limiters_serves_whoever_waits_in_the_other(self) -> None:
        shared = Total(1)
        self.limited(10, limits=[shared])
        first, *_ = self.connect(1)
        other = Limiter(10, limits=[shared], clock=self.clock)
        server = RecordingFactory()
        FakeConnection(self.clock, number=50).connect(LimitingFactory(server, other))
        self.close(first)
        self.assertEqual(len(server.addresses), 1)

    def test_a_limit_that_fails_for_one_client_stops_nobody_else(self) -> None:
        class Picky(RemoteLimit):
            def try_acquire(self, connection: object) -> bool:
                if connection.address.host == self.bad:
                    raise ZeroDivisionError
                return super().try_acquire(connection)

        picky = Picky()
        picky.bad, picky.granted = "10.0.0.9", 10
        self.limited(1, limits=[picky])
        first = self.connect(1)[0]
        self.connect(1, host="10.0.0.9")
        self.connect(2, host="10.0.0.1")
        self.close(first)
        self.assertEqual(self.served(), [0, 2])
        picky.bad = None
        self.close(self.clients[2])
        self.clock.advance(1)
        self.assertEqual(self.served(), [0, 2, 3])
        self.close(self.clients[3])
        self.clock.advance(1)
        self.turn()
        self.assertEqual(self.served(), [0, 2, 3, 1])
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))

    def test_a_limit_that_cannot_tell_a_key_stops_nobody_else(self) -> None:
        class Picky(PerPeer):
            def key(self, connection: object) -> object:
                if connection.address.host == "10.0.0.9":
                    raise ZeroDivisionError
                return super().key(connection)

        self.limited(1, limits=[Picky(5, lambda address: address.host)])
        first = self.connect(1)[0]
        self.connect(1, host="10.0.0.9")
        self.connect(1, host="10.0.0.1")
        self.close(first)
        self.assertEqual(self.served(), [0, 2])
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))

    def test_room_that_a_limit_announces_while_it_is_asked_is_taken(self) -> None:
        class Late(RemoteLimit):
            def try_acquire(self, connection: object) -> bool:
                if not self.granted:
                    self.granted = 1
                    self.callback()
                    return False
                return super().try_acquire(connection)

        self.limited(10, limits=[Late()])
        self.connect(1)
        self.assert_counts(active=1, waiting=0)

    def test_of_those_who_leave_while_others_stand_aside_nothing_is_kept(self) -> None:
        self.limited(10, max_per_peer=1)
        first, *_ = self.connect(2, host="10.0.0.1")
        gone = []
        for number in range(200):
            waiting = FakeConnection(self.clock, number=1000 + number, host="10.0.0.1").connect(self.factory)
            gone.append(weakref.ref(waiting.protocol))
            self.limiter.admission.depart(waiting.protocol)
            waiting.protocol = None
            del waiting
        self.turn()
        gc.collect()
        self.assertEqual([each for each in gone if each() is not None], [])
        self.assertFalse(first.closed)


class OrderTests(LimiterTestCase):
    """
    Whose turn it is.
    """

    def turns(self, order: object, hosts: list[str]) -> list[int]:
        self.limited(0, order=order)
        for host in hosts:
            self.connect(1, host=host)
            self.clock.advance(0.1)
        for room in range(1, len(hosts) + 1):
            self.limiter.max_connections = room
            self.turn()
        return self.served()

    def test_fifo_serves_the_oldest_first(self) -> None:
        self.assertEqual(self.turns("fifo", ["10.0.0.1"] * 4), [0, 1, 2, 3])

    def test_lifo_serves_the_newest_first(self) -> None:
        self.assertEqual(self.turns("lifo", ["10.0.0.1"] * 4), [3, 2, 1, 0])

    def test_fair_gives_each_peer_its_turn(self) -> None:
        hosts = ["10.0.0.1", "10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.2"]
        self.assertEqual(self.turns("fair", hosts), [0, 3, 4, 1, 5, 2])

    def test_an_order_of_ones_own_is_made_of_the_settings_and_the_peers(self) -> None:
        made = []

        def order(settings: Settings, peer: object) -> Fair:
            made.append(settings)
            return Fair(peer)

        hosts = ["10.0.0.1", "10.0.0.1", "10.0.0.2"]
        self.assertEqual(self.turns(order, hosts), [0, 2, 1])
        self.assertEqual(made[0].max_connections, 0)
        self.assertTrue(self.limiter.admission.needs_peers)
        self.assertRaises(TypeError, self.limiter.reconfigure, order=5)
        self.assertRaises(ValueError, self.limiter.reconfigure, order="nearest")

    def test_adaptive_serves_the_newest_and_refuses_the_oldest_when_it_is_overloaded(self) -> None:
        self.limited(1, order="adaptive", adaptive_target=1, adaptive_interval=5)
        active = self.connect()[0]
        self.connect(3)
        self.clock.advance(5.5)
        self.connect(2)
        self.clock.advance(0.4)
        self.assert_counts(waiting=5, refused={})
        self.clock.advance(0.1)
        self.turn()
        self.assert_counts(waiting=2, refused={"timeout": 3})
        self.close(active)
        self.assertEqual(self.served(), [0, 5])

    def test_those_who_wait_stay_and_keep_their_times_when_the_order_is_switched(self) -> None:
        self.limited(1, wait_timeout=10)
        active = self.connect()[0]
        self.connect()
        self.clock.advance(4)
        self.connect(2)
        self.limiter.order = "lifo"
        self.assert_counts(waiting=3)
        self.assertEqual(self.limiter.snapshot().longest_wait, 4)
        self.close(active)
        self.assertEqual(self.served(), [0, 3])
        self.clock.advance(6)
        self.turn()
        self.assert_counts(waiting=1, refused={"timeout": 1})


class FailingOrderTests(LimiterTestCase):
    """
    An order of one's own that fails.
    """

    def limited_by(self, **methods: object) -> None:
        order = type("Order", (Fifo,), dict(methods))
        self.limited(1, order=lambda settings, peer: order(), wait_timeout=30)

    def assert_first_come_first_served(self) -> None:
        self.connect(4)
        for number in range(4):
            self.assertEqual(self.served(), list(range(number + 1)))
            self.close(self.clients[number])
        self.assert_counts(active=0, waiting=0, finished=4)
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))

    def test_whatever_it_fails_at_it_is_first_come_first_served_then(self) -> None:
        for method in ("add", "remove", "next", "expires", "has_expired"):
            with self.subTest(method):
                self.limited_by(**{method: lambda self, *arguments: 1 / 0})
                if method == "has_expired":
                    self.connect(1)
                    self.connect(1)
                    self.clock.advance(30)
                    self.turn()
                    self.assert_counts(active=1, waiting=0, refused={"timeout": 1})
                    self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))
                else:
                    self.assert_first_come_first_served()

    def test_one_that_names_somebody_who_does_not_wait_is_asked_no_more(self) -> None:
        with Log() as log:
            self.limited_by(next=lambda self, now: "nobody")
            self.connect(3)
            self.close(self.clients[0])
            self.close(self.clients[1])
        self.assertEqual(self.served(), [0, 1, 2])
        self.assertEqual(sum("who does not wait" in text for text in log.texts()), 1)

    def test_one_that_cannot_be_made_changes_nothing(self) -> None:
        limiter = self.limited(1)
        self.connect(2)
        with pytest.raises(ZeroDivisionError):
            limiter.reconfigure(order=lambda settings, peer: 1 / 0, max_connections=5)
        self.assertEqual((limiter.order, limiter.max_connections), ("fifo", 1))
        self.assert_counts(active=1, waiting=1)

    def test_one_that_is_always_overdue_does_not_keep_the_reactor_busy(self) -> None:
        self.limited_by(expires=lambda self: 0.0)
        looks = []
        self.connect(2)
        expired = self.limiter.admission.queue.expired
        self.limiter.admission.queue.expired = lambda now: looks.append(now) or expired(now)
        self.clock.pump([0.001] * 1000)
        self.assertLess(len(looks), 150)


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


class RateTests(LimiterTestCase):
    """
    So many connections begin to be served in a second; more wait.
    """

    def test_more_than_the_burst_wait_and_are_served_at_the_rate(self) -> None:
        self.limited(None, max_rate=10, max_burst=3)
        self.connect(6)
        self.assert_counts(active=3, waiting=3)
        for served in (4, 5, 6):
            self.clock.advance(0.1)
            self.turn()
            self.assert_counts(active=served)

    def test_the_burst_is_a_second_of_the_rate_if_none_is_given(self) -> None:
        self.limited(None, max_rate=4)
        self.connect(6)
        self.assert_counts(active=4, waiting=2)

    def test_a_limit_without_room_takes_nothing_of_the_rate(self) -> None:
        self.limited(1, max_rate=10, max_burst=2)
        first = self.connect(3)[0]
        self.close(first)
        self.assert_counts(active=1, waiting=1)

    def test_a_clock_that_is_set_back_delays_nobody_for_longer_than_the_rate_does(self) -> None:
        self.limited(max_rate=10, max_burst=1)
        self.connect(3)
        self.clock.rightNow -= 3600
        for call in self.clock.getDelayedCalls():
            call.reset(0.1)
        self.assertEqual(self.served(), [0])
        for expected in ([0], [0, 1], [0, 1, 2]):  # the time in between is worth nothing
            self.clock.advance(0.1)
            self.turn()
            self.assertEqual(self.served(), expected)

    def test_a_changed_setting_does_not_fill_the_bucket_anew(self) -> None:
        limiter = self.limited(1000, max_rate=10, max_burst=100)
        self.connect(200)
        self.assertEqual(len(self.served()), 100)
        for number in range(100):
            limiter.reconfigure(max_connections=1001 + number, max_per_peer=900 + number)
        self.turn()
        self.assertEqual(len(self.served()), 100)
        limiter.max_rate = 20
        self.clock.advance(1)
        self.turn()
        self.assertEqual(len(self.served()), 120)
        limiter.max_burst = 1
        self.turn()
        self.assertEqual(len(self.served()), 120)

    def test_a_rate_and_a_cap_of_peers_that_are_set_together_both_hold(self) -> None:
        limiter = self.limited(10, max_rate=1, max_burst=1)
        self.connect(6, host="10.0.0.1")
        limiter.reconfigure(max_rate=1000, max_per_peer=2)
        self.clock.pump([0.01] * 10)
        self.assert_counts(active=2, waiting=4)
        self.close(*self.clients[:2])
        self.clock.pump([0.01] * 10)
        self.assert_counts(active=2, waiting=2, finished=2)

    def test_it_can_be_lifted_while_some_wait_for_it(self) -> None:
        self.limited(None, max_rate=0.1, max_burst=1)
        self.connect(3)
        self.limiter.max_rate = None
        self.turn()
        self.assert_counts(active=3, waiting=0)


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


class DryRunTests(LimiterTestCase):
    """
    A dry run serves everybody, and finds out what would have happened.
    """

    def test_everybody_is_served_and_the_waits_are_those_of_the_real_releases(self) -> None:
        self.limited(1, max_waiting=1, dry_run=True)
        first, second, third = self.connect(3)
        self.assert_counts(active=3, waiting=0, refused={})
        would = self.limiter.snapshot().dry_run
        self.assertEqual((would.active, would.waiting, would.refused["full"]), (1, 1, 1))
        self.clock.advance(2)
        self.close(first)
        would = self.limiter.snapshot().dry_run
        self.assertEqual((would.active, would.waiting, would.waits, would.wait_seconds), (1, 0, 1, 2.0))
        self.close(second, third)
        would = self.limiter.snapshot().dry_run
        self.assertEqual((would.active, would.finished), (0, 2))

    def test_who_ends_before_its_turn_would_have_departed(self) -> None:
        self.limited(1, dry_run=True)
        _, second = self.connect(2)
        self.close(second)
        self.assertEqual(self.limiter.snapshot().dry_run.departed, 1)

    def test_caps_of_peers_and_rates_are_not_in_force_either(self) -> None:
        self.limited(1, max_per_peer=1, max_rate=0.1, dry_run=True)
        self.connect(3)
        self.assert_counts(active=3, waiting=0)

    def test_when_it_is_over_the_limit_counts_who_is_there(self) -> None:
        self.limited(2, dry_run=True)
        there = self.connect(3)
        self.limiter.dry_run = False
        self.connect()
        self.assert_counts(active=3, waiting=1)
        self.close(*there[:2])
        self.assert_counts(active=2, waiting=0)
        self.assertIsNone(self.limiter.snapshot().dry_run)

    def test_the_suggested_limit_would_have_served_99_percent_at_once(self) -> None:
        self.limited(1, dry_run=True, log=False)
        with Log() as log:
            for _ in range(199):
                self.close(*self.connect())
            self.close(*self.connect(10))
            self.limiter.dry_run = False
        self.assertIn("with max_connections=8, 99 % would not have waited", log.texts()[-1])
        self.assertIn("of 209 connections, 9 would have waited", log.texts()[-2])

    def test_it_is_logged_once_a_minute_if_anything_happens(self) -> None:
        self.limited(1, dry_run=True)
        with Log() as log:
            self.close(*self.connect())
            self.clock.advance(60)
            self.clock.advance(600)
        self.assertEqual(len(log.texts()), 1)

    def test_all_settings_at_once_as_at_a_reload_leave_it_the_dry_run_that_it_is(self) -> None:
        limiter = self.limited(2, dry_run=True, wait_timeout=10)
        self.connect(10)
        limiter.reconfigure(**attrs.asdict(limiter.settings, recurse=False) | {"max_connections": 3})
        would = limiter.snapshot().dry_run
        self.assertEqual((would.active, would.waiting, would.dry_run), (3, 7, None))

    def test_a_changed_setting_is_tried_out_at_once(self) -> None:
        self.limited(1, dry_run=True)
        self.connect(2)
        self.assertEqual(self.limiter.snapshot().dry_run.waiting, 1)
        self.limiter.max_connections = 2
        self.assertEqual(self.limiter.snapshot().dry_run.waiting, 0)


class Socket(NullConnection):
    """
    A connection with a socket of which the kernel tells.
    """

    def __init__(self, number: int, host: str = "127.0.0.1") -> None:
        super().__init__(IPv4Address("TCP", host, number))
        self.idle_for: float | None = 0.0
        self.dead = self.closed = False

    def idle(self) -> float | None:
        return self.idle_for

    def is_dead(self) -> bool:
        return self.dead

    def close(self) -> None:
        self.closed = True


class LookTests(SynchronousTestCase):
    """
    Once a second, while somebody waits, the limiter looks at the sockets of those who are served.
    """

    def limited(self, *args: object, **settings: object) -> Limiter:
        self.clock = Clock()
        self.limiter = Limiter(*args, clock=self.clock, **settings)
        self.sockets: list[Socket] = []
        return self.limiter

    def connect(self, count: int = 1, host: str = "127.0.0.1") -> list[Socket]:
        new = [Socket(len(self.sockets) + number, host) for number in range(count)]
        self.sockets += new
        for each in new:
            if (
                not self.limiter.admission.serve_at_once(each)
                and self.limiter.admission.may_wait(each) is None
            ):
                self.limiter.admission.wait(each)
        return new

    def closed(self) -> list[int]:
        return [number for number, each in enumerate(self.sockets) if each.closed]

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
