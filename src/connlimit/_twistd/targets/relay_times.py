"""
What relayed connections wait for, and for how long: bytes that move, and the last of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from connlimit._system.deadlines import Deadlines, Sweep
from connlimit._twistd.targets.relay_ends import End


class Times:
    """
    The time of one relay, and one timer for all its connections, which rests when there is none.
    """

    def __init__(self, clock: Any = None) -> None:
        """
        :param clock: where the time comes from; the reactor if not given.
        """
        self._clock = clock
        self._relayed = 0
        self._sweep: Sweep | None = None

    @property
    def clock(self) -> Any:
        """
        Where the time comes from.
        """
        if self._clock is None:
            from twisted.internet import reactor

            self._clock = reactor
        return self._clock

    def deadlines(self, seconds: float, call: Callable[[Any], object]) -> Deadlines[Any]:
        """
        Those of all its connections for which the same is called after the same time.
        """
        if self._sweep is None:
            self._sweep = Sweep(self.clock)
        return self._sweep.deadlines(seconds, call)

    def begin(self) -> None:
        """
        A connection is relayed.
        """
        self._relayed += 1

    def end(self) -> None:
        """
        A relayed connection is over on both sides.
        """
        self._relayed -= 1
        if self._relayed == 0 and self._sweep is not None:
            self._sweep.rest()


class Stall:
    """
    Calls when no byte has moved for some seconds.

    It looks four times in this time. The first look, after a second at the latest, is the one with which the
    others compare; nearly always all is over before.
    """

    _LOOKS = 4

    def __init__(
        self,
        times: Times,
        seconds: float,
        moved: Callable[[], object],
        call: Callable[[], None],
        first_look: Callable[[], None],
    ) -> None:
        """
        :param moved: differs from the last time if bytes have moved.
        :param first_look: is called at the first look.
        """
        self._times = times
        self._interval = seconds / self._LOOKS
        self._moved = moved
        self._call = call
        self._first_look = first_look
        self._left = 0
        self._last: object = None
        self._deadlines = times.deadlines(min(self._interval, 1.0), Stall._look_first)
        self._deadlines.add(self)

    def stop(self) -> None:
        """
        Do not call any more.
        """
        self._deadlines.discard(self)

    def _look_first(self) -> None:
        self._deadlines = self._times.deadlines(self._interval, Stall._look)
        self._deadlines.add(self)
        self._last = self._moved()
        self._left = self._LOOKS - (self._interval <= 1.0)
        self._first_look()

    def _look(self) -> None:
        self._deadlines.add(self)
        now = self._moved()
        if now != self._last:
            self._last = now
            self._left = self._LOOKS
            return
        self._left -= 1
        if self._left <= 0:
            self.stop()
            self._call()


class Delivery:
    """
    Resets a connection when its peer has got everything; others limit its time without us.
    """

    _MAX = 0.25  # seconds

    def __init__(self, clock: Any, end: End) -> None:
        self._clock = clock
        self._end = end
        self._look(0.005)

    def _look(self, interval: float) -> None:
        end = self._end
        if not end.connected:
            return
        if end.unsent():
            self._clock.callLater(interval, self._look, min(2 * interval, self._MAX))
        else:
            end.abort()
