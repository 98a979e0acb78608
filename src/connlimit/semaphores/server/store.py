"""
Where the state of the semaphores is kept: in the memory of this process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import Attribute, Interface, implementer

from connlimit.semaphores.server.state import State


class Unavailable(Exception):
    """
    The store cannot be reached now; whether the operation was carried out is not known.
    """


class IStore(Interface):
    """
    Keeps a state, and carries out operations on it, one after the other.
    """

    state: State = Attribute("the state, as far as it is known here")

    def submit(operation: str, *arguments: Any) -> Any:
        """
        Carry out an operation of `State`.

        :return: its result, or a Deferred if that takes time; it can fail with `Rejected` or `Unavailable`.
        :raises Rejected: if that is known at once.
        """

    def seconds() -> float:
        """
        The time by which the state counts, in seconds.
        """

    def close() -> Deferred[None]:
        """
        Use it no more.
        """


class Timer:
    """
    Has things happen in a state when they are due.
    """

    def __init__(self, store: Any, clock: IReactorTime) -> None:
        self._store = store
        self._clock = clock
        self._call: IDelayedCall | None = None
        self._due_at = math.inf

    def set(self) -> None:
        """
        Look again when something is due. What is not due any more is found out when the time comes.
        """
        due = self._store.state.next_event()
        if due is None or due >= self._due_at:
            return
        self.cancel()
        self._due_at = due
        self._call = self._clock.callLater(max(0.0, due - self._store.seconds()), self._due)

    def cancel(self) -> None:
        """
        Have nothing happen any more.
        """
        if self._call is not None and self._call.active():
            self._call.cancel()
        self._call = None
        self._due_at = math.inf

    def _due(self) -> None:
        self._due_at = math.inf
        maybeDeferred(self._store.submit, "nothing").addErrback(lambda failure: failure.trap(Unavailable))


@implementer(IStore)
class MemoryStore:
    """
    A state that ends with the process.
    """

    def __init__(
        self, state: State, clock: IReactorTime, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        """
        :param seconds: gives the time, which must not be set back or forth as that of a reactor can be.
        """
        self.state = state
        self.seconds = seconds
        self._timer = Timer(self, clock)

    def submit(self, operation: str, *arguments: Any) -> Any:
        try:
            return self.state.apply(self.seconds(), operation, arguments)
        finally:
            self._timer.set()

    def close(self) -> Deferred[None]:
        self._timer.cancel()
        return succeed(None)
