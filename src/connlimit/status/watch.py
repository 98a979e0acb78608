"""
Watches a limiter: its last ten minutes, and how long its clients wait.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import attrs

from connlimit.interfaces import FIGURES, ILimiter, IOccupant
from connlimit.limits import Key
from connlimit.observers import LimiterObserver

#: Seconds between samples, and how many are kept: ten minutes.
INTERVAL = 1.0
SAMPLES = 600

#: The upper bounds of the histogram of waiting times, in seconds.
BUCKETS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

#: Of how many of the last served connections the percentiles are.
_LAST = 1000

#: How many of the queue and of the busiest peers are shown.
SHOWN = 50
PEERS = 10


@attrs.frozen
class Sample:
    """
    What there was in one second: connections at its end, and refusals during it.
    """

    active: int
    waiting: int
    refused: int


class Watch(LimiterObserver):
    """
    One limiter, as its observer and sampled once a second.

    :ivar samples: the last ten minutes, oldest first.
    :ivar counts: how many of the served waited up to each of `BUCKETS`, and how many longer.
    :ivar total: how many seconds they have waited in all.
    """

    def __init__(
        self, limiter: ILimiter, name: str | None = None, changed: Callable[[], None] = lambda: None
    ) -> None:
        """
        :param name: what it is called where it is shown; its own name if not given.
        :param changed: called when settings have been changed.
        """
        self._changed = changed
        self.limiter = limiter
        self.name = limiter.name if name is None else name
        self.samples: deque[Sample] = deque(maxlen=SAMPLES)
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0
        self._last: deque[float] = deque(maxlen=_LAST)
        self._refused = sum(limiter.snapshot().refused.values())
        limiter.add_observer(self)

    def served(self, limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        self.counts[bisect_left(BUCKETS, waited)] += 1
        self.total += waited
        self._last.append(waited)

    def reconfigured(self, limiter: ILimiter, changes: dict[str, tuple[Any, Any]]) -> None:
        self._changed()

    def sample(self) -> None:
        """
        Take a sample.
        """
        refused = sum(self.limiter.snapshot().refused.values())
        self.samples.append(Sample(self.limiter.active, self.limiter.waiting, refused - self._refused))
        self._refused = refused

    def percentiles(self) -> dict[str, float]:
        """
        The 50th, 90th and 99th percentile of the last thousand waits, in seconds.
        """
        waits = sorted(self._last)
        return {f"p{p}": waits[len(waits) * p // 100] if waits else 0.0 for p in (50, 90, 99)}

    def facts(self) -> dict[str, Any]:
        """
        Everything there is to tell but for peers, as JSON can say it. Costs the same however many wait.
        """
        settings = self.limiter.settings
        return {
            "name": self.name,
            **{
                figure.setting: getattr(settings, figure.setting)
                for figure in FIGURES.values()
                if figure.setting
            },
            **self.limiter.snapshot().figures(),
            "percentiles": self.percentiles(),
        }

    async def peers(self, turn: Callable[[], Awaitable[object]]) -> dict[str, Any]:
        """
        The busiest peers and the first of those who wait. Looks at all connections, some at a time.

        :param turn: gives others their turn.
        """
        looking = self.limiter.find_busiest_peers(PEERS)
        while True:
            try:
                next(looking)
            except StopIteration as end:
                busiest = end.value
                break
            await turn()
        return {
            "peers": [
                {"peer": str(peer), "active": active, "waiting": waiting} for peer, active, waiting in busiest
            ],
            "queue": [
                {"address": address_text(address), "age": age}
                for address, age in self.limiter.first_waiting(SHOWN)
            ],
        }

    def history(self) -> dict[str, list[int]]:
        """
        The samples, by what was sampled.
        """
        return {
            name: [getattr(sample, name) for sample in self.samples]
            for name in ("active", "waiting", "refused")
        }

    def close(self) -> None:
        """
        Watch no more.
        """
        self.limiter.remove_observer(self)


def address_text(address: Any) -> str:
    """
    An address as it is shown.
    """
    if isinstance(address, (str, Key)):  # it comes from a worker, or is no connection's
        return str(address)
    host = getattr(address, "host", None)
    if host is None:
        return "UNIX socket" if getattr(address, "uid", None) is None else f"UNIX user {address.uid}"
    return f"[{host}]:{address.port}" if ":" in host else f"{host}:{address.port}"
