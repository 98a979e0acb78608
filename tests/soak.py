"""
A soak: random clients against a limited server that fails at random, and proof that nothing was lost.

Run as: python tests/soak.py [--seconds 60] [--seed N] [--clients 100] [--reactor epoll]. It ends with one
line, and with exit code 0 only if no slot, no position in the queue and no descriptor is left behind and the
counters add up.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
from collections.abc import Callable
from contextlib import suppress

ARGUMENTS = argparse.ArgumentParser(description=__doc__)
ARGUMENTS.add_argument("--seconds", type=float, default=60.0, help="how long clients come")
ARGUMENTS.add_argument("--seed", type=int, default=None, help="repeats the choices of an earlier run")
ARGUMENTS.add_argument("--clients", type=int, default=100, help="how many there are at once")
ARGUMENTS.add_argument("--reactor", default="", help="epoll, poll, select or asyncio")
OPTIONS = ARGUMENTS.parse_args()
if OPTIONS.reactor:
    __import__(f"twisted.internet.{OPTIONS.reactor}reactor", fromlist=["install"]).install()

from twisted.internet import reactor, task
from twisted.internet.defer import Deferred, DeferredList, ensureDeferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol, serverFromString
from twisted.internet.error import ConnectionClosed
from twisted.internet.interfaces import IHalfCloseableProtocol, ITransport
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import globalLogBeginner
from twisted.python.failure import Failure
from zope.interface import implementer

from connlimit import Limiter, LimitingEndpoint
from connlimit._limiter.limiter import Snapshot

#: How long anything may take to be cleared up after the last client, in seconds.
PATIENCE = 20.0


class Fault(Exception):
    """
    What the server raises.
    """


class Echo(Protocol):
    def dataReceived(self, data: bytes) -> None:
        self.transport.write(data)


class FailsWhenMade(Echo):
    def connectionMade(self) -> None:
        raise Fault


class FailsOnData(Echo):
    def dataReceived(self, data: bytes) -> None:
        raise Fault


class FailsWhenLost(Echo):
    def connectionLost(self, reason: Failure) -> None:
        raise Fault


class ClosesWhenMade(Echo):
    def connectionMade(self) -> None:
        self.transport.loseConnection()


class AbortsOnData(Echo):
    def dataReceived(self, data: bytes) -> None:
        self.transport.abortConnection()


class IsTakenOver(Echo):
    def dataReceived(self, data: bytes) -> None:
        self.transport.protocol = echo = Echo()
        echo.makeConnection(self.transport)
        echo.dataReceived(data)


class PausesForAMoment(Echo):
    def connectionMade(self) -> None:
        self.transport.pauseProducing()
        reactor.callLater(0.02, self.transport.resumeProducing)


class ForgetsItself(Echo):
    def connectionMade(self) -> None:
        self.transport.pauseProducing()


class HasEnough(Echo):
    def connectionMade(self) -> None:
        reactor.callLater(0.05, self.transport.loseConnection)


@implementer(IHalfCloseableProtocol)
class AnswersHalfClose(Echo):
    def readConnectionLost(self) -> None:
        self.transport.loseWriteConnection()

    def writeConnectionLost(self) -> None: ...


SERVERS: list[type[Protocol] | None] = [
    *[Echo] * 8,
    FailsWhenMade,
    FailsOnData,
    FailsWhenLost,
    ClosesWhenMade,
    AbortsOnData,
    IsTakenOver,
    PausesForAMoment,
    ForgetsItself,
    HasEnough,
    AnswersHalfClose,
    None,
]


class Whatever(Factory):
    """
    Builds one of the servers, or none, or fails.
    """

    noisy = False

    def __init__(self, choices: random.Random) -> None:
        self.choices = choices

    def buildProtocol(self, addr: object) -> Protocol | None:
        if self.choices.random() < 0.02:
            raise Fault
        server = self.choices.choice(SERVERS)
        return server() if server is not None else None


class Client(Protocol):
    """
    A client; *lost* fires when its connection is over.
    """

    def __init__(self) -> None:
        self.lost: Deferred[None] = Deferred()

    def connectionLost(self, reason: Failure) -> None:
        self.lost.callback(None)


def send(transport: ITransport, choices: random.Random) -> None:
    transport.write(os.urandom(choices.choice([1, 100, 50_000])))


#: What a client can do with its connection, besides to end it.
ACTS: list[Callable[..., None]] = [
    send,
    send,
    send,
    lambda transport, choices: transport.loseWriteConnection(),
    lambda transport, choices: transport.pauseProducing(),
    lambda transport, choices: None,
]


async def be_client(port: int, choices: random.Random) -> None:
    """
    Connect, do this and that, and end.
    """
    endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", port)
    client = await connectProtocol(endpoint, Client())
    for _ in range(choices.randrange(4)):
        if client.lost.called:
            return
        choices.choice(ACTS)(client.transport, choices)
        await task.deferLater(reactor, choices.random() * 0.05)
    if not client.lost.called:
        # A reset, mostly: a client that paused itself would not notice the end of an orderly close.
        choices.choice([client.transport.abortConnection, client.transport.loseConnection])()
        reactor.callLater(1, client.transport.abortConnection)
        await client.lost


async def keep_coming(port: int, choices: random.Random, until: float) -> None:
    while reactor.seconds() < until:
        with suppress(ConnectionClosed, OSError):
            await be_client(port, choices)


async def change_limits(limiter: Limiter, choices: random.Random, until: float) -> None:
    while reactor.seconds() < until:
        limiter.reconfigure(
            max_connections=choices.randrange(30),
            max_waiting=choices.choice([None, 0, 10, 50]),
            wait_timeout=choices.choice([None, 0.05, 0.5]),
        )
        await task.deferLater(reactor, choices.random() * 0.2)
    limiter.reconfigure(max_connections=50, max_waiting=None, wait_timeout=1)


async def have_one_wait(limiter: Limiter, port: int) -> None:
    """
    Let the limiter open what it needs to have somebody wait.
    """
    limiter.max_connections = 0
    client = await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", port), Client())
    while not limiter.waiting:
        await task.deferLater(reactor, 0.01)
    client.transport.abortConnection()
    while limiter.waiting:
        await task.deferLater(reactor, 0.01)
    limiter.max_connections = 10


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def faults(limiter: Limiter, extra: int) -> list[str]:
    """
    What was lost.
    """
    now: Snapshot = limiter.snapshot()
    found = [
        f"{count} {what}"
        for count, what in ((now.active, "active"), (now.waiting, "waiting"), (extra, "descriptors"))
        if count
    ]
    if now.accepted != now.finished + now.departed + sum(now.refused.values()):
        found.append("connections that are not accounted for")
    if not now.accepted:
        found.append("no connection at all")
    return found


async def main(reactor: object) -> None:
    """
    Soak, and exit with 1 if something was lost.
    """
    seed = OPTIONS.seed if OPTIONS.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    # What the server raises is logged, and must not be kept: tracebacks hold connections it has forgotten.
    globalLogBeginner.beginLoggingTo([lambda event: None], redirectStandardIO=False, discardBuffer=True)
    choices = random.Random(seed)
    limiter = Limiter(10)
    endpoint = serverFromString(reactor, "tcp:0:interface=127.0.0.1:backlog=1000")
    port = await LimitingEndpoint(endpoint, limiter).listen(Whatever(choices))
    await task.deferLater(reactor, 0)  # the reactor runs, and has opened all it wants
    await have_one_wait(limiter, port.getHost().port)
    before = descriptors()
    until = reactor.seconds() + OPTIONS.seconds
    crowd = [
        ensureDeferred(keep_coming(port.getHost().port, random.Random(choices.random()), until))
        for _ in range(OPTIONS.clients)
    ]
    await DeferredList(
        [*crowd, ensureDeferred(change_limits(limiter, choices, until))], fireOnOneErrback=True
    )
    gc.collect()
    began = reactor.seconds()
    while reactor.seconds() - began < PATIENCE:
        if not limiter.active and not limiter.waiting and descriptors() == before:
            break
        await task.deferLater(reactor, 0.05)
        gc.collect()
    await port.stopListening()
    await task.deferLater(reactor, 0)
    found = faults(limiter, descriptors() + 1 - before)
    now = limiter.snapshot()
    print(
        f"{now.accepted} accepted = {now.finished} finished + {sum(now.refused.values())} refused + "
        f"{now.departed} departed; {now.waits} had waited, {now.reclaimed} slots were reclaimed; "
        + (f"LOST: {', '.join(found)}" if found else "nothing is left behind")
    )
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    task.react(main)
