"""
A limit whose slots are those of a semaphore.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from support.applications import ECHO
from support.logs import Log
from support.patience import PATIENCE
from support.programs import failing, running
from support.semaphores import Server, original, ours
from support.sockets import patiently, until
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread

from connlimit import Limiter, LimitingFactory
from connlimit.shared import ThrottleLimit

FILE = "[semaphores]\nA = 3\n"


@pytest.fixture(params=[ours, original], ids=["our server", "the original server"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with request.param(tmp_path, text=FILE) as running_server:
        yield running_server


class Counting:
    """
    A server that counts whom it serves at once, behind a `ThrottleLimit`.
    """

    def __init__(self, server: Server, **settings: Any) -> None:
        self.limit = ThrottleLimit("A", f"http://127.0.0.1:{server.port}", **settings)
        self.limiter = Limiter(limits=[self.limit])
        self.maximum = 0

    async def __aenter__(self) -> Counting:
        counting = self

        class Counted(Protocol):
            def connectionMade(self) -> None:
                counting.maximum = max(counting.maximum, counting.limiter.active)

            def dataReceived(self, data: bytes) -> None:
                self.transport.write(data)

        factory = LimitingFactory(Factory.forProtocol(Counted), self.limiter)
        self._port = await serverFromString(reactor, "tcp:0:interface=127.0.0.1").listen(factory)
        self.port = self._port.getHost().port
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._port.stopListening()
        await self.limiter.drain(0)
        await self.limit.close()

    def client(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE)


def talk(client: socket.socket) -> bytes:
    client.sendall(b"x")
    return client.recv(1)


@ensureDeferred
async def test_connections_take_slots_of_the_semaphore(server: Server) -> None:
    job = server.new_peer()
    server.acquire(job, "A", 2)
    async with Counting(server) as counting:
        with closing(counting.client()) as first, closing(counting.client()) as second:
            assert await deferToThread(talk, first) == b"x"
            await until(lambda: counting.limiter.waiting == 1)
            assert server.ask("GET", "/remainder?semaphore=A") == (200, "0")
            server.ask("DELETE", f"/peers/{job}")
            assert await deferToThread(talk, second) == b"x"
            assert server.ask("GET", "/remainder?semaphore=A") == (200, "1")
        await until(lambda: counting.limiter.active == 0)
        await until(lambda: server.ask("GET", "/remainder?semaphore=A") == (200, "3"))


@ensureDeferred
async def test_a_job_gets_its_turn_though_connections_wait_all_the_time(server: Server) -> None:
    async with Counting(server) as counting:
        stop = threading.Event()
        served = [0]

        def visit() -> None:
            while not stop.is_set():
                with closing(counting.client()) as client:
                    assert talk(client) == b"x"
                    served[0] += 1

        visitors = [deferToThread(visit) for _ in range(8)]
        await until(lambda: served[0] > 20)
        job = await deferToThread(server.new_peer)
        began = time.monotonic()
        status = await patiently(deferToThread(server.acquire, job, "A", 3, "block_for=20s"))
        assert status == 200
        assert time.monotonic() - began < 15
        at = served[0]
        await patiently(deferToThread(server.ask, "DELETE", f"/peers/{job}"))
        await until(lambda: served[0] > at + 20)
        stop.set()
        for each in visitors:
            await patiently(each)
        assert counting.maximum <= 3
    await until(lambda: server.ask("GET", "/remainder?semaphore=A") == (200, "3"))


@ensureDeferred
async def test_everybody_is_served_and_never_more_than_there_are_slots(server: Server) -> None:
    async with Counting(server) as counting:

        def visit() -> None:
            with closing(counting.client()) as client:
                assert talk(client) == b"x"

        for each in [deferToThread(visit) for _ in range(200)]:
            await patiently(each)
        assert counting.maximum == 3
        assert counting.limiter.snapshot().served == 200
        await until(lambda: server.ask("GET", "/remainder?semaphore=A") == (200, "3"))
        await until(lambda: counting.limit.held == 0)


@ensureDeferred
async def test_all_slots_are_given_back_at_the_end(server: Server) -> None:
    async with Counting(server) as counting:
        client = counting.client()
        assert await deferToThread(talk, client) == b"x"
    client.close()
    await until(lambda: server.ask("GET", "/remainder?semaphore=A") == (200, "3"))
    assert 'throttle_pending{semaphore="A"} 0' in server.ask("GET", "/metrics")[1]


@ensureDeferred
async def test_an_unknown_semaphore_gives_no_slots_and_is_said_once(tmp_path: Path) -> None:
    with Log() as log, ours(tmp_path, text="[semaphores]\nB = 1\n") as server:
        async with Counting(server) as counting:
            with closing(counting.client()), closing(counting.client()):
                await until(lambda: counting.limiter.waiting == 2)
                await until(lambda: any("Unknown semaphore" in text for text in log.texts()))
        assert sum("semaphore A gives no slots: Unknown semaphore" in text for text in log.texts()) == 1


#: Serves so many connections at once behind a `ThrottleLimit` that lives for two seconds.
SERVER = """
import sys
from twisted.internet import endpoints, protocol, reactor
from connlimit import Limiter, LimitingFactory
from connlimit.shared import ThrottleLimit

class Hello(protocol.Protocol):
    def connectionMade(self):
        self.transport.write(b"x")

limit = ThrottleLimit("A", sys.argv[1], expires_in=2)
factory = LimitingFactory(protocol.Factory.forProtocol(Hello), Limiter(limits=[limit]))
endpoints.serverFromString(reactor, "tcp:0:interface=127.0.0.1").listen(factory).addCallback(
    lambda port: print(port.getHost().port, flush=True))
reactor.run()
"""


class Process:
    """
    A server in a process of its own, and clients of it that stay.
    """

    def __init__(self, server: Server) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, f"http://127.0.0.1:{server.port}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self.process.stdout.readline())
        self.clients: list[socket.socket] = []

    def connect(self, count: int) -> None:
        for _ in range(count):
            client = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
            client.setblocking(False)
            self.clients.append(client)

    def served(self) -> int:
        """
        How many of the clients were greeted, and are there.
        """
        greeted = 0
        for client in self.clients:
            with suppress(BlockingIOError, ConnectionError):
                greeted += client.recv(1, socket.MSG_PEEK) == b"x"
        return greeted

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        for client in self.clients:
            client.close()


@ensureDeferred
async def test_a_process_that_was_stopped_serves_nobody_new_on_slots_that_it_has_lost(tmp_path: Path) -> None:
    with ours(tmp_path, text=FILE) as server:
        one, other = Process(server), Process(server)
        try:
            one.connect(3)
            await until(lambda: one.served() == 3)
            other.connect(3)
            one.process.send_signal(signal.SIGSTOP)
            await until(lambda: other.served() == 3)  # when the slots of the first have expired
            one.connect(3)
            one.process.send_signal(signal.SIGCONT)
            # Its old connections are counted again, beyond the full count; nobody else is served meanwhile.
            await until(lambda: server.ask("GET", "/remainder?semaphore=A") == (200, "-3"))
            for client in one.clients[:3]:
                client.close()
            del one.clients[:3]
            await until(lambda: server.ask("GET", "/remainder?semaphore=A") == (200, "0"))
            assert (one.served(), other.served()) == (0, 3)
            for client in other.clients:
                client.close()
            other.clients.clear()
            await until(lambda: one.served() == 3)
        finally:
            one.end()
            other.end()


@ensureDeferred
async def test_killed_processes_that_waited_hold_up_nobody(tmp_path: Path) -> None:
    with ours(tmp_path, text=FILE) as server:
        holder = server.new_peer()
        server.acquire(holder, "A", 3)
        dead, live = [Process(server) for _ in range(2)], Process(server)
        try:
            for each in (*dead, live):
                each.connect(5)
            await until(lambda: 'throttle_pending{semaphore="A"} 3' in server.ask("GET", "/metrics")[1])
            for each in dead:
                each.end()
            server.ask("DELETE", f"/peers/{holder}")
            began = time.monotonic()
            await until(lambda: live.served() == 3)
            assert time.monotonic() - began < 6
        finally:
            live.end()


@ensureDeferred
async def test_a_subscriber_that_fails_harms_no_other(server: Server) -> None:
    limit = ThrottleLimit("A", f"http://127.0.0.1:{server.port}")
    heard: list[str] = []

    def failing_subscriber() -> None:
        heard.append("fails")
        raise ZeroDivisionError

    limit.subscribe(failing_subscriber)
    limit.subscribe(lambda: heard.append("hears"))
    assert not limit.try_acquire(None)
    await until(lambda: "hears" in heard)
    assert heard == ["fails", "hears"]
    await limit.close()


def test_a_wrong_name_or_url_is_told_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="semaphore must be a text of at least one character, not ''"):
        ThrottleLimit("", "http://localhost:8000")
    with pytest.raises(ValueError, match="url must name a server of semaphores"):
        ThrottleLimit("A", "localhost")


def test_the_command_line_shares_a_limit_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(ECHO)
    with ours(tmp_path, text=FILE) as server:
        url = f"http://127.0.0.1:{server.port}"
        arguments = ["--listen", "tcp:0:interface=127.0.0.1", "--factory", "module:factory", "--shared", url]
        with running("connlimit", *arguments, "--name", "A", cwd=tmp_path) as program:
            with closing(socket.create_connection(("127.0.0.1", program.port()), PATIENCE)) as client:
                assert talk(client) == b"x"
                assert server.ask("GET", "/remainder?semaphore=A") == (200, "2")
            assert program.terminate() == 0
        assert server.ask("GET", "/remainder?semaphore=A") == (200, "3")
    wrong = failing("connlimit", *arguments[:-1], "http://", cwd=tmp_path)
    assert "--shared must name a server of semaphores" in wrong
