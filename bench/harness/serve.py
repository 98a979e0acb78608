"""
The servers that are compared, as programs: python -m bench.harness.serve KIND WAY prints the port and serves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol
from twisted.protocols import policies

from connlimit import Limiter, LimitingFactory
from connlimit._system import descriptors

#: More than any load connects.
CROWD = 10_000

#: A backlog that no load fills.
BACKLOG = 4096


class Echo(Protocol):
    """
    Returns what it gets.
    """

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


def echo() -> Factory:
    """
    A server that returns what it gets.
    """
    return Factory.forProtocol(Echo)


def site() -> Factory:
    """
    A web site with one small page.
    """
    from twisted.web.resource import Resource
    from twisted.web.server import Site

    class Page(Resource):
        isLeaf = True

        def render_GET(self, request: Any) -> bytes:
            return b"a small page"

    return Site(Page())


def _total(factory: Factory) -> Factory:
    limited = policies.LimitTotalConnectionsFactory()
    limited.protocol = factory.protocol
    limited.connectionLimit = CROWD
    return limited


def _by_peer(factory: Factory) -> Factory:
    limited = policies.LimitConnectionsByPeer(factory)
    limited.maxConnectionsPerPeer = CROWD
    return limited


#: What stands between the port and the server.
WAYS: dict[str, Callable[[Factory], Any]] = {
    "bare": lambda factory: factory,
    "connlimit": lambda factory: LimitingFactory(factory, Limiter(CROWD)),
    "WrappingFactory": policies.WrappingFactory,
    "ThrottlingFactory": lambda factory: policies.ThrottlingFactory(factory, CROWD),
    "LimitTotalConnectionsFactory": _total,
    "LimitConnectionsByPeer": _by_peer,
    "TimeoutFactory": lambda factory: policies.TimeoutFactory(factory, 600),
}

KINDS = {"echo": echo, "site": site}


def main(kind: str, way: str, backlog: str = str(BACKLOG)) -> None:
    """
    Serve until killed.
    """
    descriptors.raise_limit()
    factory = KINDS[kind]()
    factory.noisy = False
    endpoint = serverFromString(reactor, f"tcp:0:interface=127.0.0.1:backlog={backlog}")
    endpoint.listen(WAYS[way](factory)).addCallbacks(
        lambda port: print(port.getHost().port, flush=True), lambda failure: failure.printTraceback()
    )
    reactor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
