"""
Limits whose slots live in this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs
from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from connlimit._system.bounded_log import BoundedLog
from connlimit._system.clock import ReactorClock
from connlimit.interfaces import IKeyedLimit, ILimit, IOccupant


class _Announcing:
    """
    Tells those who asked for it that there may be room.
    """

    def __init__(self) -> None:
        self._log = BoundedLog(Logger(namespace="connlimit.limiter"))
        self._subscribers: list[Callable[[], None]] = []

    def subscribe(self, callback: Callable[[], None]) -> None:
        self._subscribers.append(callback)

    def _tell(self) -> None:
        self._call(self._subscribers)

    def _call(self, subscribers: Iterable[Callable[..., None]], *arguments: object) -> None:
        for subscriber in tuple(subscribers):
            try:
                subscriber(*arguments)
            except Exception:
                self._log.failure("{subscriber} failed to hear that there may be room", subscriber=subscriber)


class _Slots(_Announcing):
    """
    A number of slots that can be changed.
    """

    def __init__(self, slots: int | None) -> None:
        super().__init__()
        self._slots: float = math.inf if slots is None else slots

    @property
    def slots(self) -> int | None:
        """
        How many slots there are; None for no limit. Can be changed at any time.
        """
        return None if self._slots == math.inf else int(self._slots)

    @slots.setter
    def slots(self, slots: int | None) -> None:
        self._slots = math.inf if slots is None else slots
        self._tell()


@implementer(ILimit)
class Total(_Slots):
    """
    A number of slots in all.

    :ivar in_use: how many slots are taken; after a cut it can exceed the limit until enough are released.
    """

    def __init__(self, slots: int | None) -> None:
        """
        :param slots: how many; None for no limit.
        """
        super().__init__(slots)
        self.in_use = 0

    def has_room(self) -> bool:
        """
        Whether there is a free slot.
        """
        return self.in_use < self._slots

    def try_acquire(self, connection: IOccupant) -> bool:
        if self.in_use < self._slots:
            self.in_use += 1
            return True
        return False

    def release(self, connection: IOccupant) -> None:
        self.in_use -= 1
        if len(self._subscribers) > 1:  # several limiters draw on it
            self._tell()


@implementer(IKeyedLimit)
class PerPeer(_Slots):
    """
    A number of slots for each key. A key of which nothing is held is forgotten.

    The function that gives the keys must not fail, and give the same key for the same address.
    """

    def __init__(self, slots: int | None, key: Callable[[IAddress], Hashable]) -> None:
        """
        :param slots: how many for each key; None for no limit.
        :param key: gives the key of a client's address; None is never limited.
        """
        super().__init__(slots)
        self._key = key
        self._in_use: dict[Hashable, int] = {}
        self._key_subscribers: list[Callable[[Hashable], None]] = []

    def subscribe_key(self, callback: Callable[[Hashable], None]) -> None:
        """
        Call *callback* with a key whenever there may be room for one more of it, by what somebody gave back.
        """
        self._key_subscribers.append(callback)

    def in_use(self) -> Mapping[Hashable, int]:
        """
        How many slots each key has taken, of those that have any.
        """
        return MappingProxyType(self._in_use)

    def count(self, addresses: Iterable[IAddress]) -> None:
        """
        Count clients that hold a slot already.
        """
        for address in addresses:
            self._take(self._key(address))

    def key(self, connection: IOccupant) -> Hashable:
        return self._key(connection.address)

    def has_room(self, key: Hashable) -> bool:
        return key is None or self._in_use.get(key, 0) < self._slots

    def try_acquire(self, connection: IOccupant) -> bool:
        key = self.key(connection)
        if not self.has_room(key):
            return False
        self._take(key)
        return True

    def _take(self, key: Hashable) -> None:
        self._in_use[key] = self._in_use.get(key, 0) + 1

    def release(self, connection: IOccupant) -> None:
        key = self.key(connection)
        left = self._in_use[key] - 1
        if left:
            self._in_use[key] = left
        else:
            del self._in_use[key]
        if len(self._key_subscribers) > 1:  # several limiters draw on it
            self._call(self._key_subscribers, key)


class PerKey(PerPeer):
    """
    A number of slots for each key. A key of which nothing is held is forgotten.

    The function that gives the keys is asked once for each address that holds slots. If it fails, or gives
    nothing that can be a key, that is logged and the address is a key of its own.
    """

    def __init__(self, slots: int | None, key: Callable[[IAddress], Hashable]) -> None:
        """
        :param slots: how many for each key; None for no limit.
        :param key: gives the key of a client's address; None is never limited.
        """
        super().__init__(slots, self._known_key)
        self._function = key
        # The key of each address that holds slots, and how many it holds.
        self._held: dict[IAddress, list[Any]] = {}

    def _known_key(self, address: IAddress) -> Hashable:
        held = self._held.get(address)
        return held[0] if held is not None else self._asked(address)

    def _asked(self, address: IAddress) -> Hashable:
        try:
            key = self._function(address)
            hash(key)
        except Exception:
            self._log.failure(
                "{key} gave no key for {peer}, which gets one of its own", key=self._function, peer=address
            )
            return _OwnKey(address)
        return key

    def try_acquire(self, connection: IOccupant) -> bool:
        address = connection.address
        key = self._known_key(address)
        if not self.has_room(key):
            return False
        self._take(key)
        self._hold(address, key)
        return True

    def count(self, addresses: Iterable[IAddress]) -> None:
        """
        Count clients that hold a slot already.
        """
        for address in addresses:
            key = self._known_key(address)
            self._take(key)
            self._hold(address, key)

    def _hold(self, address: IAddress, key: Hashable) -> None:
        held = self._held.setdefault(address, [key, 0])
        held[1] += 1

    def release(self, connection: IOccupant) -> None:
        super().release(connection)
        held = self._held[connection.address]
        held[1] -= 1
        if not held[1]:
            del self._held[connection.address]


@implementer(IAddress)
@attrs.frozen
class Key:
    """
    Stands for the address of an occupant that is known by a key, as a job is: its peer is that key.

    :ivar key: the key; to be of the same key as a connection's client, it is the peer of that.
    """

    key: Hashable

    def __str__(self) -> str:
        return str(self.key)


@attrs.frozen
class _OwnKey:
    """
    The key of an address for which none could be found.
    """

    address: IAddress


@implementer(ILimit)
class Rate(_Announcing):
    """
    A number of slots taken in a second, however long they are held: a token bucket.
    """

    def __init__(self, rate: float, burst: int | None = None, clock: IReactorTime | None = None) -> None:
        """
        :param rate: how many in a second.
        :param burst: how many at once at the most; None for as many as in a second, and at least one.
        :param clock: where the time comes from; the reactor if not given.
        """
        super().__init__()
        self._clock: IReactorTime = ReactorClock() if clock is None else clock
        self._set(rate, burst)
        self._tokens = self._maximum
        self._counted = -math.inf
        self._timer: IDelayedCall | None = None

    def _set(self, rate: float, burst: int | None) -> None:
        self._rate = rate
        self._maximum = max(1.0, rate if burst is None else burst)

    def change(self, rate: float, burst: int | None) -> None:
        """
        Have another rate from now on. What was taken remains taken; nobody is told.
        """
        self._count()
        self._set(rate, burst)
        self._tokens = min(self._tokens, self._maximum)
        # The code that changes the rate asks again.
        self._unset_timer()

    def within(self, seconds: float) -> float:
        """
        How many slots there will be to take within this number of seconds, from now on.
        """
        self._count()
        return min(self._maximum, self._tokens) + seconds * self._rate

    def try_acquire(self, connection: IOccupant) -> bool:
        self._count()
        # A little less than one will do: the timer is set for one, and sums of fractions are inexact.
        if self._tokens > 1 - 1e-6:
            self._tokens = max(0.0, self._tokens - 1)
            return True
        if self._timer is None:
            self._timer = self._clock.callLater((1 - self._tokens) / self._rate, self._time_over)
        return False

    def _count(self) -> None:
        """
        Put what has come since the last time into the bucket.
        """
        now = self._clock.seconds()
        self._tokens = min(self._maximum, self._tokens + max(0.0, now - self._counted) * self._rate)
        self._counted = now

    def release(self, connection: IOccupant) -> None:
        """
        The end of a connection makes no room.
        """

    def stop(self) -> None:
        """
        Tell nobody any more.
        """
        self._subscribers.clear()
        self._unset_timer()

    def _unset_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_over(self) -> None:
        self._timer = None
        self._tell()


@implementer(ILimit)
class All:
    """
    Several limits at once: a connection holds a slot of each, or of none.

    A limit that raises when it is asked is logged and counts as having no room.

    :ivar lacking: the limit that had no slot when all were asked last; None if each had one.
    :ivar failed: whether it raised.
    """

    lacking: ILimit | None = None
    failed = False

    def __init__(self, limits: Sequence[ILimit]) -> None:
        self._log = BoundedLog(Logger(namespace="connlimit.limiter"))
        self.limits = tuple(limits)
        # Bound once, since each connection asks all of them.
        self._acquires = tuple(limit.try_acquire for limit in limits)
        self._releases = tuple(limit.release for limit in limits)

    def try_acquire(self, connection: IOccupant) -> bool:
        held = 0
        try:
            for acquire in self._acquires:
                if not acquire(connection):
                    break
                held += 1
            else:
                self.lacking = None
                return True
            self.failed = False
        except Exception:
            self._log.failure("{limit} failed to answer; no slot is taken", limit=self.limits[held])
            self.failed = True
        self.lacking = self.limits[held]
        self.release(connection, held)
        return False

    def release(self, connection: IOccupant, count: int | None = None) -> None:
        """
        Give back what a connection has.

        :param count: of how many limits, the first ones; None for all.
        """
        for release in self._releases[:count]:
            try:
                release(connection)
            except Exception:
                limit = self.limits[self._releases.index(release)]
                self._log.failure("{limit} failed to take a slot back", limit=limit)

    def subscribe(self, callback: Callable[[], None]) -> None:
        for limit in self.limits:
            limit.subscribe(callback)
