"""
What it costs a connection that its protocol provides optional interfaces, which ours must provide too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from twisted.internet import interfaces
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from bench.cases.life import WAYS, cost, life
from bench.harness.processes import in_turn
from bench.harness.results import Figure, Result, Table, ratio


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


def run(quick: bool) -> Iterator[Result]:
    """
    Microseconds per connection for each kind of protocol, and the ratio to one that provides none.
    """
    rounds, number = (3, 200) if quick else (25, 4000)
    lives = {
        (protocol.__name__, way): life(WAYS[way](Factory.forProtocol(protocol)))
        for protocol in (Plain, HalfCloseable, Everything)
        for way in ("bare", "connlimit")
    }
    costs = in_turn(rounds, {key: partial(cost, live, number) for key, live in lives.items()})
    added = {
        name: [
            limited - bare
            for limited, bare in zip(costs[name, "connlimit"], costs[name, "bare"], strict=True)
        ]
        for name in (protocol.__name__ for protocol in (Plain, HalfCloseable, Everything))
    }
    table = Table(
        "interfaces",
        "What limiting adds to a connection in memory, by the interfaces that its protocol provides",
        ("", "microseconds", "of one that provides none"),
    )
    for name, samples in added.items():
        times = "" if name == "Plain" else ratio(samples, added["Plain"], "{:.2f}")
        table.rows.append((name, Figure.of(samples, "{:.2f}"), times))
    yield table
