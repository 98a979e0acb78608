"""
The limiters of several workers as one.
"""

from __future__ import annotations

import json

from support.clocks import TurnsClock
from twisted.internet.address import IPv4Address
from zope.interface.verify import verifyObject

from connlimit import Limiter
from connlimit._limiter.peers import exhausted
from connlimit._limiter.slots import NullConnection
from connlimit._twistd.processes.reports import PooledLimiter, Reporter
from connlimit.interfaces import IConnection, ILimiter
from connlimit.observers import LimiterObserver


def limiter_with(waiting: int) -> tuple[TurnsClock, Limiter]:
    """
    A limiter for which so many wait, of a hundred peers.
    """
    clock = TurnsClock()
    limiter = Limiter(0, clock=clock, log=False)
    for number in range(waiting):
        limiter.admission.wait(NullConnection(IPv4Address("TCP", f"192.0.2.{number % 100}", number)))
    return clock, limiter


def peers(reporter: Reporter) -> list[list[object]]:
    return [json.loads(report)["peers"] for report in reporter.reports()][-1]


def test_a_worker_tells_the_busiest_peers_of_a_few_connections_at_once() -> None:
    _, limiter = limiter_with(200)
    assert [counts for _, *counts in peers(Reporter(limiter))] == [[0, 2]] * 10


def test_a_worker_looks_at_thousands_of_connections_in_turns() -> None:
    clock, limiter = limiter_with(5000)
    reporter = Reporter(limiter)
    assert peers(reporter) == []
    turns = 0
    while reporter._looking is not None:
        clock.advance(clock.turn)
        turns += 1
    assert turns >= 5000 / 200 / 5 - 1
    assert [counts for _, *counts in peers(reporter)] == [[0, 50]] * 10


def test_the_workers_together_are_a_limiter() -> None:
    pooled = PooledLimiter(Limiter(3, name="web"))
    verifyObject(ILimiter, pooled)
    assert (pooled.name, pooled.settings.max_connections, pooled.limits) == ("web", 3, ())
    assert not hasattr(pooled, "serve_at_once")


def test_the_workers_together_have_room_as_long_as_none_waits_and_slots_are_left() -> None:
    _, limiter = limiter_with(0)
    limiter.max_connections = 1
    pooled = PooledLimiter(Limiter(2, log=False))
    assert pooled.has_room()
    connection = NullConnection(None)
    limiter.admission.serve_at_once(connection)
    for worker, expected in enumerate((True, False)):
        for report in Reporter(limiter).reports():
            pooled.take(worker, report)
        assert pooled.has_room() == expected
    pooled.forget(1)
    assert pooled.has_room()
    pooled.drain()
    assert pooled.snapshot().draining
    assert not pooled.has_room()


def test_what_a_worker_counted_stays_when_it_ends() -> None:
    _, limiter = limiter_with(3)
    pooled = PooledLimiter(Limiter(0, log=False))
    for report in Reporter(limiter).reports():
        pooled.take("worker", report)
    before = pooled.snapshot()
    assert (before.accepted, before.waiting, before.departed) == (3, 3, 0)
    pooled.forget("worker")
    after = pooled.snapshot()
    assert (after.accepted, after.waiting, after.departed) == (3, 0, 3)
    assert after.refused == limiter.snapshot().refused
    assert pooled.limited_by() == "max_connections is 0"


def test_an_observer_hears_who_is_served_by_workers_and_of_changed_settings() -> None:
    heard: list[object] = []

    class Hears(LimiterObserver):
        def served(self, limiter: ILimiter, connection: IConnection, waited: float) -> None:
            heard.append((limiter, waited))

        def reconfigured(self, limiter: ILimiter, changes: object) -> None:
            heard.append(changes)

    own, (_, limiter) = Limiter(1, log=False), limiter_with(0)
    pooled, observer = PooledLimiter(own), Hears()
    pooled.add_observer(observer)
    reporter = Reporter(limiter)
    limiter.max_connections = 1
    limiter.admission.serve_at_once(NullConnection(None))
    reporter.served(limiter, NullConnection(None), 0.5)
    for report in reporter.reports():
        pooled.take("worker", report)
    own.max_connections = 2
    assert heard == [(pooled, 0.0), (pooled, 0.5), {"max_connections": (1, 2)}]
    pooled.remove_observer(observer)
    own.max_connections = 3
    assert len(heard) == 3


def test_the_busiest_of_all_workers_are_told() -> None:
    _, limiter = limiter_with(300)
    pooled = PooledLimiter(Limiter(0, log=False))
    for worker in range(2):
        for report in Reporter(limiter).reports():
            pooled.take(worker, report)
    assert exhausted(pooled.find_busiest_peers(3)) == pooled.busiest_peers(3)
    assert all(waiting == 6 for _, _, waiting in pooled.busiest_peers(3))
