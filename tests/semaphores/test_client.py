"""
The client for Twisted, with our own server and with the original one.
"""

from __future__ import annotations

import gzip
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from support.clients import free_port
from support.logs import Log
from support.patience import PATIENCE
from support.semaphores import Server, original, ours
from support.sockets import patiently, until
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, gatherResults
from twisted.internet.defer import ensureDeferred as start
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.logger import formatEvent, globalLogPublisher

from connlimit.semaphores import SemaphoreError, Semaphores


@pytest.fixture(scope="module", params=[ours, original], ids=["our server", "the original server"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with request.param(tmp_path_factory.mktemp("semaphores")) as running_server:
        yield running_server


def client(server: Server, **settings: Any) -> Semaphores:
    return Semaphores(f"http://127.0.0.1:{server.port}", **settings)


@ensureDeferred
async def test_a_lock_is_held_within_its_context(server: Server) -> None:
    semaphores = client(server)
    async with semaphores.lock("/&", count=2) as lock:
        assert (lock.name, lock.count) == ("/&", 2)
        assert await semaphores.remainder("/&") == 0
    assert await semaphores.remainder("/&") == 2
    await semaphores.close()


@ensureDeferred
async def test_a_lock_is_given_back_when_its_context_fails(server: Server) -> None:
    semaphores = client(server)
    with pytest.raises(ZeroDivisionError):
        async with semaphores.lock("A"):
            raise ZeroDivisionError
    assert await semaphores.remainder("A") == 5
    await semaphores.close()


@ensureDeferred
async def test_the_same_with_deferreds(server: Server) -> None:
    semaphores = client(server)
    lock = semaphores.lock("C")
    assert await lock.acquire() is lock
    other = semaphores.lock("C").acquire()
    await deferLater(reactor, 0.1, lambda: None)
    assert not other.called
    await lock.release()
    await patiently(other).addCallback(lambda lock: lock.release())
    assert await semaphores.remainder("C") == 1
    with pytest.raises(ValueError, match="C is not held"):
        await lock.release()
    await semaphores.close()


@ensureDeferred
async def test_several_locks_of_one_peer_go_down_the_levels(server: Server) -> None:
    semaphores = client(server)
    peer = semaphores.peer()
    async with peer.lock("C"), peer.lock("B", 2), peer.lock("A", 3):
        assert [await semaphores.remainder(name) for name in "ABC"] == [2, 3, 0]
        with pytest.raises(SemaphoreError, match="Lock hierachy violation") as caught:
            await peer.lock("/&").acquire()
        assert caught.value.status == 409
        with pytest.raises(SemaphoreError, match="holds A already"):
            await peer.lock("A", 3).acquire()
        assert [await semaphores.remainder(name) for name in "ABC"] == [2, 3, 0]
    assert [await semaphores.remainder(name) for name in "ABC"] == [5, 5, 1]
    await semaphores.close()


@ensureDeferred
async def test_what_is_impossible_fails_at_once(server: Server) -> None:
    semaphores = client(server)
    with pytest.raises(SemaphoreError, match="Unknown semaphore"):
        await semaphores.lock("Z").acquire()
    with pytest.raises(SemaphoreError, match="Lock can never be acquired"):
        await semaphores.lock("A", 6).acquire()
    with pytest.raises(SemaphoreError, match="Unknown semaphore"):
        await semaphores.remainder("Z")
    await semaphores.close()


@ensureDeferred
async def test_it_gives_up_in_time_and_leaves_nothing_pending(server: Server) -> None:
    semaphores = client(server)
    async with semaphores.lock("C"):
        for timeout in (0, 0.3):
            began = time.monotonic()
            with pytest.raises(TimeoutError, match=rf"C: no lock within {timeout} s"):
                await semaphores.lock("C", timeout=timeout).acquire()
            assert time.monotonic() - began < 5
        await nothing_pends(server)
    assert await semaphores.remainder("C") == 1
    await semaphores.close()


async def nothing_pends(server: Server) -> None:
    await until(lambda: 'throttle_pending{semaphore="C"} 0' in server.ask("GET", "/metrics")[1])


@ensureDeferred
async def test_cancelled_it_leaves_nothing_pending(server: Server) -> None:
    semaphores = client(server)
    async with semaphores.lock("C"):
        peer = semaphores.peer()
        for seconds in (0, 0.001, 0.01, 0.2):
            for lock in (semaphores.lock("C"), peer.lock("C")):
                acquiring = lock.acquire()
                await deferLater(reactor, seconds, lambda: None)
                acquiring.cancel()
                with pytest.raises(CancelledError):
                    await acquiring
        await nothing_pends(server)
    assert await semaphores.remainder("C") == 1
    await semaphores.close()


@ensureDeferred
async def test_locks_are_had_in_the_order_of_asking(server: Server) -> None:
    semaphores = client(server)
    order: list[int] = []

    async def take(number: int) -> None:
        async with semaphores.lock("C"):
            order.append(number)

    first = semaphores.lock("C")
    await first.acquire()
    waiting = []
    for number in range(5):
        waiting.append(start(take(number)))
        pending = f'throttle_pending{{semaphore="C"}} {number + 1}'
        await until(lambda pending=pending: pending in server.ask("GET", "/metrics")[1])
    await first.release()
    await patiently(gatherResults(waiting))
    assert order == [0, 1, 2, 3, 4]
    await semaphores.close()


@ensureDeferred
async def test_heartbeats_keep_a_lock_for_longer_than_it_takes_to_expire(server: Server) -> None:
    semaphores = client(server, expires_in=0.6)
    async with semaphores.lock("C"):
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            assert await semaphores.remainder("C") == 0
            await deferLater(reactor, 0.05, lambda: None)
    await semaphores.close()


@pytest.mark.parametrize("kind", [ours, original], ids=["our server", "the original server"])
@ensureDeferred
async def test_what_is_held_is_restored_after_a_restart_of_the_server(
    tmp_path: Path, kind: Callable[..., Any]
) -> None:
    with Log() as log:
        running_server = kind(tmp_path)
        server = running_server.__enter__()
        semaphores = client(server, expires_in=1.5)
        peer = semaphores.peer()
        held, lower = peer.lock("C"), peer.lock("A", 2)
        await held.acquire()
        await lower.acquire()
        running_server.__exit__(None, None, None)
        waiting = semaphores.lock("B").acquire()
        with kind(tmp_path, port=server.port) as server:
            await until(lambda: server.ask("GET", "/remainder?semaphore=C") == (200, "0"))
            await until(lambda: server.ask("GET", "/remainder?semaphore=A") == (200, "3"))
            await (await patiently(waiting)).release()
            await lower.release()
            await held.release()
            for name, full in (("A", "5"), ("B", "5"), ("C", "1")):
                assert server.ask("GET", f"/remainder?semaphore={name}") == (200, full)
            await semaphores.close()
    assert sum("do not answer" in text for text in log.texts()) == 1
    assert sum("are back" in text for text in log.texts()) == 1


@ensureDeferred
async def test_a_lock_that_could_not_be_given_back_is_given_back_when_the_server_can_be_reached(
    tmp_path: Path,
) -> None:
    """
    The server is stopped, and not killed: it knows of the lock all the time.
    """
    with ours(tmp_path) as server:
        semaphores = client(server)
        lock = semaphores.lock("C")
        await lock.acquire()
        # A server that does not take connections, rather than one that does not answer for ten seconds.
        server.program.process.send_signal(signal.SIGSTOP)
        releasing = lock.release()
        await deferLater(reactor, 0.2, lambda: None)
        server.program.process.send_signal(signal.SIGCONT)
        await patiently(releasing)
        assert await semaphores.remainder("C") == 1
        await semaphores.close()


@ensureDeferred
async def test_a_server_that_is_away_is_waited_for_as_long_as_one_wants(tmp_path: Path) -> None:
    port = free_port()
    semaphores = Semaphores(f"http://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await semaphores.lock("C", timeout=0.3).acquire()
    assert time.monotonic() - began < 5
    with pytest.raises(SemaphoreError, match=r"do not answer: .*refused"):
        await semaphores.remainder("C")
    waiting = semaphores.lock("C").acquire()
    with ours(tmp_path, port=port):
        await (await patiently(waiting)).release()
    await semaphores.close()


@ensureDeferred
async def test_what_is_no_server_of_semaphores_is_told_as_such(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def answer() -> None:
            for _ in range(2):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        semaphores = Semaphores(f"http://127.0.0.1:{listening.getsockname()[1]}")
        with pytest.raises(SemaphoreError, match="do not answer"):
            await semaphores.remainder("A")
        with pytest.raises(TimeoutError):
            await semaphores.lock("A", timeout=0).acquire()
        thread.join(PATIENCE)
    await semaphores.close()


#: Asks for a lock of C, says so, and waits for ever.
ASKING = """
import sys
from twisted.internet import reactor
from connlimit.semaphores import Semaphores
lock = Semaphores(sys.argv[1]).lock("C")
lock.acquire().addCallback(lambda _: print("held", flush=True))
reactor.callLater(0.5, print, "asked", flush=True)
reactor.run()
"""


@ensureDeferred
async def test_what_a_killed_process_waited_for_goes_to_the_next_within_seconds(tmp_path: Path) -> None:
    with ours(tmp_path) as server:
        semaphores = client(server)
        held = await semaphores.lock("C").acquire()
        url = f"http://127.0.0.1:{server.port}"
        dead = [
            subprocess.Popen([sys.executable, "-c", ASKING, url], stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        try:
            for each in dead:
                assert await deferToThread(each.stdout.readline) == "asked\n"
            waiting = semaphores.lock("C").acquire()
            await until(lambda: 'throttle_pending{semaphore="C"} 4' in server.ask("GET", "/metrics")[1])
        finally:
            for each in dead:
                each.kill()
                each.communicate()
        await held.release()
        began = time.monotonic()
        await (await patiently(waiting)).release()
        assert time.monotonic() - began < 8
        await semaphores.close()


@ensureDeferred
async def test_two_locks_that_a_new_peer_asks_for_at_once_are_both_given_back(server: Server) -> None:
    semaphores = client(server)
    peer = semaphores.peer()
    first, second = peer.lock("C").acquire(), peer.lock("C").acquire()
    for each in (first, second):
        each.addErrback(lambda failure: failure.trap(SemaphoreError))
    await patiently(gatherResults([first, second]))
    for name in list(peer._held):
        await peer.release(name)
    assert await semaphores.remainder("C") == 1
    await semaphores.close()


@ensureDeferred
async def test_cancelled_at_any_moment_it_leaves_no_peer(tmp_path: Path) -> None:
    with ours(tmp_path) as server:
        semaphores = client(server)
        for turns in range(40):
            acquiring = semaphores.lock("A").acquire()
            acquiring.addErrback(lambda failure: failure.trap(CancelledError))
            for _ in range(turns % 20):
                await deferLater(reactor, 0.0005, lambda: None)
            if acquiring.called:
                await (await acquiring).release()
            else:
                acquiring.cancel()
        await until(lambda: server.ask("GET", "/peers/") == (200, "[]"))
        assert await semaphores.remainder("A") == 5
        await semaphores.close()


@ensureDeferred
async def test_a_lock_is_lost_when_the_server_was_not_reached_in_time_and_that_is_said(
    tmp_path: Path,
) -> None:
    with Log() as log, ours(tmp_path) as server:
        semaphores = client(server, expires_in=1)
        async with semaphores.lock("C") as lock:
            assert not lock.lost
            server.program.process.send_signal(signal.SIGSTOP)
            await until(lambda: lock.lost)
            await until(lambda: any("C at http://" in text and "others" in text for text in log.texts()))
            server.program.process.send_signal(signal.SIGCONT)
            await until(lambda: server.ask("GET", "/remainder?semaphore=C") == (200, "0"))
        await until(lambda: server.ask("GET", "/remainder?semaphore=C") == (200, "1"))
        await semaphores.close()


class FakeServer:
    """
    Answers each request by what it is told to, and keeps what it was sent.
    """

    def __init__(self, answer: Callable[[bytes], Iterator[bytes]]) -> None:
        self.requests: list[bytes] = []
        self._answer = answer
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                self.requests.append(connection.recv(65536))
                for part in self._answer(self.requests[-1]):
                    connection.sendall(part)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self._listening.close()


@ensureDeferred
async def test_names_and_passwords_are_sent_as_basic_authentication_and_never_logged() -> None:
    fake = FakeServer(lambda request: iter([b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n7"]))
    with Log() as log:
        url = f"http://eve:s%3Acret@127.0.0.1:{fake.port}"
        semaphores = Semaphores(url, headers={"X-Team": "blue"})
        assert await patiently(semaphores.remainder("A")) == 7
        fake.close()
        with pytest.raises(SemaphoreError) as caught:
            await patiently(semaphores.remainder("A"))
        await semaphores.close()
    (request,) = fake.requests
    assert b"Authorization: Basic " + b64encode(b"eve:s:cret") + b"\r\n" in request
    assert b"X-Team: blue\r\n" in request
    assert f"Host: 127.0.0.1:{fake.port}\r\n".encode() in request
    assert not any("cret" in text for text in [*log.texts(), str(caught.value)])
    with pytest.raises(ValueError, match=r"not '\*\*\*@host:port'"):
        Semaphores("http://eve:secret@host:port")
    with pytest.raises(ValueError, match="headers must be texts by their names"):
        Semaphores("http://localhost", headers={"X-Team": "blue\r\nX-Other: red"})


@pytest.mark.parametrize("where", ["head", "body", "compressed"])
@ensureDeferred
async def test_an_endless_answer_ends_the_connection(where: str) -> None:
    def endless(request: bytes) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n"
        if where == "compressed":
            bomb = gzip.compress(bytes(10_000_000))
            assert len(bomb) < 64 * 1024
            yield b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb
            return
        if where == "body":
            yield b"Content-Length: 4000000000\r\n\r\n"
        for _ in range(100_000):
            sent.append(1)
            yield b"X-Header: value\r\n" * 1000

    sent: list[int] = []
    fake = FakeServer(endless)
    semaphores = Semaphores(f"http://127.0.0.1:{fake.port}")
    with pytest.raises(SemaphoreError, match="do not answer"):
        await patiently(semaphores.remainder("A"))
    assert len(sent) < 2000
    fake.close()
    await semaphores.close()


@ensureDeferred
async def test_nothing_is_logged_of_requests_and_connections(server: Server) -> None:
    events: list[str] = []
    observer = lambda event: events.append(formatEvent(event) or "")  # noqa: E731
    globalLogPublisher.addObserver(observer)
    try:
        for _ in range(3):
            semaphores = client(server)
            async with semaphores.lock("A"):
                pass
            await semaphores.close()
    finally:
        globalLogPublisher.removeObserver(observer)
    assert events == []


@ensureDeferred
async def test_a_redirect_is_not_followed() -> None:
    other = FakeServer(lambda request: iter([b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n7"]))
    place = f"http://127.0.0.1:{other.port}/".encode()
    fake = FakeServer(
        lambda request: iter([b"HTTP/1.1 302 Found\r\nLocation: " + place + b"\r\nContent-Length: 0\r\n\r\n"])
    )
    semaphores = Semaphores(f"http://127.0.0.1:{fake.port}")
    with pytest.raises(SemaphoreError) as caught:
        await patiently(semaphores.remainder("A"))
    assert caught.value.status == 302
    assert other.requests == []
    fake.close()
    other.close()
    await semaphores.close()


@pytest.mark.parametrize("url", ["localhost:8000", "redis://localhost", "", "http://", None])
def test_a_wrong_url_is_told_in_a_sentence(url: Any) -> None:
    with pytest.raises(ValueError, match=r"url must name a server of semaphores, such as .*, not "):
        Semaphores(url)


@pytest.mark.parametrize("seconds", [0, -1, "5", True, float("nan")])
def test_a_wrong_time_to_expire_is_told_in_a_sentence(seconds: Any) -> None:
    with pytest.raises(ValueError, match=r"expires_in must be a number of seconds, 0\.1 or more"):
        Semaphores("http://localhost:8000", expires_in=seconds)


def test_a_wrong_lock_is_told_in_a_sentence() -> None:
    semaphores = Semaphores("http://localhost:8000/")
    with pytest.raises(ValueError, match="count must be a whole number, 1 or more, not 0"):
        semaphores.lock("A", 0)
    with pytest.raises(ValueError, match="timeout must be a number of seconds, 0 or more, or None, not -1"):
        semaphores.lock("A", timeout=-1)
