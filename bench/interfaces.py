"""
What it costs a connection that its protocol provides optional interfaces, which ours must provide too.
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable, Iterator

from twisted.internet import interfaces
from twisted.internet.protocol import Factory, Protocol, connectionDone
from zope.interface import implementer

from connlimit import Limiter, LimitingFactory


class Plain(Protocol):
    """
    Provides nothing but IProtocol.
    """


@implementer(interfaces.IHalfCloseableProtocol)
class HalfCloseable(Protocol):
    """
    Provides one of the interfaces.
    """


@implementer(
    interfaces.IHalfCloseableProtocol, interfaces.IHandshakeListener, interfaces.IFileDescriptorReceiver
)
class Everything(Protocol):
    """
    Provides all of them.
    """


class Transport:
    """
    Stands for a transport, and costs nothing.
    """

    def connectionLost(self, reason: object) -> None: ...


def life(factory: Factory) -> Callable[[], None]:
    """
    A connection's life without its data, as Twisted's transports call it.
    """

    def live() -> None:
        protocol = factory.buildProtocol(None)
        protocol.logPrefix()
        protocol.makeConnection(Transport())
        protocol.connectionLost(connectionDone)

    return live


def run(quick: bool) -> Iterator[str]:
    """
    Microseconds per connection for each kind of protocol, and the ratio to one that provides none.
    """
    rounds, number = (3, 200) if quick else (25, 4000)
    lives = {
        protocol.__name__: (
            life(Factory.forProtocol(protocol)),
            life(LimitingFactory(Factory.forProtocol(protocol), Limiter(1))),
        )
        for protocol in (Plain, HalfCloseable, Everything)
    }
    added: dict[str, list[float]] = {name: [] for name in lives}
    for _ in range(rounds):
        for name, (bare, limited) in lives.items():
            cost = timeit.timeit(limited, number=number) - timeit.timeit(bare, number=number)
            added[name].append(cost / number * 1e6)
    yield "What limiting adds to a connection in memory, by the interfaces that its protocol provides"
    plain = statistics.median(added["Plain"])
    for name, costs in added.items():
        cost = statistics.median(costs)
        yield f"  {name:15} {cost:6.2f} us  {cost / plain:5.2f} x"
