"""
A connection's life in memory, without sockets: what a factory and its protocols cost, and nothing else.

What of that is the limiter's own is a benchmark.

As a program it lives a number of lives and ends, for somebody who counts its instructions:
python -m bench.cases.life WAY COUNT
"""

from __future__ import annotations

import sys
import time
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.protocols.policies import ThrottlingFactory

from bench.harness.processes import in_turn
from bench.harness.results import Figure, Result, Table, ratio
from connlimit import Limiter, LimitingFactory
from connlimit._limiter.slots import NullConnection
from connlimit.observers import LimiterObserver


class Transport:
    """
    Stands for a transport, costs nothing, and tells its protocol of the end as Twisted's do.
    """

    protocol: Any

    def connectionLost(self, reason: object) -> None:
        protocol = self.protocol
        del self.protocol
        protocol.connectionLost(reason)


def life(factory: Any) -> Callable[[], None]:
    """
    A connection's life without its data, as Twisted's transports call it.
    """

    def live() -> None:
        transport = Transport()
        transport.protocol = protocol = factory.buildProtocol(None)
        protocol.logPrefix()
        protocol.makeConnection(transport)
        transport.connectionLost(connectionDone)

    return live


def cost(live: Callable[[], None], number: int) -> float:
    """
    Microseconds of CPU that a life takes, in the mean of a number of them.
    """
    return timeit.timeit(live, timer=time.process_time, number=number) / number * 1e6


#: How a factory can be wrapped.
WAYS: dict[str, Callable[[Factory], Any]] = {
    "bare": lambda factory: factory,
    "connlimit": lambda factory: LimitingFactory(factory, Limiter(1)),
    "ThrottlingFactory": ThrottlingFactory,
}


class Hears(LimiterObserver):
    """
    An observer that hears of every connection.
    """

    def served(self, limiter: Any, connection: Any, waited: float) -> None: ...

    def finished(self, limiter: Any, connection: Any) -> None: ...


#: What a limiter may have to look at when a connection comes, and when it has finished.
LOOKED_AT: dict[str, dict[str, Any]] = {
    "max_connections": {},
    "and max_per_peer": {"max_per_peer": 1000},
    "and max_rate": {"max_rate": 1e9},
    "and idle_timeout": {"idle_timeout": 60},
    "and an observer": {"observers": [Hears()]},
}


def slot(**settings: Any) -> Callable[[], None]:
    """
    A slot that is taken at once and given back, by a connection of which there is nothing else.
    """
    admission = Limiter(1000, **settings).admission
    connection = NullConnection(IPv4Address("TCP", "192.0.2.1", 1))

    def live() -> None:
        admission.serve_at_once(connection)
        admission.finish(connection)

    return live


def run(quick: bool) -> Iterator[Result]:
    """
    What a limiter costs a connection that need not wait, by what it has to look at.
    """
    rounds, number = (3, 200) if quick else (40, 5000)
    lives = {what: slot(**settings) for what, settings in LOOKED_AT.items()}
    costs = in_turn(rounds, {what: partial(cost, live, number) for what, live in lives.items()})
    table = Table("life", "A slot taken at once and given back", ("", "microseconds", "times the first"))
    first = next(iter(costs.values()))
    for what, samples in costs.items():
        table.rows.append((what, Figure.of(samples, "{:.2f}"), ratio(samples, first, "{:.2f}")))
    yield table


def main(way: str, count: str) -> None:
    """
    Live a number of lives.
    """
    live = life(WAYS[way](Factory.forProtocol(Protocol)))
    for _ in range(int(count)):
        live()


if __name__ == "__main__":
    main(*sys.argv[1:])
