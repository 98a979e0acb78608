"""
A client that goes away while it waits is noticed when it goes.
"""

from __future__ import annotations

import ast
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from pytest_twisted import ensureDeferred
from support.clients import reset
from support.fakes import ApplicationError
from support.logs import Log
from support.patience import PATIENCE
from support.sockets import connected, listening, patiently, until
from support.tls import wrap_server_tls
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol

from connlimit import Limiter, LimitingFactory
from connlimit._system import departures

KINDS = ["the kernel's word", "looks"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """
    How departures are noticed.
    """
    if request.param == "looks":
        monkeypatch.setattr(departures, "_of_reactors", {reactor: departures.Looks(reactor)})
        monkeypatch.setattr(departures, "_LOOK_INTERVAL", 0.05)
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
        noticing = departures.of(reactor)
        assert noticing not in reactor.getReaders()
        clients = [await connected(where) for _ in range(2)]
        await until(lambda: limiter.waiting == 1)
        assert noticing in reactor.getReaders()
        await clients[1].close()
        await until(lambda: noticing not in reactor.getReaders())
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

    def close(self) -> None: ...

    def control(self, changes: list | None, maximum: int, timeout: int = 0) -> list[object]:
        for change in changes or ():
            self.changes.append((change.ident, change.flags))
        events, self.events = self.events[:maximum], self.events[maximum:]
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
    noticing = departures.Departures(fake, departures._Kqueue())
    near, far = socket.socketpair()
    waiting, other = Waiting(), Waiting()
    noticing.watch(near.fileno(), waiting)
    noticing.watch(far.fileno(), other)
    assert readers == [noticing]
    assert kqueue.changes == [(near.fileno(), 0x21), (far.fileno(), 0x21)]

    def happens(descriptor: int, flags: int, error: int = 0) -> None:
        kqueue.events.append(SimpleNamespace(ident=descriptor, flags=flags, fflags=error))
        noticing.doRead()

    far.sendall(b"more")
    happens(near.fileno(), 0x20)
    assert not waiting.departed
    happens(near.fileno(), 0x8020)
    assert not waiting.departed  # there is something to read
    happens(near.fileno(), 0x8020, 54)
    assert waiting.departed
    happens(far.fileno(), 0x8020)
    assert other.departed
    noticing.unwatch(near.fileno(), waiting)
    noticing.unwatch(far.fileno(), other)
    assert readers == []
    near.close()
    far.close()


def new_departures(kind: str) -> departures.Departures | departures.Looks:
    """
    What notices departures in this way, and has logged nothing yet.
    """
    return departures.Looks(reactor) if kind == "looks" else departures._make(reactor)


class Failing(Waiting):
    """
    Somebody who waits, and whose end raises.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def client_departed(self) -> None:
        super().client_departed()
        raise self._error


@pytest.mark.parametrize("error", [ApplicationError("x"), SystemExit(1)], ids=["exception", "exit"])
@pytest.mark.parametrize("method", ["client_departed", "departs_with"])
@ensureDeferred
async def test_whatever_fails_for_one_the_others_are_told(
    kind: str, method: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    noticing = new_departures(kind)
    pairs = [socket.socketpair() for _ in range(3)]
    waiting = [Waiting() for _ in pairs]
    monkeypatch.setattr(waiting[0], method, fail)
    with Log() as log:
        for (near, _), each in zip(pairs, waiting, strict=True):
            noticing.watch(near.fileno(), each)
        for _, far in pairs[:2]:
            far.close()
        await until(lambda: waiting[1].departed)
        pairs[2][1].close()
        await until(lambda: waiting[2].departed)
    assert [event["log_failure"].value for event in log.events if "log_failure" in event] == [error]
    for (near, _), each in zip(pairs, waiting, strict=True):
        noticing.unwatch(near.fileno(), each)
        near.close()
    assert noticing not in reactor.getReaders()


@ensureDeferred
async def test_whoever_fails_again_and_again_does_not_fill_the_log(kind: str) -> None:
    noticing = new_departures(kind)
    with Log() as log:
        for _ in range(20):
            near, far = socket.socketpair()
            waiting = Failing(ApplicationError("x"))
            noticing.watch(near.fileno(), waiting)
            far.close()
            await until(lambda waiting=waiting: waiting.departed)
            noticing.unwatch(near.fileno(), waiting)
            near.close()
    assert len(log.events) == 1


@ensureDeferred
async def test_a_socket_that_the_kernel_does_not_take_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departures, "_LOOK_INTERVAL", 0.05)
    noticing = departures.of(reactor)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    limiter = Limiter(0)
    async with listening(limiter) as (_, where):
        with monkeypatch.context() as patch:
            patch.setattr(noticing._kernel, "watch", full)
            client = connect(where)
            await until(lambda: limiter.waiting == 1)
        other = connect(where)
        await until(lambda: limiter.waiting == 2)
        client.close()
        await until(lambda: limiter.snapshot().departed == 1)
        other.close()
        await until(lambda: limiter.snapshot().departed == 2)


FORKING = r"""
import os, signal, sys, time
import importlib
importlib.import_module("twisted.internet." + sys.argv[1] + "reactor").install()
from twisted.internet import endpoints, protocol, reactor, stdio
from twisted.protocols.basic import LineReceiver
from connlimit import Limiter, LimitingFactory
from connlimit._system import departures

limiter = Limiter(0)
server = protocol.Factory.forProtocol(protocol.Protocol)
factory = LimitingFactory(server, limiter)

class Commands(LineReceiver):
    delimiter = b"\n"

    def lineReceived(self, line):
        try:
            answer = eval(line.decode())
        except Exception as error:
            answer = str(error)
        self.sendLine(repr(answer).encode())

    def connectionLost(self, reason):
        os._exit(0)

def fork(*acts):
    reading, writing = os.pipe()
    if os.fork():
        os.close(reading)
        return writing
    os.close(writing)
    try:
        for act in acts:
            act()
        os.read(reading, 1)
    finally:
        os._exit(0)

def move():
    # As a program that makes itself a daemon when it runs already.
    if os.fork():
        os._exit(0)

def stop_watching():
    for connection in limiter.admission.waiting_for(factory):
        connection.wrappedProtocol.stop_watching()

def abort_all():
    for connection in limiter.admission.waiting_for(factory):
        connection.transport.abortConnection()

def waiting_and_departed():
    return limiter.waiting, limiter.snapshot().departed

endpoints.serverFromString(reactor, "tcp:0:interface=127.0.0.1").listen(factory).addCallback(
    lambda port: print(port.getHost().port, flush=True))
stdio.StandardIO(Commands())
reactor.run()
"""


class Forking:
    """
    A server in a process of its own that does what it is told.
    """

    def __init__(self, reactor_name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKING, reactor_name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.where = f"tcp:127.0.0.1:{int(self._process.stdout.readline())}"

    def __enter__(self) -> Forking:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def do(self, what: str) -> object:
        print(what, file=self._process.stdin, flush=True)
        return ast.literal_eval(self._process.stdout.readline())

    def until(self, waiting: int, departed: int) -> None:
        """
        Wait until so many wait and so many have departed.
        """
        began = time.monotonic()
        while self.do("waiting_and_departed()") != (waiting, departed):
            assert time.monotonic() - began < PATIENCE, self.do("waiting_and_departed()")
            time.sleep(0.01)

    def rests(self, seconds: float = 0.5) -> bool:
        """
        Whether it has next to nothing to do.
        """
        before = self.do("time.process_time()")
        time.sleep(seconds)
        return self.do("time.process_time()") - before < seconds / 4


REACTORS = ["epoll", "poll", "select", "asyncio"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("reactor_name", REACTORS)
@pytest.mark.parametrize("end", ["departed", "aborted by somebody else"])
def test_after_a_fork_the_numbers_of_those_who_left_mean_nothing(reactor_name: str, end: str) -> None:
    with Forking(reactor_name) as server:
        gone = [connect(server.where) for _ in range(5)]
        server.until(5, 0)
        server.do("fork()")
        if end == "departed":
            for client in gone:
                reset(client)
        else:
            server.do("abort_all()")
        server.until(0, 5)
        assert server.rests()
        alive = [connect(server.where, b"something") for _ in range(10)]
        server.until(10, 5)
        for client in gone:
            client.close()
        assert server.rests()
        server.until(10, 5)
        for client in alive:
            reset(client)
        server.until(0, 15)
        assert server.rests()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("reactor_name", REACTORS)
def test_what_a_child_does_with_its_connections_is_nothing_to_its_parent(reactor_name: str) -> None:
    with Forking(reactor_name) as server:
        clients = [connect(server.where) for _ in range(5)]
        server.until(5, 0)
        server.do("fork(stop_watching)")
        time.sleep(0.2)  # nobody tells when the child has done it
        for client in clients:
            client.close()
        server.until(0, 5)
        assert server.rests()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("reactor_name", ["epoll", "poll", "select"])
def test_a_child_that_goes_on_in_its_parents_place_notices_departures(reactor_name: str) -> None:
    with Forking(reactor_name) as server:
        before = [connect(server.where) for _ in range(5)]
        server.until(5, 0)
        server.do("move()")
        before[0].close()
        server.until(4, 1)
        after = [connect(server.where) for _ in range(5)]
        server.until(9, 1)
        for client in before[1:] + after:
            client.close()
        server.until(0, 10)
        assert server.rests()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("reactor_name", ["epoll", "poll", "select"])
def test_a_child_that_is_forked_while_nobody_waits_has_the_kernels_word(reactor_name: str) -> None:
    with Forking(reactor_name) as server:
        connect(server.where).close()
        server.until(0, 1)
        server.do("move()")
        clients = [connect(server.where) for _ in range(5)]
        server.until(5, 1)
        assert server.do("departures.of(reactor).is_used()") is True
        for client in clients:
            client.close()
        server.until(0, 6)
        assert server.rests()


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
