"""
The state of the semaphores in a real Redis.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from test_redis_limit import PATIENCE, Redis
from test_semaphores_http import Server, in_thread, ours, wait_until_pending

pytest.importorskip("txredisapi")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    running = Redis(tmp_path).start(settle=False)
    yield running
    running.stop()


def test_the_state_outlives_the_server(tmp_path: Path, redis: Redis) -> None:
    with ours(tmp_path, "--store", redis.url) as server:
        holder, waiter = server.new_peer(), server.new_peer()
        server.acquire(holder, "C")
        assert server.acquire(waiter, "C") == 202
        server.acquire(holder, "/&", 2)
        server.program.process.kill()
    with ours(tmp_path, "--store", redis.url) as server:
        assert server.ask("GET", "/remainder?semaphore=C") == (200, "0")
        assert server.ask("GET", "/remainder?semaphore=%2F%26") == (200, "0")
        waiting = in_thread(lambda: server.acquire(waiter, "C", 1, "block_for=30s"))
        server.release(holder, "C")
        assert waiting() == 200


def test_several_servers_serve_the_same_semaphores(tmp_path: Path, redis: Redis) -> None:
    with ours(tmp_path, "--store", redis.url) as one, ours(tmp_path, "--store", redis.url) as other:
        holder, waiter = one.new_peer(), other.new_peer()
        assert one.acquire(holder, "C") == 200
        waiting = in_thread(lambda: (other.acquire(waiter, "C", 1, "block_for=30s"), time.monotonic()))
        wait_until_pending(one, waiter)
        released = time.monotonic()
        other.release(holder, "C")
        status, at = waiting()
        assert status == 200
        assert at - released < 1
        assert one.ask("GET", "/peers/") != (200, "[]")
        # A peer that expires is gone for both.
        one.ask("PUT", f"/peers/{waiter}", {"expires_in": "100ms"})
        assert other.acquire(holder, "C", 1, "block_for=30s") == 200
        assert one.ask("GET", f"/peers/{waiter}/is_acquired") == (400, "Unknown peer")


def test_a_redis_that_has_lost_its_memory_is_told_again(tmp_path: Path, redis: Redis) -> None:
    with ours(tmp_path, "--store", redis.url) as one, ours(tmp_path, "--store", redis.url) as other:
        holder = one.new_peer()
        one.acquire(holder, "C")
        assert other.ask("GET", "/remainder?semaphore=C") == (200, "0")
        redis.stop()
        status, text = one.ask("GET", "/remainder?semaphore=C")
        assert status == 503
        assert text.startswith("The store cannot be used now: ")
        redis.start(settle=False)
        for server in (one, other):
            began = time.monotonic()
            while server.ask("GET", "/remainder?semaphore=C") != (200, "0"):
                assert time.monotonic() - began < PATIENCE
                time.sleep(0.05)
        other.release(holder, "C")
        assert one.ask("GET", "/remainder?semaphore=C") == (200, "1")
        one.program.wait_for("cannot be used")
        one.program.wait_for("is back")


def test_a_server_that_was_stopped_for_long_catches_up_though_the_log_was_cut(
    tmp_path: Path, redis: Redis
) -> None:
    with ours(tmp_path, "--store", redis.url) as one, ours(tmp_path, "--store", redis.url) as other:
        holder = one.new_peer()
        one.acquire(holder, "C")
        assert other.ask("GET", "/remainder?semaphore=C") == (200, "0")
        other.program.process.send_signal(signal.SIGSTOP)
        with ExitStack() as stack:
            stack.callback(other.program.process.send_signal, signal.SIGCONT)
            heartbeat(one, holder, 2100)
            one.release(holder, "C")
        assert int(redis.ask(b"LLEN", b"connlimit:{semaphores}:log")[1:]) < 2000
        assert other.ask("GET", "/remainder?semaphore=C") == (200, "1")


def heartbeat(server: Server, peer: int, times: int) -> None:
    """
    Send many heartbeats, several at once.
    """
    import http.client
    import json
    import threading

    def send() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        for _ in range(times // 10):
            body = json.dumps({"expires_in": "5min"})
            connection.request("PUT", f"/peers/{peer}", body, {"Content-Type": "application/json"})
            assert connection.getresponse().read() == b"Ok"
        connection.close()

    senders = [threading.Thread(target=send) for _ in range(10)]
    for each in senders:
        each.start()
    for each in senders:
        each.join(PATIENCE)


def test_a_change_of_the_file_holds_for_all_servers(tmp_path: Path, redis: Redis) -> None:
    with ours(tmp_path, "--store", redis.url) as one, ours(tmp_path, "--store", redis.url) as other:
        other.program.wait_for("toml: 5 semaphores")
        (tmp_path / "throttle.toml").write_text("[semaphores]\nC = 9")
        one.program.process.send_signal(signal.SIGHUP)
        one.program.wait_for("toml: 1 semaphores")
        assert one.ask("GET", "/remainder?semaphore=C") == (200, "9")
        assert other.ask("GET", "/remainder?semaphore=C") == (200, "9")


def test_it_starts_without_its_redis_and_says_so(tmp_path: Path) -> None:
    redis = Redis(tmp_path)
    with ours(tmp_path, "--store", redis.url) as server:
        server.program.wait_for("cannot be used")
        assert server.ask("POST", "/new_peer", {"expires_in": "1s"})[0] == 503
        redis.start(settle=False)
        try:
            server.program.wait_for("toml: 5 semaphores")
            assert "is back" in server.program.output
            peer = server.new_peer()
            assert server.acquire(peer, "C") == 200
            assert server.program.terminate() == 0
        finally:
            redis.stop()
