"""
One timer for many who wait, each as long as others do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import inf
from typing import Any, Generic, TypeVar

from twisted.internet.interfaces import IDelayedCall

T = TypeVar("T")

#: Seconds: what is due so soon after something else is called with it.
_TOGETHER = 0.001


class Deadlines(Generic[T]):
    """
    Calls a function for each object some seconds after that was added, unless it is discarded before.

    As all wait equally long, they are due in the order in which they were added.
    """

    def __init__(self, sweep: Sweep, seconds: float, call: Callable[[T], object]) -> None:
        """
        Made by `Sweep.deadlines`.
        """
        self._sweep = sweep
        self._seconds = seconds
        self._call = call
        self._due: OrderedDict[T, float] = OrderedDict()

    def add(self, each: T) -> None:
        """
        The time of an object begins, which must not be one of these already.
        """
        sweep = self._sweep
        self._due[each] = due = sweep.clock.seconds() + self._seconds
        if due < sweep.comes:
            sweep.come(self._seconds)

    def discard(self, each: T) -> None:
        """
        Do not call for an object any more, if that is still to come.
        """
        self._due.pop(each, None)

    def first(self) -> float:
        """
        When the next is due.
        """
        return next(iter(self._due.values()), inf)

    def call_until(self, now: float) -> None:
        """
        Call for all that are due, but not for what is added by that.
        """
        for _ in range(len(self._due)):
            if self.first() > now:
                break
            self._call(self._due.popitem(last=False)[0])


class Sweep:
    """
    The timer of some `Deadlines`. It is set for the first of all, and is not touched when that is discarded:
    when it fires, it is set for what is first then.

    :ivar clock: where the time comes from.
    :ivar comes: when it fires, if it is not to be set for anything later than that.
    """

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self.comes = inf
        self._timer: IDelayedCall | None = None
        self._all: dict[tuple[float, Callable[[Any], object]], Deadlines[Any]] = {}

    def deadlines(self, seconds: float, call: Callable[[T], object]) -> Deadlines[T]:
        """
        Those for which this is called after this number of seconds.
        """
        deadlines = self._all.get((seconds, call))
        if deadlines is None:
            deadlines = self._all[seconds, call] = Deadlines(self, seconds, call)
        return deadlines

    def come(self, seconds: float) -> None:
        """
        Be there in this number of seconds, which is sooner than planned.
        """
        self._cancel()
        self.comes = self.clock.seconds() + seconds
        self._timer = self.clock.callLater(seconds, self._fire)

    def rest(self) -> None:
        """
        Nothing is likely to be added for a while: if there is nothing now, leave no timer.
        """
        if self._timer is not None and all(each.first() == inf for each in self._all.values()):
            self._cancel()
            self.comes = inf

    def _fire(self) -> None:
        self._timer = None
        self.comes = -inf  # what is called may add something: it is seen to afterwards
        now = self.clock.seconds()
        try:
            for each in list(self._all.values()):
                each.call_until(now + _TOGETHER)
        finally:
            self.comes = inf
            first = min(each.first() for each in self._all.values())
            if first < inf:
                self.come(max(0.0, first - now))

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
