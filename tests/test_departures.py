"""
A client that goes away while it waits is noticed when it goes.
"""

from __future__ import annotations

import select
import socket
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pytest_twisted import ensureDeferred
from sockets import connected, listening, patiently, until, wrap_server_tls
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol

from connlimit import Limiter, LimitingFactory, _departures

KINDS = ["the kernel's word", "looks"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """
    How departures are noticed.
    """
    if request.param == "looks":
        monkeypatch.setattr(_departures, "_of_reactors", {reactor: _departures.Looks(reactor)})
        monkeypatch.setattr(_departures, "_LOOK_INTERVAL", 0.05)
    return request.param


def connect(where: str, data: bytes = b"") -> socket.socket:
    """
    A client that has sent this.
    """
    if where.startswith("unix:"):
        client = socket.socket(socket.AF_UNIX)
        client.connect(where.removeprefix("unix:"))
    else:
        client = socket.create_connection(("127.0.0.1", int(where.rpartition(":")[2])))
    if data:
        client.sendall(data)
    return client


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@ensureDeferred
async def test_a_client_that_closes_having_sent_nothing_has_departed(kind: str) -> None:
    limiter = Limiter(0)
    async with listening(limiter) as (server, where):
        client = connect(where)
        await until(lambda: limiter.waiting == 1)
        client.close()
        await until(lambda: limiter.waiting == 0)
        assert limiter.snapshot().departed == 1
        assert server.addresses == []


@pytest.mark.parametrize("data", [b"", b"sent before"])
@ensureDeferred
async def test_a_client_that_resets_has_departed(kind: str, data: bytes) -> None:
    limiter = Limiter(0)
    async with listening(limiter) as (_, where):
        client = connect(where, data)
        await until(lambda: limiter.waiting == 1)
        reset(client)
        await until(lambda: limiter.waiting == 0)
        assert limiter.snapshot().departed == 1


@ensureDeferred
async def test_what_a_client_sent_before_it_closed_is_delivered_at_its_turn(kind: str) -> None:
    limiter = Limiter(0)
    async with listening(limiter) as (server, where):
        client, other = connect(where, b"the log"), connect(where)
        await until(lambda: limiter.waiting == 2)
        client.close()
        other.close()
        await until(lambda: limiter.snapshot().departed == 1)
        limiter.max_connections = 1
        await until(lambda: server.events == ["made", b"the log", "lost"])
        assert limiter.snapshot().finished == 1


@ensureDeferred
async def test_a_client_that_sent_something_and_closed_has_departed_if_the_setting_says_so(kind: str) -> None:
    limiter = Limiter(0, departed_on_half_close=True)
    async with listening(limiter) as (_, where):
        client = connect(where, b"something")
        await until(lambda: limiter.waiting == 1)
        client.shutdown(socket.SHUT_WR)
        await until(lambda: limiter.waiting == 0)
        client.close()


@ensureDeferred
async def test_a_client_that_closed_its_direction_and_then_resets_has_departed(kind: str) -> None:
    limiter = Limiter(0)
    async with listening(limiter) as (_, where):
        client, other = connect(where, b"something"), connect(where)
        await until(lambda: limiter.waiting == 2)
        client.shutdown(socket.SHUT_WR)
        other.close()
        await until(lambda: limiter.snapshot().departed == 1)
        reset(client)
        await until(lambda: limiter.snapshot().departed == 2)


@ensureDeferred
async def test_a_client_that_sends_more_and_more_stays(kind: str) -> None:
    limiter = Limiter(0)
    async with listening(limiter) as (server, where):
        client, other = connect(where, b"one"), connect(where)
        await until(lambda: limiter.waiting == 2)
        client.sendall(b"two")
        other.close()
        await until(lambda: limiter.snapshot().departed == 1)
        client.sendall(b"three")
        assert limiter.waiting == 1
        limiter.max_connections = 1
        await until(lambda: b"".join(server.events[1:]) == b"onetwothree")
        client.close()


@pytest.mark.parametrize("data", [b"", b"something"])
@ensureDeferred
async def test_on_a_unix_socket_it_is_the_same(data: bytes, tmp_path: Path) -> None:
    limiter = Limiter(0)
    async with listening(limiter, f"unix:{tmp_path / 'socket'}") as (server, where):
        client, other = connect(where, data), connect(where)
        await until(lambda: limiter.waiting == 2)
        client.close()
        other.close()
        await until(lambda: limiter.snapshot().departed == (1 if data else 2))
        limiter.max_connections = 1
        await until(lambda: server.events == (["made", data, "lost"] if data else []))
        assert limiter.waiting == 0


@ensureDeferred
async def test_a_tls_client_that_closed_has_departed_in_any_case(kind: str, certificate: Path) -> None:
    ssl = pytest.importorskip("twisted.internet.ssl")
    context = ssl.DefaultOpenSSLContextFactory(str(certificate), str(certificate))
    limiter = Limiter(0)
    tcp = serverFromString(reactor, "tcp:0:interface=127.0.0.1")
    async with listening(limiter, wrap_server_tls(context, tcp)) as (_, where):
        client = connect(where, b"\x16\x03\x01 some of a ClientHello")
        await until(lambda: limiter.waiting == 1)
        client.close()
        await until(lambda: limiter.waiting == 0)
        assert limiter.snapshot().departed == 1


@ensureDeferred
async def test_tls_inside_of_the_limiter_is_known_too(kind: str, certificate: Path) -> None:
    ssl = pytest.importorskip("twisted.internet.ssl")
    from twisted.protocols.tls import TLSMemoryBIOFactory

    context = ssl.DefaultOpenSSLContextFactory(str(certificate), str(certificate))
    limiter = Limiter(0)
    server = TLSMemoryBIOFactory(context, False, Factory.forProtocol(Protocol))
    async with listening(limiter, server=server) as (_, where):
        client = connect(where, b"\x16\x03\x01 some of a ClientHello")
        await until(lambda: limiter.waiting == 1)
        client.close()
        await until(lambda: limiter.waiting == 0)


@ensureDeferred
async def test_a_number_that_is_given_again_is_not_mistaken() -> None:
    limiter = Limiter(0, wait_timeout=0.05)
    async with listening(limiter) as (_, where):
        for _ in range(5):
            client = await connected(where)
            await client.is_closed()
        limiter.wait_timeout = None
        client = await connected(where)
        await until(lambda: limiter.waiting == 1)
        await client.close()
        await until(lambda: limiter.waiting == 0)
        snapshot = limiter.snapshot()
        assert (snapshot.refused["timeout"], snapshot.departed) == (5, 1)


@ensureDeferred
async def test_while_nobody_waits_the_reactor_has_nothing_of_it() -> None:
    limiter = Limiter(1)
    async with listening(limiter) as (_, where):
        departures = _departures.of(reactor)
        assert departures not in reactor.getReaders()
        clients = [await connected(where) for _ in range(2)]
        await until(lambda: limiter.waiting == 1)
        assert departures in reactor.getReaders()
        await clients[1].close()
        await until(lambda: departures not in reactor.getReaders())
        await clients[0].close()


SCRIPT = """
import sys, importlib
importlib.import_module("twisted.internet." + sys.argv[1] + "reactor").install()
from twisted.internet import endpoints, protocol, reactor
from connlimit import Limiter, LimitingEndpoint
from connlimit.observers import LimiterObserver

class Tell(LimiterObserver):
    def waiting(self, limiter, connection):
        print("waiting", flush=True)
    def departed(self, limiter, connection, waited):
        print("departed", flush=True)

endpoint = endpoints.serverFromString(reactor, "tcp:0:interface=127.0.0.1")
endpoint = LimitingEndpoint(endpoint, Limiter(0, observers=[Tell()]))
endpoint.listen(protocol.Factory.forProtocol(protocol.Protocol)).addCallback(
    lambda port: print(port.getHost().port, flush=True))
reactor.run()
"""


@pytest.mark.parametrize("reactor_name", ["epoll", "poll", "select", "asyncio"])
def test_on_each_reactor(reactor_name: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, reactor_name], stdout=subprocess.PIPE, text=True
    )
    try:
        port = int(process.stdout.readline())
        for _ in range(3):
            client = socket.create_connection(("127.0.0.1", port))
            assert process.stdout.readline() == "waiting\n"
            client.close()
            assert process.stdout.readline() == "departed\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class FakeKqueue:
    """
    As much of kqueue(2) as is used, told by hand what happens.
    """

    def __init__(self) -> None:
        self.changes: list[tuple[int, int]] = []
        self.events: list[object] = []

    def fileno(self) -> int:
        return 99

    def control(self, changes: list | None, most: int, timeout: int = 0) -> list[object]:
        for change in changes or ():
            self.changes.append((change.ident, change.flags))
        events, self.events = self.events[:most], self.events[most:]
        return events


class Waiting:
    """
    Somebody who waits.
    """

    def __init__(self) -> None:
        self.departed = False

    def departs_with(self, unread: bool) -> bool:
        return not unread

    def client_departed(self) -> None:
        self.departed = True


def test_a_kqueue_tells_of_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kqueue = FakeKqueue()
    for name, value in {
        "kqueue": lambda: kqueue,
        "kevent": lambda ident, filter, flags: SimpleNamespace(ident=ident, filter=filter, flags=flags),
        "KQ_FILTER_READ": -1,
        "KQ_EV_ADD": 1,
        "KQ_EV_DELETE": 2,
        "KQ_EV_CLEAR": 0x20,
        "KQ_EV_EOF": 0x8000,
    }.items():
        monkeypatch.setattr(select, name, value, raising=False)
    readers: list[object] = []
    fake = SimpleNamespace(addReader=readers.append, removeReader=readers.remove)
    departures = _departures.Departures(fake, _departures._Kqueue())
    near, far = socket.socketpair()
    waiting, other = Waiting(), Waiting()
    departures.watch(near.fileno(), waiting)
    departures.watch(far.fileno(), other)
    assert readers == [departures]
    assert kqueue.changes == [(near.fileno(), 0x21), (far.fileno(), 0x21)]

    def happens(descriptor: int, flags: int, error: int = 0) -> None:
        kqueue.events.append(SimpleNamespace(ident=descriptor, flags=flags, fflags=error))
        departures.doRead()

    far.sendall(b"more")
    happens(near.fileno(), 0x20)
    assert not waiting.departed
    happens(near.fileno(), 0x8020)
    assert not waiting.departed  # there is something to read
    happens(near.fileno(), 0x8020, 54)
    assert waiting.departed
    happens(far.fileno(), 0x8020)
    assert other.departed
    departures.unwatch(near.fileno(), waiting)
    departures.unwatch(far.fileno(), other)
    assert readers == []
    near.close()
    far.close()


@ensureDeferred
async def test_a_crowd_departs_at_once() -> None:
    limiter, server = Limiter(1), Factory.forProtocol(Protocol)
    endpoint = serverFromString(reactor, "tcp:0:interface=127.0.0.1:backlog=1000")
    port = await endpoint.listen(LimitingFactory(server, limiter))
    where = f"tcp:127.0.0.1:{port.getHost().port}"
    clients = [connect(where) for _ in range(300)]
    await until(lambda: limiter.waiting == 299)
    for client in clients[1:]:
        client.close()
    await until(lambda: limiter.snapshot().departed == 299)
    clients[0].close()
    await until(lambda: limiter.active == 0)
    await patiently(port.stopListening())
