"""
Waiting for active connections to end, and ending what is left in time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from connlimit.interfaces import IConnection
from connlimit.observers import LimiterObserver

if TYPE_CHECKING:
    from connlimit._limiter import Limiter


class Drain(LimiterObserver):
    """
    One wait for a set of active connections.
    """

    _log = Logger()

    def __init__(self, limiter: Limiter, remaining: set[IConnection]) -> None:
        self._limiter = limiter
        self._remaining = remaining
        self._timer: IDelayedCall | None = None
        self._done: Deferred[None] = Deferred()

    def run(self, timeout: float | None) -> Deferred[None]:
        """
        Start.

        :param timeout: seconds until the remaining connections are aborted; None for never.
        :return: fires when all have finished.
        """
        self._limiter.add_observer(self)
        if timeout is not None and self._remaining:
            self._timer = self._limiter.clock.callLater(timeout, self._abort_remaining)
        self._check()
        return self._done

    def finished(self, limiter: Limiter, connection: IConnection) -> None:
        """
        See `ILimiterObserver.finished`.
        """
        self._remaining.discard(connection)
        self._check()

    def _check(self) -> None:
        if self._remaining:
            return
        self._limiter.remove_observer(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._done.callback(None)

    def _abort_remaining(self) -> None:
        self._timer = None
        self._log.warn(
            "{limiter}: {count} connections did not end in time and are aborted",
            limiter=self._limiter.name,
            count=len(self._remaining),
        )
        for connection in list(self._remaining):
            connection.abort()
