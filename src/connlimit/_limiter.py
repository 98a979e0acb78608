"""
Who is served, who waits and who is refused.

There is no transport and no protocol here. A connection is whatever provides
`connlimit.interfaces.IConnection`; it is, at any instant, in one of these states:

    new       it was accepted; the limiter has not been asked about it yet
    waiting   it stands in the line
    active    it holds a slot
    over      it has finished, departed or was refused, and is in none of our collections

These things can happen, and no others:

    serve_at_once   new -> active      there is room and nobody waits
    may_wait        new -> over        there is no place in the line (refused)
    wait            new -> waiting     it has joined the line
                    new -> over        the last place was taken meanwhile (refused)
    a slot frees    waiting -> active  it is its turn
    wait_timeout    waiting -> over    refused
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

The line holds its connections, since nobody else does: a paused transport is in no reactor. Those that are
active are held weakly: a transport that the application pauses and forgets is closed by the garbage
collector, as it would be without us, and its slot is reclaimed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import ref

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.logger import Logger
from zope.interface import implementer

from connlimit import _descriptors
from connlimit._drain import Drain
from connlimit._line import Fifo
from connlimit._settings import Settings, adjustable
from connlimit.interfaces import IConnection, ILimit, ILimiterObserver
from connlimit.limits import All, Total
from connlimit.refusals import DESCRIPTORS, DRAINING, FULL, REASONS, TIMEOUT

_AUDIT_INTERVAL = 1.0  # seconds


@attrs.frozen
class Snapshot:
    """
    What a limiter has done since it was made, and what it holds now.

    ``accepted`` is always ``active + waiting + finished + departed`` and all of ``refused``.

    :ivar settings: the settings in force.
    :ivar active: connections that hold a slot.
    :ivar waiting: connections in the line.
    :ivar accepted: connections the limiter was asked about.
    :ivar served: connections that got a slot, at once or after a wait.
    :ivar finished: connections that were served and are over.
    :ivar departed: clients that went away while they waited.
    :ivar refused: connections turned away, by reason.
    :ivar longest_wait: seconds that the first of the line has waited; 0.0 if nobody waits.
    :ivar waits: connections that were served after a wait.
    :ivar wait_seconds: how long these have waited, all together.
    :ivar reclaimed: of the finished, those whose protocol was not told of the end of its socket.
    :ivar draining: whether the limiter is being drained.
    """

    settings: Settings
    active: int
    waiting: int
    accepted: int
    served: int
    finished: int
    departed: int
    refused: Mapping[str, int]
    longest_wait: float
    waits: int
    wait_seconds: float
    reclaimed: int
    draining: bool


@implementer(IConnection)
@attrs.frozen
class _Remains:
    """
    What is known of a connection that was lost to garbage collection.
    """

    address: IAddress
    factory = None
    slot = None

    def serve(self) -> None: ...

    def refuse(self, reason: str) -> None: ...

    def abort(self) -> None: ...

    def is_dead(self) -> bool:
        return True


@adjustable
class Limiter:
    """
    Limits, the line of those who wait for them, and what happens when both are full.

    One limiter may serve any number of factories; its limits then hold across them. Every setting
    is also an attribute and can be changed at any time: more room admits at once, less room ends nobody.

    :ivar settings: all settings, frozen; change them by `reconfigure` or by their attributes.
    """

    _log = Logger()

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
        self._clock = _checked_clock(clock) if clock is not None else None
        self._total = Total(self.settings.max_connections)
        further = tuple(limits)
        limit = All((self._total, *further)) if further else self._total
        limit.subscribe(self._serve_waiting)
        # Bound once: a served connection costs one call for all limits together.
        self._try_acquire = limit.try_acquire
        self._release = limit.release

        # The address of each connection that holds a slot, by a weak reference to it.
        self._active: dict[ref[IConnection], IAddress] = {}
        # References whose connections are no more. The collector can come at any instant, so it only
        # leaves them here; they are seen to at the next arrival, or within a second if somebody waits.
        self._collected: list[ref[IConnection]] = []
        self._line = Fifo()
        self._timer: IDelayedCall | None = None
        self._audit_timer: IDelayedCall | None = None
        self._serving = False
        self._draining = False
        self._observers: tuple[ILimiterObserver, ...] = tuple(observers)

        self._accepted = 0
        self._finished = 0
        self._departed = 0
        self._refused = dict.fromkeys(REASONS, 0)
        self._waits = 0
        self._wait_seconds = 0.0
        self._reclaimed = 0

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
        return len(self._active) - len(self._collected)

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
            settings=self.settings,
            active=self.active,
            waiting=self.waiting,
            accepted=self._accepted,
            served=self.active + self._finished,
            finished=self._finished,
            departed=self._departed,
            refused=MappingProxyType(dict(self._refused)),
            longest_wait=self.clock.seconds() - self._line.oldest()[1] if self._line else 0.0,
            waits=self._waits,
            wait_seconds=self._wait_seconds,
            reclaimed=self._reclaimed,
            draining=self._draining,
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

    # What can be changed

    @property
    def clock(self) -> IReactorTime:
        """
        Where the time comes from. Those who wait keep the time they have waited when it is changed.
        """
        if self._clock is None:
            from twisted.internet import reactor

            self._clock = _checked_clock(reactor)
        return self._clock

    @clock.setter
    def clock(self, clock: IReactorTime) -> None:
        shift = _checked_clock(clock).seconds() - self.clock.seconds()
        self._stop_timers()
        for connection in list(self._line):
            self._line.add(connection, self._line.remove(connection) + shift)
        self._clock = clock
        self._start_timers()

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
        self.settings = new
        self._tell("reconfigured", changes)
        if "wait_timeout" in changes:
            self._stop_timers()
            self._start_timers()
        self._total.slots = new.max_connections

    def add_observer(self, observer: ILimiterObserver) -> None:
        """
        Let the observer hear what happens from now on.
        """
        self._observers = (*self._observers, observer)

    def remove_observer(self, observer: ILimiterObserver) -> None:
        """
        Let the observer hear nothing any more.
        """
        self._observers = tuple(each for each in self._observers if each is not observer)

    def drain(self, timeout: float | None = None) -> Deferred[None]:
        """
        Refuse newcomers and the line, wait for the active connections, then abort what is left.

        A drained limiter serves nobody any more.

        :param timeout: seconds until the active connections are aborted; None waits as long as it takes.
        :return: fires when no connection is active.
        """
        self._draining = True
        self.refuse_waiting(self._line)
        return self.wait_for(self._actives(), timeout)

    # What happens to connections, told by the factories and protocols

    def serve_at_once(self, connection: IConnection) -> bool:
        """
        Give a new connection a slot, if there is room and nobody waits.
        """
        if self._collected:
            self._reclaim_collected()
        if self._line or self._draining or not self._try_acquire(connection):
            return False
        self._accepted += 1
        connection.slot = slot = ref(connection, self._collect)
        self._active[slot] = connection.address
        if self._observers:
            self._tell("served", connection, 0.0)
        return True

    def may_wait(self, connection: IConnection) -> bool:
        """
        Whether there is a place in the line for a new connection. If there is none, it is refused herewith.
        """
        reason = self._no_place()
        if reason is None:
            return True
        self._accepted += 1
        self._count_refused(connection, reason)
        return False

    def wait(self, connection: IConnection) -> None:
        """
        Put a new connection into the line.
        """
        self._accepted += 1
        reason = self._no_place()
        if reason is not None:
            self._count_refused(connection, reason)
            connection.refuse(reason)
            return
        self._line.add(connection, self.clock.seconds())
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
        self._finished += 1
        self._release(connection)
        if self._observers:
            self._tell("finished", connection)
        if self._line:
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
        Wait until all of the connections that are active have finished, and abort what is left then.

        :param timeout: seconds until they are aborted; None waits as long as it takes.
        """
        return Drain(self, {each for each in connections if each.slot is not None}).run(timeout)

    # How it is done

    def _no_place(self) -> str | None:
        """
        Why there is no place in the line, or None if there is one.
        """
        if self._draining:
            return DRAINING
        most = self.settings.max_waiting
        if most is not None and len(self._line) >= most:
            return FULL
        return None if _descriptors.left_for_waiting() else DESCRIPTORS

    def _serve_waiting(self) -> None:
        """
        Serve the line as far as there is room.
        """
        if self._serving:
            return
        self._serving = True
        try:
            while self._line and self._serve_next():
                pass
        finally:
            self._serving = False

    def _serve_next(self) -> bool:
        """
        Serve whose turn it is, if there is room.

        In a frame of its own: a traceback from below, if somebody keeps it, keeps the connection that
        failed and not one that was served later.
        """
        connection = self._line.next()
        if not self._try_acquire(connection):
            return False
        waited = self._leave_line(connection)
        self._waits += 1
        self._wait_seconds += waited
        connection.slot = slot = ref(connection, self._collect)
        self._active[slot] = connection.address
        if self._observers:
            self._tell("served", connection, waited)
        connection.serve()
        return True

    def _leave_line(self, connection: IConnection) -> float:
        """
        Take a waiting connection out of the line.

        :return: how many seconds it has waited.
        """
        waited = self.clock.seconds() - self._line.remove(connection)
        if not self._line:
            self._stop_timers()
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
            remains = _Remains(self._active.pop(slot))
            self._finished += 1
            self._count_reclaimed(remains, "its transport was forgotten, and garbage")
            self._release(remains)
            if self._observers:
                self._tell("finished", remains)

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

    def _start_timers(self) -> None:
        """
        While somebody waits: see to it that the first of the line is refused when its time is over, and
        that no slot is held by a connection that is no more.

        One timer serves the whole line: it is set for whoever has waited longest, and is not moved
        when that one leaves earlier; it then finds out and is set for the next.
        """
        if not self._line:
            return
        if self._audit_timer is None:
            self._audit_timer = self.clock.callLater(_AUDIT_INTERVAL, self._audit)
        timeout = self.settings.wait_timeout
        if self._timer is None and timeout is not None:
            _, arrived = self._line.oldest()
            delay = arrived + timeout - self.clock.seconds()
            self._timer = self.clock.callLater(max(0.0, delay), self._time_over)

    def _stop_timers(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._audit_timer is not None:
            self._audit_timer.cancel()
            self._audit_timer = None

    def _audit(self) -> None:
        """
        Free the slots whose connections are no more without anybody having been told.

        It looks at every active connection, and so runs once a second at the most, and only while
        somebody waits.
        """
        self._audit_timer = None
        self._reclaim_collected()
        for connection in self._actives():
            if connection.is_dead():
                connection.abort()
                self.reclaim(connection, "its socket is gone or was reset, and it did not notice")
        self._serve_waiting()
        self._start_timers()

    def _time_over(self) -> None:
        self._timer = None
        now, timeout = self.clock.seconds(), self.settings.wait_timeout
        while self._line and timeout is not None:
            connection, arrived = self._line.oldest()
            if arrived + timeout > now:
                break
            self._leave_line(connection)
            self._refuse(connection, TIMEOUT)
        self._start_timers()
        self._serve_waiting()

    def _tell(self, event: str, *facts: Any) -> None:
        """
        Tell the observers of an event, by the name of the method of `ILimiterObserver`.
        """
        for observer in self._observers:
            try:
                getattr(observer, event)(self, *facts)
            except Exception:
                self._log.failure("{observer} failed to observe {event}", observer=observer, event=event)


def _checked_clock(clock: object) -> IReactorTime:
    if not (hasattr(clock, "seconds") and hasattr(clock, "callLater")):
        raise TypeError(f"clock must provide IReactorTime, as the reactor and task.Clock do, not {clock!r}")
    return clock  # type: ignore[return-value]
