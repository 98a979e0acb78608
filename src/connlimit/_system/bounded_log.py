"""
A log that no client can fill: what happens again and again is logged once, then counted.
"""

from __future__ import annotations

import time
from typing import Any

import attrs
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger, LogLevel, formatEvent
from twisted.python.failure import Failure

#: Seconds in which a kind of event has one line, and its end one.
INTERVAL = 60.0


@attrs.define
class _Kind:
    """
    What is known of one kind of event that happens now.

    :ivar level: the level of its line.
    :ivar since: when it was said.
    :ivar total: how often it has happened since then.
    :ivar uncounted: how often since its last line.
    :ivar last: the text of the last.
    :ivar due: when the count is to be said, and the timer that does it, if it has happened again.
    :ivar over_at: when its end was said last.
    :ivar is_over: whether that was said since it happened last.
    """

    level: Any
    since: float
    total: int = 1
    uncounted: int = 0
    last: str = ""
    due: float = 0.0
    timer: IDelayedCall | None = None
    over_at: float | None = None
    is_over: bool = False


class BoundedLog:
    """
    Logs events that a client can bring about, a few lines a minute at most.

    Stands for a `Logger`: ``BoundedLog(Logger(namespace=...))``. The kind of an event is its format, so what
    differs from one to the next belongs in its facts. The first of a kind is logged as it is. Those that
    follow are counted; the count is logged once a minute, with the last as the example, and, when a minute
    has passed without any, that it is over. If something tells that sooner, call `over`.

    Give each object that can fail on its own, such as a backend, one of its own.
    """

    def __init__(self, log: Logger, clock: IReactorTime | None = None, interval: float = INTERVAL) -> None:
        """
        :param log: where the lines go.
        :param clock: where the time comes from; the reactor if not given.
        :param interval: seconds between two lines of a kind.
        """
        self._log = log
        self._clock = clock
        self._interval = interval
        self._kinds: dict[str, _Kind] = {}

    def info(self, format: str, **facts: Any) -> None:
        """
        Something happened that is worth a line, once.
        """
        self._event(LogLevel.info, format, facts)

    def warn(self, format: str, **facts: Any) -> None:
        """
        Something happened that somebody should look at.
        """
        self._event(LogLevel.warn, format, facts)

    def error(self, format: str, **facts: Any) -> None:
        """
        Something went wrong.
        """
        self._event(LogLevel.error, format, facts)

    def failure(self, format: str, failure: Failure | None = None, **facts: Any) -> None:
        """
        An exception was raised. Only the first of a kind is logged with its traceback.

        :param failure: the exception; the one that is being handled if not given.
        """
        if failure is None:
            failure = Failure()
        if self._is_new(LogLevel.critical, format):
            self._log.failure(format, failure, **facts)
        else:
            self._count(format, f"{format}: {{error}}", {**facts, "error": repr(failure.value)})

    def over(self, event: str, format: str, **facts: Any) -> None:
        """
        A kind of event is over: log that, if it has happened since the last time that this was said.

        Costs next to nothing if it has not. The facts get ``count``, how often it happened, and ``seconds``,
        how long ago it began. What comes and goes all the time is said once a minute.

        :param event: the format of the event.
        :param format: what is to be said.
        """
        if not self._kinds:
            return
        kind = self._kinds.get(event)
        if kind is None or kind.is_over:
            return
        now = self._seconds()
        if kind.over_at is not None and now - kind.over_at < self._interval:
            return
        kind.is_over, kind.over_at = True, now
        kind.uncounted = 0
        self._log.info(format, count=kind.total, seconds=now - kind.since, **facts)

    def _event(self, level: Any, format: str, facts: dict[str, Any]) -> None:
        if self._is_new(level, format):
            self._log.emit(level, format, **facts)
        else:
            self._count(format, format, facts)

    def _is_new(self, level: Any, format: str) -> bool:
        """
        Whether an event of this kind is to be logged as it is: there was none in the last interval.
        """
        now = self._seconds()
        kind = self._kinds.get(format)
        if kind is None or (kind.timer is None and now - kind.since >= self._interval):
            over_at = kind.over_at if kind is not None else None
            self._kinds[format] = _Kind(level, now, over_at=over_at)
            return True
        return False

    def _count(self, kind_format: str, format: str, facts: dict[str, Any]) -> None:
        kind = self._kinds[kind_format]
        kind.total += 1
        kind.uncounted += 1
        kind.is_over = False
        # The text alone is kept: the facts would keep connections.
        kind.last = formatEvent({"log_format": format, **facts})
        now = self._seconds()
        if kind.timer is None:
            self._set_timer(kind_format, kind, max(0.0, kind.since + self._interval - now))
        elif now >= kind.due + self._interval:  # that reactor does not run
            kind.timer.cancel()
            self._interval_over(kind_format)

    def _interval_over(self, format: str) -> None:
        kind = self._kinds[format]
        kind.timer = None
        if kind.uncounted:
            self._log.emit(
                kind.level,
                "{last} ({count} times in the last {seconds:.0f} s)",
                last=kind.last,
                count=kind.uncounted,
                seconds=self._interval,
            )
            kind.uncounted = 0
            self._set_timer(format, kind, self._interval)
            return
        del self._kinds[format]
        if not kind.is_over:
            self._log.info(
                "not again for {seconds:.0f} s, after {count} times: {last}",
                seconds=self._interval,
                count=kind.total,
                last=kind.last,
            )

    def _seconds(self) -> float:
        return time.monotonic() if self._clock is None else self._clock.seconds()

    def _set_timer(self, format: str, kind: _Kind, seconds: float) -> None:
        clock: Any = self._clock
        if clock is None:
            from twisted.internet import reactor as clock
        kind.due = self._seconds() + seconds
        kind.timer = clock.callLater(seconds, self._interval_over, format)
