"""
One timer for everybody who waits: who has waited too long, who is due a notice, and when the next audit is.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Protocol

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from connlimit._limiter.queue import Queue, Ranked
from connlimit._limiter.settings import Settings
from connlimit._system.bounded_log import BoundedLog
from connlimit.interfaces import FULL, TIMEOUT, IConnection, IOccupant

#: Seconds between two audits.
AUDIT_INTERVAL = 1.0

#: Seconds between two looks at who has waited too long, at the least.
_LEAST_DELAY = 0.01

#: How many who wait are refused at once when waiting is useless, before others have their turn.
_REFUSED_AT_ONCE = 100


class Acts(Protocol):
    """
    What is done when it is time.
    """

    def refuse(self, connection: IOccupant, reason: str) -> None:
        """
        Take a connection out of the queue, and refuse it.
        """

    def audit(self) -> None:
        """
        Look for slots whose holders are dead or idle, and for limits that work again.
        """

    def is_waiting_useless(self) -> bool:
        """
        Whether all who wait are to be refused.
        """

    def serve_queue(self) -> None:
        """
        Serve those who wait as far as there is room.
        """


class Deadlines:
    """
    One timer serves the whole queue: it is set for the one that is due first, and is not moved when that one
    leaves earlier; it then finds out and is set for the next. Another one, for the audit, runs while somebody
    waits or there is a drain. Otherwise there is no timer.
    """

    __slots__ = (
        "_acts",
        "_audit_due",
        "_audit_timer",
        "_clock",
        "_drains",
        "_log",
        "_notice",
        "_own",
        "_queue",
        "_refusal_timer",
        "_timeout",
        "_timer",
        "_unnotified",
    )

    def __init__(
        self, queue: Queue, settings: Settings, clock: IReactorTime, log: BoundedLog, acts: Acts
    ) -> None:
        self._queue = queue
        self._clock = clock
        self._log = log
        self._acts = acts
        self._timeout = settings.wait_timeout
        self._notice = settings.notice
        # Which connections wait and have not had the notice yet, if there is one, and since when.
        self._unnotified: OrderedDict[Any, float] = OrderedDict()
        # Who has a time-out of its own, by when that is.
        self._own: Ranked[IOccupant] = Ranked()
        self._drains = 0
        self._timer: IDelayedCall | None = None
        self._audit_timer: IDelayedCall | None = None
        self._audit_due = -math.inf
        self._refusal_timer: IDelayedCall | None = None

    def change(self, settings: Settings) -> None:
        """
        The settings, or the order of the queue, have changed. Looks at all who wait if there was no notice.
        """
        had_notice = self._notice is not None
        self._timeout = settings.wait_timeout
        self._notice = settings.notice
        if self._notice is None:
            self._unnotified.clear()
        elif not had_notice:
            waiting = (each for each in self._queue if IConnection.providedBy(each))
            self._unnotified.update((each, self._queue.arrival(each)) for each in waiting)
        self._stop()
        self._start()

    def joined(self, connection: IOccupant, now: float) -> None:
        """
        A connection has joined the queue.
        """
        if self._notice is not None and IConnection.providedBy(connection):
            self._unnotified[connection] = now
        self._start()

    def give_up(self, occupant: IOccupant, due: float) -> None:
        """
        Refuse one who has joined the queue at this time, if it still waits then.
        """
        self._own.add(occupant, due)
        self._start()

    def left(self, connection: IOccupant) -> None:
        """
        A connection has left the queue.
        """
        if self._own and connection in self._own:
            self._own.remove(connection)
        if self._unnotified:
            self._unnotified.pop(connection, None)
        if not (self._queue.order or self._queue):
            self._stop()
            if self._drains:
                self._start()

    def drain_begins(self) -> None:
        """
        Somebody waits for those who are active.
        """
        self._drains += 1
        self._start()

    def drain_ends(self) -> None:
        """
        Somebody does so no longer.
        """
        self._drains -= 1
        if not (self._drains or self._queue):
            self._stop()

    def _start(self, at_least: float = 0.0) -> None:
        """
        Set the timers, as far as they are needed and not set for an earlier time.

        :param at_least: seconds before the queue is looked at again, whatever the order says.
        """
        if self._audit_timer is None and (self._queue or self._drains):
            now = self._clock.seconds()
            # An audit that is due stays due, however often the queue is empty meanwhile.
            if not now - AUDIT_INTERVAL <= self._audit_due <= now + AUDIT_INTERVAL:
                self._audit_due = now + AUDIT_INTERVAL
            self._audit_timer = self._clock.callLater(max(0.0, self._audit_due - now), self._audit)
        if not self._queue:
            return
        due = self._due()
        if due is None:
            return
        if self._timer is not None:
            if self._timer.getTime() <= due:
                return
            self._timer.cancel()
        delay = max(at_least, due - self._clock.seconds())
        self._timer = self._clock.callLater(delay, self._time_over)

    def _due(self) -> float | None:
        """
        When there is something to do for somebody who waits, at the earliest.
        """
        queue = self._queue
        times = [queue.order.expires() if queue.order else None]
        if self._timeout is not None:
            times.append(queue.oldest()[1] + self._timeout)
        if self._own:
            times.append(self._own.rank(self._own.first()))
        if self._notice is not None and self._unnotified:
            times.append(next(iter(self._unnotified.values())) + self._notice[0])
        return min((time for time in times if time is not None), default=None)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._audit_timer is not None:
            self._audit_timer.cancel()
            self._audit_timer = None
        if self._refusal_timer is not None:
            self._refusal_timer.cancel()
            self._refusal_timer = None

    def _time_over(self) -> None:
        self._timer = None
        queue, now, timeout = self._queue, self._clock.seconds(), self._timeout
        while queue:
            connection = queue.expired(now)
            if connection is None:
                connection, arrived = queue.oldest()
                if timeout is None or arrived + timeout > now:
                    break
            self._acts.refuse(connection, TIMEOUT)
        own = self._own
        while own and own.rank(first := own.first()) <= now:
            self._acts.refuse(first, TIMEOUT)
        if self._notice is not None:
            self._give_notice(now, *self._notice)
        self._start(_LEAST_DELAY)
        self._acts.serve_queue()

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

    def _audit(self) -> None:
        self._audit_timer = None
        self._audit_due = self._clock.seconds() + AUDIT_INTERVAL
        self._acts.audit()
        self._start()
        if self._refusal_timer is None:
            self._refuse_if_useless()

    def _refuse_if_useless(self) -> None:
        """
        Refuse those who wait as long as waiting is useless, longest waiting first, and let others have their
        turn now and then.
        """
        self._refusal_timer = None
        for _ in range(_REFUSED_AT_ONCE):
            if not self._queue or not self._acts.is_waiting_useless():
                return
            self._acts.refuse(self._queue.oldest()[0], FULL)
        if self._queue and self._refusal_timer is None:
            self._refusal_timer = self._clock.callLater(0, self._refuse_if_useless)
