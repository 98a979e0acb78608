"""
Admission: which occupants are served, which wait in the queue, and which are refused.

This module does no I/O. Nothing else changes an occupant's state:

    new --serve_at_once------------------> active --finish / reclaim--> over
     |---wait--> waiting --a slot frees-----^                             ^
     |             '---depart / refuse -----------------------------------|
     '---may_wait: the queue is full -------------------------------------'

Three rules hold between any two events: (1) no more are active than the limits allow (lowering a limit ends
nobody); (2) no slot is free while somebody who could have it waits; (3) a newcomer never overtakes the queue,
except as its discipline says. The exempt stand outside: they are served at once, and take no slot.

Rule 2 has one enforcer: whatever may have made room ends in `serve_queue`, a loop that serves until there is
no room or nobody is left. Serving one can end it, and others, before ``serve`` returns; such a nested call
returns at once and the running loop looks again. So nothing recurses.

One whose own key is full steps aside and is called back when its key has room; a call that it cannot use goes
to the next. So each event moves few occupants, however many stand aside. One that takes several slots holds
up those behind it until these are free, or it would never be served.

Ends may be reported twice, in any order, or by the garbage collector: in any other state they do nothing. The
queue holds its occupants strongly, because a paused transport is in no reactor; active ones are held weakly,
because a transport that its application dropped must be free to be collected, and its slot with it.

What users write (a limit, a key, an order, a notice, an observer, who is exempt) may raise at any call. It is
logged, the occupant is treated as `connlimit.interfaces` says, and everybody else as ever.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, Protocol
from weakref import ref

import attrs
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IReactorTime

from connlimit._limiter import effective_limits
from connlimit._limiter.audience import Audience
from connlimit._limiter.deadlines import AUDIT_INTERVAL, Deadlines
from connlimit._limiter.drain import Drain
from connlimit._limiter.dry_run import DryRun
from connlimit._limiter.effective_limits import EffectiveLimits
from connlimit._limiter.peers import peer_key
from connlimit._limiter.queue import Keys, Queue, new_order
from connlimit._limiter.settings import Settings
from connlimit._limiter.slots import Demand, Slots
from connlimit._system.bounded_log import BoundedLog
from connlimit._system.clock import ReactorClock
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
    IOccupant,
    IPort,
    IRefusing,
)
from connlimit.limits import PerPeer

_RATE_WINDOW = 10.0  # seconds

#: The settings that the order of the queue, the deadlines and the departures depend on.
_OF_THE_ORDER = {"order", "peer_prefix", "adaptive_target", "adaptive_interval"}
_OF_THE_DEADLINES = {"wait_timeout", "notice", "order", "adaptive_target", "adaptive_interval"}
_OF_DEPARTURES = {"departed_on_half_close", "refusal"}


@attrs.define
class Counts:
    """
    What has happened to connections so far, as `connlimit.interfaces.Snapshot` has it.
    """

    accepted: int = 0
    finished: int = 0
    departed: int = 0
    refused: dict[str, int] = attrs.Factory(lambda: dict.fromkeys(REASONS, 0))
    waits: int = 0
    wait_seconds: float = 0.0
    reclaimed: int = 0
    idle_closed: int = 0
    exempted: int = 0


class Budget(Protocol):
    """
    What the connections may take of the process's descriptors.

    :ivar is_tight: whether there is something to find out before somebody is served.
    :ivar opens: how many are opened for each connection that is served, besides its own.
    """

    is_tight: bool
    opens: int

    def may_serve(self) -> bool:
        """
        Whether one more may be served.
        """

    def may_serve_exempt(self) -> bool:
        """
        Whether one more may be served that is exempt.
        """

    def may_wait(self, slots: float) -> bool:
        """
        Whether one more may wait.

        :param slots: how many more could be served at once.
        """


class _NoBudget:
    """
    Connections without sockets, as far as we know, take nothing of the process.
    """

    def __init__(self) -> None:
        self.is_tight = False
        self.opens = 0

    def may_serve(self) -> bool:
        return True

    def may_serve_exempt(self) -> bool:
        return True

    def may_wait(self, slots: float) -> bool:
        return True


class Admission:
    """
    What factories and protocols tell a limiter, and those who stop them.

    :ivar settings: the settings in force.
    :ivar clock: where the time comes from.
    :ivar limits: the limits in force.
    :ivar queue: who waits.
    :ivar slots: who is active.
    :ivar counts: what has happened so far.
    :ivar budget: what the connections may take of the process's descriptors.
    :ivar refusals: the refusals that are being said to its clients.
    :ivar is_draining: whether nobody is served any more.
    :ivar dry_run: in a dry run, finds out what would have happened.
    """

    __slots__ = (
        "_active",
        "_closing",
        "_deadlines",
        "_exempt",
        "_further",
        "_is_exempt",
        "_is_serving",
        "_log",
        "_looks_again",
        "_lost",
        "_maximum",
        "_on_collection",
        "_order",
        "_ports",
        "_release_marks",
        "_returned",
        "_served_at",
        "_weights",
        "audience",
        "budget",
        "clock",
        "counts",
        "dry_run",
        "is_draining",
        "limits",
        "queue",
        "refusals",
        "settings",
        "slots",
    )

    def __init__(
        self,
        settings: Settings,
        limits: Iterable[ILimit],
        clock: IReactorTime,
        audience: Audience,
        log: BoundedLog,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.audience = audience
        self._log = log
        self.limits = EffectiveLimits(limits, settings, clock, log, self.serve_queue)
        self.queue = Queue(new_order(settings, self.limits.peer), self.limits.has_room_for)
        self.slots = Slots()
        self.slots.keep_times(settings.idle_timeout is not None, clock.seconds())
        self._deadlines = Deadlines(self.queue, settings, clock, log, self)
        self._is_exempt = settings.exempt
        # Who waits for several slots, and for how many more than one.
        self._weights: dict[IOccupant, int] = {}
        self._is_serving = False
        self._looks_again = False
        self.counts = Counts()
        # Of how many had finished when, to tell the rate of releases.
        self._release_marks = ((-math.inf, 0), (-math.inf, 0))
        self.budget: Budget = _NoBudget()
        self._ports: list[IPort] = []
        self.refusals: set[IRefusing] = set()
        self.is_draining = False
        self.dry_run: DryRun | None = None
        self._bind()

    def _bind(self) -> None:
        """
        Have at hand what every connection needs of the slots, the queue and the limits.
        """
        slots = self.slots
        self._active, self._exempt, self._lost = slots.active, slots.exempt, slots.lost
        self._closing, self._served_at, self._on_collection = (
            slots.closing,
            slots.served_at,
            slots.on_collection,
        )
        self._order, self._returned = self.queue.order, self.queue.returned
        self._maximum, self._further = self.limits.maximum - slots.extra, self.limits.further

    def subscribe(self) -> None:
        """
        Hear when the further limits may have room. They may call back at once.
        """
        for limit in self.limits.given:
            if isinstance(limit, PerPeer):
                limit.subscribe_key(partial(self._key_may_have_room, limit))
            limit.subscribe(partial(self._may_have_room, limit))

    # What happens to connections, told by the factories and protocols. Every connection passes the first two
    # of these, so they do themselves what the slots could do for them.

    def serve_at_once(self, connection: IOccupant) -> bool:
        """
        Give a new connection a slot, if there is room and nobody waits.
        """
        if self._lost:
            self.reclaim_lost()
        if self._is_exempt is not None and self._serve_exempt(connection):
            return True
        if (
            len(self._active) - len(self._exempt) >= self._maximum
            or self._order
            or self._returned
            or self.is_draining
            or (self.budget.is_tight and not self.budget.may_serve())
            or (self._further is not None and not self._further.try_acquire(connection))
        ):
            return False
        self.counts.accepted += 1
        connection.slot = slot = ref(connection, self._on_collection)
        self._active[slot] = connection.address
        if self._served_at is not None:
            self._served_at[slot] = self.clock.seconds()
        if self.audience.of_served:
            self.audience.tell("served", connection, 0.0)
        return True

    def finish(self, connection: IOccupant) -> None:
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
            self.counts.finished += 1
            if self._further is not None:
                if self.queue.has_aside:
                    keys = self.limits.keys(connection)
                self._further.release(connection)
        if self.audience.of_finished:
            self.audience.tell("finished", connection)
        for key in keys:
            self.queue.call_back(key)
        if self._order or self._returned:
            self.serve_queue()

    def may_wait(self, connection: IOccupant) -> str | None:
        """
        Whether a new connection may wait. If not, it is refused by this.

        :return: None, or the reason of the refusal.
        """
        reason = self._no_place(connection)
        if reason is not None:
            self.counts.accepted += 1
            self._count_refused(connection, reason)
        return reason

    def serve_heavy_at_once(self, occupant: IOccupant, weight: int) -> bool:
        """
        Give a new occupant *weight* slots, if there is room and nobody waits.
        """
        slots, extra = self.slots, weight - 1
        # What it needs besides one slot is set aside while it is asked whether it gets that.
        slots.extra += extra
        self._maximum = self.limits.maximum - slots.extra
        is_served = self.serve_at_once(occupant)
        slots.extra -= extra
        self._maximum = self.limits.maximum - slots.extra
        if is_served and occupant.slot is not None and occupant.slot not in slots.exempt:
            self._weigh(occupant.slot, extra)
        elif is_served:
            self.serve_queue()
        return is_served

    def finish_heavy(self, occupant: IOccupant) -> None:
        """
        An occupant that may hold several slots is over.
        """
        if occupant.slot is not None:
            self._lighten(occupant.slot)
            self.finish(occupant)

    def wait(self, connection: IOccupant, timeout: float | None = None, weight: int = 1) -> None:
        """
        Put a new connection, or another occupant, into the queue.

        :param timeout: seconds that it waits at the most, whatever others do; None for no such limit.
        :param weight: for how many slots.
        """
        self.counts.accepted += 1
        reason = self._no_place(connection)
        if reason is not None:
            self._refuse(connection, reason)
            return
        now = self.clock.seconds()
        self.queue.add(connection, now)
        if weight > 1:
            self._weights[connection] = weight - 1
        self._deadlines.joined(connection, now)
        if timeout is not None:
            self._deadlines.give_up(connection, now + timeout)
        if self.audience.everybody:
            self.audience.tell("waiting", connection)
        self.serve_queue()
        if timeout is not None and timeout <= 0 and connection in self.queue:
            self.refuse(connection, TIMEOUT)
            self.serve_queue()

    def depart(self, connection: IOccupant) -> None:
        """
        The client of a waiting connection went away.
        """
        if connection not in self.queue:
            return
        waited = self._leave_queue(connection)
        self.counts.departed += 1
        if self.audience.everybody:
            self.audience.tell("departed", connection, waited)
        self.serve_queue()

    def reclaim(self, connection: IOccupant, why: str) -> None:
        """
        The socket of an active connection is gone, but its protocol was not told.

        :param why: how that came, for the log.
        """
        if connection.slot is None:
            return
        self.counts.reclaimed += 1
        self._log.warn(
            "{limiter}: the slot of {peer} is reclaimed: {why}",
            limiter=self.settings.name,
            peer=connection.address,
            why=why,
        )
        if self.slots.heavy:
            self._lighten(connection.slot)
        self.finish(connection)

    def reclaim_lost(self) -> None:
        """
        Free the slots of those that were lost to garbage collection.
        """
        for remains in self.slots.take_lost():
            self.reclaim(remains, "its holder was forgotten, and garbage")

    # What can be asked

    @property
    def needs_peers(self) -> bool:
        """
        Whether it matters who a connection's peer is.
        """
        settings = self.settings
        return bool(
            settings.max_per_peer is not None
            or settings.exempt is not None
            or self.limits.given
            or self.queue.order.needs_peers
        )

    def has_room(self) -> bool:
        """
        Whether a newcomer would be served at once, as far as that does not depend on its peer.
        """
        return (
            not (self._order or self._returned or self.is_draining)
            and self.slots.taken < self.limits.maximum
            and self.budget.may_serve()
        )

    def has_place(self) -> bool:
        """
        Whether a newcomer would be served or could wait, as far as that does not depend on its peer.
        """
        if self.is_draining:
            return False
        if self.has_room():
            return True
        maximum = self.settings.max_waiting
        return (maximum is None or len(self.queue) < maximum) and self._has_descriptors()

    def active_for(self, factory: object) -> list[Any]:
        """
        The active occupants of a factory, connections if it is one of connections. Looks at all of them.
        """
        return [each for each in self.slots.occupants() if each.factory is factory]

    def waiting_for(self, factory: object) -> list[Any]:
        """
        The waiting occupants of a factory, longest waiting first. Looks at all who wait.
        """
        return [each for each in self.queue if each.factory is factory]

    def retry_after(self) -> float:
        """
        Seconds after which a newcomer would be served, by the rate of the last releases: between 1 and 3600.
        """
        now = self.clock.seconds()
        (since, finished), (last, _) = self._release_marks
        if not 0 <= now - last <= _RATE_WINDOW:
            self._release_marks = self._release_marks[1], (now, self.counts.finished)
        released = self.counts.finished - finished
        if not released or since == -math.inf or now <= since:
            return 1.0
        return min(max((len(self.queue) + 1) * (now - since) / released, 1.0), 3600.0)

    # Ports, and the end

    def run_in(self, reactor: Any) -> None:
        """
        Let timers run in this reactor, unless a clock was given or it is known already where they run.
        """
        if isinstance(self.clock, ReactorClock):
            self.clock.run_in(reactor)

    def add_port(self, port: IPort) -> None:
        """
        Count the backlog of a port as long as that listens, and close it with the others.
        """
        self._ports.append(port)

    def backlog(self) -> int | None:
        """
        How many connections the ports have not accepted yet; None if there is no telling.
        """
        self._ports = [port for port in self._ports if port.is_listening()]
        known = [backlog for port in self._ports if (backlog := port.backlog()) is not None]
        return sum(known) if known else None

    def stop_listening(self) -> list[Deferred[Any]]:
        """
        Close the ports.
        """
        return [maybeDeferred(port.stop_listening) for port in self._ports if port.is_listening()]

    def refuse_all(self) -> None:
        """
        Refuse newcomers and the queue from now on, and leave the active connections alone.
        """
        if not self.is_draining and self.dry_run is not None:
            self.dry_run.report()
        self.is_draining = True
        self.refuse_waiting(self.queue)

    def refuse_waiting(self, connections: Iterable[IOccupant]) -> None:
        """
        Refuse those of the connections that wait, because their server is being stopped.
        """
        # All leave the queue before the first is told, so that the end of one does not bring another's turn.
        waiting = [each for each in connections if each in self.queue]
        for connection in waiting:
            self._leave_queue(connection)
        for connection in waiting:
            self._refuse(connection, DRAINING)
        self.serve_queue()

    def wait_for(self, connections: Iterable[IOccupant], timeout: float | None) -> Deferred[None]:
        """
        Wait until all of the connections that are active have finished, and those who were refused have been
        told, and close what is left then.

        :param timeout: seconds until they are closed; None waits as long as it takes.
        """
        active = [each for each in connections if each.slot is not None]
        self._deadlines.drain_begins()
        return Drain(self.audience.limiter, active, self.refusals).run(timeout).addBoth(self._drained)

    def _drained(self, result: Any) -> Any:
        self._deadlines.drain_ends()
        return result

    # Settings

    def change(self, settings: Settings, changed: AbstractSet[str]) -> None:
        """
        Have other settings. Nobody moves yet: see `take_effect`.

        :param changed: the names of those that have changed.
        :raises Exception: if an order of the user's own cannot be made; nothing has changed then.
        """
        peer = peer_key(settings.peer_prefix) if "peer_prefix" in changed else self.limits.peer
        order = new_order(settings, peer) if _OF_THE_ORDER & changed else None
        self.settings = settings
        self._is_exempt = settings.exempt
        if order is not None:
            self.queue.reorder(order)
        if effective_limits.SETTINGS & changed:
            self.limits.change(settings, changed, peer, self.slots.addresses())
            # Those who stand aside do so with their keys of the limits that were.
            self.queue.call_all_back()
        if "idle_timeout" in changed:
            self.slots.keep_times(settings.idle_timeout is not None, self.clock.seconds())
        self._bind()
        if _OF_THE_DEADLINES & changed:
            self._deadlines.change(settings)

    def take_effect(self, changed: AbstractSet[str]) -> None:
        """
        See to those who are served or refused by settings that have changed.
        """
        if "exempt" in changed and self._is_exempt is not None:
            self._serve_exempt_waiting()
        if _OF_DEPARTURES & changed:
            for connection in list(self.queue):
                if IConnection.providedBy(connection):
                    connection.reconsider()
        self._may_have_room()

    # How it is done

    def serve_queue(self) -> None:
        """
        Serve those who wait as far as there is room.
        """
        if self._is_serving:
            self._looks_again = True
            return
        self._is_serving = True
        try:
            while self._order or self._returned:
                self._looks_again = False
                # A limit may have called while it was asked: then it is asked once more.
                if not self._serve_next() and not (self._looks_again and self._serve_next()):
                    break
        finally:
            self._is_serving = False

    def _serve_next(self) -> bool:
        """
        Serve whose turn it is, if there is room; return False if there is none.

        In a frame of its own: a traceback from below, if somebody keeps it, keeps the connection that
        failed and not one that was served later.
        """
        if len(self._active) - len(self._exempt) >= self._maximum or (
            self.budget.opens and not self.budget.may_serve()
        ):
            return False
        now = self.clock.seconds()
        connection = self.queue.next(now)
        extra = self._weights.get(connection, 0) if self._weights else 0
        if extra and self.slots.taken + extra >= self.limits.maximum:
            return self._let_pass_heavy(connection, extra)
        if self._further is not None and not self._further.try_acquire(connection):
            return self._let_others_pass(connection)
        waited = self._leave_queue(connection)
        self.counts.waits += 1
        self.counts.wait_seconds += waited
        self.slots.take(connection, now)
        if extra:
            self._weigh(connection.slot, extra)
        if self.audience.of_served:
            self.audience.tell("served", connection, waited)
        connection.serve()
        return True

    def _let_pass_heavy(self, occupant: IOccupant, extra: int) -> bool:
        """
        Take one that needs more slots than are free out of the others' way, if it is its own key that has no
        room, or if it needs more than there are at all. Otherwise nobody overtakes it.

        :return: whether it was.
        """
        if extra >= self.limits.maximum:
            self.refuse(occupant, FULL)
            return True
        return self._let_others_pass(occupant, was_asked=False)

    def _weigh(self, slot: ref[IOccupant], extra: int) -> None:
        """
        One that has just got a slot takes *extra* more.
        """
        self.slots.heavy[slot] = extra
        self.slots.extra += extra
        self._maximum = self.limits.maximum - self.slots.extra

    def _lighten(self, slot: ref[IOccupant]) -> None:
        """
        One that is over gives back what it took besides its slot.
        """
        self.slots.extra -= self.slots.heavy.pop(slot, 0)
        self._maximum = self.limits.maximum - self.slots.extra

    def _let_others_pass(self, connection: IOccupant, was_asked: bool = True) -> bool:
        """
        Take the connection out of the others' way, if it is its own key that has no room.

        :param was_asked: whether a slot was asked for.
        :return: whether it was.
        """
        if self.settings.over_peer == "refuse" and self.limits.is_at_cap(connection):
            self.refuse(connection, PEER)
            return True
        aside = self.limits.aside_for(connection, was_asked)
        if aside is None:
            return False
        self.queue.step_aside(connection, *aside)
        return True

    def _leave_queue(self, connection: IOccupant) -> float:
        """
        Take a waiting connection out of the queue.

        :return: how many seconds it has waited.
        """
        waited = max(0.0, self.clock.seconds() - self.queue.remove(connection))
        self._deadlines.left(connection)
        if self._weights:
            self._weights.pop(connection, None)
        return waited

    def _may_have_room(self, limit: ILimit | None = None) -> None:
        """
        A limit tells that there may be room, or, without one, anything may have changed.
        """
        if limit is None or self.limits.makes_stand_aside(limit):
            self.queue.call_all_back()
        self.serve_queue()

    def _key_may_have_room(self, limit: IKeyedLimit, key: Hashable) -> None:
        """
        A limit tells that there may be room for one more of a key.
        """
        self.queue.call_back(self.limits.key_of(limit, key))
        self.serve_queue()

    def _serve_exempt_waiting(self) -> None:
        """
        Serve those who wait and are exempt now. Looks at all who wait.
        """
        for connection in list(self.queue):
            if connection in self.queue and self._serve_exempt(connection):
                self._leave_queue(connection)
                self.counts.accepted -= 1  # the exempt are counted apart
                connection.serve()

    def _serve_exempt(self, connection: IOccupant) -> bool:
        """
        Serve the connection without a slot, if it is exempt.
        """
        try:
            if (
                self.is_draining
                or not self._is_exempt(connection.address)
                or not self.budget.may_serve_exempt()
            ):
                return False
        except Exception:
            self._log.failure(
                "{exempt} failed to say whether a peer is exempt; it is not", exempt=self._is_exempt
            )
            return False
        self.slots.exempt.add(self.slots.take(connection, self.clock.seconds()))
        self.counts.exempted += 1
        if self.audience.everybody:
            self.audience.tell("exempted", connection)
        return True

    def _no_place(self, connection: IOccupant) -> str | None:
        """
        Why the connection may not wait, or None if it may.
        """
        if self.is_draining:
            return DRAINING
        settings = self.settings
        if settings.over_peer == "refuse" and self.limits.is_at_cap(connection):
            return PEER
        if self.limits.refusing and self.limits.is_waiting_useless():
            return FULL
        maximum = settings.max_waiting
        if maximum is not None and len(self.queue) >= maximum:
            return FULL
        # Only of a connection a descriptor is held while it waits.
        if not self._has_descriptors() and IConnection.providedBy(connection):
            return DESCRIPTORS
        return None

    def _has_descriptors(self) -> bool:
        """
        Whether one more may wait, as far as the process's descriptors allow.
        """
        return self.budget.may_wait(max(0.0, self.limits.maximum - self.slots.count()))

    def _refuse(self, connection: IOccupant, reason: str) -> None:
        self._count_refused(connection, reason)
        connection.refuse(reason)

    def _count_refused(self, connection: IOccupant, reason: str) -> None:
        self.counts.refused[reason] += 1
        if self.audience.everybody:
            self.audience.tell("refused", connection, reason)

    # What the deadlines have done

    def refuse(self, connection: IOccupant, reason: str) -> None:
        """
        Refuse one who waits.
        """
        self._leave_queue(connection)
        self._refuse(connection, reason)

    def is_waiting_useless(self) -> bool:
        """
        Whether a limit says that nobody is to wait.
        """
        return self.limits.is_waiting_useless()

    def audit(self) -> None:
        """
        Free the slots of active connections whose sockets are gone, and of those that are idle.
        """
        self.reclaim_lost()
        active = self.slots.connections()
        for connection in active:
            if connection.is_dead():
                connection.abort()
                self.reclaim(connection, "its socket is gone or was reset, and it did not notice")
        for key in self.limits.failed_keys():
            self.queue.call_back(key)
        self.serve_queue()
        timeout = self.settings.idle_timeout
        if timeout is not None:
            closed = self.slots.close_idle(active, timeout, self.clock.seconds(), self._demand())
            self.counts.idle_closed += closed

    def _demand(self) -> Demand:
        """
        Of how many slots those who wait could make use now.
        """
        slots, limits = self.slots, self.limits
        below = self.queue.aside()
        ready = self.queue.ready
        if slots.taken < limits.maximum and self.budget.may_serve() and limits.lacks_rate():
            ready = 0  # slots are there
        if ready and limits.maximum < math.inf:
            ready += max(0, slots.taken - int(limits.maximum))
        soon = limits.rate_within(AUDIT_INTERVAL)
        if soon is not None:
            ready = min(ready, soon)
            below = {key: min(count, soon) for key, count in below.items()}
        return Demand(ready, below, limits.keys)
