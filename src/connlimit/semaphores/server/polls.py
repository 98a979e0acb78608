"""
Requests that wait for their locks.
"""

from __future__ import annotations

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from connlimit.semaphores.server.records import Rejected


@attrs.define(eq=False)
class _Poll:
    """
    One request that waits.

    :ivar done: fires with whether the lock was granted; fails with `Rejected` if it never will be.
    :ivar timer: ends the wait.
    """

    peer: int
    name: str
    done: Deferred[bool]
    timer: IDelayedCall | None = None


class Polls:
    """
    All requests that wait for their locks.
    """

    def __init__(self, clock: IReactorTime) -> None:
        """
        :param clock: measures how long a request may wait.
        """
        self._clock = clock
        self._polls: dict[tuple[int, str], list[_Poll]] = {}
        self._is_ending = False

    def wait(self, peer: int, name: str, seconds: float) -> Deferred[bool]:
        """
        Wait for a pending lock to be granted, at most this number of seconds.

        :return: fires with whether it was; fails with `Rejected` if it never will be. Can be cancelled.
        """
        poll = _Poll(peer, name, Deferred(lambda _: self._forget(poll)))
        if self._is_ending or seconds <= 0:
            poll.done.callback(False)
            return poll.done
        poll.timer = self._clock.callLater(seconds, self._end, poll, None)
        self._polls.setdefault((peer, name), []).append(poll)
        return poll.done

    def settled(self, peer: int, name: str, reason: Rejected | None) -> None:
        """
        A lock is not pending any more.
        """
        for poll in self._polls.get((peer, name), ()):
            # In a turn of its own, as the state is in the middle of an operation.
            if poll.timer is not None:
                poll.timer.cancel()
            poll.timer = self._clock.callLater(0, self._end, poll, True if reason is None else reason)

    def end(self) -> None:
        """
        Let no request wait any longer.
        """
        self._is_ending = True
        for polls in list(self._polls.values()):
            for poll in list(polls):
                self._end(poll, None)

    def __len__(self) -> int:
        return sum(map(len, self._polls.values()))

    def _end(self, poll: _Poll, result: bool | Rejected | None) -> None:
        self._forget(poll)
        if isinstance(result, Rejected):
            poll.done.errback(result)
        else:
            poll.done.callback(bool(result))

    def _forget(self, poll: _Poll) -> None:
        if poll.timer is not None and poll.timer.active():
            poll.timer.cancel()
        polls = self._polls.get((poll.peer, poll.name), [])
        if poll in polls:
            polls.remove(poll)
            if not polls:
                del self._polls[poll.peer, poll.name]
