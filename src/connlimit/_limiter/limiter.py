"""
Who is served, who waits and who is refused.

There is no transport and no protocol here. A connection is whatever provides
`connlimit.interfaces.IConnection`; it is, at any instant, in one of these states:

    new       it was accepted; the limiter has not been asked about it yet
    waiting   it stands in the line
    active    it holds a slot
    over      it has finished, departed or was refused, and is in none of our collections

These things can happen, and no others:

    serve_at_once   new -> active      there is room and nobody waits, or the peer is exempt
    may_wait        new -> over        there is no place in the line (refused)
    wait            new -> waiting     it has joined the line
                    new -> over        the last place was taken meanwhile (refused)
    a slot frees    waiting -> active  it is its turn
    wait_timeout    waiting -> over    refused; likewise if the order of the line says that it is too late,
                                       or if its peer is at its cap at its turn and must not wait, or if
                                       a limit says that waiting is useless
    drain           waiting -> over    refused
    depart          waiting -> over    its client went away
    finish          active -> over     its socket is gone; the slot is free
    reclaim         active -> over     its socket is gone, and nobody told its protocol

``depart``, ``finish`` and ``reclaim`` in any other state do nothing, so a connection may report its end
twice.

Whatever may have made room (a release, a departure, a refusal, a raised limit) ends in
``_serve_waiting``, which serves the line until there is no room or nobody waits. Serving one
connection can end it, and others, before ``serve`` returns; such a nested call only returns,
and the loop that is already running looks again. So nothing recurses, however long the line.

One whose own key has no room (its peer is at its cap) steps aside when its turn comes, and others pass; it is
called back when its key has room. A call that the one who is called cannot use goes to the next. So each
event moves few connections, however many stand aside, and nobody stands beside a slot that it could have.

What users write (a limit, a key, an order, a notice, an observer, who is exempt) may raise at any call. It is
logged, the connection is treated as `connlimit.interfaces` says, and everybody else is treated as ever.

The line holds its connections, since nobody else does: a paused transport is in no reactor. Those that are
active are held weakly: a transport that the application pauses and forgets is closed by the garbage
collector, as it would be without us, and its slot is reclaimed.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Generator, Hashable, Iterable
from functools import partial
from operator import itemgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import ref

import attrs
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from connlimit._limiter.drain import Drain
from connlimit._limiter.dry_run import DryRun
from connlimit._limiter.inert import Inert
from connlimit._limiter.peers import busiest, exhausted, peer_key
from connlimit._limiter.queue import Fifo, Keys, Line, new_order
from connlimit._limiter.settings import Settings, adjustable
from connlimit._system import descriptors
from connlimit._system.bounded_log import BoundedLog
from connlimit._system.clock import ReactorClock, clock_of
from connlimit.interfaces import (
    DESCRIPTORS,
    DRAINING,
    FULL,
    PEER,
    REASONS,
    TIMEOUT,
    IConnection,
    IKeyedLimit,
    ILimit,
    ILimiter,
    ILimiterObserver,
    IPort,
    IRefusing,
    IRefusingLimit,
    Snapshot,
)
from connlimit.limits import All, PerPeer, Rate
from connlimit.observers import LimiterLog, hears

_AUDIT_INTERVAL = 1.0  # seconds
_RATE_WINDOW = 10.0  # seconds
_LEAST_DELAY = 0.01  # seconds between two looks at who has waited too long

#: How many of the line are refused at once when waiting is useless, before others have their turn.
_REFUSED_AT_ONCE = 100


@implementer(ILimiter)
@adjustable
class Limiter:
    """
    Limits, the line of those who wait for them, and what happens when both are full.

    One limiter may serve any number of factories; its limits then hold across them. Every setting
    is also an attribute and can be changed at any time: more room admits at once, less room ends nobody.

    :ivar settings: all settings, frozen; change them by `reconfigure` or by their attributes.
    :ivar limits: the further limits that it was given.
    """

    # Named, so that what is set by a mistyped name is an error.
    __slots__ = (
        "__weakref__",
        "_accepted",
        "_active",
        "_audit_due",
        "_audit_timer",
        "_clock",
        "_closing",
        "_collected",
        "_departed",
        "_draining",
        "_drains",
        "_dry_run",
        "_exempt",
        "_exempted",
        "_failing",
        "_finished",
        "_finished_observers",
        "_further",
        "_idle_closed",
        "_is_exempt",
        "_keyed",
        "_line",
        "_log",
        "_log_observer",
        "_looks_again",
        "_most",
        "_observers",
        "_on_collection",
        "_order",
        "_peer",
        "_peers",
        "_ports",
        "_rate",
        "_reclaimed",
        "_refusal_timer",
        "_refused",
        "_refusing",
        "_release_marks",
        "_returned",
        "_served_at",
        "_served_at_from",
        "_served_observers",
        "_serving",
        "_timer",
        "_unnotified",
        "_wait_seconds",
        "_waits",
        "budget",
        "limits",
        "refusals",
        "settings",
    )

    if TYPE_CHECKING:
        # The attributes that `adjustable` adds.

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(
        self,
        max_connections: int | None = None,
        *,
        limits: Iterable[ILimit] = (),
        observers: Iterable[ILimiterObserver] = (),
        clock: IReactorTime | None = None,
        **settings: Any,
    ) -> None:
        """
        :param max_connections: how many connections are served at once; None for no limit, 0 for nobody.
        :param limits: further limits; a connection is served when it has a slot of each.
        :param observers: whoever watches.
        :param clock: where the time comes from; the reactor if not given.
        :param settings: any other setting, by its name.
        :raises TypeError: for an unknown setting or a value of a wrong type.
        :raises ValueError: for a wrong value.
        """
        self.settings = Settings().evolve({"max_connections": max_connections, **settings})
        self._clock = ReactorClock() if clock is None else clock_of(_checked_clock(clock))
        self._log = BoundedLog(Logger(), self._clock)
        self._most = math.inf
        self._peers: PerPeer | None = None
        self._rate: Rate | None = None
        self.limits = tuple(limits)
        self._refusing = tuple(limit for limit in self.limits if IRefusingLimit.providedBy(limit))

        # The address of each connection that holds a slot, by a weak reference to it.
        self._active: dict[ref[IConnection], IAddress] = {}
        self._on_collection = self._collect  # bound once
        # Those of them that are exempt and take none of the limits.
        self._exempt: set[ref[IConnection]] = set()
        # When each was served, while there is an idle_timeout, and since when that is known.
        self._served_at: dict[ref[IConnection], float] | None = None
        self._served_at_from = 0.0
        # Those that were closed because they were idle, and are not gone yet.
        self._closing: set[ref[IConnection]] = set()
        # References whose connections are no more. The collector can come at any instant, so it only
        # leaves them here; they are seen to at the next arrival, or within a second if somebody waits.
        self._collected: list[ref[IConnection]] = []
        self._timer: IDelayedCall | None = None
        self._audit_timer: IDelayedCall | None = None
        self._audit_due = -math.inf
        self._refusal_timer: IDelayedCall | None = None
        # Who waits and has not had the notice yet, if there is one.
        self._unnotified: OrderedDict[IConnection, float] = OrderedDict()
        self._serving = False
        self._looks_again = False
        self._drains = 0
        self._draining = False
        self._dry_run: DryRun | None = None
        self._set_observers(observers)
        self._log_observer: LimiterLog | None = None
        if not any(issubclass(type(each), LimiterLog) for each in self._observers):
            self._switch_log()
        self._ports: list[IPort] = []
        #: The refusals that are being said to its clients.
        self.refusals: set[IRefusing] = set()
        # What its connections may take of the process's descriptors.
        self.budget = descriptors.Budget()

        self._accepted = 0
        self._finished = 0
        self._departed = 0
        self._refused = dict.fromkeys(REASONS, 0)
        self._waits = 0
        self._wait_seconds = 0.0
        self._reclaimed = 0
        self._idle_closed = 0
        self._exempted = 0
        # Of how many had finished when, to tell the rate of releases.
        self._release_marks = ((-math.inf, 0), (-math.inf, 0))

        self._peer = peer_key(self.settings.peer_prefix)
        self._is_exempt = self.settings.exempt
        self._failing: set[ILimit] = set()
        self._keyed: tuple[IKeyedLimit, ...] = ()
        self._refill_line(new_order(self.settings, self._peer), [])
        self._set_limits(_OF_THE_LIMITS)
        self._keep_served_times()
        if self.settings.dry_run:
            self._switch_dry_run()
        # Last, since a limit may call back at once.
        for limit in self.limits:
            if isinstance(limit, PerPeer):
                limit.subscribe_key(partial(self._key_may_have_room, limit))
            limit.subscribe(partial(self._may_have_room, limit))

    def __repr__(self) -> str:
        return (
            f"<Limiter {self.settings.name}: {self.active} of {self.settings.max_connections} served, "
            f"{self.waiting} waiting>"
        )

    # What can be asked

    @property
    def active(self) -> int:
        """
        How many connections hold a slot.
        """
        collected = sum(slot not in self._exempt for slot in self._collected)
        return len(self._active) - collected - len(self._exempt)

    @property
    def waiting(self) -> int:
        """
        How many connections wait in the line.
        """
        return len(self._line)

    def snapshot(self) -> Snapshot:
        """
        Every counter and gauge, at this instant.
        """
        self._reclaim_collected()
        return Snapshot(
            active=self.active,
            waiting=self.waiting,
            accepted=self._accepted,
            served=self.active + self._finished,
            finished=self._finished,
            departed=self._departed,
            refused=MappingProxyType(dict(self._refused)),
            longest_wait=max(0.0, self.clock.seconds() - self._line.oldest()[1]) if self.waiting else 0.0,
            waits=self._waits,
            wait_seconds=self._wait_seconds,
            reclaimed=self._reclaimed,
            idle_closed=self._idle_closed,
            exempt=len(self._exempt),
            exempted=self._exempted,
            backlog=self._backlog(),
            draining=self._draining,
            dry_run=self._dry_run.snapshot() if self._dry_run else None,
        )

    def active_for(self, factory: object) -> list[IConnection]:
        """
        The active connections that a factory serves. Looks at all of them.
        """
        return [each for each in self._actives() if each.factory is factory]

    def waiting_for(self, factory: object) -> list[IConnection]:
        """
        The connections that wait for a factory, longest waiting first. Looks at the whole line.
        """
        return [each for each in self._line if each.factory is factory]

    @property
    def needs_peers(self) -> bool:
        """
        Whether it matters who a connection's peer is.
        """
        settings = self.settings
        return bool(
            settings.max_per_peer is not None
            or settings.exempt is not None
            or self.limits
            or settings.order not in ("fifo", "lifo", "adaptive")
        )

    def busiest_peers(self, count: int) -> list[tuple[Hashable, int, int]]:
        """
        The peers with the most connections: each with how many are active and how many wait. Looks at all.
        """
        return exhausted(self.find_busiest_peers(count))

    def find_busiest_peers(self, count: int) -> Generator[None, None, list[tuple[Hashable, int, int]]]:
        """
        The same, as a generator that returns it: between two of its steps others can have their turn.
        """
        return busiest(self._peer, list(self._active.values()), list(self._line.everybody()), count)

    def first_waiting(self, count: int) -> list[tuple[IAddress, float]]:
        """
        Those who have waited longest: their addresses, and how many seconds they have waited.
        """
        now = self.clock.seconds()
        return [
            (connection.address, max(0.0, now - self._line.arrival(connection)))
            for connection in self._line.first(count)
        ]

    @property
    def observers(self) -> tuple[ILimiterObserver, ...]:
        """
        Who observes it.
        """
        return self._observers

    def limited_by(self, reason: str = FULL, connection: IConnection | None = None) -> str:
        """
        In words, which limit makes connections wait now, or why one was refused.

        :param reason: why.
        :param connection: which.
        """
        settings = self.settings
        if reason == DESCRIPTORS:
            return "descriptors run short"
        if reason == PEER and connection is not None:
            return f"max_per_peer is {settings.max_per_peer}, of {self._peer(connection.address)}"
        most = settings.max_waiting
        queue = f", max_waiting is {most}" if most is not None and self.waiting >= most else ""
        return self._lacking(connection) + queue

    def _lacking(self, connection: IConnection | None) -> str:
        settings = self.settings
        if not self._has_slot():
            return f"max_connections is {settings.max_connections}"
        keys = self._line.lacking()
        if keys and not self._order:
            limit, key = next(iter(keys))
            others = f" and {len(keys) - 1} others" if len(keys) > 1 else ""
            what = f"max_per_peer is {settings.max_per_peer}" if limit is self._peers else _named(limit)
            return what if key is _UNKNOWN else f"{what}, of {_short(key)}{others}"
        further: object = self._further.lacking if self._further is not None else None
        if further is None:
            return f"{self.active} of any number"
        if further is self._peers and connection is not None:
            return f"max_per_peer is {settings.max_per_peer}, of {self._peer(connection.address)}"
        if further is self._rate:
            return f"max_rate is {settings.max_rate} per second"
        return f"no slot from {_named(further)}"

    # What can be changed

    @property
    def clock(self) -> IReactorTime:
        """
        Where the time comes from.
        """
        return self._clock

    def run_in(self, reactor: Any) -> None:
        """
        Let timers run in this reactor, unless a clock was given or it is known already where they run.
        """
        if isinstance(self._clock, ReactorClock):
            self._clock.run_in(reactor)

    def reconfigure(self, **settings: Any) -> None:
        """
        Change several settings at once, all or none.

        :raises TypeError: for an unknown setting or a value of a wrong type; nothing has changed.
        :raises ValueError: for a wrong value; nothing has changed.
        """
        old, new = self.settings, self.settings.evolve(settings)
        changes = {
            name: (getattr(old, name), getattr(new, name))
            for name in settings
            if getattr(old, name) != getattr(new, name)
        }
        if not changes:
            return
        peer = peer_key(new.peer_prefix) if "peer_prefix" in changes else self._peer
        # An order of one's own may fail to be made.
        order = new_order(new, peer) if _OF_THE_LINE & changes.keys() else None
        self.settings = new
        self._peer = peer
        self._is_exempt = new.exempt
        if "dry_run" in changes:
            self._switch_dry_run()
        elif self._dry_run is not None:
            self._dry_run.reconfigure({name: value for name, (_, value) in changes.items()})
        if order is not None:
            self._refill_line(order, [(each, self._line.arrival(each)) for each in self._line])
        if _OF_THE_LIMITS & changes.keys():
            self._set_limits(changes.keys())
        if "idle_timeout" in changes:
            self._keep_served_times()
        if "notice" in changes:
            self._unnotified.clear() if new.notice is None else self._expect_notice(old.notice is None)
        if _OF_THE_TIMERS & changes.keys():
            self._stop_timers()
            self._start_timers()
        self._tell("reconfigured", changes)
        if "log" in changes:
            self._switch_log()
        if "exempt" in changes and self._is_exempt is not None:
            self._serve_exempt_waiting()
        if _OF_DEPARTURES & changes.keys():
            for connection in list(self._line):
                connection.reconsider()
        self._may_have_room()

    def _expect_notice(self, everybody: bool) -> None:
        """
        Give the notice to all who wait, if it is the first. Looks at the whole line.
        """
        if everybody:
            self._unnotified.update((each, self._line.arrival(each)) for each in self._line)

    def _keep_served_times(self) -> None:
        """
        Know from now on when each connection was served, if that matters.
        """
        self._served_at = None if self.settings.idle_timeout is None else {}
        self._served_at_from = self.clock.seconds()

    def _set_limits(self, changed: Collection[str]) -> None:
        """
        Make the limits that the settings ask for, some of which have changed. Looks at all who are active.
        """
        settings = self.settings
        dry = settings.dry_run
        self._most = math.inf if dry or settings.max_connections is None else settings.max_connections
        if settings.max_per_peer is None or dry:
            self._peers = None
        elif self._peers is None or "peer_prefix" in changed:
            self._peers = PerPeer(settings.max_per_peer, self._peer)
            self._peers.count(address for slot, address in self._active.items() if slot not in self._exempt)
        else:
            self._peers.slots = settings.max_per_peer
        if settings.max_rate is None or dry:
            if self._rate is not None:
                self._rate.stop()
            self._rate = None
        elif self._rate is None:
            self._rate = Rate(settings.max_rate, settings.max_burst, self._clock)
            self._rate.subscribe(self._serve_waiting)
        elif "max_rate" in changed or "max_burst" in changed:
            self._rate.change(settings.max_rate, settings.max_burst)
        # The rate comes last: what it has given, nobody can give back.
        limits = [each for each in (self._peers, *self.limits, self._rate) if each is not None]
        self._further = All(limits) if limits else None
        self._keyed = tuple(each for each in limits if IKeyedLimit.providedBy(each))
        self._failing.clear()
        # Those who stand aside do so with their keys of the limits that were.
        self._line.call_all_back()

    def _refill_line(self, order: Fifo, arrivals: list[tuple[IConnection, float]]) -> None:
        """
        Let connections wait in another order. Looks at the whole line.
        """
        self._line = Line(order, self._has_room_for)
        self._order = order
        self._returned = self._line.returned
        for connection, arrived in arrivals:
            self._line.add(connection, arrived)

    def _switch_dry_run(self) -> None:
        if self._dry_run is not None:
            self.remove_observer(self._dry_run)
            self._dry_run.report()
            self._dry_run = None
        if self.settings.dry_run:
            shadow = Limiter(
                clock=self._clock, log=False, **DryRun.tried_out(attrs.asdict(self.settings, recurse=False))
            )
            self._dry_run = DryRun(self, shadow)
            self.add_observer(self._dry_run)

    def add_port(self, port: IPort) -> None:
        """
        Let the snapshot tell the backlog of a port, as long as that listens.
        """
        self._ports.append(port)

    def add_observer(self, observer: ILimiterObserver) -> None:
        """
        Let the observer hear what happens from now on.
        """
        self._set_observers((*self._observers, observer))

    def remove_observer(self, observer: ILimiterObserver) -> None:
        """
        Let the observer hear nothing any more.
        """
        self._set_observers(each for each in self._observers if each is not observer)

    def _set_observers(self, observers: Iterable[ILimiterObserver]) -> None:
        self._observers = tuple(observers)
        # Each connection makes these events, so it matters whether anybody hears them.
        self._served_observers, self._finished_observers = (
            tuple(each for each in self._observers if hears(each, event)) for event in ("served", "finished")
        )

    def _switch_log(self) -> None:
        if self._log_observer is not None:
            self.remove_observer(self._log_observer)
            self._log_observer = None
        if self.settings.log:
            self._log_observer = LimiterLog()
            self.add_observer(self._log_observer)

    def drain(self, timeout: float | None = None) -> Deferred[None]:
        """
        Refuse newcomers and the line, wait for the active connections, then close what is left.

        A drained limiter serves nobody any more. Connections that are between two requests are closed at
        once, as far as that can be told.

        :param timeout: seconds until the active connections are closed; None waits as long as it takes.
        :return: fires when no connection is active, and those who were refused have been told.
        """
        self.refuse_all()
        return self.wait_for(self._actives(), timeout)

    def refuse_all(self) -> None:
        """
        Refuse newcomers and the line from now on, and leave the active connections alone.
        """
        if not self._draining and self._dry_run is not None:
            self._dry_run.report()
        self._draining = True
        self.refuse_waiting(self._line)

    def stop_listening(self) -> list[Deferred[Any]]:
        """
        Close the ports that the limiter knows.
        """
        return [maybeDeferred(port.stop_listening) for port in self._ports if port.is_listening()]

    def has_room(self) -> bool:
        """
        Whether a newcomer would be served at once, as far as that does not depend on its peer.
        """
        return (
            not (self._order or self._returned or self._draining)
            and self._has_slot()
            and self.budget.may_serve()
        )

    def has_place(self) -> bool:
        """
        Whether a newcomer would be served or could wait, as far as that does not depend on its peer.
        """
        if self._draining:
            return False
        if self.has_room():
            return True
        most = self.settings.max_waiting
        return (most is None or self.waiting < most) and self._has_descriptors()

    def retry_after(self) -> float:
        """
        Seconds after which a newcomer would be served, by the rate of the last releases: between 1 and 3600.
        """
        now = self.clock.seconds()
        (since, finished), (last, _) = self._release_marks
        if not 0 <= now - last <= _RATE_WINDOW:
            self._release_marks = self._release_marks[1], (now, self._finished)
        released = self._finished - finished
        if not released or since == -math.inf or now <= since:
            return 1.0
        return min(max((self.waiting + 1) * (now - since) / released, 1.0), 3600.0)

    # What happens to connections, told by the factories and protocols

    def serve_at_once(self, connection: IConnection) -> bool:
        """
        Give a new connection a slot, if there is room and nobody waits.
        """
        if self._collected:
            self._reclaim_collected()
        if self._is_exempt is not None and self._serve_exempt(connection):
            return True
        if (
            len(self._active) - len(self._exempt) >= self._most
            or self._order
            or self._returned
            or self._draining
            or ((descriptors.is_short or self.budget.opens) and not self.budget.may_serve())
            or (self._further is not None and not self._further.try_acquire(connection))
        ):
            return False
        self._accepted += 1
        connection.slot = slot = ref(connection, self._on_collection)
        self._active[slot] = connection.address
        if self._served_at is not None:
            self._served_at[slot] = self.clock.seconds()
        if self._served_observers:
            self._tell("served", connection, 0.0)
        return True

    def may_wait(self, connection: IConnection) -> str | None:
        """
        Whether there is a place in the line for a new connection. If there is none, it is refused herewith.

        :return: None, or the reason of the refusal.
        """
        reason = self._no_place(connection)
        if reason is not None:
            self._accepted += 1
            self._count_refused(connection, reason)
        return reason

    def wait(self, connection: IConnection) -> None:
        """
        Put a new connection into the line.
        """
        self._accepted += 1
        reason = self._no_place(connection)
        if reason is not None:
            self._count_refused(connection, reason)
            connection.refuse(reason)
            return
        now = self.clock.seconds()
        self._line.add(connection, now)
        if self.settings.notice is not None:
            self._unnotified[connection] = now
        self._start_timers()
        if self._observers:
            self._tell("waiting", connection)
        self._serve_waiting()

    def depart(self, connection: IConnection) -> None:
        """
        The client of a waiting connection went away.
        """
        if connection not in self._line:
            return
        waited = self._leave_line(connection)
        self._departed += 1
        if self._observers:
            self._tell("departed", connection, waited)
        self._serve_waiting()

    def finish(self, connection: IConnection) -> None:
        """
        The socket of an active connection is gone.
        """
        slot = connection.slot
        if slot is None:
            return
        connection.slot = None
        del self._active[slot]
        if self._served_at:
            self._served_at.pop(slot, None)
        if self._closing:
            self._closing.discard(slot)
        keys: Keys = ()
        if self._exempt and slot in self._exempt:
            self._exempt.discard(slot)
        else:
            self._finished += 1
            if self._further is not None:
                if self._line.has_aside:
                    keys = self._keys(connection)
                self._further.release(connection)
        if self._finished_observers:
            self._tell("finished", connection)
        for key in keys:
            self._line.call_back(key)
        if self._order or self._returned:
            self._serve_waiting()

    def reclaim(self, connection: IConnection, why: str) -> None:
        """
        The socket of an active connection is gone, but its protocol was not told.

        :param why: how that came, for the log.
        """
        if connection.slot is not None:
            self._count_reclaimed(connection, why)
            self.finish(connection)

    def refuse_waiting(self, connections: Iterable[IConnection]) -> None:
        """
        Refuse those of the connections that wait, because their server is being stopped.
        """
        # All leave the line before the first is told, lest the end of one bring another's turn.
        waiting = [each for each in connections if each in self._line]
        for connection in waiting:
            self._leave_line(connection)
        for connection in waiting:
            self._refuse(connection, DRAINING)
        self._serve_waiting()

    def wait_for(self, connections: Iterable[IConnection], timeout: float | None) -> Deferred[None]:
        """
        Wait until all of the connections that are active have finished, and those who were refused have been
        told, and close what is left then.

        :param timeout: seconds until they are closed; None waits as long as it takes.
        """
        active = [each for each in connections if each.slot is not None]
        self._drains += 1
        self._start_timers()
        return Drain(self, active, self.refusals).run(timeout).addBoth(self._drained)

    def _drained(self, result: Any) -> Any:
        self._drains -= 1
        if not (self._drains or self._line):
            self._stop_timers()
        return result

    # How it is done

    def _has_slot(self) -> bool:
        """
        Whether there is a slot of those that ``max_connections`` gives; they are as many as are active.
        """
        return len(self._active) - len(self._exempt) < self._most

    def _has_descriptors(self) -> bool:
        """
        Whether one more may wait, as far as the process's descriptors allow.
        """
        return self.budget.may_wait(max(0.0, self._most - self.active))

    def _serve_exempt_waiting(self) -> None:
        """
        Serve those who wait and are exempt now. Looks at the whole line.
        """
        for connection in list(self._line):
            if connection in self._line and self._serve_exempt(connection):
                self._leave_line(connection)
                self._accepted -= 1  # the exempt are counted apart
                connection.serve()

    def _serve_exempt(self, connection: IConnection) -> bool:
        """
        Serve the connection without a slot, if it is exempt.
        """
        try:
            if self._draining or not self._is_exempt(connection.address) or not descriptors.left_in_reserve():
                return False
        except Exception:
            self._log.failure(
                "{exempt} failed to tell whether a peer is exempt; it is not", exempt=self._is_exempt
            )
            return False
        connection.slot = slot = ref(connection, self._on_collection)
        self._active[slot] = connection.address
        self._exempt.add(slot)
        self._exempted += 1
        if self._observers:
            self._tell("exempted", connection)
        return True

    def _no_place(self, connection: IConnection) -> str | None:
        """
        Why there is no place in the line, or None if there is one.
        """
        if self._draining:
            return DRAINING
        if self._must_not_wait(connection):
            return PEER
        if self._waiting_is_useless():
            return FULL
        most = self.settings.max_waiting
        if most is not None and self.waiting >= most:
            return FULL
        return None if self._has_descriptors() else DESCRIPTORS

    def _must_not_wait(self, connection: IConnection) -> bool:
        """
        Whether the connection's peer is at its cap and does not wait for it.
        """
        peers = self._peers
        return (
            peers is not None
            and self.settings.over_peer == "refuse"
            and not peers.has_room(peers.key(connection))
        )

    def _waiting_is_useless(self) -> bool:
        """
        Whether a limit says that nobody is to wait. One that fails to tell does not.
        """
        for limit in self._refusing:
            try:
                if limit.refuses():
                    return True
            except Exception:
                self._log.failure("{limit} failed to tell whether it refuses", limit=limit)
        return False

    def _refuse_if_useless(self) -> None:
        """
        Refuse the line as long as waiting is useless, longest waiting first, and let others have their turn
        now and then.
        """
        self._refusal_timer = None
        for _ in range(_REFUSED_AT_ONCE):
            if not self.waiting or not self._waiting_is_useless():
                return
            connection, _arrived = self._line.oldest()
            self._leave_line(connection)
            self._refuse(connection, FULL)
        if self.waiting and self._refusal_timer is None:
            self._refusal_timer = self.clock.callLater(0, self._refuse_if_useless)

    def _may_have_room(self, limit: ILimit | None = None) -> None:
        """
        A limit tells that there may be room, or, without one, anything may have changed.
        """
        if limit is None or IKeyedLimit.providedBy(limit) or limit in self._failing:
            self._line.call_all_back()
        self._serve_waiting()

    def _key_may_have_room(self, limit: IKeyedLimit, key: Hashable) -> None:
        """
        A limit tells that there may be room for one more of a key.
        """
        self._line.call_back((limit, key))
        self._serve_waiting()

    def _keys(self, connection: IConnection) -> Keys:
        """
        The keys of a connection, each with its limit. Of a limit that fails to tell, it is `_UNKNOWN`.
        """
        keys = []
        for limit in self._keyed:
            try:
                key = limit.key(connection)
                hash(key)
            except Exception:
                self._log.failure("{limit} failed to tell a key; that connection stands aside", limit=limit)
                self._failing.add(limit)
                key = _UNKNOWN
            keys.append((limit, key))
        return tuple(keys)

    def _has_room_for(self, key: tuple[IKeyedLimit, Hashable]) -> bool:
        """
        Whether there is room for one more of a key.
        """
        limit, its_key = key
        if its_key is _UNKNOWN:
            return True  # nobody knows before it is asked for a slot
        try:
            return limit.has_room(its_key)
        except Exception:
            self._log.failure("{limit} failed to tell whether a key has room; it has none", limit=limit)
            return False

    def _serve_waiting(self) -> None:
        """
        Serve the line as far as there is room.
        """
        if self._serving:
            self._looks_again = True
            return
        self._serving = True
        try:
            while self._order or self._returned:
                self._looks_again = False
                # A limit may have called while it was asked: then it is asked once more.
                if not self._serve_next() and not (self._looks_again and self._serve_next()):
                    break
        finally:
            self._serving = False

    def _serve_next(self) -> bool:
        """
        Serve whose turn it is, if there is room; return False if there is none.

        In a frame of its own: a traceback from below, if somebody keeps it, keeps the connection that
        failed and not one that was served later.
        """
        if not self._has_slot() or (self.budget.opens and not self.budget.may_serve()):
            return False
        now = self.clock.seconds()
        connection = self._line.next(now)
        if self._further is not None and not self._further.try_acquire(connection):
            return self._let_others_pass(connection)
        waited = self._leave_line(connection)
        self._waits += 1
        self._wait_seconds += waited
        connection.slot = slot = ref(connection, self._on_collection)
        self._active[slot] = connection.address
        if self._served_at is not None:
            self._served_at[slot] = now
        if self._served_observers:
            self._tell("served", connection, waited)
        connection.serve()
        return True

    def _let_others_pass(self, connection: IConnection) -> bool:
        """
        Take the connection out of the others' way, if it is its own key that has no room.

        :return: whether it was.
        """
        if self._must_not_wait(connection):
            self._leave_line(connection)
            self._refuse(connection, PEER)
            return True
        assert self._further is not None
        keys = self._keys(connection)
        lacking = next((key for key in keys if not self._has_room_for(key)), None)
        if lacking is None:
            unknown = [key for key in keys if key[1] is _UNKNOWN]
            if self._further.failed:
                limit = self._further.lacking
                assert limit is not None
                self._failing.add(limit)
                lacking = (limit, _UNKNOWN)
                keys = (*(key for key in keys if key != lacking), lacking)
            elif unknown:
                lacking = unknown[0]
            else:
                return False
        self._line.step_aside(connection, keys, lacking)
        return True

    def _leave_line(self, connection: IConnection) -> float:
        """
        Take a waiting connection out of the line.

        :return: how many seconds it has waited.
        """
        waited = max(0.0, self.clock.seconds() - self._line.remove(connection))
        if self._unnotified:
            self._unnotified.pop(connection, None)
        if not self._line:
            self._stop_timers()
            if self._drains:
                self._start_timers()
        return waited

    def _actives(self) -> list[IConnection]:
        """
        The connections that hold a slot.
        """
        return [connection for slot in list(self._active) if (connection := slot()) is not None]

    def _collect(self, slot: ref[IConnection]) -> None:
        """
        A connection was lost to garbage collection, or has finished and nobody else held it any more.
        """
        if slot in self._active:
            self._collected.append(slot)

    def _reclaim_collected(self) -> None:
        """
        Free the slots of those that were lost to garbage collection.
        """
        while self._collected:
            slot = self._collected.pop()
            remains = Inert(self._active[slot])
            remains.slot = slot
            self.reclaim(remains, "its transport was forgotten, and garbage")

    def _backlog(self) -> int | None:
        """
        How many connections the ports have not accepted yet.
        """
        self._ports = [port for port in self._ports if port.is_listening()]
        known = [backlog for port in self._ports if (backlog := port.backlog()) is not None]
        return sum(known) if known else None

    def _count_reclaimed(self, connection: IConnection, why: str) -> None:
        self._reclaimed += 1
        self._log.warn(
            "{limiter}: the slot of {peer} is reclaimed: {why}",
            limiter=self.name,
            peer=connection.address,
            why=why,
        )

    def _refuse(self, connection: IConnection, reason: str) -> None:
        self._count_refused(connection, reason)
        connection.refuse(reason)

    def _count_refused(self, connection: IConnection, reason: str) -> None:
        self._refused[reason] += 1
        if self._observers:
            self._tell("refused", connection, reason)

    def _start_timers(self, at_least: float = 0.0) -> None:
        """
        While somebody waits: see to it that whoever has waited too long is refused, that notices are given,
        and that no slot is held by a connection that is no more.

        One timer serves the whole line: it is set for whoever is due first, and is not moved when that one
        leaves earlier; it then finds out and is set for the next.

        :param at_least: seconds before whoever waits is looked at again, whatever the order says.
        """
        if self._audit_timer is None and (self._line or self._drains):
            now = self.clock.seconds()
            # A look that is due stays due, however often the line is empty meanwhile.
            if not now - _AUDIT_INTERVAL <= self._audit_due <= now + _AUDIT_INTERVAL:
                self._audit_due = now + _AUDIT_INTERVAL
            self._audit_timer = self.clock.callLater(max(0.0, self._audit_due - now), self._audit)
        if not self._line:
            return
        due = self._due()
        if due is None:
            return
        if self._timer is not None:
            if self._timer.getTime() <= due:
                return
            self._timer.cancel()
        delay = max(at_least, due - self.clock.seconds())
        self._timer = self.clock.callLater(delay, self._time_over)

    def _due(self) -> float | None:
        """
        When there is something to do for somebody who waits, at the earliest.
        """
        times = [self._order.expires() if self._order else None]
        timeout, notice = self.settings.wait_timeout, self.settings.notice
        if timeout is not None:
            times.append(self._line.oldest()[1] + timeout)
        if notice is not None and self._unnotified:
            times.append(next(iter(self._unnotified.values())) + notice[0])
        return min((time for time in times if time is not None), default=None)

    def _stop_timers(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._audit_timer is not None:
            self._audit_timer.cancel()
            self._audit_timer = None
        if self._refusal_timer is not None:
            self._refusal_timer.cancel()
            self._refusal_timer = None

    def _audit(self) -> None:
        """
        Free the slots of active connections whose sockets are no more, and of those that are idle.
        """
        self._audit_timer = None
        self._audit_due = self.clock.seconds() + _AUDIT_INTERVAL
        self._reclaim_collected()
        actives = self._actives()
        for connection in actives:
            if connection.is_dead():
                connection.abort()
                self.reclaim(connection, "its socket is gone or was reset, and it did not notice")
        for limit in tuple(self._failing):
            self._line.call_back((limit, _UNKNOWN))
        self._serve_waiting()
        if self.settings.idle_timeout is not None:
            self._close_idle(actives, self.settings.idle_timeout)
        self._start_timers()
        if self._refusing and self._refusal_timer is None:
            self._refuse_if_useless()

    def _close_idle(self, actives: list[IConnection], timeout: float) -> None:
        """
        Close those who were idle for too long, longest idle first, as many as that would really serve.
        """
        wanted = self._wanted()
        if not wanted:
            return
        idle = []
        for connection in actives:
            slot = connection.slot
            if slot is None or slot in self._exempt:
                continue
            if slot in self._closing:
                self._take_wanted(wanted, connection)
            elif (seconds := self._idle(connection)) is not None and seconds >= timeout:
                idle.append((seconds, connection))
        for _seconds, connection in sorted(idle, key=itemgetter(0), reverse=True):
            if not wanted:
                break
            if connection.slot is not None and self._take_wanted(wanted, connection):
                self._idle_closed += 1
                self._closing.add(connection.slot)
                connection.close()

    def _wanted(self) -> Counter[Hashable]:
        """
        How many of those who wait would be served if any slot were free (None), and if one of a key were.
        """
        further = self._further
        wanted: Counter[Hashable] = Counter(self._line.aside())
        ready = self._line.ready
        if (
            self._has_slot()
            and self.budget.may_serve()
            and further is not None
            and further.lacking is self._rate
        ):
            ready = 0  # slots are there
        if ready and self._most < math.inf:
            ready += max(0, len(self._active) - len(self._exempt) - int(self._most))
        if self._rate is not None:
            soon = math.ceil(self._rate.within(_AUDIT_INTERVAL))
            ready = min(ready, soon)
            wanted = Counter({key: min(count, soon) for key, count in wanted.items()})
        wanted[None] = ready
        return +wanted

    def _take_wanted(self, wanted: Counter[Hashable], connection: IConnection) -> bool:
        """
        Whether the end of a connection would serve somebody; that one is counted no more.
        """
        for key in (None, *self._keys(connection)):
            if key in wanted:
                wanted[key] -= 1
                if not wanted[key]:
                    del wanted[key]
                return True
        return False

    def _idle(self, connection: IConnection) -> float | None:
        """
        For how many seconds a connection has moved no byte since it was served.
        """
        assert self._served_at is not None
        seconds = connection.idle()
        if seconds is None:
            return None
        return min(seconds, self.clock.seconds() - self._served_at.get(connection.slot, self._served_at_from))

    def _time_over(self) -> None:
        self._timer = None
        now, timeout = self.clock.seconds(), self.settings.wait_timeout
        while self._line:
            connection = self._line.expired(now)
            if connection is None:
                connection, arrived = self._line.oldest()
                if timeout is None or arrived + timeout > now:
                    break
            self._leave_line(connection)
            self._refuse(connection, TIMEOUT)
        if self.settings.notice is not None:
            self._give_notice(now, *self.settings.notice)
        self._start_timers(_LEAST_DELAY)
        self._serve_waiting()

    def _give_notice(self, now: float, after: float, what: Any) -> None:
        while self._unnotified:
            connection, arrived = next(iter(self._unnotified.items()))
            if arrived + after > now:
                break
            del self._unnotified[connection]
            try:
                connection.notify(what if isinstance(what, bytes) else what(connection))
            except Exception:
                self._log.failure("{notice} failed to make a notice", notice=what)

    def _tell(self, event: str, *facts: Any) -> None:
        """
        Tell the observers of an event, by the name of the method of `ILimiterObserver`.
        """
        for observer in self._observers:
            try:
                getattr(observer, event)(self, *facts)
            except Exception:
                self._log.failure("{observer} failed to observe {event}", observer=observer, event=event)


def _named(limit: object) -> str:
    """
    What a limit is called in the log.
    """
    kind = type(limit)
    try:
        if kind.__repr__ is not object.__repr__:
            return repr(limit)[:_MOST_NAMED]
        name = getattr(limit, "name", None)
    except Exception:  # it is whatever a user has written
        return kind.__name__
    return _short(f"{kind.__name__} {name}") if isinstance(name, str) else kind.__name__


def _short(thing: object) -> str:
    return str(thing)[:_MOST_NAMED]


#: How much of a limit's name is logged.
_MOST_NAMED = 100

#: The settings that change the order of the line, the limits, and the timers.
_OF_THE_LINE = {"order", "peer_prefix", "adaptive_target", "adaptive_interval"}
_OF_THE_LIMITS = {"max_connections", "max_per_peer", "peer_prefix", "max_rate", "max_burst", "dry_run"}
_OF_DEPARTURES = {"departed_on_half_close", "refusal"}
_OF_THE_TIMERS = {"wait_timeout", "notice", "order", "adaptive_target", "adaptive_interval"}

#: The key of a connection of which a limit has failed to tell it, or failed altogether.
_UNKNOWN = object()


def _checked_clock(clock: object) -> IReactorTime:
    if not (hasattr(clock, "seconds") and hasattr(clock, "callLater")):
        raise TypeError(f"clock must provide IReactorTime, as the reactor and task.Clock do, not {clock!r}")
    return clock  # type: ignore[return-value]
