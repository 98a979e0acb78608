"""
Who holds a slot, which of them are dead or idle, and which were lost to garbage collection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any
from weakref import ref

from twisted.internet.interfaces import IAddress
from zope.interface import implementer

from connlimit.interfaces import IConnection, IOccupant


@implementer(IConnection)
class NullConnection:
    """
    Stands for a connection that is lost, or that is another limiter's: does nothing, whatever it is told.
    """

    factory: Any = None
    slot: Any = None

    def __init__(self, address: Any) -> None:
        self.address = address

    def serve(self) -> None: ...

    def refuse(self, reason: str) -> None: ...

    def abort(self) -> None: ...

    def close(self, gave_up: Callable[[], None] | None = None) -> None: ...

    def notify(self, data: bytes) -> None: ...

    def reconsider(self) -> None: ...

    def is_dead(self) -> bool:
        return False

    def idle(self) -> float | None:
        return None

    def is_at_rest(self, quiet: float | None) -> bool:
        return False


class Demand:
    """
    Of how many slots those who wait could make use: of any, and of those of one key.
    """

    def __init__(
        self, of_any: int, of_keys: Mapping[Hashable, int], keys: Callable[[IConnection], Iterable[Hashable]]
    ) -> None:
        """
        :param keys: the keys of a connection.
        """
        self._wanted: Counter[Hashable] = +Counter({**of_keys, None: of_any})
        self._keys = keys

    def __bool__(self) -> bool:
        return bool(self._wanted)

    def is_met_by(self, connection: IConnection) -> bool:
        """
        Whether the end of a connection would serve somebody; that one is counted no more.
        """
        for key in (None, *self._keys(connection)):
            if key in self._wanted:
                self._wanted[key] -= 1
                if not self._wanted[key]:
                    del self._wanted[key]
                return True
        return False


class Slots:
    """
    The connections that hold a slot. They are held weakly, by the reference that is their ``slot``.

    The garbage collector can come at any instant, so it only leaves the reference of a connection that it
    took; the slot is free when the next connection arrives, or within a second if somebody waits.

    :ivar active: the address of each that holds a slot.
    :ivar exempt: those of them that are exempt and take none of the limits.
    :ivar heavy: those of them that take several slots, and how many more than one.
    :ivar extra: how many more all of these take.
    :ivar closing: those of them that were closed because they were idle, and are not gone yet.
    :ivar lost: those of them that were collected.
    :ivar served_at: when each was served, while that matters; None while it does not.
    :ivar on_collection: what their references call.
    """

    __slots__ = (
        "_known_from",
        "active",
        "closing",
        "exempt",
        "extra",
        "heavy",
        "lost",
        "on_collection",
        "served_at",
    )

    def __init__(self) -> None:
        self.active: dict[ref[IOccupant], IAddress] = {}
        self.exempt: set[ref[IOccupant]] = set()
        self.heavy: dict[ref[IOccupant], int] = {}
        self.extra = 0
        self.closing: set[ref[IOccupant]] = set()
        self.lost: list[ref[IOccupant]] = []
        self.served_at: dict[ref[IOccupant], float] | None = None
        self.on_collection = self._collect  # bound once
        # Since when it is known who was served when.
        self._known_from = 0.0

    @property
    def taken(self) -> int:
        """
        How many are taken of those that ``max_connections`` gives.
        """
        return len(self.active) - len(self.exempt) + self.extra

    def count(self) -> int:
        """
        How many occupants are active, without the exempt and without those that are lost.
        """
        return len(self.active) - len(self.exempt) - sum(slot not in self.exempt for slot in self.lost)

    def take(self, connection: IOccupant, now: float) -> ref[IOccupant]:
        """
        Give a connection a slot.
        """
        connection.slot = slot = ref(connection, self.on_collection)
        self.active[slot] = connection.address
        if self.served_at is not None:
            self.served_at[slot] = now
        return slot

    def occupants(self) -> list[IOccupant]:
        """
        Those that hold a slot, the exempt among them.
        """
        return [occupant for slot in list(self.active) if (occupant := slot()) is not None]

    def connections(self) -> list[IConnection]:
        """
        Those of them that are connections.
        """
        occupants: list[Any] = self.occupants()
        # Asked of each class once: there can be tens of thousands, and they are looked at every second.
        kinds = {kind for kind in set(map(type, occupants)) if IConnection.implementedBy(kind)}
        return [each for each in occupants if type(each) in kinds]

    def addresses(self) -> Iterator[IAddress]:
        """
        The addresses of those that are not exempt.
        """
        return (address for slot, address in self.active.items() if slot not in self.exempt)

    def _collect(self, slot: ref[IOccupant]) -> None:
        # Also of one that has finished, when nobody else holds it any more.
        if slot in self.active:
            self.lost.append(slot)

    def take_lost(self) -> Iterator[IOccupant]:
        """
        Something that stands for each that is lost, until there is none; the caller sees to its end.
        """
        while self.lost:
            slot = self.lost.pop()
            remains = NullConnection(self.active[slot])
            remains.slot = slot
            yield remains

    def keep_times(self, are_kept: bool, now: float) -> None:
        """
        Know from now on when each connection is served, or not.
        """
        self.served_at = {} if are_kept else None
        self._known_from = now

    def close_idle(self, connections: list[IConnection], timeout: float, now: float, demand: Demand) -> int:
        """
        Close those of the connections that were idle for too long, longest idle first, as far as their slots
        are in demand.

        :return: how many were closed.
        """
        if not demand:
            return 0
        idle = []
        for connection in connections:
            if connection.slot is None or connection.slot in self.exempt:
                continue
            if connection.slot in self.closing:
                demand.is_met_by(connection)
            elif (seconds := self._idle(connection, now)) is not None and seconds >= timeout:
                idle.append((seconds, connection))
        closed = 0
        for _, connection in sorted(idle, key=itemgetter(0), reverse=True):
            if not demand:
                break
            if connection.slot is not None and demand.is_met_by(connection):
                closed += 1
                self.closing.add(connection.slot)
                connection.close()
        return closed

    def _idle(self, connection: IConnection, now: float) -> float | None:
        """
        For how many seconds a connection has moved no byte since it was served.
        """
        assert self.served_at is not None
        seconds = connection.idle()
        if seconds is None:
            return None
        return min(seconds, now - self.served_at.get(connection.slot, self._known_from))
