"""
The queue: who waits, since when, and whose turn it is.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from heapq import heapify, heappop, heappush, merge
from itertools import chain, count, islice
from typing import Any, TypeAlias, TypeVar

import attrs
from twisted.internet.interfaces import IAddress
from twisted.logger import Logger
from zope.interface import implementer

from connlimit.interfaces import IOccupant, IQueue

T = TypeVar("T")
Peer: TypeAlias = Callable[[IAddress], Hashable]
Keys: TypeAlias = tuple[Any, ...]


@implementer(IQueue)
class Fifo(OrderedDict[IOccupant, float]):
    """
    First come, first served: the time of arrival by connection.

    An OrderedDict, not a dict: the first entry of a dict takes ever longer to find as entries
    before it are removed.

    :cvar needs_peers: whether it matters who a connection's peer is.
    """

    needs_peers = False

    def add(self, connection: IOccupant, now: float) -> None:
        self[connection] = now

    def remove(self, connection: IOccupant) -> float:
        return self.pop(connection)

    def arrival(self, connection: IOccupant) -> float:
        return self[connection]

    def next(self, now: float) -> IOccupant:
        return next(iter(self))

    def oldest(self) -> tuple[IOccupant, float]:
        return next(iter(self.items()))

    def expires(self) -> float | None:
        return None

    def has_expired(self, connection: IOccupant, now: float) -> bool:
        return False


class Lifo(Fifo):
    """
    The newest is served first.
    """

    def next(self, now: float) -> IOccupant:
        return next(reversed(self))


class Fair(Fifo):
    """
    The peers take turns; within one, first come, first served.
    """

    needs_peers = True

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self._peer = peer
        # The peers in the order of their turns, each with its connections.
        self._turns: OrderedDict[Hashable, OrderedDict[IOccupant, None]] = OrderedDict()

    def add(self, connection: IOccupant, now: float) -> None:
        super().add(connection, now)
        self._turns.setdefault(self._peer(connection.address), OrderedDict())[connection] = None

    def remove(self, connection: IOccupant) -> float:
        # A peer whose connection leaves has had its turn, if that was the next.
        peer = self._peer(connection.address)
        its = self._turns[peer]
        was_next = next(iter(self._turns)) == peer and next(iter(its)) is connection
        del its[connection]
        if not its:
            del self._turns[peer]
        elif was_next:
            self._turns.move_to_end(peer)
        return super().remove(connection)

    def next(self, now: float) -> IOccupant:
        return next(iter(next(iter(self._turns.values()))))


class Adaptive(Fifo):
    """
    First come, first served, until the queue is overloaded: then the newest first, and those who have waited
    too long are refused.

    The test is that of CoDel (RFC 8289), on the wait of the one that has waited longest: more than *target*
    seconds, without a break for *interval* seconds. The overload is over when the queue has been empty.
    """

    def __init__(self, target: float, interval: float) -> None:
        super().__init__()
        self._target = target
        self._interval = interval
        # Since when the wait has been above the target.
        self._above: float | None = None

    def remove(self, connection: IOccupant) -> float:
        arrived = super().remove(connection)
        if not self:
            self._above = None
        return arrived

    def next(self, now: float) -> IOccupant:
        return next(reversed(self)) if self._is_overloaded(now) else next(iter(self))

    def expires(self) -> float | None:
        if not self:
            return None
        above_from = self.oldest()[1] + self._target
        if self._above is None:
            return above_from + self._interval
        return max(above_from, self._above + self._interval)

    def has_expired(self, connection: IOccupant, now: float) -> bool:
        return self._is_overloaded(now) and self[connection] + self._target <= now

    def _is_overloaded(self, now: float) -> bool:
        above_from = self.oldest()[1] + self._target
        if self._above is None:
            if above_from <= now:
                self._above = above_from
        elif above_from > now and now - self._above < self._interval:
            self._above = None
        return self._above is not None and now - self._above >= self._interval


class Guarded(Fifo):
    """
    Keeps an order that somebody else wrote: if that raises, or names somebody who does not wait, that is
    logged, it is asked no more, and from then on it is first come, first served.
    """

    _log = Logger(namespace="connlimit.limiter")
    needs_peers = True  # for all that we know

    def __init__(self, order: IQueue) -> None:
        super().__init__()
        self._order: IQueue | None = order

    def _ask(self, method: str, *arguments: Any) -> Any:
        """
        What the order answers; None if it fails, or has failed before.
        """
        if self._order is not None:
            try:
                return getattr(self._order, method)(*arguments)
            except Exception:
                self._log.failure(
                    "{order} failed to {method}; first come, first served from now on",
                    order=self._order,
                    method=method,
                )
                self._order = None
        return None

    def add(self, connection: IOccupant, now: float) -> None:
        super().add(connection, now)
        self._ask("add", connection, now)

    def remove(self, connection: IOccupant) -> float:
        arrived = super().remove(connection)
        self._ask("remove", connection)
        return arrived

    def next(self, now: float) -> IOccupant:
        connection: Any = self._ask("next", now)
        if connection is not None and isinstance(connection, Hashable) and connection in self:
            return connection  # type: ignore[return-value]
        if self._order is not None:
            self._log.error(
                "{order} named {connection}, who does not wait; first come, first served from now on",
                order=self._order,
                connection=connection,
            )
            self._order = None
        return super().next(now)

    def expires(self) -> float | None:
        expires = self._ask("expires")
        return expires if isinstance(expires, (int, float)) else None

    def has_expired(self, connection: IOccupant, now: float) -> bool:
        return bool(self._ask("has_expired", connection, now))


#: The orders by the names that the setting has for them.
ORDERS: Mapping[str, Callable[[Any, Peer], Fifo]] = {
    "fifo": lambda settings, peer: Fifo(),
    "lifo": lambda settings, peer: Lifo(),
    "fair": lambda settings, peer: Fair(peer),
    "adaptive": lambda settings, peer: Adaptive(settings.adaptive_target, settings.adaptive_interval),
}


def new_order(settings: Any, peer: Peer) -> Fifo:
    """
    An empty queue in the order that the settings ask for, by its name or by what makes it.
    """
    order = settings.order
    return ORDERS[order](settings, peer) if order in ORDERS else Guarded(order(settings, peer))


class Ranked(dict[T, list[Any]]):
    """
    Who comes first, of things that anybody may take out again; of one that is out nothing is kept.
    """

    def __init__(self) -> None:
        super().__init__()
        # One that is out leaves an entry without it behind, until it comes first or half of them are such.
        self._heap: list[list[Any]] = []
        self._number = count()

    def add(self, thing: T, rank: float) -> None:
        """
        Put something in; of equals, what comes in first comes first.
        """
        self[thing] = entry = [rank, next(self._number), thing]
        heappush(self._heap, entry)

    def remove(self, thing: T) -> float:
        """
        Take something out, wherever it stands, and return its rank.
        """
        entry = self.pop(thing)
        entry[2] = None
        if len(self._heap) > 2 * len(self):
            self._heap = [each for each in self._heap if each[2] is not None]
            heapify(self._heap)
        rank: float = entry[0]
        return rank

    def rank(self, thing: T) -> float:
        """
        The rank of something that is in.
        """
        rank: float = self[thing][0]
        return rank

    def first(self) -> T:
        """
        What comes first. Only called while something is in.
        """
        while self._heap[0][2] is None:
            heappop(self._heap)
        first: T = self._heap[0][2]
        return first

    def firsts(self, count: int) -> Iterator[T]:
        """
        Up to *count* of those that come first, in their order. Does not look at the others.
        """
        heap = self._heap
        # Whatever comes next in a heap is below something that has come.
        candidates = [(heap[0][:2], 0)] if heap else []
        while candidates and count:
            _, index = heappop(candidates)
            thing = heap[index][2]
            if thing is not None:
                count -= 1
                yield thing
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(heap):
                    heappush(candidates, (heap[child][:2], child))


@attrs.define(eq=False)
class _Group:
    """
    Those who stand aside with the same keys, in the order in which they stepped aside.

    :ivar keys: the keys of each of them.
    :ivar lacking: which of the keys had no room when that was looked at last.
    """

    keys: Keys
    lacking: Hashable
    connections: OrderedDict[IOccupant, None] = attrs.Factory(OrderedDict)


class Queue:
    """
    Everybody who waits: those in the order, and those who stand aside because a key of theirs has no room.

    One whose turn comes and whose key has no room steps aside, so that others pass. When all of its keys have
    room it returns, and goes before those in the order: its turn has come already. Those with the same keys
    stand together, below one key that has no room; when that gets room, the first of them returns, or all
    of them move below another key that has none. So nothing here looks at more than one of a group.

    :ivar order: those whose turn has not come yet.
    :ivar returned: those who have returned, by arrival.
    """

    def __init__(self, order: Fifo, has_room: Callable[[Any], bool]) -> None:
        """
        :param order: an empty queue.
        :param has_room: whether there is room for one more of a key.
        """
        self._has_room = has_room
        self._begin(order)

    def _begin(self, order: Fifo) -> None:
        self.order = order
        # By arrival: those who stand aside or have returned, and of them those who have returned.
        self._outside: Ranked[IOccupant] = Ranked()
        self.returned: Ranked[IOccupant] = Ranked()
        self._keys: dict[IOccupant, Keys] = {}
        self._groups: dict[Keys, _Group] = {}
        # The groups by the key that each lacks, in the order in which their first ones stepped aside.
        self._below: dict[Hashable, Ranked[_Group]] = {}
        self._steps = count()
        self._stepped: dict[IOccupant, int] = {}

    def reorder(self, order: Fifo) -> None:
        """
        Let all who wait wait in another order. Looks at all.

        :param order: an empty queue.
        """
        arrivals = [(each, self.arrival(each)) for each in self]
        self._begin(order)
        for connection, arrived in arrivals:
            order.add(connection, arrived)

    def __len__(self) -> int:
        return len(self.order) + len(self._outside)

    def __contains__(self, connection: IOccupant) -> bool:
        return connection in self.order or connection in self._outside

    def __iter__(self) -> Iterator[IOccupant]:
        if not self._outside:
            return iter(self.order)
        return iter(sorted([*self.order, *self._outside], key=self.arrival))

    def everybody(self) -> Iterator[IOccupant]:
        """
        All who wait, in no order.
        """
        return chain(self.order, self._outside)

    def first(self, count: int) -> list[IOccupant]:
        """
        Up to *count* of those who have waited longest, in the order of arrival. Does not look at others.
        """
        inside, outside = islice(self.order, count), self._outside.firsts(count)
        return list(islice(merge(inside, outside, key=self.arrival), count))

    @property
    def ready(self) -> int:
        """
        How many do not stand aside.
        """
        return len(self.order) + len(self.returned)

    @property
    def has_aside(self) -> bool:
        """
        Whether somebody stands aside.
        """
        return bool(self._groups)

    def lacking(self) -> Collection[Any]:
        """
        The keys that have no room, and below which somebody stands aside.
        """
        return self._below.keys()

    def aside(self) -> dict[Hashable, int]:
        """
        How many stand aside below each key that has no room. Looks at each group.
        """
        below: Counter[Hashable] = Counter()
        for group in self._groups.values():
            below[group.lacking] += len(group.connections)
        return below

    def arrival(self, connection: IOccupant) -> float:
        """
        When the connection arrived, in seconds.
        """
        return (
            self._outside.rank(connection) if connection in self._outside else self.order.arrival(connection)
        )

    def add(self, connection: IOccupant, now: float) -> None:
        """
        Put a new connection in the queue.
        """
        self.order.add(connection, now)

    def remove(self, connection: IOccupant) -> float:
        """
        Take the connection out, wherever it stands, and return the time of its arrival.

        The call of one who had returned goes to the next of each of its keys.
        """
        if connection not in self._outside:
            return self.order.remove(connection)
        keys = self._keys.pop(connection)
        if connection in self.returned:
            self.returned.remove(connection)
            arrived = self._outside.remove(connection)
            for key in keys:
                self.call_back(key)
            return arrived
        self._leave_group(self._groups[keys], connection)
        return self._outside.remove(connection)

    def next(self, now: float) -> IOccupant:
        """
        Whose turn it is. Only called while somebody does not stand aside.
        """
        return self.returned.first() if self.returned else self.order.next(now)

    def oldest(self) -> tuple[IOccupant, float]:
        """
        Who has waited longest, and the time of its arrival.
        """
        if not self._outside:
            return self.order.oldest()
        first = self._outside.first()
        arrived = self._outside.rank(first)
        if self.order and (oldest := self.order.oldest())[1] <= arrived:
            return oldest
        return first, arrived

    def expired(self, now: float) -> IOccupant | None:
        """
        Who has waited too long, as the order says. For those who stand aside there is no such time: their own
        key makes them wait.
        """
        if not self.order:
            return None
        connection, _arrived = self.order.oldest()
        return connection if self.order.has_expired(connection, now) else None

    def step_aside(self, connection: IOccupant, keys: Keys, lacking: Hashable) -> None:
        """
        Let others pass: a key of the connection has no room.

        :param keys: all keys of the connection.
        :param lacking: the one of them that has no room.
        """
        if connection in self.returned:
            self.returned.remove(connection)
            was_called = True
        else:
            self._outside.add(connection, self.order.remove(connection))
            was_called = False
        self._keys[connection] = keys
        self._stepped[connection] = next(self._steps)
        group = self._groups.get(keys)
        if group is None:
            group = self._groups[keys] = _Group(keys, lacking)
            group.connections[connection] = None
            self._put_below(group, lacking)
        else:
            group.connections[connection] = None
        if was_called:
            # It could not use the room that it was called for.
            for key in keys:
                if key != lacking:
                    self.call_back(key)

    def call_back(self, key: Hashable) -> None:
        """
        There may be room for one more of this key: the first who stands aside for it alone returns.
        """
        while (groups := self._below.get(key)) is not None:
            group = groups.first()
            lacking = next((each for each in group.keys if not self._has_room(each)), _NOTHING)
            if lacking is _NOTHING:
                connection = next(iter(group.connections))
                self._leave_group(group, connection)
                self.returned.add(connection, self._outside.rank(connection))
                return
            if lacking == key:
                return
            self._take_from_below(group)
            self._put_below(group, lacking)

    def call_all_back(self) -> None:
        """
        There may be room for anybody. Looks at all who stand aside.
        """
        for connection in self._stepped:
            self.returned.add(connection, self._outside.rank(connection))
        self._stepped.clear()
        self._groups.clear()
        self._below.clear()

    def _leave_group(self, group: _Group, connection: IOccupant) -> None:
        was_first = next(iter(group.connections)) is connection
        del group.connections[connection]
        del self._stepped[connection]
        if was_first:
            self._take_from_below(group)
            if group.connections:
                self._put_below(group, group.lacking)
            else:
                del self._groups[group.keys]

    def _put_below(self, group: _Group, key: Hashable) -> None:
        group.lacking = key
        self._below.setdefault(key, Ranked()).add(group, self._stepped[next(iter(group.connections))])

    def _take_from_below(self, group: _Group) -> None:
        groups = self._below[group.lacking]
        groups.remove(group)
        if not groups:
            del self._below[group.lacking]


_NOTHING = object()
