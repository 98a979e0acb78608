"""
Limits whose slots live in this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from twisted.logger import Logger
from zope.interface import implementer

from connlimit.interfaces import IConnection, ILimit


@implementer(ILimit)
class Total:
    """
    So many slots in all.

    :ivar in_use: how many slots are taken; after a cut it can exceed the limit until enough are released.
    """

    def __init__(self, slots: int | None) -> None:
        """
        :param slots: how many; None for no limit.
        """
        self.in_use = 0
        self._subscribers: list[Callable[[], None]] = []
        self._slots: float = math.inf if slots is None else slots

    @property
    def slots(self) -> int | None:
        """
        How many slots there are; None for no limit. Can be changed at any time.
        """
        return None if self._slots == math.inf else int(self._slots)

    @slots.setter
    def slots(self, slots: int | None) -> None:
        self._slots = math.inf if slots is None else slots
        for callback in self._subscribers:
            callback()

    def try_acquire(self, connection: IConnection) -> bool:
        """
        See `ILimit.try_acquire`.
        """
        if self.in_use < self._slots:
            self.in_use += 1
            return True
        return False

    def release(self, connection: IConnection) -> None:
        """
        See `ILimit.release`.
        """
        self.in_use -= 1

    def subscribe(self, callback: Callable[[], None]) -> None:
        """
        See `ILimit.subscribe`.
        """
        self._subscribers.append(callback)


@implementer(ILimit)
class All:
    """
    Several limits at once: a connection holds a slot of each, or of none.

    A limit that raises when it is asked is logged and counts as having no room.
    """

    _log = Logger()

    def __init__(self, limits: Sequence[ILimit]) -> None:
        self.limits = tuple(limits)

    def try_acquire(self, connection: IConnection) -> bool:
        """
        See `ILimit.try_acquire`.
        """
        for index, limit in enumerate(self.limits):
            try:
                acquired = limit.try_acquire(connection)
            except Exception:
                self._log.failure("{limit} failed to answer; no slot is taken", limit=limit)
                acquired = False
            if not acquired:
                self._release(self.limits[:index], connection)
                return False
        return True

    def release(self, connection: IConnection) -> None:
        """
        See `ILimit.release`.
        """
        self._release(self.limits, connection)

    def _release(self, limits: Sequence[ILimit], connection: IConnection) -> None:
        for limit in limits:
            try:
                limit.release(connection)
            except Exception:
                self._log.failure("{limit} failed to take a slot back", limit=limit)

    def subscribe(self, callback: Callable[[], None]) -> None:
        """
        See `ILimit.subscribe`.
        """
        for limit in self.limits:
            limit.subscribe(callback)
