"""
The client for Twisted, with our own server and with the original one.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from sockets import patiently, until
from support import PATIENCE, Log, free_port
from test_semaphores_http import Server, original, ours
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, gatherResults
from twisted.internet.defer import ensureDeferred as start
from twisted.internet.task import deferLater

from connlimit.semaphores import SemaphoreError, Semaphores

pytest.importorskip("treq")


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
    import signal

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
