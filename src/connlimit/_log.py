"""
The log of a limiter: when it becomes full, when it has room again, and what happened in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.logger import Logger

from connlimit.interfaces import IConnection
from connlimit.observers import LimiterObserver

if TYPE_CHECKING:
    from connlimit._limiter import Limiter, Snapshot


class LimiterLog(LimiterObserver):
    """
    Logs a line when somebody must wait or is refused, and one when nobody waits any more.

    So the log tells of changes of state, however many connections there are. Each connection is told of only
    if that is asked for, at the level debug, since twistd's own log has all levels.
    """

    _log = Logger()

    def __init__(self, connections: bool = False) -> None:
        """
        :param connections: whether to tell of each connection.
        """
        self._connections = connections
        self._before: Snapshot | None = None
        self._since = 0.0
        self._most = 0

    def waiting(self, limiter: Limiter, connection: IConnection) -> None:
        """
        See `ILimiterObserver.waiting`.
        """
        self._debug("waits", limiter, connection)
        self._full(limiter)
        self._most = max(self._most, limiter.waiting)

    def served(self, limiter: Limiter, connection: IConnection, waited: float) -> None:
        """
        See `ILimiterObserver.served`.
        """
        self._debug("is served", limiter, connection)
        self._may_have_room(limiter)

    def exempted(self, limiter: Limiter, connection: IConnection) -> None:
        """
        See `ILimiterObserver.exempted`.
        """
        self._debug("is exempt and served", limiter, connection)

    def finished(self, limiter: Limiter, connection: IConnection) -> None:
        """
        See `ILimiterObserver.finished`.
        """
        self._debug("has finished", limiter, connection)
        self._may_have_room(limiter)

    def refused(self, limiter: Limiter, connection: IConnection, reason: str) -> None:
        """
        See `ILimiterObserver.refused`.
        """
        self._debug(f"is refused ({reason})", limiter, connection)
        self._full(limiter)

    def departed(self, limiter: Limiter, connection: IConnection, waited: float) -> None:
        """
        See `ILimiterObserver.departed`.
        """
        self._debug("departed", limiter, connection)
        self._may_have_room(limiter)

    def reconfigured(self, limiter: Limiter, changes: dict[str, tuple[Any, Any]]) -> None:
        """
        See `ILimiterObserver.reconfigured`.
        """
        self._log.info(
            "{limiter}: {changes}",
            limiter=changes["name"][1] if "name" in changes else limiter.name,
            changes=", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items()),
        )

    def _debug(self, what: str, limiter: Limiter, connection: IConnection) -> None:
        if self._connections:
            self._log.debug(
                "{limiter}: {peer} {what}", limiter=limiter.name, peer=connection.address, what=what
            )

    def _full(self, limiter: Limiter) -> None:
        if self._before is None:
            self._before = limiter.snapshot()
            self._since = limiter.clock.seconds()
            self._most = limiter.waiting
            self._log.warn(
                "{limiter}: full: {active} of {most} served",
                limiter=limiter.name,
                active=limiter.active,
                most=limiter.max_connections,
            )

    def _may_have_room(self, limiter: Limiter) -> None:
        """
        Tell that there is room, when nobody waits and one more would be served.
        """
        before = self._before
        if before is None or limiter.waiting or not limiter.has_room():
            return
        self._before = None
        now = limiter.snapshot()
        self._log.info(
            "{limiter}: room again after {seconds:.1f} s: {waited} waited, at most {at_once} at once, "
            "{refused} were refused and {departed} departed",
            limiter=limiter.name,
            seconds=limiter.clock.seconds() - self._since,
            waited=now.waits - before.waits,
            at_once=self._most,
            refused=sum(now.refused.values()) - sum(before.refused.values()),
            departed=now.departed - before.departed,
        )
