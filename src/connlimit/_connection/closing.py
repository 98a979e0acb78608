"""
Closing a connection in good order, as long as anything moves on it, and ending it when nothing does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from connlimit._system import sockets

#: Seconds within which something must move on a connection that is being closed.
QUIET = 5.0

#: Seconds that closing may take in all, however much moves.
MAX = 30.0

_LOOKS = 4  # within the time in which something must move


class Patience:
    """
    Waits as long as bytes move on a connection, but not longer than some time in all, and gives up then.
    """

    def __init__(
        self,
        transport: Any,
        clock: IReactorTime,
        give_up: Callable[[], None],
        quiet: float,
        maximum: float,
        pause: Callable[[], None] | None = None,
    ) -> None:
        """
        :param transport: that of the connection.
        :param give_up: called when nothing has moved for *quiet* seconds, or after *maximum* seconds.
        :param pause: called each time that nothing has moved for a part of *quiet*.
        """
        self._transport = transport
        self._clock = clock
        self._give_up = give_up
        self._quiet = quiet
        self._began = self._moved = clock.seconds()
        self._maximum = maximum
        self._pause = pause
        self._state = sockets.progress(transport)
        self._timer: IDelayedCall | None = clock.callLater(quiet / _LOOKS, self._look)

    def stop(self) -> None:
        """
        The connection is over.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        now, state = self._clock.seconds(), sockets.progress(self._transport)
        if state != self._state:
            self._state, self._moved = state, now
        if now - self._moved >= self._quiet or now - self._began >= self._maximum:
            self._timer = None
            self._give_up()
            return
        self._timer = self._clock.callLater(self._quiet / _LOOKS, self._look)
        if self._pause is not None and self._moved != now:
            self._pause()
