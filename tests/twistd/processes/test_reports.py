"""
The limiters of several workers as one.
"""

from __future__ import annotations

import json

from support.clocks import TurnsClock
from twisted.internet.address import IPv4Address

from connlimit import Limiter
from connlimit._limiter.inert import Inert
from connlimit._limiter.peers import exhausted
from connlimit._twistd.processes.reports import PooledLimiter, Reporter


def limiter_with(waiting: int) -> tuple[TurnsClock, Limiter]:
    """
    A limiter for which so many wait, of a hundred peers.
    """
    clock = TurnsClock()
    limiter = Limiter(0, clock=clock, log=False)
    for number in range(waiting):
        limiter.wait(Inert(IPv4Address("TCP", f"192.0.2.{number % 100}", number)))
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


def test_the_busiest_of_all_workers_are_told() -> None:
    _, limiter = limiter_with(300)
    pooled = PooledLimiter(Limiter(0, log=False))
    for worker in range(2):
        for report in Reporter(limiter).reports():
            pooled.take(worker, report)
    assert exhausted(pooled.find_busiest_peers(3)) == pooled.busiest_peers(3)
    assert all(waiting == 6 for _, _, waiting in pooled.busiest_peers(3))
