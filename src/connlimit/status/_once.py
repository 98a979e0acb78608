"""
What is made once for all who ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from twisted.internet.defer import Deferred, ensureDeferred, succeed
from twisted.python.failure import Failure

T = TypeVar("T")
Make = Callable[[], Coroutine[Any, Any, T]]


class Once(Generic[T]):
    """
    What a coroutine makes, when it is asked for first.

    :ivar is_made: whether it is there.
    """

    def __init__(self, make: Make[T]) -> None:
        self.is_made = False
        self._make = make
        self._value: Any = None
        self._asking: list[Deferred[T]] | None = None

    @property
    def is_asked(self) -> bool:
        """
        Whether it is there, or is being made.
        """
        return self.is_made or self._asking is not None

    def get(self) -> Deferred[T]:
        """
        What was made, as soon as that is so.
        """
        if self.is_made:
            return succeed(self._value)
        deferred: Deferred[T] = Deferred()
        if self._asking is None:
            self._asking = [deferred]
            ensureDeferred(self._make()).addBoth(self._end)
        else:
            self._asking.append(deferred)
        return deferred

    def _end(self, result: T | Failure) -> None:
        assert self._asking is not None
        asking, self._asking = self._asking, None
        if not isinstance(result, Failure):
            self.is_made, self._value = True, result
        for each in asking:
            if isinstance(result, Failure):
                each.errback(result)
            else:
                each.callback(result)


class Recent(Generic[T]):
    """
    What a coroutine makes, made again when it is asked for and the last is too old.
    """

    def __init__(self, make: Make[T], seconds: Callable[[], float], interval: float) -> None:
        """
        :param seconds: tells the time.
        :param interval: after how many seconds it is too old.
        """
        self._make = make
        self._seconds = seconds
        self._interval = interval
        self._last = Once(make)
        self._begun = 0.0

    def get(self) -> Deferred[T]:
        """
        What was made less than an interval ago, or is made now.
        """
        now = self._seconds()
        if self._last.is_made and not 0 <= now - self._begun < self._interval:
            self._last = Once(self._make)
        if not self._last.is_asked:
            self._begun = now
        return self._last.get()
