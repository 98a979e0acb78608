"""
The limiters of one name in all workers, as one that can be watched.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Generator, Hashable, Iterator
from heapq import nlargest
from typing import Any

import attrs
from twisted.internet.defer import Deferred, succeed

from connlimit._limiter.limiter import Limiter
from connlimit.interfaces import IConnection, ILimiter, Snapshot
from connlimit.observers import LimiterObserver
from connlimit.status.watch import PEERS, SHOWN, address_text

#: What is added up over the workers: counts of now, and counts since the start.
_GAUGES = ("active", "waiting", "exempt")
_COUNTERS = (
    "accepted",
    "served",
    "finished",
    "departed",
    "waits",
    "wait_seconds",
    "reclaimed",
    "idle_closed",
    "exempted",
)

#: How many waits are told at once: a message has 64 KiB at most.
_WAITS = 4000

#: How many steps of the look for the busiest peers are made in one turn of the reactor.
_STEPS = 5

#: How many waits are kept until they are told.
_MOST_WAITS = 20_000


class Reporter(LimiterObserver):
    """
    Tells, in a worker, what a limiter does.
    """

    def __init__(self, limiter: Limiter) -> None:
        self.limiter = limiter
        self._waits: deque[float] = deque(maxlen=_MOST_WAITS)
        self._busiest: list[tuple[Hashable, int, int]] = []
        self._looking: Generator[None, None, list[tuple[Hashable, int, int]]] | None = None
        limiter.add_observer(self)

    def served(self, limiter: ILimiter, connection: IConnection, waited: float) -> None:
        """
        See `ILimiterObserver.served`.
        """
        self._waits.append(round(waited, 4))

    def reports(self) -> Iterator[str]:
        """
        What is to be told now, in one message or more.
        """
        limiter, now = self.limiter, self.limiter.snapshot()
        facts = {name: getattr(now, name) for name in (*_GAUGES, *_COUNTERS, "longest_wait")}
        facts["refused"] = dict(now.refused)
        self._look_at_peers()
        facts["peers"] = [(str(peer), *counts) for peer, *counts in self._busiest]
        facts["line"] = [(address_text(address), age) for address, age in limiter.first_waiting(SHOWN)]
        while True:
            facts["waits_told"] = [self._waits.popleft() for _ in range(min(_WAITS, len(self._waits)))]
            yield json.dumps(facts)
            if not self._waits:
                return

    def _look_at_peers(self) -> None:
        """
        Find the busiest peers: at once if there are few connections, for the next report if there are many.
        """
        if self._looking is None:
            self._looking = self.limiter.find_busiest_peers(PEERS)
            self._go_on_looking()

    def _go_on_looking(self) -> None:
        assert self._looking is not None
        try:
            for _ in range(_STEPS):
                next(self._looking)
        except StopIteration as end:
            self._busiest, self._looking = end.value, None
        else:
            self.limiter.clock.callLater(0, self._go_on_looking)


class PooledLimiter:
    """
    What the workers' limiters of one name report, all together; in all else a limiter that nobody uses.
    """

    def __init__(self, own: Limiter) -> None:
        """
        :param own: the limiter of that name in this process.
        """
        self.own = own
        self._reports: dict[object, dict[str, Any]] = {}
        self._ended: Counter[str] = Counter()
        self._refused_ended: Counter[str] = Counter()
        self._observers: list[Any] = []
        self._draining = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def take(self, worker: object, report: str) -> None:
        """
        A worker reports.
        """
        facts = self._reports[worker] = json.loads(report)
        for waited in facts.pop("waits_told"):
            for observer in self._observers:
                observer.served(self.own, None, waited)

    def forget(self, worker: object) -> None:
        """
        A worker has ended: what it counted stays.
        """
        facts = self._reports.pop(worker, None)
        if facts is not None:
            # Its connections ended with it.
            facts["finished"] += facts["active"]
            facts["departed"] += facts["waiting"]
            self._ended.update({name: facts[name] for name in _COUNTERS})
            self._refused_ended.update(facts["refused"])

    @property
    def active(self) -> int:
        """
        See `Limiter.active`.
        """
        return sum(facts["active"] for facts in self._reports.values())

    @property
    def waiting(self) -> int:
        """
        See `Limiter.waiting`.
        """
        return sum(facts["waiting"] for facts in self._reports.values())

    def snapshot(self) -> Snapshot:
        """
        See `Limiter.snapshot`.
        """
        reports = self._reports.values()
        refused = Counter(self._refused_ended)
        for facts in reports:
            refused.update(facts["refused"])
        own = self.own.snapshot()
        sums = {name: sum(facts[name] for facts in reports) for name in _GAUGES}
        sums |= {name: self._ended[name] + sum(facts[name] for facts in reports) for name in _COUNTERS}
        return attrs.evolve(
            own,
            **sums,
            refused={**own.refused, **refused},
            longest_wait=max((facts["longest_wait"] for facts in reports), default=0.0),
            draining=self._draining,
        )

    def busiest_peers(self, count: int) -> list[tuple[str, int, int]]:
        """
        See `Limiter.busiest_peers`: of those that are among the busiest of a worker.
        """
        active: Counter[str] = Counter()
        waiting: Counter[str] = Counter()
        for facts in self._reports.values():
            for peer, served, waits in facts["peers"]:
                active[peer] += served
                waiting[peer] += waits
        peers = nlargest(count, active, key=lambda peer: active[peer] + waiting[peer])
        return [(peer, active[peer], waiting[peer]) for peer in peers]

    def find_busiest_peers(self, count: int) -> Generator[None, None, list[tuple[str, int, int]]]:
        """
        See `Limiter.find_busiest_peers`. There are few, so one step does it.
        """
        yield
        return self.busiest_peers(count)

    def first_waiting(self, count: int) -> list[tuple[str, float]]:
        """
        See `Limiter.first_waiting`.
        """
        line = [(address, age) for facts in self._reports.values() for address, age in facts["line"]]
        return nlargest(count, line, key=lambda each: each[1])

    def add_observer(self, observer: Any) -> None:
        """
        Let an observer hear of those who are served; nothing else is told of each.
        """
        self._observers.append(observer)

    def remove_observer(self, observer: Any) -> None:
        """
        See `Limiter.remove_observer`.
        """
        self._observers.remove(observer)

    def drain(self, timeout: float | None = None) -> Deferred[None]:
        """
        See `Limiter.drain`: the workers do it.
        """
        self._draining = True
        return succeed(None)
