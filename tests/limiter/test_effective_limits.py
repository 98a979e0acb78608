"""
Limits of peers, of keys, of a rate, and of one's own.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import attrs
import pytest
from support.fakes import FakeConnection, RecordingFactory
from support.limiters import LimiterTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from connlimit import Limiter, LimitingFactory
from connlimit.interfaces import IConnection, IKeyedLimit, ILimit, IRefusingLimit
from connlimit.limits import PerKey, PerPeer, Total
from connlimit.observers import LimiterObserver
from connlimit.refusals import Say


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


@implementer(IKeyedLimit)
@attrs.define
class ByPort(RemoteLimit):
    """
    A limit of one's own by a key: equal to others that hold the same, so it cannot be hashed.
    """

    def key(self, connection: object) -> object:
        return connection.address.port % 2

    def has_room(self, key: object) -> bool:
        return bool(self.granted)


class UnhashableTests(LimiterTestCase):
    """
    A limit of one's own need not be hashable.
    """

    def limited_by(self, limit: RemoteLimit) -> RemoteLimit:
        limit.granted, limit.held = 0, []
        with pytest.raises(TypeError):
            hash(limit)
        self.limited(limits=[limit])
        self.connect(3)
        self.assertEqual(self.served(), [])
        return limit

    def test_one_that_answers_later(self) -> None:
        limit = self.limited_by(attrs.define(type("Later", (RemoteLimit,), {}))())
        limit.grant(2)
        self.assertEqual(self.served(), [0, 1])

    def test_one_by_a_key(self) -> None:
        limit = self.limited_by(ByPort())
        limit.grant(2)
        self.assertEqual(self.served(), [0, 1])

    def test_one_that_fails(self) -> None:
        class Failing(RemoteLimit):
            __hash__ = None
            fails = True

            def try_acquire(self, connection: object) -> bool:
                return 1 / 0 if self.fails else super().try_acquire(connection)

        limit = self.limited_by(Failing())
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))
        limit.fails = False
        limit.grant(3)
        self.assertEqual(self.served(), [0, 1, 2])


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
