"""
A relay between clients and a backend that the test drives.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import clientFromString, serverFromString
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from connlimit import Limiter
from connlimit._twistd.targets.relay import RelayFactory
from connlimit._twistd.targets.relay_options import RelayOptions
from support.sockets import Client, listening, patiently, until

LOCAL = "tcp:0:interface=127.0.0.1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.fixturenames.append("way")
    metafunc.parametrize("way", ["in the kernel", "in Python"], indirect=True)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """
    Both ways in which bytes are moved, here and in programs that are run.
    """
    if request.param == "in Python":
        monkeypatch.delattr("os.splice", raising=False)
        (tmp_path / "sitecustomize.py").write_text("import os\nif hasattr(os, 'splice'): del os.splice\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@implementer(IHalfCloseableProtocol)
class Peer(Client):
    """
    A client or a backend that keeps its direction open when the other side closes its own.
    """

    ended = False
    was_reset = False

    def connectionLost(self, reason: Failure) -> None:
        self.was_reset = reason.check(ConnectionLost) is not None
        super().connectionLost(reason)

    def readConnectionLost(self) -> None:
        self.ended = True

    def writeConnectionLost(self) -> None:
        pass


class Backend(Factory):
    """
    A server whose connections are driven by the test.
    """

    noisy = False

    def __init__(self) -> None:
        self.peers: list[Peer] = []

    def buildProtocol(self, addr: object) -> Peer:
        self.peers.append(Peer())
        return self.peers[-1]


class Relayed:
    """
    A limited relay before a backend.
    """

    def __init__(self, limiter: Limiter, backend: Backend, where: str) -> None:
        self.limiter = limiter
        self.backend = backend
        self.where = where
        self.clients: list[Peer] = []

    async def connect(self) -> Peer:
        """
        A client of the relay.
        """
        endpoint = clientFromString(reactor, self.where)
        self.clients.append(await patiently(endpoint.connect(Factory.forProtocol(Peer))))
        return self.clients[-1]

    async def pair(self) -> tuple[Peer, Peer]:
        """
        A client, and the backend's end of its relay.
        """
        known = len(self.backend.peers)
        client = await self.connect()
        await until(lambda: len(self.backend.peers) > known and self.backend.peers[-1].connected)
        return client, self.backend.peers[-1]


@asynccontextmanager
async def relayed(
    maximum: int | None = None, backend_at: str = LOCAL, **options: object
) -> AsyncIterator[Relayed]:
    """
    A relay with so many slots, whose clients and backends end with the context.
    """
    backend = Backend()
    port = await serverFromString(reactor, backend_at).listen(backend)
    host = port.getHost()
    target = f"tcp:127.0.0.1:{host.port}" if hasattr(host, "port") else f"unix:{host.name.decode()}"
    limiter = Limiter(maximum)
    factory = RelayFactory(clientFromString(reactor, target), target, RelayOptions(**options))
    async with listening(limiter, server=factory) as (_, where):
        relay = Relayed(limiter, backend, where)
        try:
            yield relay
        finally:
            await port.stopListening()
            for peer in (*backend.peers, *relay.clients):
                peer.transport.abortConnection()
    await until(lambda: all(peer.is_lost for peer in (*backend.peers, *relay.clients)))


async def client_gone(relay: Relayed, client: Peer) -> None:
    """
    Wait until the relay has let go of its only client.
    """
    await until(lambda: client.ended or client.is_lost)
    client.transport.loseConnection()
    await until(lambda: relay.limiter.active == 0)


class PendingBackend:
    """
    An endpoint that is still connecting, until the test says what comes of it.
    """

    def __init__(self) -> None:
        self.cancelled = False
        self.connecting: Deferred[object] = Deferred(lambda deferred: setattr(self, "cancelled", True))

    def connect(self, factory: Factory) -> Deferred[object]:
        self.factory = factory
        return self.connecting


class RelayTestCase(SynchronousTestCase):
    """
    A relay whose backend is still connecting, until it answers.
    """

    def setUp(self) -> None:
        self.backend = PendingBackend()
        self.clock = Clock()
        self.relay = RelayFactory(self.backend, "backend", clock=self.clock)
        self.client = self.relay.buildProtocol(None)
        self.released: list[None] = []
        self.client.keep_slot(lambda: self.released.append(None))
        self.transport = StringTransport(peerAddress=IPv4Address("TCP", "127.0.0.1", 5))
        self.client.makeConnection(self.transport)

    def answer(self) -> StringTransport:
        """
        The backend accepts; returns the transport to it.
        """
        backend = self.backend.factory.buildProtocol(None)
        transport = StringTransport()
        backend.makeConnection(transport)
        self.backend.connecting.callback(backend)
        return transport
