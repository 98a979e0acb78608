"""
The waiting line: who waits, since when, and whose turn it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from heapq import heappop, heappush
from itertools import count
from typing import Any, TypeAlias

from twisted.internet.interfaces import IAddress
from zope.interface import implementer

from connlimit.interfaces import IConnection, IWaitingLine

Peer: TypeAlias = Callable[[IAddress], Hashable]


@implementer(IWaitingLine)
class Fifo(OrderedDict[IConnection, float]):
    """
    First come, first served: the time of arrival by connection.

    An OrderedDict, not a dict: the first entry of a dict takes ever longer to find as entries
    before it are removed.
    """

    def add(self, connection: IConnection, now: float) -> None:
        """
        See `IWaitingLine.add`.
        """
        self[connection] = now

    def remove(self, connection: IConnection) -> float:
        """
        See `IWaitingLine.remove`.
        """
        return self.pop(connection)

    def arrival(self, connection: IConnection) -> float:
        """
        See `IWaitingLine.arrival`.
        """
        return self[connection]

    def next(self, now: float) -> IConnection:
        """
        See `IWaitingLine.next`.
        """
        return next(iter(self))

    def oldest(self) -> tuple[IConnection, float]:
        """
        See `IWaitingLine.oldest`.
        """
        return next(iter(self.items()))

    def expires(self) -> float | None:
        """
        See `IWaitingLine.expires`.
        """
        return None

    def has_expired(self, connection: IConnection, now: float) -> bool:
        """
        See `IWaitingLine.has_expired`.
        """
        return False


class Lifo(Fifo):
    """
    The newest is served first.
    """

    def next(self, now: float) -> IConnection:
        """
        See `IWaitingLine.next`.
        """
        return next(reversed(self))


class Fair(Fifo):
    """
    The peers take turns; within one, first come, first served.
    """

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self._peer = peer
        # The peers in the order of their turns, each with its connections.
        self._turns: OrderedDict[Hashable, OrderedDict[IConnection, None]] = OrderedDict()

    def add(self, connection: IConnection, now: float) -> None:
        """
        See `IWaitingLine.add`.
        """
        super().add(connection, now)
        self._turns.setdefault(self._peer(connection.address), OrderedDict())[connection] = None

    def remove(self, connection: IConnection) -> float:
        """
        See `IWaitingLine.remove`. A peer whose connection leaves has had its turn, if that was the next.
        """
        peer = self._peer(connection.address)
        its = self._turns[peer]
        was_next = next(iter(self._turns)) == peer and next(iter(its)) is connection
        del its[connection]
        if not its:
            del self._turns[peer]
        elif was_next:
            self._turns.move_to_end(peer)
        return super().remove(connection)

    def next(self, now: float) -> IConnection:
        """
        See `IWaitingLine.next`.
        """
        return next(iter(next(iter(self._turns.values()))))


class Adaptive(Fifo):
    """
    First come, first served, until the line is overloaded: then the newest first, and whoever has waited
    too long is refused.

    The test is that of CoDel (RFC 8289), on the wait of whoever has waited longest: more than *target*
    seconds, without a break for *interval* seconds. The overload is over when the line has been empty.
    """

    def __init__(self, target: float, interval: float) -> None:
        super().__init__()
        self._target = target
        self._interval = interval
        # Since when the wait has been above the target.
        self._above: float | None = None

    def remove(self, connection: IConnection) -> float:
        """
        See `IWaitingLine.remove`.
        """
        arrived = super().remove(connection)
        if not self:
            self._above = None
        return arrived

    def next(self, now: float) -> IConnection:
        """
        See `IWaitingLine.next`.
        """
        return next(reversed(self)) if self._is_overloaded(now) else next(iter(self))

    def expires(self) -> float | None:
        """
        See `IWaitingLine.expires`.
        """
        if not self:
            return None
        above_from = self.oldest()[1] + self._target
        if self._above is None:
            return above_from + self._interval
        return max(above_from, self._above + self._interval)

    def has_expired(self, connection: IConnection, now: float) -> bool:
        """
        See `IWaitingLine.has_expired`.
        """
        return self._is_overloaded(now) and self[connection] + self._target <= now

    def _is_overloaded(self, now: float) -> bool:
        above_from = self.oldest()[1] + self._target
        if self._above is None:
            if above_from <= now:
                self._above = above_from
        elif above_from > now and now - self._above < self._interval:
            self._above = None
        return self._above is not None and now - self._above >= self._interval


#: The orders by the names that the setting has for them.
ORDERS: Mapping[str, Callable[[Any, Peer], Fifo]] = {
    "fifo": lambda settings, peer: Fifo(),
    "lifo": lambda settings, peer: Lifo(),
    "fair": lambda settings, peer: Fair(peer),
    "adaptive": lambda settings, peer: Adaptive(settings.adaptive_target, settings.adaptive_interval),
}


class Line:
    """
    Everybody who waits: those in the order, and those who stand aside because their own key has no room.

    One whose turn comes and whose peer is at its cap steps aside, so that others pass. When its peer may have
    room it returns, and goes before those in the order: its turn has come already. Nothing here looks at more
    than one connection, however many stand aside.
    """

    def __init__(self, order: IWaitingLine) -> None:
        self.order = order
        # By key, in the order in which they stepped aside.
        self._aside: dict[Hashable, OrderedDict[IConnection, float]] = {}
        # The key of each who stands aside or has returned.
        self.outside: dict[IConnection, Hashable] = {}
        self.returned: dict[IConnection, float] = {}
        # Those who stepped aside or returned, by arrival; who has left since is skipped.
        self._by_arrival: list[tuple[float, int, IConnection]] = []
        self._turns: list[tuple[float, int, IConnection]] = []
        self._number = count()

    def __len__(self) -> int:
        return len(self.order) + len(self.outside)

    def __contains__(self, connection: IConnection) -> bool:
        return connection in self.order or connection in self.outside

    def __iter__(self) -> Iterator[IConnection]:
        if not self.outside:
            return iter(self.order)
        return iter(sorted([*self.order, *self.outside], key=self.arrival))

    def arrival(self, connection: IConnection) -> float:
        """
        When the connection arrived, in seconds.
        """
        key = self.outside.get(connection, _NOWHERE)
        if key is _NOWHERE:
            return self.order.arrival(connection)
        return self.returned[connection] if connection in self.returned else self._aside[key][connection]

    def add(self, connection: IConnection, now: float) -> None:
        """
        Put a new connection in the line.
        """
        self.order.add(connection, now)

    def remove(self, connection: IConnection) -> float:
        """
        Take the connection out, wherever it stands, and return the time of its arrival.
        """
        if not self.outside:
            return self.order.remove(connection)
        key = self.outside.pop(connection, _NOWHERE)
        if key is _NOWHERE:
            arrived = self.order.remove(connection)
        elif connection in self.returned:
            arrived = self.returned.pop(connection)
        else:
            arrived = self._leave_aside(key, connection)
        if not self.outside:
            self._by_arrival.clear()
            self._turns.clear()
        return arrived

    def next(self, now: float) -> IConnection | None:
        """
        Whose turn it is; None if all stand aside.
        """
        while self._turns:
            connection = self._turns[0][2]
            if connection in self.returned:
                return connection
            heappop(self._turns)
        return self.order.next(now) if self.order else None

    def oldest(self) -> tuple[IConnection, float]:
        """
        Who has waited longest, and the time of its arrival.
        """
        while self._by_arrival:
            arrived, _, connection = self._by_arrival[0]
            if connection in self.outside:
                if self.order and self.order.oldest()[1] <= arrived:
                    break
                return connection, arrived
            heappop(self._by_arrival)
        return self.order.oldest()

    def expires(self) -> float | None:
        """
        See `IWaitingLine.expires`.
        """
        return self.order.expires()

    def has_expired(self, connection: IConnection, now: float) -> bool:
        """
        See `IWaitingLine.has_expired`.
        """
        return connection in self.order and self.order.has_expired(connection, now)

    def step_aside(self, connection: IConnection, key: Hashable) -> None:
        """
        Let others pass: the connection's key has no room.
        """
        if self._turns and self._turns[0][2] is connection:
            heappop(self._turns)
        known = connection in self.outside
        arrived = self.remove(connection)
        self.outside[connection] = key
        self._aside.setdefault(key, OrderedDict())[connection] = arrived
        if not known or not self._by_arrival:
            heappush(self._by_arrival, (arrived, next(self._number), connection))

    def call_back(self, key: Hashable) -> None:
        """
        There may be room for one more of this key: the first who stands aside for it returns.
        """
        if key in self._aside:
            connection = next(iter(self._aside[key]))
            arrived = self._leave_aside(key, connection)
            self.returned[connection] = arrived
            heappush(self._turns, (arrived, next(self._number), connection))

    def call_all_back(self) -> None:
        """
        There may be room for anybody. Looks at all who stand aside.
        """
        for key in list(self._aside):
            while key in self._aside:
                self.call_back(key)

    def _leave_aside(self, key: Hashable, connection: IConnection) -> float:
        its = self._aside[key]
        arrived = its.pop(connection)
        if not its:
            del self._aside[key]
        return arrived


_NOWHERE = object()
