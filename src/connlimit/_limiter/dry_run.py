"""
The dry run: everybody is served, and a limiter that serves nobody finds out what would have happened.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import ref

from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from connlimit._limiter.slots import NullConnection
from connlimit.interfaces import ILimiter, IOccupant, Snapshot
from connlimit.observers import LimiterObserver

_REPORT_INTERVAL = 60.0  # seconds

_NOT_TRIED_OUT = {"dry_run", "exempt", "notice", "idle_timeout", "log"}

#: The share of connections that the suggested limit serves at once.
SERVED_AT_ONCE = 0.99


class _SameDescriptors:
    """
    The connections that are tried out have their descriptors already.
    """

    def __init__(self, limiter: Any) -> None:
        self._limiter = limiter
        self.is_tight = False
        self.opens = 0

    def may_serve(self) -> bool:
        return True

    def may_serve_exempt(self) -> bool:
        return True

    def may_wait(self, slots: float) -> bool:
        may: bool = self._limiter.admission.budget.may_wait(0)
        return may


class DryRun(LimiterObserver):
    """
    Observes a limiter that serves everybody, and repeats what happens with its settings in force.

    The connections arrive and end when they really do; so who would have waited still ends at its time.
    """

    _log = Logger(namespace="connlimit.limiter")

    def __init__(self, limiter: Any, shadow: Any) -> None:
        """
        :param limiter: serves everybody.
        :param shadow: a limiter with the same settings that nobody else uses.
        """
        self._limiter = limiter
        self._shadow = shadow
        shadow.admission.budget = _SameDescriptors(limiter)
        self._shadows: dict[ref[IOccupant], NullConnection] = {}
        self._collected: list[ref[IOccupant]] = []
        # How many connections found how many others active.
        self._found_active: Counter[int] = Counter()
        self._timer: IDelayedCall | None = None

    def snapshot(self) -> Snapshot:
        """
        What would have happened so far.
        """
        self._forget_collected()
        would: Snapshot = self._shadow.snapshot()
        return would

    @staticmethod
    def tried_out(settings: Mapping[str, Any]) -> dict[str, Any]:
        """
        Those of the settings that are tried out; the others concern connections, which stay as they are.
        """
        return {name: value for name, value in settings.items() if name not in _NOT_TRIED_OUT}

    def reconfigure(self, settings: Mapping[str, Any]) -> None:
        """
        The settings have been changed.
        """
        self._shadow.reconfigure(**self.tried_out(settings))

    def suggested_limit(self) -> int | None:
        """
        The limit at which 99 % of the connections would not have waited; None before there are any.
        """
        wanted = math.ceil(self._found_active.total() * SERVED_AT_ONCE)
        for active in sorted(self._found_active):
            wanted -= self._found_active[active]
            if wanted <= 0:
                return active + 1
        return None

    def report(self) -> None:
        """
        Log what would have happened so far, and which limit would do.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        suggestion = self.suggested_limit()
        if suggestion is not None:
            self._log_summary()
            self._log.info(
                "{limiter}: dry run: with max_connections={suggestion}, 99 % would not have waited",
                limiter=self._limiter.settings.name,
                suggestion=suggestion,
            )

    def served(self, limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        self._forget_collected()
        self._found_active[limiter.active + self._limiter.admission.slots.extra - 1] += 1
        shadow = NullConnection(connection.address)
        self._shadows[ref(connection, self._collected.append)] = shadow
        admission = self._shadow.admission
        weight = getattr(connection, "weight", 1)
        serves = (
            admission.serve_at_once if weight == 1 else partial(admission.serve_heavy_at_once, weight=weight)
        )
        if not serves(shadow) and admission.may_wait(shadow) is None:
            admission.wait(shadow, weight=weight)
        if self._timer is None:
            self._timer = limiter.clock.callLater(_REPORT_INTERVAL, self._minute_over)

    def finished(self, limiter: ILimiter, connection: IOccupant) -> None:
        self._end(self._shadows.pop(ref(connection), None))

    def _end(self, shadow: NullConnection | None) -> None:
        if shadow is not None:
            self._shadow.admission.depart(shadow)
            self._shadow.admission.finish_heavy(shadow)

    def _forget_collected(self) -> None:
        while self._collected:
            self._end(self._shadows.pop(self._collected.pop(), None))

    def _minute_over(self) -> None:
        self._timer = None
        self._log_summary()

    def _log_summary(self) -> None:
        would = self.snapshot()
        self._log.info(
            "{limiter}: dry run: of {accepted} connections, {waited} would have waited"
            " ({mean_wait:.3f} s in the mean), {departed} would have ended before their turn,"
            " {refused} would have been refused; at most {maximum} were active at once",
            limiter=self._limiter.settings.name,
            accepted=would.accepted,
            waited=would.waits + would.waiting + would.departed,
            mean_wait=would.wait_seconds / would.waits if would.waits else 0.0,
            departed=would.departed,
            refused=sum(would.refused.values()),
            maximum=max(self._found_active) + 1,
        )
