"""
The waiting line, with its operations in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from zope.interface.verify import verifyObject

from connlimit._line import Adaptive, Fair, Fifo, Lifo, Line
from connlimit.interfaces import IWaitingLine


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
    verifyObject(IWaitingLine, ORDERS[order]())


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

    def filled(self, count: int) -> tuple[Line, list[Waiting]]:
        line = Line(Fifo())
        all_of_them = [Waiting(number, number % 2) for number in range(count)]
        for each in all_of_them:
            line.add(each, float(each.number))
        return line, all_of_them

    def test_others_pass_and_who_returns_goes_first(self) -> None:
        line, (first, second, third) = self.filled(3)
        line.step_aside(first, "key")
        assert line.next(9.0) is second
        assert (len(line), list(line)) == (3, [first, second, third])
        line.call_back("key")
        assert line.next(9.0) is first
        assert (len(line), list(line)) == (3, [first, second, third])

    def test_who_returned_can_step_aside_again(self) -> None:
        line, (first, second) = self.filled(2)
        line.step_aside(first, "key")
        line.call_back("key")
        line.step_aside(first, "other")
        assert line.next(9.0) is second
        line.call_back("key")
        assert line.next(9.0) is second
        line.call_back("other")
        assert line.next(9.0) is first

    def test_the_oldest_is_found_wherever_it_stands(self) -> None:
        line, (first, second, third) = self.filled(3)
        line.step_aside(second, "key")
        assert line.oldest() == (first, 0.0)
        line.step_aside(first, "key")
        assert line.oldest() == (first, 0.0)
        assert line.remove(first) == 0.0
        assert line.oldest() == (second, 1.0)
        line.remove(second)
        assert line.oldest() == (third, 2.0)

    @given(st.lists(st.tuples(st.sampled_from(["add", "aside", "back", "remove", "all"]), st.integers(0, 9))))
    def test_in_any_order_of_events_nobody_is_lost(self, steps: list[tuple[str, int]]) -> None:
        line = Line(Fifo())
        order: list[Waiting] = []
        aside: dict[int, list[Waiting]] = {}
        returned: list[Waiting] = []

        def call_back(key: int) -> None:
            line.call_back(key)
            if aside.get(key):
                returned.append(aside[key].pop(0))

        for now, (step, which) in enumerate(steps):
            everybody = sorted(
                [*order, *returned, *chain.from_iterable(aside.values())], key=lambda each: each.number
            )
            turn = min(returned, key=lambda each: each.number) if returned else next(iter(order), None)
            assert list(line) == everybody
            assert len(line) == len(everybody)
            assert line.next(float(now)) is turn
            if everybody:
                assert line.oldest() == (everybody[0], float(everybody[0].number))
            if step == "add":
                order.append(Waiting(now, which))
                line.add(order[-1], float(now))
            elif step == "aside" and turn is not None:
                line.step_aside(turn, turn.address)
                (returned if turn in returned else order).remove(turn)
                aside.setdefault(turn.address, []).append(turn)
            elif step == "back":
                call_back(which)
            elif step == "all":
                line.call_all_back()
                returned += chain.from_iterable(aside.values())
                aside.clear()
            elif step == "remove" and everybody:
                leaving = everybody[which % len(everybody)]
                assert line.arrival(leaving) == float(leaving.number)
                assert line.remove(leaving) == float(leaving.number)
                assert leaving not in line
                for place in (order, returned, *aside.values()):
                    if leaving in place:
                        place.remove(leaving)
