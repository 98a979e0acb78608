"""
The waiting line, with its operations in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from time import thread_time

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.limiters import LimiterTestCase
from support.logs import Log
from zope.interface.verify import verifyObject

from connlimit._limiter.queue import Adaptive, Fair, Fifo, Lifo, Queue
from connlimit._limiter.settings import Settings
from connlimit.interfaces import IQueue


@attrs.frozen
class Waiting:
    """
    Somebody who waits: the peer is the address.
    """

    number: int
    address: int = 0


def peer(address: int) -> int:
    return address


ORDERS: dict[str, Callable[[], Fifo]] = {
    "fifo": Fifo,
    "lifo": Lifo,
    "fair": lambda: Fair(peer),
    "adaptive": lambda: Adaptive(0.5, 10.0),
}


@pytest.mark.parametrize("order", ORDERS)
def test_each_order_is_a_line(order: str) -> None:
    verifyObject(IQueue, ORDERS[order]())


@pytest.mark.parametrize("order", ORDERS)
def test_who_does_not_wait_cannot_leave(order: str) -> None:
    with pytest.raises(KeyError):
        ORDERS[order]().remove(Waiting(0))


@given(order=st.sampled_from(sorted(ORDERS)), steps=st.lists(st.integers(-5, 20)))
def test_whoever_leaves_from_the_middle_the_others_keep_their_turns(order: str, steps: list[int]) -> None:
    line, model = ORDERS[order](), []
    peers: list[int] = []  # whose turn it is, in the fair order
    for now, step in enumerate(steps):
        if step < 0:
            new = Waiting(now, -step)
            line.add(new, float(now))
            model.append(new)
            if new.address not in peers:
                peers.append(new.address)
        elif model:
            leaving = model[step % len(model)]
            first = next(each for each in model if each.address == peers[0])
            model.remove(leaving)
            assert line.remove(leaving) == leaving.number
            if leaving == first:
                peers.append(peers.pop(0))
            peers = [each for each in peers if any(one.address == each for one in model)]
        assert list(line) == model
        assert len(line) == len(model)
        if model:
            assert line.oldest() == (model[0], float(model[0].number))
            assert model[0] in line
            expected = {
                "fifo": model[0],
                "lifo": model[-1],
                "fair": next(each for each in model if each.address == peers[0]),
                "adaptive": model[0],
            }
            # The adaptive line is asked at once, when nobody has waited too long.
            assert line.next(float(model[0].number)) == expected[order]


def seconds_for(order: str, count: int) -> float:
    """
    How long it takes that a thousand of so many leave from the middle and come again, one after the other.
    """
    line, waiting = ORDERS[order](), [Waiting(number, number % 100) for number in range(count)]
    for each in waiting:
        line.add(each, 0.0)
    began = thread_time()
    for each in waiting[count // 2 :][:1000]:
        assert line.next(0.0) is not None
        line.remove(each)
        line.add(each, 0.0)
    return thread_time() - began


@pytest.mark.parametrize("order", ORDERS)
def test_coming_and_leaving_take_no_longer_in_a_longer_queue(order: str) -> None:
    # The best of several, since others use the machine, too. To look at all would take 20 times as long.
    short, long = (min(seconds_for(order, count) for _ in range(5)) for count in (2000, 40_000))
    assert long < 4 * short


class TestAdaptive:
    """
    The adaptive order: overloaded after 10 s of waits above 0.5 s.
    """

    def test_a_long_wait_alone_is_no_overload(self) -> None:
        line = Adaptive(0.5, 10.0)
        old, new = Waiting(1), Waiting(2)
        line.add(old, 0.0)
        line.add(new, 5.0)
        assert line.next(9.0) is old
        assert not line.has_expired(old, 9.0)

    def test_when_the_wait_was_too_long_for_too_long_the_newest_is_next_and_the_oldest_expires(self) -> None:
        line = Adaptive(0.5, 10.0)
        old, new = Waiting(1), Waiting(2)
        line.add(old, 0.0)
        assert line.expires() == 10.5
        line.add(new, 10.2)
        assert line.next(10.6) is new
        assert line.has_expired(old, 10.6)
        assert not line.has_expired(new, 10.6)

    def test_one_short_wait_begins_the_interval_anew(self) -> None:
        line = Adaptive(0.5, 10.0)
        first, second = Waiting(1), Waiting(2)
        line.add(first, 0.0)
        assert line.next(1.0) is first
        line.add(second, 4.9)
        line.remove(first)
        assert line.next(5.0) is second
        assert line.expires() == 4.9 + 0.5 + 10.0

    def test_the_overload_is_over_when_the_line_has_been_empty(self) -> None:
        line = Adaptive(0.5, 10.0)
        old, new, newer = Waiting(1), Waiting(2), Waiting(3)
        line.add(old, 0.0)
        assert line.has_expired(old, 11.0)
        line.remove(old)
        line.add(new, 12.0)
        line.add(newer, 12.1)
        assert line.next(12.2) is new
        assert not line.has_expired(new, 13.0)


class TestAside:
    """
    Those who stand aside.
    """

    def filled(self, count: int) -> tuple[Queue, list[Waiting]]:
        self.full: set[object] = set()
        line = Queue(Fifo(), lambda key: key not in self.full)
        all_of_them = [Waiting(number, number % 2) for number in range(count)]
        for each in all_of_them:
            line.add(each, float(each.number))
        return line, all_of_them

    def test_others_pass_and_who_returns_goes_first(self) -> None:
        line, (first, second, third) = self.filled(3)
        line.step_aside(first, ("key",), "key")
        assert line.next(9.0) is second
        assert (len(line), list(line)) == (3, [first, second, third])
        line.call_back("key")
        assert line.next(9.0) is first
        assert (len(line), list(line)) == (3, [first, second, third])

    def test_who_returned_can_step_aside_again(self) -> None:
        line, (first, second) = self.filled(2)
        line.step_aside(first, ("key", "other"), "key")
        line.call_back("key")
        line.step_aside(first, ("key", "other"), "other")
        assert line.next(9.0) is second
        line.call_back("key")
        assert line.next(9.0) is second
        line.call_back("other")
        assert line.next(9.0) is first

    def test_one_that_lacks_another_key_when_it_is_called_lets_the_next_return(self) -> None:
        line, (first, second, third, fourth) = self.filled(4)
        line.step_aside(first, ("key", "other"), "key")
        line.step_aside(second, ("key", "other"), "key")
        line.step_aside(third, ("key",), "key")
        self.full = {"other"}
        line.call_back("key")
        assert line.next(9.0) is third
        assert line.aside() == {"other": 2}
        line.remove(third)
        line.call_back("key")
        assert line.next(9.0) is fourth
        self.full = set()
        line.call_back("other")
        assert line.next(9.0) is first

    def test_the_call_of_one_that_leaves_or_cannot_use_it_goes_to_the_next(self) -> None:
        line, (first, second, third) = self.filled(3)
        for each in (first, second, third):
            line.step_aside(each, ("key", each.number % 2), "key")
        line.call_back("key")
        assert list(line.returned) == [first]
        line.remove(first)
        assert list(line.returned) == [second]
        self.full = {1}
        line.step_aside(second, ("key", 1), 1)
        assert list(line.returned) == [third]

    def test_the_oldest_is_found_wherever_it_stands(self) -> None:
        line, (first, second, third) = self.filled(3)
        line.step_aside(second, ("key",), "key")
        assert line.oldest() == (first, 0.0)
        line.step_aside(first, ("key",), "key")
        assert line.oldest() == (first, 0.0)
        assert line.remove(first) == 0.0
        assert line.oldest() == (second, 1.0)
        line.remove(second)
        assert line.oldest() == (third, 2.0)

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["add", "turn", "free", "fill", "remove", "all"]),
                st.integers(0, 9),
                st.integers(0, 2),
            ),
            max_size=80,
        )
    )
    def test_in_any_order_of_events_nobody_is_lost_and_none_stands_aside_that_has_room(
        self, steps: list[tuple[str, int, int]]
    ) -> None:
        """
        Of any keys that are free, nobody stands aside who has no other.
        """
        line, _ = self.filled(0)
        everybody: list[Waiting] = []
        keys: dict[Waiting, tuple[str, ...]] = {}
        for now, (step, which, other) in enumerate(steps):
            if step == "add":
                new = Waiting(now, which)
                keys[new] = (f"peer {which % 3}", f"colour {other}")
                everybody.append(new)
                line.add(new, float(now))
            elif step == "turn" and (line.order or line.returned):
                turn = line.next(float(now))
                lacking = [key for key in keys[turn] if key in self.full]
                if lacking:
                    line.step_aside(turn, keys[turn], lacking[0])
                else:
                    everybody.remove(turn)
                    assert line.remove(turn) == float(turn.number)
            elif step == "fill":
                self.full.add(f"peer {which % 3}" if other else f"colour {which % 3}")
            elif step == "free":
                key = f"peer {which % 3}" if other else f"colour {which % 3}"
                if key in self.full:
                    self.full.remove(key)
                    for _ in everybody:  # as many as there are free now
                        line.call_back(key)
            elif step == "remove" and everybody:
                leaving = everybody.pop(which % len(everybody))
                assert line.arrival(leaving) == float(leaving.number)
                assert line.remove(leaving) == float(leaving.number)
                assert leaving not in line
            elif step == "all":
                line.call_all_back()
            assert list(line) == everybody
            assert len(line) == len(everybody)
            if everybody:
                assert line.oldest() == (everybody[0], float(everybody[0].number))
            for each in everybody:
                if each not in line.order and each not in line.returned:
                    assert self.full & set(keys[each])
        for each in everybody:
            line.remove(each)
        assert not (line._outside)
        assert not (line.returned)
        assert not (line._groups)
        assert not (line._below)
        assert not (line._stepped)
        assert not (line._keys)
        assert not (line._outside._heap)
        assert not (line.returned._heap)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60), st.integers(0, 10))
def test_those_who_have_waited_longest_are_found_wherever_they_stand(
    steps: list[tuple[bool, int]], wanted: int
) -> None:
    line = Queue(Fifo(), lambda key: False)
    for now, (aside, leaves) in enumerate(steps):
        each = Waiting(now)
        line.add(each, now)
        if aside:
            line.step_aside(each, ((now % 3,),), (now % 3,))
        if leaves < len(line) and now % 2:
            line.remove(list(line)[leaves])
    assert line.first(wanted) == list(line)[:wanted]
    assert sorted(line.everybody(), key=line.arrival) == list(line)


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
