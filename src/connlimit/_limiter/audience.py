"""
Who observes a limiter, and telling them what happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from connlimit._system.bounded_log import BoundedLog
from connlimit.interfaces import ILimiter, ILimiterObserver
from connlimit.observers import hears


class Audience:
    """
    The observers of a limiter. What one raises is logged, and nobody else notices.

    :ivar limiter: whom they observe.
    :ivar everybody: all of them, in the order in which they came.
    :ivar of_served: those that do something when a connection is served. Every connection makes this event
        and the next, so it matters whether anybody hears them.
    :ivar of_finished: those that do something when one has finished.
    """

    __slots__ = ("_log", "everybody", "limiter", "of_finished", "of_served")

    def __init__(self, limiter: ILimiter, observers: Iterable[ILimiterObserver], log: BoundedLog) -> None:
        self.limiter = limiter
        self._log = log
        self._set(observers)

    def add(self, observer: ILimiterObserver) -> None:
        """
        Tell an observer what happens from now on.
        """
        self._set((*self.everybody, observer))

    def remove(self, observer: ILimiterObserver) -> None:
        """
        Tell an observer nothing more.
        """
        self._set(each for each in self.everybody if each is not observer)

    def _set(self, observers: Iterable[ILimiterObserver]) -> None:
        self.everybody = tuple(observers)
        self.of_served = tuple(each for each in self.everybody if hears(each, "served"))
        self.of_finished = tuple(each for each in self.everybody if hears(each, "finished"))

    def tell(self, event: str, *facts: Any) -> None:
        """
        Tell everybody of an event, by the name of the method of `ILimiterObserver`.
        """
        for observer in self.everybody:
            try:
                getattr(observer, event)(self.limiter, *facts)
            except Exception:
                self._log.failure("{observer} failed to observe {event}", observer=observer, event=event)
