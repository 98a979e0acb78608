"""
A limit whose slots are those of a named semaphore, which jobs in any language take as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from zope.interface import implementer

from connlimit._system.bounded_log import BoundedLog
from connlimit._system.since_boot import since_boot
from connlimit.interfaces import ILimit, IOccupant
from connlimit.semaphores import Lock, SemaphoreError, Semaphores

#: How many locks are asked for at the same time, at most.
_MAX_ASKED = 16

#: A lock that is held for these seconds is given back, though somebody here waits: others get their turn.
_TURN = 1.0

#: Seconds until a server is asked again that has refused to give a lock at all.
_REFUSED = 5.0


@attrs.frozen(eq=False)
class _Slot:
    """
    A lock, and when it was acquired, by the clock since boot.
    """

    lock: Lock
    since: float


@implementer(ILimit)
class ThrottleLimit:
    """
    A slot for each count of a semaphore.

    A connection whose slot is still to be asked for waits in the limiter's line. When a connection ends, its
    slot goes to the next in the queue here, or back to the server when nobody waits, or when it was here long
    enough. The server gives slots in the order of requests.

    A slot is lost when the server has not heard from this process for ``expires_in``: nobody new is served on
    it. The connection that it served is left alone, and the server learns of it as soon as that is possible.
    """

    def __init__(self, semaphore: str, url: str, *, expires_in: float = 60.0, reactor: Any = None) -> None:
        """
        :param semaphore: the semaphore's name.
        :param url: that of the server of semaphores, such as ``http://localhost:8000``.
        :param expires_in: seconds after which the slots of a process that is not heard from are free again.
        :raises ValueError: for a wrong value.
        """
        if not isinstance(semaphore, str) or not semaphore:  # type: ignore[redundant-expr]
            raise ValueError(f"semaphore must be a text of at least one character, not {semaphore!r}")
        if reactor is None:
            from twisted.internet import reactor
        self.semaphore = semaphore
        self._semaphores = Semaphores(url, expires_in=expires_in, reactor=reactor)
        self._reactor = reactor
        self._subscribers: list[Callable[[], None]] = []
        # Oldest first.
        self._in_use: deque[_Slot] = deque()
        self._free: list[_Slot] = []
        self._asked: set[Deferred[Any]] = set()
        # How many locks may be asked for at once: more as long as all that come are used.
        self._maximum = 1
        self._is_refused = False
        self._timer: IDelayedCall | None = None
        self._closed = False
        self._log = BoundedLog(Logger(namespace="connlimit.semaphores"), reactor)

    @property
    def in_use(self) -> int:
        """
        How many slots the connections of this process have.
        """
        return len(self._in_use)

    @property
    def held(self) -> int:
        """
        How many slots this process has.
        """
        return len(self._in_use) + len(self._free)

    def subscribe(self, callback: Callable[[], None]) -> None:
        self._subscribers.append(callback)

    def try_acquire(self, connection: IOccupant) -> bool:
        while self._free:
            slot = self._free.pop()
            if not slot.lock.lost:
                self._in_use.append(slot)
                return True
            self._release(slot)
        while len(self._asked) < self._maximum and not self._closed:
            self._ask()
        return False

    def release(self, connection: IOccupant) -> None:
        if not self._in_use:
            return  # closed
        slot = self._in_use.popleft()
        if since_boot() - slot.since < _TURN and not slot.lock.lost:
            self._free.append(slot)
            # The limiter looks for who is next right after this.
            self._reactor.callLater(0, self._give_back, slot)
        else:
            self._release(slot)

    def _ask(self) -> None:
        asked = self._semaphores.lock(self.semaphore).acquire()
        self._asked.add(asked)
        asked.addBoth(self._answered, asked)

    def _answered(self, result: Any, asked: Deferred[Any]) -> None:
        self._asked.discard(asked)
        if isinstance(result, Lock):
            self._is_refused = False
            slot = _Slot(result, since_boot())
            self._free.append(slot)
            self._tell()
            is_used = slot not in self._free
            self._maximum = min(2 * self._maximum, _MAX_ASKED) if is_used else 1
            self._give_back(slot)
        elif not result.check(CancelledError):
            self._refused(result)

    def _refused(self, failure: Any) -> None:
        if not self._is_refused:
            self._is_refused = True
            why = failure.getErrorMessage() if failure.check(SemaphoreError) else repr(failure.value)
            self._log.error("semaphore {name} gives no slots: {why}", name=self.semaphore, why=why)
        if not self._closed and self._timer is None:
            self._timer = self._reactor.callLater(_REFUSED, self._ask_again)

    def _ask_again(self) -> None:
        self._timer = None
        self._tell()

    def _tell(self) -> None:
        for callback in self._subscribers:
            try:
                callback()
            except Exception:
                self._log.failure("{subscriber} failed to hear that there may be room", subscriber=callback)

    def _give_back(self, slot: _Slot) -> None:
        """
        Give a slot back that nobody has taken.
        """
        if slot in self._free:
            self._free.remove(slot)
            self._release(slot)

    def _release(self, slot: _Slot) -> None:
        slot.lock.release().addErrback(
            lambda failure: self._log.failure("{lock} could not be released", failure, lock=slot.lock)
        )

    def close(self) -> Deferred[None]:
        """
        Give all slots back, and ask for no more.

        :return: fires when that is done, or impossible.
        """
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for asked in list(self._asked):
            asked.cancel()
        slots = [*self._in_use, *self._free]
        self._in_use.clear()
        self._free.clear()
        released = gatherResults([slot.lock.release() for slot in slots], consumeErrors=True)
        return released.addBoth(lambda _: self._semaphores.close())
