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

``depart`` and ``finish`` in any other state do nothing, so a connection may report its end twice.

Whatever may have made room (a release, a departure, a refusal, a raised limit) ends in
``_serve_waiting``, which serves the line until there is no room or nobody waits. Serving one
connection can end it, and others, before ``serve`` returns; such a nested call only returns,
and the loop that is already running looks again. So nothing recurses, however long the line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from connlimit import _descriptors
from connlimit._drain import Drain
from connlimit._line import Fifo
from connlimit._settings import Settings, adjustable
from connlimit.interfaces import IConnection, ILimit, ILimiterObserver
from connlimit.limits import All, Total
from connlimit.refusals import DESCRIPTORS, DRAINING, FULL, REASONS, TIMEOUT


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
    draining: bool


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

        self._active: set[IConnection] = set()
        self._line = Fifo()
        self._timer: IDelayedCall | None = None
        self._serving = False
        self._draining = False
        self._observers: tuple[ILimiterObserver, ...] = tuple(observers)

        self._accepted = 0
        self._finished = 0
        self._departed = 0
        self._refused = dict.fromkeys(REASONS, 0)
        self._waits = 0
        self._wait_seconds = 0.0

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
        return len(self._active)

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
            draining=self._draining,
        )

    def active_for(self, factory: object) -> list[IConnection]:
        """
        The active connections that a factory serves. Looks at all of them.
        """
        return [each for each in self._active if each.factory is factory]

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
        self._stop_timer()
        for connection in list(self._line):
            self._line.add(connection, self._line.remove(connection) + shift)
        self._clock = clock
        self._start_timer()

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
            self._stop_timer()
            self._start_timer()
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
        return self.wait_for(self._active, timeout)

    # What happens to connections, told by the factories and protocols

    def serve_at_once(self, connection: IConnection) -> bool:
        """
        Give a new connection a slot, if there is room and nobody waits.
        """
        if self._line or self._draining or not self._try_acquire(connection):
            return False
        self._accepted += 1
        self._active.add(connection)
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
        self._start_timer()
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
        try:
            self._active.remove(connection)
        except KeyError:
            return
        self._finished += 1
        self._release(connection)
        if self._observers:
            self._tell("finished", connection)
        if self._line:
            self._serve_waiting()

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
        return Drain(self, self._active.intersection(connections)).run(timeout)

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
            while self._line:
                connection = self._line.next()
                if not self._try_acquire(connection):
                    break
                waited = self._leave_line(connection)
                self._waits += 1
                self._wait_seconds += waited
                self._active.add(connection)
                if self._observers:
                    self._tell("served", connection, waited)
                connection.serve()
        finally:
            self._serving = False

    def _leave_line(self, connection: IConnection) -> float:
        """
        Take a waiting connection out of the line.

        :return: how many seconds it has waited.
        """
        waited = self.clock.seconds() - self._line.remove(connection)
        if not self._line:
            self._stop_timer()
        return waited

    def _refuse(self, connection: IConnection, reason: str) -> None:
        self._count_refused(connection, reason)
        connection.refuse(reason)

    def _count_refused(self, connection: IConnection, reason: str) -> None:
        self._refused[reason] += 1
        if self._observers:
            self._tell("refused", connection, reason)

    def _start_timer(self) -> None:
        """
        See to it that the first of the line is refused when its time is over.

        One timer serves the whole line: it is set for whoever has waited longest, and is not moved
        when that one leaves earlier; it then finds out and is set for the next.
        """
        timeout = self.settings.wait_timeout
        if self._timer is None and timeout is not None and self._line:
            _, arrived = self._line.oldest()
            delay = arrived + timeout - self.clock.seconds()
            self._timer = self.clock.callLater(max(0.0, delay), self._time_over)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_over(self) -> None:
        self._timer = None
        now, timeout = self.clock.seconds(), self.settings.wait_timeout
        while self._line and timeout is not None:
            connection, arrived = self._line.oldest()
            if arrived + timeout > now:
                break
            self._leave_line(connection)
            self._refuse(connection, TIMEOUT)
        self._start_timer()
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
