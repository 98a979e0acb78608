"""
Limits whose slots live in this process.
"""

from __future__ import annotations

import gc
import weakref
from operator import attrgetter

import attrs
import pytest
from twisted.internet.address import IPv4Address
from zope.interface.verify import verifyObject

from connlimit.interfaces import ILimit
from connlimit.limits import All, PerKey, PerPeer, Total


@attrs.define(eq=False)
class Held:
    """
    What holds a slot: its client's address.
    """

    address: IPv4Address


def test_they_are_limits() -> None:
    verifyObject(ILimit, Total(1))
    verifyObject(ILimit, All([]))


def test_a_total_has_so_many_slots() -> None:
    limit = Total(2)
    assert [limit.try_acquire(None) for _ in range(3)] == [True, True, False]
    limit.release(None)
    assert limit.try_acquire(None)
    assert limit.in_use == 2


def test_a_total_of_none_has_no_end() -> None:
    limit = Total(None)
    assert limit.slots is None
    assert all(limit.try_acquire(None) for _ in range(1000))


def test_a_total_that_is_cut_has_room_only_when_enough_is_released() -> None:
    limit = Total(2)
    limit.try_acquire(None)
    limit.try_acquire(None)
    limit.slots = 1
    limit.release(None)
    assert not limit.try_acquire(None)
    limit.release(None)
    assert limit.try_acquire(None)


def test_subscribers_hear_of_a_change() -> None:
    heard = []
    limit = Total(1)
    All([limit]).subscribe(lambda: heard.append(limit.slots))
    limit.slots = 5
    limit.slots = None
    assert heard == [5, None]


def test_all_limits_or_none_give_a_slot() -> None:
    wide, narrow = Total(2), Total(1)
    both = All([wide, narrow])
    assert both.try_acquire(None)
    assert not both.try_acquire(None)
    assert (wide.in_use, narrow.in_use) == (1, 1)
    both.release(None)
    assert (wide.in_use, narrow.in_use) == (0, 0)


@pytest.mark.parametrize("kind", [PerPeer, PerKey])
def test_of_a_key_that_gave_all_back_nothing_is_kept(kind: type[PerPeer]) -> None:
    limit = kind(2, attrgetter("host"))
    gone = []
    for number in range(100):
        one = Held(IPv4Address("TCP", f"10.0.0.{number}", 1))
        assert limit.try_acquire(one)
        assert limit.in_use() == {one.address.host: 1}
        limit.release(one)
        gone.append(weakref.ref(one))
        del one
    gc.collect()
    assert limit.in_use() == {}
    assert [each for each in gone if each() is not None] == []
