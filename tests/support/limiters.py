"""
A limiter and its clients, without sockets.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from connlimit import Limiter, LimitingFactory
from connlimit._limiter.slots import NullConnection
from connlimit.interfaces import IOccupant
from connlimit.limits import Key
from support.fakes import FakeConnection, RecordingFactory


class LimiterTestCase(SynchronousTestCase):
    """
    A limiter before one recording factory, and clients by the number.
    """

    def limited(self, *args: object, **settings: object) -> Limiter:
        self.clock = settings.setdefault("clock", Clock())
        self.limiter = Limiter(*args, **settings)
        self.server = RecordingFactory()
        self.factory = LimitingFactory(self.server, self.limiter)
        self.clients: list[FakeConnection] = []
        return self.limiter

    def connect(self, count: int = 1, **how: object) -> list[FakeConnection]:
        new = [
            FakeConnection(self.clock, number=len(self.clients) + index, **how).connect(self.factory)
            for index in range(count)
        ]
        self.clients += new
        self.turn()
        return new

    def turn(self) -> None:
        """
        Let everything happen that is due.
        """
        while any(call.getTime() <= self.clock.seconds() for call in self.clock.getDelayedCalls()):
            self.clock.advance(0)

    def close(self, *clients: FakeConnection) -> None:
        for client in clients:
            client.close()
        self.turn()

    def served(self) -> list[int]:
        """
        The numbers of the clients that were served, in the order of their turns.
        """
        return [address.port - 10000 for address in self.server.addresses]

    def assert_counts(self, **expected: object) -> None:
        snapshot = self.limiter.snapshot()
        refused = {reason: count for reason, count in snapshot.refused.items() if count}
        actual = {name: refused if name == "refused" else getattr(snapshot, name) for name in expected}
        self.assertEqual(actual, expected)
        self.assertEqual(
            snapshot.accepted,
            snapshot.active
            + snapshot.waiting
            + snapshot.finished
            + snapshot.departed
            + sum(snapshot.refused.values()),
        )


class Socket(NullConnection):
    """
    A connection with a socket of which the kernel tells.
    """

    def __init__(self, number: int, host: str = "127.0.0.1") -> None:
        super().__init__(IPv4Address("TCP", host, number))
        self.idle_for: float | None = 0.0
        self.dead = self.closed = False

    def idle(self) -> float | None:
        return self.idle_for

    def is_dead(self) -> bool:
        return self.dead

    def close(self) -> None:
        self.closed = True


@implementer(IOccupant)
class Work:
    """
    An occupant that is no connection.

    :ivar events: what its limiter told it.
    """

    factory: Any = None
    slot: Any = None

    def __init__(self, limiter: Limiter, key: object = None) -> None:
        self.address = Key(key)
        self.events: list[str] = []
        self._limiter = limiter

    def begin(self) -> Work:
        admission = self._limiter.admission
        if not admission.serve_at_once(self) and admission.may_wait(self) is None:
            admission.wait(self)
        return self

    def serve(self) -> None:
        self.events.append("serve")

    def refuse(self, reason: str) -> None:
        self.events.append(f"refuse {reason}")

    def abort(self) -> None:
        self.events.append("abort")
        self._limiter.admission.finish(self)


class SocketsTestCase(SynchronousTestCase):
    """
    A limiter, and connections without protocols that have sockets.
    """

    def limited(self, *args: object, **settings: object) -> Limiter:
        self.clock = Clock()
        self.limiter = Limiter(*args, clock=self.clock, **settings)
        self.sockets: list[Socket] = []
        return self.limiter

    def connect(self, count: int = 1, host: str = "127.0.0.1") -> list[Socket]:
        new = [Socket(len(self.sockets) + number, host) for number in range(count)]
        self.sockets += new
        for each in new:
            if (
                not self.limiter.admission.serve_at_once(each)
                and self.limiter.admission.may_wait(each) is None
            ):
                self.limiter.admission.wait(each)
        return new

    def closed(self) -> list[int]:
        return [number for number, each in enumerate(self.sockets) if each.closed]
