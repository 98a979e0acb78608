"""
A connection's life in memory, without sockets: what a factory and its protocols cost, and nothing else.

As a program it lives so many lives and ends, for somebody who counts its instructions:
python -m bench.cases.life WAY COUNT
"""

from __future__ import annotations

import sys
import time
import timeit
from collections.abc import Callable
from typing import Any

from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.protocols.policies import ThrottlingFactory

from connlimit import Limiter, LimitingFactory


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
    Microseconds of CPU that a life takes, in the mean of so many.
    """
    return timeit.timeit(live, timer=time.process_time, number=number) / number * 1e6


#: How a factory can be wrapped.
WAYS: dict[str, Callable[[Factory], Any]] = {
    "bare": lambda factory: factory,
    "connlimit": lambda factory: LimitingFactory(factory, Limiter(1)),
    "ThrottlingFactory": ThrottlingFactory,
}


def main(way: str, count: str) -> None:
    """
    Live so many lives.
    """
    live = life(WAYS[way](Factory.forProtocol(Protocol)))
    for _ in range(int(count)):
        live()


if __name__ == "__main__":
    main(*sys.argv[1:])
