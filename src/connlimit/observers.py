"""
What watches a limiter: the base class for observers of your own, and the log.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import attrs
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from zope.interface import implementer

from connlimit.interfaces import DRAINING, ILimiter, ILimiterObserver, IOccupant

#: Seconds for which somebody must have waited without a break before that is told.
_LEAST = 1.0

#: How often it is told in how many seconds that a limiter is full; what happens besides is summed up.
_MAX_TOLD, _INTERVAL = 3, 60.0


@implementer(ILimiterObserver)
class LimiterObserver:
    """
    An observer that does nothing: override what you want to hear.
    """

    def exempted(self, limiter: ILimiter, connection: IOccupant) -> None:
        pass

    def waiting(self, limiter: ILimiter, connection: IOccupant) -> None:
        pass

    def served(self, limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        pass

    def finished(self, limiter: ILimiter, connection: IOccupant) -> None:
        pass

    def refused(self, limiter: ILimiter, connection: IOccupant, reason: str) -> None:
        pass

    def departed(self, limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        pass

    def reconfigured(self, limiter: ILimiter, changes: dict[str, tuple[Any, Any]]) -> None:
        pass


def hears(observer: object, event: str) -> bool:
    """
    Whether an observer does anything when it hears an event, by the name of its method.
    """
    try:
        method = getattr(observer, event, None)
    except Exception:
        return True  # it will raise again when it is told, and that is logged
    return getattr(method, "__func__", method) is not getattr(LimiterObserver, event)


@attrs.define
class _Story:
    """
    What happens from when somebody must wait or is refused, until nobody waits and there is room.

    :ivar since: when it began.
    :ivar at_once: how many waited at once, at the most.
    """

    since: float
    waited: int = 0
    at_once: int = 0
    refused: int = 0
    departed: int = 0
    is_told: bool = False


class LimiterLog(LimiterObserver):
    """
    Logs that a limiter is full, and by which limit, and that it has room again.

    A line is logged when somebody is refused, or when there was somebody who waits for a second, and one when
    nobody waits any more and there is room. There are three such pairs a minute at most; what else happens is
    summed up in one line a minute. Each limiter has one of these, unless its setting ``log`` is False.
    """

    _log = Logger(namespace="connlimit.limiter")

    def __init__(self) -> None:
        self._story: _Story | None = None
        self._timer: IDelayedCall | None = None
        self._told: deque[float] = deque(maxlen=_MAX_TOLD)
        # What is not told yet: since when, how often, for how many seconds in all, and all in all.
        self._untold_since = 0.0
        self._untold_times = 0
        self._untold_seconds = 0.0
        self._untold = _Story(0.0)
        self._summing_up: IDelayedCall | None = None
        self._end_of_story = _EndOfStory(self)

    def waiting(self, limiter: ILimiter, connection: IOccupant) -> None:
        story = self._story or self._begin(limiter)
        story.waited += 1
        story.at_once = max(story.at_once, limiter.waiting)

    def refused(self, limiter: ILimiter, connection: IOccupant, reason: str) -> None:
        if reason == DRAINING:
            return
        story = self._story or self._begin(limiter)
        story.refused += 1
        if not story.is_told:
            self._tell(limiter, limiter.limited_by(reason, connection))

    def departed(self, limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        if self._story is not None:
            self._story.departed += 1
            self.may_have_room(limiter)

    def reconfigured(self, limiter: ILimiter, changes: dict[str, tuple[Any, Any]]) -> None:
        self._log.info(
            "{limiter}: {changes}",
            limiter=changes["name"][1] if "name" in changes else limiter.name,
            changes=", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items()),
        )
        self.may_have_room(limiter)

    def may_have_room(self, limiter: ILimiter) -> None:
        """
        End the story, when nobody waits and one more would be served; if nothing was logged, when nobody
        waits.
        """
        story = self._story
        if story is None or limiter.waiting:
            return
        if (story.is_told or story.refused) and not limiter.has_room():
            return
        self._story = None
        limiter.remove_observer(self._end_of_story)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if story.is_told:
            self._log.info(
                "{limiter}: room again after {seconds:.1f} s: {waited} waited, at most {at_once} at once, "
                "{refused} were refused and {departed} departed",
                limiter=limiter.name,
                seconds=limiter.clock.seconds() - story.since,
                **_counts(story),
            )
        else:
            self._leave_untold(limiter, story)

    def _begin(self, limiter: ILimiter) -> _Story:
        now = limiter.clock.seconds()
        if self._untold_times and now - self._untold_since >= _INTERVAL:
            self._sum_up(limiter)
        self._story = _Story(now)
        limiter.add_observer(self._end_of_story)
        self._timer = limiter.clock.callLater(_LEAST, self._lasts, limiter)
        return self._story

    def _lasts(self, limiter: ILimiter) -> None:
        """
        The story has lasted for some time.
        """
        self._timer = None
        if self._story is not None and not self._story.is_told and not limiter.snapshot().draining:
            self._tell(limiter, limiter.limited_by())

    def _tell(self, limiter: ILimiter, limit: str) -> None:
        """
        Tell the story so far, unless that was done often enough.
        """
        story, now = self._story, limiter.clock.seconds()
        assert story is not None
        if len(self._told) == _MAX_TOLD and now - self._told[0] < _INTERVAL:
            if self._summing_up is None:
                delay = self._told[0] + _INTERVAL - now
                self._summing_up = limiter.clock.callLater(delay, self._minute_over, limiter)
            return
        self._told.append(now)
        story.is_told = True
        self._log.warn(
            "{limiter}: full: {limit}: {active} served, {waiting} waiting, {refused} refused",
            limiter=limiter.name,
            limit=limit,
            active=limiter.active,
            waiting=limiter.waiting,
            refused=story.refused,
        )

    def _minute_over(self, limiter: ILimiter) -> None:
        self._summing_up = None
        if self._untold_times:
            self._sum_up(limiter)
        story = self._story
        if story is not None and not story.is_told and (story.refused or self._timer is None):
            self._tell(limiter, limiter.limited_by())

    def _leave_untold(self, limiter: ILimiter, story: _Story) -> None:
        if not self._untold_times:
            self._untold_since = story.since
        untold = self._untold
        self._untold_times += 1
        self._untold_seconds += limiter.clock.seconds() - story.since
        untold.waited += story.waited
        untold.at_once = max(untold.at_once, story.at_once)
        untold.refused += story.refused
        untold.departed += story.departed

    def _sum_up(self, limiter: ILimiter) -> None:
        """
        Tell what was not told.
        """
        self._log.info(
            "{limiter}: in the last {seconds:.0f} s full {times} times more, for {full:.1f} s in all: "
            "{waited} waited, at most {at_once} at once, {refused} were refused and {departed} departed",
            limiter=limiter.name,
            seconds=limiter.clock.seconds() - self._untold_since,
            times=self._untold_times,
            full=self._untold_seconds,
            **_counts(self._untold),
        )
        self._untold_times, self._untold_seconds, self._untold = 0, 0.0, _Story(0.0)


class _EndOfStory(LimiterObserver):
    """
    Looks for the end of a story, while there is one; so nothing is observed of connections that do not wait.
    """

    def __init__(self, log: LimiterLog) -> None:
        self._log = log

    def served(self, limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        self._log.may_have_room(limiter)

    def finished(self, limiter: ILimiter, connection: IOccupant) -> None:
        self._log.may_have_room(limiter)


class ConnectionLog(LimiterObserver):
    """
    Logs what happens to each connection, at the level debug, since twistd's own log has all levels.
    """

    _log = Logger(namespace="connlimit.connection")

    def waiting(self, limiter: ILimiter, connection: IOccupant) -> None:
        self._debug("waits", limiter, connection)

    def served(self, limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        self._debug("is served", limiter, connection)

    def exempted(self, limiter: ILimiter, connection: IOccupant) -> None:
        self._debug("is exempt and served", limiter, connection)

    def finished(self, limiter: ILimiter, connection: IOccupant) -> None:
        self._debug("has finished", limiter, connection)

    def refused(self, limiter: ILimiter, connection: IOccupant, reason: str) -> None:
        self._debug(f"is refused ({reason})", limiter, connection)

    def departed(self, limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        self._debug("departed", limiter, connection)

    def _debug(self, what: str, limiter: ILimiter, connection: IOccupant) -> None:
        self._log.debug("{limiter}: {peer} {what}", limiter=limiter.name, peer=connection.address, what=what)


def _counts(story: _Story) -> dict[str, int]:
    return {name: getattr(story, name) for name in ("waited", "at_once", "refused", "departed")}
