"""
The limiters of one name in all workers, as one that can be watched.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from heapq import nlargest
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from connlimit._limiter.limiter import Limiter
from connlimit._limiter.settings import Settings
from connlimit._limiter.slots import NullConnection
from connlimit.interfaces import (
    COUNTER,
    FIGURES,
    FLAG,
    FULL,
    MAXIMUM,
    Figure,
    ILimit,
    ILimiter,
    ILimiterObserver,
    IOccupant,
    Snapshot,
)
from connlimit.observers import LimiterObserver
from connlimit.status.watch import PEERS, SHOWN, address_text

#: How many waits are told at once: a message has 64 KiB at most.
_WAITS = 4000

#: How many steps of the look for the busiest peers are made in one turn of the reactor.
_STEPS = 5

#: How many waits are kept until they are told.
_MAX_WAITS = 20_000


#: Stands for a connection of a worker.
_ELSEWHERE = NullConnection(None)


class Reporter(LimiterObserver):
    """
    Tells, in a worker, what a limiter does.
    """

    def __init__(self, limiter: Limiter) -> None:
        self.limiter = limiter
        self._waits: deque[float] = deque(maxlen=_MAX_WAITS)
        self._busiest: list[tuple[Hashable, int, int]] = []
        self._looking: Generator[None, None, list[tuple[Hashable, int, int]]] | None = None
        limiter.add_observer(self)

    def served(self, limiter: ILimiter, connection: IOccupant, waited: float) -> None:
        self._waits.append(round(waited, 4))

    def reports(self) -> Iterator[str]:
        """
        What is to be told now, in one message or more.
        """
        self._look_at_peers()
        facts: dict[str, Any] = {
            "figures": self.limiter.snapshot().figures(),
            "peers": [(str(peer), *counts) for peer, *counts in self._busiest],
            "queue": [(address_text(address), age) for address, age in self.limiter.first_waiting(SHOWN)],
        }
        while True:
            facts["waits"] = [self._waits.popleft() for _ in range(min(_WAITS, len(self._waits)))]
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


@implementer(ILimiter)
class PooledLimiter:
    """
    What the workers' limiters of one name report, all together.
    """

    def __init__(self, own: Limiter) -> None:
        """
        :param own: the limiter of that name in this process, which has the settings and serves nobody.
        """
        self.own = own
        self._reports: dict[object, dict[str, Any]] = {}
        self._ended: dict[str, Any] = {}
        self._observers: list[ILimiterObserver] = []

    def take(self, worker: object, report: str) -> None:
        """
        A worker reports.
        """
        facts = self._reports[worker] = json.loads(report)
        for waited in facts.pop("waits"):
            for observer in self._observers:
                observer.served(self, _ELSEWHERE, waited)

    def forget(self, worker: object) -> None:
        """
        A worker has ended: what it counted stays.
        """
        report = self._reports.pop(worker, None)
        if report is not None:
            figures = report["figures"]
            # Its connections ended with it.
            figures["finished"] += figures["active"]
            figures["departed"] += figures["waiting"]
            self._ended = {
                name: together(figure, [self._ended.get(name), figures[name]])
                for name, figure in FIGURES.items()
                if figure.kind == COUNTER
            }

    @property
    def name(self) -> str:
        return self.own.settings.name

    @property
    def settings(self) -> Settings:
        """
        Those that this process has sent to the workers.
        """
        return self.own.settings

    @property
    def limits(self) -> Sequence[ILimit]:
        """
        Those of this process.
        """
        return self.own.limits

    @property
    def clock(self) -> IReactorTime:
        return self.own.clock

    @property
    def active(self) -> int:
        return sum(report["figures"]["active"] for report in self._reports.values())

    @property
    def waiting(self) -> int:
        return sum(report["figures"]["waiting"] for report in self._reports.values())

    def snapshot(self) -> Snapshot:
        own = self.own.snapshot()
        told = [own.figures(), self._ended, *(report["figures"] for report in self._reports.values())]
        return attrs.evolve(
            own,
            **{
                name: together(figure, [figures.get(name) for figures in told])
                for name, figure in FIGURES.items()
                if figure.kind != FLAG
            },
        )

    def has_room(self) -> bool:
        """
        As far as the number of all connections shows.
        """
        maximum = self.settings.max_connections
        return not self.waiting and self.own.has_room() and (maximum is None or self.active < maximum)

    def limited_by(self, reason: str = FULL, connection: IOccupant | None = None) -> str:
        """
        In the words of this process.
        """
        return self.own.limited_by(reason, connection)

    def busiest_peers(self, count: int) -> list[tuple[Hashable, int, int]]:
        """
        Of those that are among the busiest of a worker.
        """
        active: Counter[str] = Counter()
        waiting: Counter[str] = Counter()
        for report in self._reports.values():
            for peer, served, waits in report["peers"]:
                active[peer] += served
                waiting[peer] += waits
        peers = nlargest(count, active, key=lambda peer: active[peer] + waiting[peer])
        return [(peer, active[peer], waiting[peer]) for peer in peers]

    def find_busiest_peers(self, count: int) -> Generator[None, None, list[tuple[Hashable, int, int]]]:
        """
        There are few, so one step does it.
        """
        yield
        return self.busiest_peers(count)

    def first_waiting(self, count: int) -> list[tuple[str, float]]:
        queue = [(address, age) for report in self._reports.values() for address, age in report["queue"]]
        return nlargest(count, queue, key=lambda each: each[1])

    def add_observer(self, observer: ILimiterObserver) -> None:
        """
        Let an observer hear who is served, and which settings change; nothing else.
        """
        self._observers.append(observer)
        self.own.add_observer(observer)

    def remove_observer(self, observer: ILimiterObserver) -> None:
        self._observers.remove(observer)
        self.own.remove_observer(observer)

    def drain(self, timeout: float | None = None) -> Deferred[None]:
        """
        The workers do it, and the limiter of this process says that it is so.
        """
        return self.own.drain(timeout)


def together(figure: Figure, values: Iterable[Any]) -> Any:
    """
    The values of a figure of several limiters as one; those that are None are not known.
    """
    known = [value for value in values if value is not None]
    if figure.label:
        total: Counter[str] = Counter()
        for value in known:
            total.update(value)
        return dict(total)
    if figure.kind == MAXIMUM:
        return max(known, default=None)
    return sum(known)
