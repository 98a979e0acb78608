"""
What is made once for all who ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any, Generic, TypeVar

from twisted.internet.defer import Deferred, ensureDeferred, succeed
from twisted.python.failure import Failure

T = TypeVar("T")
#: Seconds for which what was made is shown at least and at most.
LEAST_AGE, MAX_AGE = 0.1, 1.0

Make = Callable[[], Coroutine[Any, Any, T]]


class Once(Generic[T]):
    """
    What a coroutine makes, when it is asked for first.

    :ivar is_made: whether it is there.
    :ivar value: what it is then.
    :ivar begun: when it was begun, by the monotonic clock.
    :ivar took: how many seconds it took.
    """

    def __init__(self, make: Make[T]) -> None:
        self.is_made = False
        self.value: Any = None
        self.begun = self.took = 0.0
        self._make = make
        self._asking: list[Deferred[T]] | None = None

    def get(self) -> Deferred[T]:
        """
        What was made, as soon as that is so.
        """
        if self.is_made:
            return succeed(self.value)
        deferred: Deferred[T] = Deferred()
        if self._asking is None:
            self._asking = [deferred]
            self.begun = monotonic()
            ensureDeferred(self._make()).addBoth(self._end)
        else:
            self._asking.append(deferred)
        return deferred

    def _end(self, result: T | Failure) -> None:
        assert self._asking is not None
        asking, self._asking = self._asking, None
        self.took = monotonic() - self.begun
        if not isinstance(result, Failure):
            self.is_made, self.value = True, result
        for each in asking:
            if isinstance(result, Failure):
                each.errback(result)
            else:
                each.callback(result)


class Recent(Generic[T]):
    """
    What a coroutine makes, made again when it is asked for and the last is too old.

    It may be twenty times as old as it took seconds to make, at least a tenth of a second and at most one: so
    it is fresh where it costs little, and costs little wherever it is asked for again and again.
    """

    def __init__(self, make: Make[T], cost: Callable[[T], float] = lambda made: 0.0) -> None:
        """
        :param cost: tells how many seconds what was made of it has taken.
        """
        self._make = make
        self._cost = cost
        self._last = Once(make)

    def get(self) -> Deferred[T]:
        """
        What was made not long ago, or is made now.
        """
        last = self._last
        if last.is_made:
            age = 20 * (last.took + self._cost(last.value))
            if monotonic() - last.begun > min(max(age, LEAST_AGE), MAX_AGE):
                self._last = Once(self._make)
        return self._last.get()

    def forget(self) -> None:
        """
        Make it again when it is asked for: what it tells has been changed.
        """
        self._last = Once(self._make)
