"""
The state of the semaphores in a real Redis.
"""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.clients import read_all
from support.patience import PATIENCE
from support.programs import running
from support.redis import Redis, questions
from support.semaphores import Server, in_thread, ours, wait_until_pending
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredList

from connlimit.semaphores.server.records import Rejected
from connlimit.semaphores.server.state import State
from connlimit.semaphores.server.store import Unavailable

pytest.importorskip("txredisapi")

from connlimit.semaphores.server.redis_store import MAX_BYTES, RedisStore, pages


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


def test_a_server_without_a_file_leaves_the_semaphores_of_the_store(tmp_path: Path, redis: Redis) -> None:
    with ours(tmp_path, "--store", redis.url, "--max-peers", "3") as one:
        holder = one.new_peer()
        one.acquire(holder, "C")
        length = redis.ask(b"LLEN", b"connlimit:{semaphores}:log")
        folder = tmp_path / "other"
        folder.mkdir()
        arguments = ["connlimit-semaphores", "--listen", "tcp:0:interface=127.0.0.1", "--store", redis.url]
        with running(*arguments, cwd=folder) as program:
            program.wait_for("no such file, so they are those of the store")
            other = Server(program.port())
            began = time.monotonic()
            while other.ask("GET", "/remainder?semaphore=C") != (200, "0"):
                assert time.monotonic() - began < PATIENCE
                time.sleep(0.05)
        # Nor does one say again what is known.
        with ours(tmp_path, "--store", redis.url) as again:
            again.program.wait_for("toml: 5 semaphores")
        assert redis.ask(b"LLEN", b"connlimit:{semaphores}:log") == length
        assert one.ask("GET", "/remainder?semaphore=A") == (200, "5")
        one.new_peer()
        one.new_peer()
        assert one.ask("POST", "/new_peer", {"expires_in": "1s"})[0] == 429


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


def test_what_is_refused_leaves_nothing_in_the_store(tmp_path: Path, redis: Redis) -> None:
    with ours(tmp_path, "--store", redis.url) as server:
        peer = server.new_peer()
        before = redis.info(b"used_memory", b"memory")
        length = redis.ask(b"LLEN", b"connlimit:{semaphores}:log")
        unknown = "\u00fc" * 10_000
        for _ in range(50):
            restored = {"expires_in": "5min", "peer_id": 7, "acquired": {unknown: 1}}
            assert server.ask("POST", "/restore", restored) == (400, "Unknown semaphore")
            assert server.ask("PUT", f"/peers/{peer}/{'x' * 5000}", 1) == (400, "Unknown semaphore")
            assert server.ask("DELETE", f"/peers/{peer}/{'x' * 5000}") == (400, "Unknown semaphore")
            assert server.ask("GET", f"/remainder?semaphore={'x' * 5000}") == (400, "Unknown semaphore")
            assert server.ask("GET", "/peers/8/is_acquired") == (400, "Unknown peer")
            assert server.ask("PUT", "/peers/8", {"expires_in": "5min"}) == (400, "Unknown peer")
            assert server.ask("PUT", f"/peers/{peer}/C", 2)[0] == 409
        assert redis.ask(b"LLEN", b"connlimit:{semaphores}:log") == length
        assert int(redis.info(b"used_memory", b"memory")) < int(before) + 2**20


def test_an_operation_has_its_share_of_the_store_and_no_more(tmp_path: Path, redis: Redis) -> None:
    names = [f"{number:03} {'x' * 40}" for number in range(100)]
    text = "[semaphores]\n" + "".join(f'"{name}" = 5\n' for name in names)
    with ours(tmp_path, "--store", redis.url, text=text) as server:
        restored = {"expires_in": "5min", "peer_id": 7, "acquired": dict.fromkeys(names, 1)}
        status, sentence = server.ask("POST", "/restore", restored)
        assert status == 413
        assert "1024 bytes" in sentence
        restored["acquired"] = dict.fromkeys(names[:5], 1)
        assert server.ask("POST", "/restore", restored) == (200, "Ok")


def test_a_name_takes_no_more_of_the_store_than_it_has_bytes(tmp_path: Path, redis: Redis) -> None:
    name = "\u00fc" * 400
    with ours(tmp_path, "--store", redis.url, text=f'[semaphores]\n"{name}" = 5\n') as server:
        peer = server.new_peer()
        assert server.acquire(peer, name) == 200


def test_a_log_of_many_bytes_is_cut_and_a_server_starts_with_it(tmp_path: Path, redis: Redis) -> None:
    name = "x" * 800
    text = f'[semaphores]\n"{name}" = 5000\n'
    with ours(tmp_path, "--store", redis.url, text=text) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        for peer in range(1600):
            body = json.dumps({"expires_in": "5min", "peer_id": peer, "acquired": {name: 1}})
            connection.request("POST", "/restore", body, {"Content-Type": "application/json"})
            assert connection.getresponse().read() == b"Ok"
        connection.close()
        assert 0 < int(redis.ask(b"LLEN", b"connlimit:{semaphores}:log")[1:]) < 1400
    with ours(tmp_path, "--store", redis.url, text=text) as server:
        assert server.ask("GET", f"/remainder?semaphore={name}") == (200, "3400")


def test_a_server_starts_with_the_state_of_very_many_peers(tmp_path: Path, redis: Redis) -> None:
    state = State()
    state.apply(0.0, "configure", [{"A": (1_000_000, 0)}, 300_000])
    for peer in range(250_000):
        state.apply(0.0, "new_peer", [peer, 86400.0])
        state.apply(0.0, "acquire", [peer, "A", 1, None])
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(str(redis.socket))
        for page, _ in pages(state.records()):
            client.sendall(command("RPUSH", "connlimit:{semaphores}:state", page))
        fields = {"history": "h1", "start": 5, "mark": "", "time": 0, "count": 500_000, "size": 1 << 24}
        words = [str(word) for field in fields.items() for word in field]
        client.sendall(command("HSET", "connlimit:{semaphores}:about", *words) + command("QUIT"))
        read_all(client)
    with ours(tmp_path, "--store", redis.url) as server:
        began = time.monotonic()
        while server.ask("GET", "/remainder?semaphore=A")[0] == 503:
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.05)
        # The file of this server says 5.
        assert server.ask("GET", "/remainder?semaphore=A") == (200, "-249995")
        assert server.ask("PUT", "/peers/249999", {"expires_in": "1s"}) == (200, "Ok")
        assert "cannot be used" not in server.program.output


def command(*words: str) -> bytes:
    """
    A command as Redis reads it.
    """
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%b\r\n" % (len(word.encode()), word.encode()) for word in words]
    return b"".join(parts)


def test_the_state_is_written_down_seldom_while_peers_become_more(tmp_path: Path, redis: Redis) -> None:
    with ours(tmp_path, "--store", redis.url) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        written = set()
        for number in range(5000):
            body = '{"expires_in": "5min"}'
            connection.request("POST", "/new_peer", body, {"Content-Type": "application/json"})
            connection.getresponse().read()
            if number % 100 == 0:
                written.add(redis.ask(b"HGET", b"connlimit:{semaphores}:about", b"count"))
        connection.close()
        assert len(written) <= 4


def test_a_redis_that_has_forgotten_the_script_is_sent_it_again(tmp_path: Path, redis: Redis) -> None:
    with ours(tmp_path, "--store", redis.url) as server:
        peer = server.new_peer()
        for _ in range(3):
            redis.ask(b"SCRIPT", b"FLUSH")
            assert server.ask("PUT", f"/peers/{peer}", {"expires_in": "5min"}) == (200, "Ok")
        assert "cannot be used" not in server.program.output


def test_a_redis_that_refuses_each_operation_is_told_of_once(tmp_path: Path, redis: Redis) -> None:
    with ours(tmp_path, "--store", redis.url) as server:
        peer = server.new_peer()
        redis.ask(b"CONFIG", b"SET", b"maxmemory", b"1")
        for _ in range(4):
            began = time.monotonic()
            while server.ask("PUT", f"/peers/{peer}", {"expires_in": "5min"})[0] != 503:
                assert time.monotonic() - began < PATIENCE
        redis.ask(b"CONFIG", b"SET", b"maxmemory", b"0")
        began = time.monotonic()
        while server.ask("PUT", f"/peers/{peer}", {"expires_in": "5min"}) != (200, "Ok"):
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.05)
        server.program.wait_for("is back")
        assert server.program.output.count("cannot be used") == 1
        assert server.program.output.count("is back") == 1


def test_the_time_of_the_operations_is_not_that_of_a_clock_which_can_be_set(
    tmp_path: Path, redis: Redis
) -> None:
    with ours(tmp_path, "--store", redis.url) as server:
        began = time.monotonic()
        peer = server.new_peer("2s")
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(redis.socket))
            client.sendall(command("HGET", "connlimit:{semaphores}:about", "time") + command("QUIT"))
            now = int(read_all(client).split(b"\r\n")[1])
        # Milliseconds since the first server of this store began.
        assert now < (time.monotonic() - began + PATIENCE) * 1000
        while server.ask("GET", f"/peers/{peer}/is_acquired")[0] == 200:
            time.sleep(0.05)
        assert 1.9 < time.monotonic() - began < PATIENCE


def test_a_redis_that_does_not_answer_is_given_up_in_time_and_found_again(
    tmp_path: Path, redis: Redis
) -> None:
    with ours(tmp_path, "--store", redis.url) as server, ExitStack() as stack:
        peer = server.new_peer()
        redis.process.send_signal(signal.SIGSTOP)
        stack.callback(redis.process.send_signal, signal.SIGCONT)
        began = time.monotonic()
        assert server.ask("PUT", f"/peers/{peer}", {"expires_in": "5min"})[0] == 503
        assert 2.5 < time.monotonic() - began < 15
        assert server.ask("GET", "/health") == (200, "Ok")
        redis.process.send_signal(signal.SIGCONT)
        began = time.monotonic()
        while server.ask("PUT", f"/peers/{peer}", {"expires_in": "5min"}) != (200, "Ok"):
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.05)
        assert "Traceback" not in server.program.output
        assert server.program.terminate() == 0


@ensureDeferred
async def test_operations_that_arrive_together_share_a_question_and_each_has_its_own_answer(
    redis: Redis,
) -> None:
    with stores(redis, 1) as (store,):
        await store.submit("configure", {"A": (2, 0)}, None)
        before = questions(redis)
        asked = [store.submit("new_peer", peer, 300.0) for peer in range(4)]
        await DeferredList(asked)
        assert questions(redis) == before + 1
        asked = [store.submit("acquire", peer, "A", 1, None) for peer in (3, 1, 2, 0)]
        asked.append(store.submit("acquire", 2, "A", 2, None))
        with pytest.raises(Rejected, match=f"{MAX_BYTES} bytes"):
            store.submit("restore", 9, 300.0, {"A": 10**MAX_BYTES})
        asked.append(store.submit("remainder", "A"))
        asked.append(store.submit("acquire", 2, "B", 1, None))
        asked.append(store.submit("release", 3, "A"))
        results = [result for _, result in await DeferredList(asked, consumeErrors=True)]
        assert results[:4] == [True, True, False, False]
        assert [results[4].value.status, results[6].value.status] == [409, 400]
        assert results[7] is None
        # Who asked first has what was released.
        assert [await store.submit("is_acquired", peer) for peer in (1, 2, 0)] == [True, True, False]


@ensureDeferred
async def test_servers_that_add_operations_at_once_have_the_same_state(redis: Redis) -> None:
    with stores(redis, 2) as both:
        await both[0].submit("configure", {"A": (50, 0)}, None)
        history = redis.ask(b"HGET", b"connlimit:{semaphores}:about", b"history")
        for turn in range(30):
            asked: list[Deferred[object]] = []
            # Sometimes one of them is alone, and sometimes neither knows what the other does.
            for at, store in enumerate(both if turn % 3 else both[turn % 2 :][:1]):
                for number in range(turn % 7 + 1):
                    peer = turn * 100 + number * 2 + at
                    asked.append(store.submit("new_peer", peer, 300.0))
                    if number:
                        asked.append(store.submit("restore", peer, 300.0 + turn, {"A": 1}))
            await DeferredList(asked, consumeErrors=True)
            for store in both[turn % 2 :]:
                for peer in list(store.state.peers)[-3:]:
                    asked.append(store.submit("acquire", peer, "A", 1, None))
            await DeferredList(asked, consumeErrors=True)
        with stores(redis, 1) as (new,):
            known = []
            for store in (*both, new):
                await store.submit("nothing")
                known.append(list(store.state.records()))
        assert len(known[0]) > 150
        assert known[0] == known[1] == known[2]
        assert redis.ask(b"HGET", b"connlimit:{semaphores}:about", b"history") == history


@ensureDeferred
async def test_no_operation_is_answered_before_it_is_in_the_store_however_many_there_are(
    redis: Redis,
) -> None:
    with stores(redis, 1) as (store,):
        await store.submit("configure", {"A": (5000, 0)}, 10_000)
        before = questions(redis)
        answered = 0

        def check(is_new: object) -> None:
            nonlocal answered
            assert is_new is True
            answered += 1
            if answered % 100 == 0:
                # One more was there before these.
                assert int(redis.ask(b"LLEN", b"connlimit:{semaphores}:log")[1:]) > answered

        asked = [store.submit("new_peer", peer, 300.0).addCallback(check) for peer in range(1900)]
        for succeeded, result in await DeferredList(asked):
            assert succeeded, result
        assert answered == 1900
        assert questions(redis) == before + 2


@ensureDeferred
async def test_operations_that_were_to_be_added_together_fail_together_when_redis_is_gone(
    redis: Redis,
) -> None:
    with stores(redis, 1) as (store,):
        await store.submit("configure", {"A": (5, 0)}, None)
        redis.stop()
        asked = [store.submit("new_peer", peer, 300.0) for peer in range(5)]
        for succeeded, result in await DeferredList(asked, consumeErrors=True):
            assert not succeeded
            assert isinstance(result.value, Unavailable)
        assert not store.state.peers


@contextmanager
def stores(redis: Redis, count: int) -> Iterator[list[RedisStore]]:
    """
    So many stores as servers have them.
    """
    made = [RedisStore(State(), redis.url, reactor) for _ in range(count)]
    try:
        yield made
    finally:
        for each in made:
            each.close()
