"""
All limits in force, asked as one: those of the settings, and the further ones that a limiter was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from typing import Any

from twisted.internet.interfaces import IAddress, IReactorTime

from connlimit._limiter.peers import peer_key
from connlimit._limiter.queue import Keys, Queue
from connlimit._limiter.settings import Settings
from connlimit._system.bounded_log import BoundedLog
from connlimit.interfaces import IKeyedLimit, ILimit, IOccupant, IRefusingLimit
from connlimit.limits import All, PerPeer, Rate

#: The settings that these limits are made of.
SETTINGS = frozenset({"max_connections", "max_per_peer", "peer_prefix", "max_rate", "max_burst", "dry_run"})

#: The key of a connection of which a limit has failed to tell it, or failed altogether.
_UNKNOWN = object()

#: How much of a limit's name is logged.
_MAX_NAMED = 100


class EffectiveLimits:
    """
    What ``max_connections`` allows is only a number, since those who are active are counted anyway. Every
    other limit gives its own slots, the rate last: what it has given, nobody can give back.

    A limit that fails is logged and has no room; those who asked it stand aside until it calls, or until the
    next audit.

    :ivar given: the further limits.
    :ivar maximum: how many connections ``max_connections`` lets be served at once.
    :ivar further: all the others as one; None if there are none.
    :ivar refusing: those that can say that waiting is useless.
    :ivar peer: what tells the peer of an address.
    """

    __slots__ = (
        "_by_id",
        "_clock",
        "_failing",
        "_has_room_again",
        "_keyed",
        "_log",
        "_peers",
        "_rate",
        "further",
        "given",
        "maximum",
        "peer",
        "refusing",
    )

    def __init__(
        self,
        given: Iterable[ILimit],
        settings: Settings,
        clock: IReactorTime,
        log: BoundedLog,
        has_room_again: Callable[[], None],
    ) -> None:
        """
        :param has_room_again: called when the rate allows one more.
        """
        self.given = tuple(given)
        self.maximum = math.inf
        self.further: All | None = None
        self.peer = peer_key(settings.peer_prefix)
        self._clock = clock
        self._log = log
        self._has_room_again = has_room_again
        self._peers: PerPeer | None = None
        self._rate: Rate | None = None
        self._keyed: tuple[IKeyedLimit, ...] = ()
        # A key is known with the id of its limit, which need not be hashable.
        self._by_id: dict[int, Any] = {}
        self._failing: set[int] = set()
        self.refusing = tuple(limit for limit in self.given if IRefusingLimit.providedBy(limit))
        self.change(settings, SETTINGS, self.peer, ())

    def change(
        self,
        settings: Settings,
        changed: Collection[str],
        peer: Callable[[IAddress], Hashable],
        active: Iterable[IAddress],
    ) -> None:
        """
        Be what the settings ask for, some of which have changed.

        :param peer: what tells the peer of an address from now on.
        :param active: the addresses of those who hold slots.
        """
        dry = settings.dry_run
        self.peer = peer
        self.maximum = math.inf if dry or settings.max_connections is None else settings.max_connections
        if settings.max_per_peer is None or dry:
            self._peers = None
        elif self._peers is None or "peer_prefix" in changed:
            self._peers = PerPeer(settings.max_per_peer, peer)
            self._peers.count(active)
        else:
            self._peers.slots = settings.max_per_peer
        if settings.max_rate is None or dry:
            if self._rate is not None:
                self._rate.stop()
            self._rate = None
        elif self._rate is None:
            self._rate = Rate(settings.max_rate, settings.max_burst, self._clock)
            self._rate.subscribe(self._has_room_again)
        elif "max_rate" in changed or "max_burst" in changed:
            self._rate.change(settings.max_rate, settings.max_burst)
        limits = [each for each in (self._peers, *self.given, self._rate) if each is not None]
        self.further = All(limits) if limits else None
        self._keyed = tuple(each for each in limits if IKeyedLimit.providedBy(each))
        self._by_id = {id(each): each for each in limits}
        self._failing.clear()

    # What can be asked of a connection

    def keys(self, connection: IOccupant) -> Keys:
        """
        The keys of a connection, each with its limit.
        """
        keys = []
        for limit in self._keyed:
            try:
                key = limit.key(connection)
                hash(key)
            except Exception:
                self._log.failure("{limit} failed to give a key; that connection stands aside", limit=limit)
                self._failing.add(id(limit))
                key = _UNKNOWN
            keys.append((id(limit), key))
        return tuple(keys)

    @staticmethod
    def key_of(limit: ILimit, key: Hashable) -> Hashable:
        """
        A key of a limit, as `keys` has it.
        """
        return id(limit), key

    def has_room_for(self, key: tuple[int, Hashable]) -> bool:
        """
        Whether there is room for one more of a key.
        """
        number, its_key = key
        if its_key is _UNKNOWN:
            return True  # nobody knows before it is asked for a slot
        limit = self._by_id[number]
        try:
            return bool(limit.has_room(its_key))
        except Exception:
            self._log.failure("{limit} failed to say whether a key has room; it has none", limit=limit)
            return False

    def aside_for(self, connection: IOccupant, was_asked: bool = True) -> tuple[Keys, Hashable] | None:
        """
        For what a connection that got no slot stands aside: its keys, and the one of them that has no room.

        :param was_asked: whether all were asked for a slot.
        :return: None if it is not its own key that has none.
        """
        keys = self.keys(connection)
        lacking = next((key for key in keys if not self.has_room_for(key)), None)
        if lacking is not None:
            return keys, lacking
        further = self.further
        if was_asked and further is not None and further.failed:
            limit = further.lacking
            assert limit is not None
            self._failing.add(id(limit))
            lacking = (id(limit), _UNKNOWN)
            return (*(key for key in keys if key != lacking), lacking), lacking
        lacking = next((key for key in keys if key[1] is _UNKNOWN), None)
        return None if lacking is None else (keys, lacking)

    def is_at_cap(self, connection: IOccupant) -> bool:
        """
        Whether the connection's peer has as many slots as ``max_per_peer`` allows.
        """
        peers = self._peers
        return peers is not None and not peers.has_room(peers.key(connection))

    # What can be asked in general

    def makes_stand_aside(self, limit: ILimit) -> bool:
        """
        Whether somebody may stand aside because of a limit.
        """
        return id(limit) in self._failing or IKeyedLimit.providedBy(limit)

    def failed_keys(self) -> Iterator[Hashable]:
        """
        The keys below which those stand aside whose limits failed.
        """
        for number in tuple(self._failing):
            yield number, _UNKNOWN

    def is_waiting_useless(self) -> bool:
        """
        Whether a limit says that nobody is to wait. One that fails to tell does not.
        """
        for limit in self.refusing:
            try:
                if limit.refuses():
                    return True
            except Exception:
                self._log.failure("{limit} failed to say whether it refuses", limit=limit)
        return False

    def lacks_rate(self) -> bool:
        """
        Whether it was the rate, if any, that had no slot when all were asked last.
        """
        return self.further is not None and self.further.lacking is self._rate

    def rate_within(self, seconds: float) -> int | None:
        """
        How many may begin to be served within these seconds, as far as the rate goes; None for any number.
        """
        return None if self._rate is None else math.ceil(self._rate.within(seconds))

    # In words

    def in_words(
        self, settings: Settings, taken: int, active: int, queue: Queue, connection: IOccupant | None
    ) -> str:
        """
        Which limit makes connections wait now.

        :param taken: how many slots are taken of those that ``max_connections`` gives.
        :param active: how many connections are active.
        :param connection: one that does, if one is known.
        """
        if taken >= self.maximum:
            return f"max_connections is {settings.max_connections}"
        keys: Collection[Any] = queue.lacking()
        if keys and not queue.order:
            number, key = next(iter(keys))
            limit = self._by_id[number]
            others = f" and {len(keys) - 1} others" if len(keys) > 1 else ""
            what = f"max_per_peer is {settings.max_per_peer}" if limit is self._peers else _named(limit)
            return what if key is _UNKNOWN else f"{what}, of {_short(key)}{others}"
        lacking: Any = self.further.lacking if self.further is not None else None
        if lacking is None:
            return f"{active} of any number"
        if lacking is self._peers and connection is not None:
            return self.peer_in_words(settings, connection)
        if lacking is self._rate:
            return f"max_rate is {settings.max_rate} per second"
        return f"no slot from {_named(lacking)}"

    def peer_in_words(self, settings: Settings, connection: IOccupant) -> str:
        """
        That a connection's peer is at its cap.
        """
        return f"max_per_peer is {settings.max_per_peer}, of {self.peer(connection.address)}"


def _named(limit: ILimit) -> str:
    """
    What a limit is called in the log.
    """
    kind = type(limit)
    try:
        if kind.__repr__ is not object.__repr__:
            return repr(limit)[:_MAX_NAMED]
        name = getattr(limit, "name", None)
    except Exception:  # it is whatever a user has written
        return kind.__name__
    return _short(f"{kind.__name__} {name}") if isinstance(name, str) else kind.__name__


def _short(thing: object) -> str:
    return str(thing)[:_MAX_NAMED]
