"""
Waiting for active connections to end, and closing what is left in time.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakSet

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from connlimit.interfaces import IConnection, ILimiter, IOccupant, IRefusing
from connlimit.observers import LimiterObserver

_LOOK_INTERVAL = 1.0  # seconds

#: Seconds after which a connection on which nothing moves, and whose client did not speak last, is at rest.
REST = 5.0


class Drain(LimiterObserver):
    """
    One wait for a set of active occupants, and for refusals that are being said.

    Connections that are at rest are closed at once, and those that come to rest meanwhile within a second.
    They are held weakly: one that its application has forgotten must be free to be collected.
    """

    _log = Logger(namespace="connlimit.limiter")

    def __init__(
        self, limiter: ILimiter, remaining: Iterable[IOccupant], refusals: Iterable[IRefusing]
    ) -> None:
        self._limiter = limiter
        self._remaining = WeakSet(remaining)
        self._refusals = set(refusals)
        self._quiet: float | None = None
        self._timer: IDelayedCall | None = None
        self._look_timer: IDelayedCall | None = None
        self._aborted = 0
        self._done: Deferred[None] = Deferred(lambda done: self._stop())

    def run(self, timeout: float | None) -> Deferred[None]:
        """
        Start.

        :param timeout: seconds until the remaining connections are closed; None for never.
        :return: fires when all have finished, and all refusals are said.
        """
        self._limiter.add_observer(self)
        if timeout is not None:
            self._quiet = REST
            if self._remaining:
                self._timer = self._limiter.clock.callLater(timeout, self._close_remaining)
        for refusal in list(self._refusals):
            refusal.said().addCallback(self._was_said, refusal)
        self._look()
        return self._done

    def finished(self, limiter: ILimiter, connection: IOccupant) -> None:
        self._remaining.discard(connection)
        self._check()

    def _was_said(self, result: None, refusal: IRefusing) -> None:
        self._refusals.discard(refusal)
        self._check()

    def _check(self) -> None:
        if self._remaining or self._refusals or self._done.called:
            return
        self._stop()
        if self._aborted:
            self._log.warn(
                "{limiter}: {count} of the connections that were closed took too long and were aborted",
                limiter=self._limiter.name,
                count=self._aborted,
            )
        self._done.callback(None)

    def _stop(self) -> None:
        self._limiter.remove_observer(self)
        for timer in (self._timer, self._look_timer):
            if timer is not None and timer.active():
                timer.cancel()

    def _look(self) -> None:
        """
        Close those who are at rest.
        """
        for connection in list(self._remaining):
            if IConnection.providedBy(connection) and connection.is_at_rest(self._quiet):
                connection.close(self._gave_up)
        self._check()
        if not self._done.called:
            self._look_timer = self._limiter.clock.callLater(_LOOK_INTERVAL, self._look)

    def _close_remaining(self) -> None:
        self._log.warn(
            "{limiter}: {count} connections did not end in time and are closed",
            limiter=self._limiter.name,
            count=len(self._remaining),
        )
        for occupant in list(self._remaining):
            if IConnection.providedBy(occupant):
                occupant.close(self._gave_up)
            else:
                occupant.abort()

    def _gave_up(self) -> None:
        self._aborted += 1
