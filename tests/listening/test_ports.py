"""
Ports that stop accepting while their limiter is full.
"""

from __future__ import annotations

import resource
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.fakes import RecordingFactory
from support.patience import PATIENCE
from support.programs import running
from support.sockets import connected, patiently, until
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString

from connlimit import LimitedService, Limiter, LimitingEndpoint

#: A server that needs a descriptor for each answer.
STORM = """
from twisted.internet.protocol import Factory, Protocol

class Opening(Protocol):
    def dataReceived(self, data):
        with open(__file__):
            self.transport.write(data + b", a file opened")

factory = Factory.forProtocol(Opening)
"""

BACKLOG_TOLD = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel does not tell")


@asynccontextmanager
async def stopping(limiter: Limiter, ports: int = 1) -> AsyncIterator[tuple[RecordingFactory, list[str]]]:
    """
    Ports that stop accepting when the limiter is full.
    """
    server, listening = RecordingFactory(), []
    for _ in range(ports):
        endpoint = serverFromString(reactor, "tcp:0:interface=127.0.0.1:backlog=1000")
        listening.append(await LimitingEndpoint(endpoint, limiter, "stop-accepting").listen(server))
    try:
        yield server, [f"tcp:127.0.0.1:{port.getHost().port}" for port in listening]
    finally:
        for port in listening:
            await port.stopListening()
        await patiently(limiter.drain(0))


@pytest.mark.parametrize("max_waiting", [0, 2])
@ensureDeferred
async def test_nobody_is_refused_and_everybody_is_served_in_the_end(max_waiting: int) -> None:
    limiter = Limiter(1, max_waiting=max_waiting)
    async with stopping(limiter) as (_, (where,)):
        clients = [await connected(where) for _ in range(30)]
        for client in clients:
            client.transport.write(b"hello")
        for client in clients:
            await client.receives(b"hello")
            await client.close()
        snapshot = limiter.snapshot()
        assert (snapshot.accepted, sum(snapshot.refused.values())) == (30, 0)


@BACKLOG_TOLD
@ensureDeferred
async def test_those_who_come_stay_in_the_backlog_which_is_told() -> None:
    limiter = Limiter(1, max_waiting=0)
    async with stopping(limiter) as (_, (where,)):
        clients = [await connected(where)]
        await until(lambda: limiter.active == 1)
        clients += [await connected(where) for _ in range(7)]
        await until(lambda: limiter.snapshot().backlog == 7)
        assert limiter.snapshot().accepted == 1
        await clients[0].close()
        await until(lambda: limiter.snapshot().accepted >= 2)
        for client in clients[1:]:
            await client.close()


@ensureDeferred
async def test_ports_that_share_a_limiter_all_stop_and_all_go_on() -> None:
    limiter = Limiter(1, max_waiting=0)
    async with stopping(limiter, 2) as (server, (one, other)):
        first = await connected(one)
        await until(lambda: limiter.active == 1)
        second = await connected(other)
        second.transport.write(b"second")
        third = await connected(one)
        third.transport.write(b"third")
        await first.close()
        await until(lambda: second.received or third.received)
        await (second if second.received else third).close()
        await until(lambda: second.received and third.received)
        assert (second.received, third.received) == (b"second", b"third")
        assert server.most_live == 1


@ensureDeferred
async def test_more_room_lets_them_go_on() -> None:
    limiter = Limiter(0, max_waiting=0)
    async with stopping(limiter) as (_, (where,)):
        client = await connected(where)
        client.transport.write(b"hello")
        await until(lambda: limiter.snapshot().backlog in (1, None))
        limiter.reconfigure(max_connections=2, max_waiting=5)
        await client.receives(b"hello")


@ensureDeferred
async def test_a_service_can_do_it_too() -> None:
    limiter = Limiter(1, max_waiting=0)
    endpoint = serverFromString(reactor, "tcp:0:interface=127.0.0.1")
    service = LimitedService(endpoint, RecordingFactory(), limiter, 0, when_full="stop-accepting")
    service.startService()
    port = service._waitingForPort.result.getHost().port
    first, second = [await connected(f"tcp:127.0.0.1:{port}") for _ in range(2)]
    second.transport.write(b"hello")
    await until(lambda: limiter.active == 1)
    await first.close()
    await second.receives(b"hello")
    await patiently(service.stopService())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LimitingEndpoint(None, Limiter(1), "never"),
        lambda: LimitedService(None, RecordingFactory(), Limiter(1), when_full="never"),
        lambda: serverFromString(reactor, "connlimit:tcp:0:when_full=never"),
    ],
)
def test_anything_else_is_an_error_of_one_sentence(make: object) -> None:
    with pytest.raises(ValueError, match="when_full must be refuse or stop-accepting, not 'never'"):
        make()


def answer_to(port: int, word: bytes) -> bytes:
    """
    What a client is answered; nothing if it is refused.
    """
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client, suppress(ConnectionError):
        client.sendall(word)
        return client.recv(100)
    return b""


@pytest.mark.parametrize("when_full", ["refuse", "stop-accepting"])
def test_a_crowd_of_clients_never_takes_the_last_descriptors(when_full: str, tmp_path: Path) -> None:
    (tmp_path / "storm.py").write_text(STORM)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 6000:
        pytest.skip("too few descriptors for the clients")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    command = ["connlimit", "--listen=tcp:0:interface=127.0.0.1", f"--when-full={when_full}"]
    command += ["--max-connections=10", "--factory=storm:factory"]
    clients: list[socket.socket] = []
    try:
        with running(*command, ulimit="-n 256", cwd=tmp_path) as program:
            port = program.port()
            first = socket.create_connection(("127.0.0.1", port), 20)
            first.sendall(b"active")
            assert first.recv(100) == b"active, a file opened"
            for _ in range(5000):
                client = socket.socket()
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))
                clients.append(client)
            first.sendall(b"still")
            assert first.recv(100) == b"still, a file opened"
            for client in clients:
                client.close()
            # Those who went are still in the backlog and in the queue, until the program has seen each.
            began = time.monotonic()
            while answer_to(port, b"now") != b"now, a file opened":
                assert time.monotonic() - began < PATIENCE
            for _ in range(20):
                assert answer_to(port, b"after") == b"after, a file opened"
            first.sendall(b"at last")
            assert first.recv(100) == b"at last, a file opened"
            first.close()
            assert program.terminate() == 0
            assert "Too many open files" not in program.output
            assert "EMFILE" not in program.output
    finally:
        for client in clients:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
