"""
Real sockets within the test's own reactor: a limited echo server, and clients that do what they are told.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from twisted.internet import reactor, task
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import (
    TCP4ServerEndpoint,
    clientFromString,
    connectProtocol,
    serverFromString,
)
from twisted.internet.interfaces import IStreamClientEndpoint, IStreamServerEndpoint
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure

from connlimit import Limiter, LimitingEndpoint
from support.fakes import RecordingFactory

#: Seconds after which a test has waited too long.
PATIENCE = 20.0


class Client(Protocol):
    """
    A client that keeps what it receives.

    :ivar received: all of it.
    :ivar lost: fires when the connection is over.
    """

    def __init__(self) -> None:
        self.received = b""
        self.is_lost = False
        self.lost: Deferred[None] = Deferred()
        self._wanted: tuple[int, Deferred[None]] | None = None

    def dataReceived(self, data: bytes) -> None:
        self.received += data
        self._check()

    def connectionLost(self, reason: Failure) -> None:
        self.is_lost = True
        self._check()
        self.lost.callback(None)

    async def receives(self, data: bytes) -> None:
        """
        Wait until exactly this has been received in all.
        """
        self._wanted = len(data), Deferred()
        self._check()
        await patiently(self._wanted[1])
        assert self.received == data

    async def is_closed(self) -> None:
        """
        Wait until the server has closed the connection.
        """
        if not self.is_lost:
            await patiently(self.lost)

    async def close(self) -> None:
        """
        Close the connection.
        """
        self.transport.loseConnection()
        await self.is_closed()

    def _check(self) -> None:
        if self._wanted is not None and (self.is_lost or len(self.received) >= self._wanted[0]):
            deferred = self._wanted[1]
            if not deferred.called:
                deferred.callback(None)


def patiently(deferred: Deferred[object]) -> Awaitable[object]:
    """
    The Deferred, which must not take too long.
    """
    return deferred.addTimeout(PATIENCE, reactor)


async def until(condition: Callable[[], object]) -> None:
    """
    Wait until something is true that no event tells.
    """
    began = reactor.seconds()
    while not condition():
        assert reactor.seconds() - began < PATIENCE
        await task.deferLater(reactor, 0.005)


async def connected(endpoint: str | IStreamClientEndpoint) -> Client:
    """
    A client that is connected to the endpoint.
    """
    if isinstance(endpoint, str):
        endpoint = clientFromString(reactor, endpoint)
    return await patiently(connectProtocol(endpoint, Client()))


async def all_connected(endpoint: str, count: int) -> list[Client]:
    """
    So many clients, connected in this order.
    """
    return [await connected(endpoint) for _ in range(count)]


async def all_closed(clients: Sequence[Client]) -> None:
    """
    Wait until the server has closed all these connections.
    """
    await patiently(gatherResults([client.lost for client in clients]))


@asynccontextmanager
async def listening(
    limiter: Limiter, where: str | IStreamServerEndpoint = "tcp:0:interface=127.0.0.1", server: object = None
) -> AsyncIterator[tuple[RecordingFactory, str]]:
    """
    A limited echo server, and the endpoint string of its clients. All its connections end with the context.
    """
    server = server or RecordingFactory()
    if isinstance(where, str):
        where = serverFromString(reactor, where)
    port = await LimitingEndpoint(where, limiter).listen(server)
    host = port.getHost()
    try:
        yield server, f"tcp:127.0.0.1:{host.port}" if hasattr(host, "port") else f"unix:{host.name.decode()}"
    finally:
        await port.stopListening()
        await patiently(limiter.drain(0))


def tcp(port: int = 0) -> TCP4ServerEndpoint:
    """
    An endpoint that listens on loopback.
    """
    return TCP4ServerEndpoint(reactor, port, interface="127.0.0.1")
