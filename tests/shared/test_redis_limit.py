"""
A limit that processes share by way of a real Redis.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytest_twisted import ensureDeferred
from support.applications import ECHO
from support.logs import Log
from support.patience import PATIENCE
from support.programs import failing, running
from support.redis import TTL, Redis, Service
from support.redis_limits import (
    NUMBERS,
    WORKER,
    Answering,
    Asker,
    Backend,
    Members,
    administer,
    failures,
    lease,
    redis_limit,
)
from support.sockets import connected, listening, patiently, until
from support.tls import make_certificate
from twisted.internet import reactor
from twisted.internet.endpoints import UNIXClientEndpoint, serverFromString
from twisted.internet.threads import deferToThread
from twisted.logger import LogLevel

from connlimit import Limiter
from connlimit._limiter.slots import NullConnection
from connlimit._twistd.config_file import read
from connlimit._twistd.targets.relay import RelayFactory
from connlimit.refusals import Say

txredisapi = pytest.importorskip("txredisapi")


@ensureDeferred
async def test_members_never_have_more_than_there_are(redis: Redis) -> None:
    async with Members(redis, 5, 3) as members:
        for index in range(3):
            members.want(index, 4)
        await until(lambda: sum(members.used()) == 5)
        for _ in range(30):
            index = max(range(3), key=lambda index: members.used()[index])
            members.limits[index].release(None)
            members.serve(index)
            if not any(members.wanted):
                members.want((index + 1) % 3, 2)
            await until(lambda: sum(members.used()) == 5 or not any(members.wanted))


@ensureDeferred
async def test_a_freed_slot_reaches_who_waits_elsewhere_soon(redis: Redis) -> None:
    async with Members(redis, 1, 2) as members:
        members.want(0)
        await until(lambda: members.used() == [1, 0])
        times = []
        for one, other in ((0, 1), (1, 0)) * 5:
            members.want(other)
            await until(
                lambda one=one, other=other: members.limits[other]._short or members.limits[one]._short
            )
            began = monotonic()
            members.limits[one].release(None)
            await until(lambda other=other: members.used()[other] == 1)
            times.append(monotonic() - began)
        assert sorted(times)[len(times) // 2] < 0.05


@ensureDeferred
async def test_nobody_sits_on_free_slots_while_another_waits(redis: Redis) -> None:
    async with Members(redis, 20, 2) as members:
        members.want(0, 20)
        await until(lambda: members.used() == [20, 0])
        for _ in range(15):
            members.limits[0].release(None)
        began = monotonic()
        members.want(1, 15)
        await until(lambda: members.used() == [5, 15])
        assert monotonic() - began < TTL / 3  # nobody waited for a heartbeat


@ensureDeferred
async def test_a_long_line_in_one_process_does_not_keep_slots_from_another(redis: Redis) -> None:
    async with Members(redis, 2, 2) as members:
        members.want(0, 50)
        await until(lambda: members.used() == [2, 0])
        for _ in range(3):
            members.want(1)
            await until(lambda: members.limits[0]._others_ask)
            # The first may have asked earlier, for those who wait there; then it is the other's turn.
            for _ in range(2):
                if members.used() == [2, 0]:
                    members.limits[0].release(None)
                    members.serve(0)
                    await until(lambda: sum(members.used()) == 2)
            assert members.used() == [1, 1]
            members.limits[1].release(None)
            await until(lambda: members.used() == [2, 0])


@ensureDeferred
async def test_what_is_free_of_a_limit_that_was_cut_is_given_back(redis: Redis) -> None:
    async with Members(redis, 20, 1) as members:
        limit = members.limits[0]
        members.want(0, 10)
        await until(lambda: members.used() == [10])
        for _ in range(8):
            limit.release(None)
        assert limit.held >= 10
        connection = await patiently(txredisapi.UnixConnection(str(redis.socket), reconnect=False))
        await patiently(redis_limit.set_slots(connection, limit.name, 3))
        await until(lambda: limit.held <= 3)
        await patiently(connection.disconnect())


@ensureDeferred
async def test_a_busy_process_asks_rarely_and_an_idle_one_keeps_nothing(redis: Redis) -> None:
    async with Members(redis, 200, 1) as members:
        limit = members.limits[0]
        rounds = 0
        while rounds < 100:
            if rounds == 20:
                questions, began = limit._question, monotonic()
            members.want(0, 40)
            await until(lambda: members.used() == [40])
            while limit.in_use:
                limit.release(None)
            await until(lambda: True)
            rounds += 1
        assert limit._question - questions <= (monotonic() - began) / (TTL / 3) + 2
        await until(lambda: limit.held == 0)


@ensureDeferred
async def test_a_dead_members_slots_return_within_the_ttl(redis: Redis) -> None:
    async with Members(redis, 3, 2) as members:
        members.want(0, 3)
        await until(lambda: members.used() == [3, 0])
        dead = members.limits[0]
        dead._closed = True  # it says no more
        dead._timer.cancel()
        dead.in_use = 0
        began = monotonic()
        members.want(1, 3)
        await until(lambda: members.used() == [0, 3])
        assert monotonic() - began < TTL + 1.2
        dead._closed = False
        dead._timer = None


@ensureDeferred
async def test_who_was_stopped_for_longer_than_the_ttl_knows_that_it_has_no_lease(redis: Redis) -> None:
    async with Members(redis, 2, 1) as members:
        members.want(0, 1)
        await until(lambda: members.used() == [1] and members.limits[0].held == 2)
        members.limits[0]._ends = monotonic() - 0.001
        assert not members.limits[0].try_acquire(None)
        members.want(0, 1)
        await until(lambda: members.used() == [2])


@ensureDeferred
async def test_the_limit_can_be_changed_for_all(redis: Redis) -> None:
    async with Members(redis, 10, 2) as members:
        connection = await patiently(txredisapi.UnixConnection(str(redis.socket), reconnect=False))
        await patiently(redis_limit.set_slots(connection, members.limits[0].name, 1))
        members.want(0, 3)
        members.want(1, 3)
        await until(lambda: sum(members.used()) == 1)
        await patiently(redis_limit.set_slots(connection, members.limits[0].name, 6))
        await until(lambda: sum(members.used()) == 6)
        await patiently(connection.disconnect())


@ensureDeferred
async def test_a_late_question_undoes_nothing(redis: Redis) -> None:
    async with Members(redis, 5, 1) as members:
        members.want(0, 3)
        await until(lambda: members.used() == [3])
        limit = members.limits[0]
        late = json.loads(limit._say(in_use=0, kept=0, wanted=0, more=False, age=0, same=True, outlived=0))
        assert lease(redis, limit.name, **late) == ["late"]
        connection = await patiently(txredisapi.UnixConnection(str(redis.socket), reconnect=False))
        record = await patiently(connection.hget(redis_limit.keys_of(limit.name)[0], limit.member))
        assert json.loads(record)["held"] >= 3
        await patiently(connection.disconnect())


@ensureDeferred
async def test_nothing_is_left_in_redis(redis: Redis) -> None:
    async with Members(redis, 5, 2) as members:
        members.want(0, 2)
        members.want(1, 2)
        await until(lambda: members.used() == [2, 2])
        key = redis_limit.keys_of(members.limits[0].name)[0]
        connection = await patiently(txredisapi.UnixConnection(str(redis.socket), reconnect=False))
        # All would be forgotten by itself, if the processes were killed.
        assert TTL * 10 < await patiently(connection.ttl(key)) <= 300
    assert not await patiently(connection.exists(key))
    await patiently(connection.disconnect())


@pytest.mark.parametrize("when_unreachable", ["hold", "local=1"])
@ensureDeferred
async def test_when_redis_is_away_it_says_so_once_and_goes_on_when_it_is_back(
    when_unreachable: str, tmp_path: Path
) -> None:
    redis = Redis(tmp_path).start()
    try:
        with Log() as log:
            async with Members(redis, 2, 1, when_unreachable=when_unreachable) as members:
                limit = members.limits[0]
                members.want(0, 1)
                await until(lambda: limit.held == 2)
                redis.stop()
                members.want(0, 1)
                assert members.used() == [2]  # the lease can be used up
                limit.release(None)
                limit.release(None)
                await until(lambda: monotonic() > limit._ends and limit._is_away)
                members.want(0, 2)
                assert members.used() == [0 if when_unreachable == "hold" else 1]
                redis.start(settle=False)
                await until(lambda: members.used() == [2])
        texts = [text for text in log.texts() if "Redis at " in text]
        assert ["cannot be used" in text for text in texts] == [True, False]
        assert "is back" in texts[1]
    finally:
        redis.stop()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://localhost", ("localhost", 6379, None, 0, None, None, False)),
        ("rediss://user:p%40ss@host:7000/3", ("host", 7000, None, 3, "user", "p@ss", True)),
        ("unix:///run/redis.sock?db=2", (None, 6379, "/run/redis.sock", 2, None, None, False)),
        ("unix://:secret@/run/redis.sock", (None, 6379, "/run/redis.sock", 0, None, "secret", False)),
        ("rediss://[::1]/?ssl_ca_certs=/ca.pem&ttl=3", ("::1", 6379, None, 0, None, None, True, "/ca.pem")),
        (
            "redis+sentinel://:pw@one,two:7000,[::1]:8000/service/3",
            (
                *(None, 6379, None, 3, None, "pw", False, None),
                (("one", 26379), ("two", 7000), ("::1", 8000)),
                "service",
            ),
        ),
    ],
)
def test_urls_are_read(url: str, expected: tuple[object, ...]) -> None:
    assert redis_limit.RedisAddress.from_url(url) == redis_limit.RedisAddress(*expected)


@pytest.mark.parametrize("url", ["redis://host", "redis+sentinel://host/service"])
def test_passwords_can_be_in_files_or_in_the_environment(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(parameters: str) -> tuple[str | None, str | None, str | None]:
        address = redis_limit.RedisAddress.from_url(url + parameters)
        assert "word" not in repr(address)
        return address.password, address.sentinel_username, address.sentinel_password

    sentinels = "sentinel" in url
    (tmp_path / "one").write_text("word one\n")
    (tmp_path / "two").write_text("word two\n")
    assert of("") == (None, None, None)
    assert of(f"?password_file={tmp_path}/one") == ("word one", None, None)
    if sentinels:
        assert of(f"?sentinel_password_file={tmp_path}/two&sentinel_username=me") == (None, "me", "word two")
        assert of("?sentinel_password=word") == (None, None, "word")
    monkeypatch.setenv("CONNLIMIT_REDIS_PASSWORD", "word 3")
    monkeypatch.setenv("CONNLIMIT_SENTINEL_PASSWORD", "word 4")
    assert of("") == ("word 3", None, "word 4" if sentinels else None)
    assert of(f"?password_file={tmp_path}/one")[0] == "word one"


def test_a_url_can_be_in_a_file_where_nobody_else_sees_it(redis: Redis, tmp_path: Path) -> None:
    (tmp_path / "url").write_text(f"{redis.url}?ttl={TTL}\n")
    command = ["--listen=tcp:0:interface=127.0.0.1", "--factory=echoes:factory", "--max-connections=1"]
    command.append("--name=file")
    (tmp_path / "echoes.py").write_text(ECHO)
    with (
        running(
            "connlimit", *command, "--name=file", f"--shared-file={tmp_path}/url", cwd=tmp_path
        ) as program,
        socket.create_connection(("127.0.0.1", program.port()), PATIENCE) as client,
    ):
        client.sendall(b"hello")
        assert client.recv(10) == b"hello"
        script = [sys.executable, "-m", "connlimit.shared.admin", "--url-file", str(tmp_path / "url"), "list"]
        done = subprocess.run(script, capture_output=True, text=True, timeout=PATIENCE)
        assert "file: 1 of its own setting held" in done.stdout


def test_a_url_can_carry_what_a_limit_takes() -> None:
    url = "redis://localhost/2?ttl=5&when_unreachable=local=3"
    limit = redis_limit.RedisLimit("x", 5, url=url)
    assert (limit._ttl, limit._local, limit._refuses, limit.address.database) == (5, 3, False, 2)
    limit = redis_limit.RedisLimit("x", 5, url=url, ttl=7, when_unreachable="refuse")
    assert (limit._ttl, limit._local, limit._refuses) == (7, 0, True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "http://localhost"}, "url must name a Redis"),
        ({"url": "redis://"}, "url must name a Redis"),
        ({"url": "redis://host:port"}, "url must name a Redis"),
        ({"url": "redis://host/db"}, "url must name a Redis"),
        ({"url": "unix://"}, "url must name a Redis"),
        ({"slots": -1}, "slots must be a whole number"),
        ({"name": ""}, "name must be a text"),
        ({"ttl": 0}, "ttl must be a number of seconds"),
        ({"when_unreachable": "panic"}, "when_unreachable must be hold, refuse or local=N, not 'panic'"),
        ({"when_unreachable": "local=x"}, "when_unreachable must be"),
        (
            {"url": "redis://host?ttl=soon"},
            "ttl must be a time from 0.5 to 3600 seconds, such as 30, 500ms, 30s or 5min, not 'soon'",
        ),
        (
            {"url": "redis://host?ttl=nan"},
            "ttl must be a time from 0.5 to 3600 seconds, such as 30, 500ms, 30s or 5min, not 'nan'",
        ),
        ({"url": "redis://host?when_unreachable=local"}, "when_unreachable must be .*, not 'local'"),
        (
            {"url": "redis://host?tttl=5"},
            "url can have the parameters password_file, ttl, when_unreachable, not tttl=5",
        ),
        ({"url": "redis://host?ssl_ca_certs=x"}, "url can have .*, not ssl_ca_certs=x"),
        ({"url": "redis+sentinel://host"}, "url must name a Redis"),
        ({"url": "redis+sentinel://host,:1/service"}, "url must name a Redis"),
        ({"url": "redis://:secret@host/db"}, r"url must name .*, not 'redis://\*\*\*@host/db'"),
        ({"url": "redis://:secret"}, r"url must name .*, not 'redis://:\*\*\*'"),
        ({"url": "redis:/:secret@host"}, r"url must name .*, not 'redis:/\*\*\*@host'"),
        ({"url": "redis://u:secret#x@host:y"}, r"url must name .*, not 'redis://\*\*\*@host:\*\*\*'"),
        ({"url": "redis://host?password=secret"}, r"url can have .*, not password=\*\*\*"),
        ({"url": "redis://host?password_file=/none"}, "password_file must be a file .*, not '/none'"),
        ({"url": "rediss://host?ssl_ca_certs=/none"}, "ssl_ca_certs must be a file of .*, not '/none'"),
    ],
)
def test_a_wrong_value_gets_one_sentence(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=rf"\A{words}[^\n]*\Z"):
        redis_limit.RedisLimit(**{"name": "x", "slots": 5, "url": "redis://localhost", **settings})


def test_four_processes_never_have_more_than_the_limit_whatever_happens_to_them(tmp_path: Path) -> None:
    redis, backend, slots = Redis(tmp_path).start(), Backend(), 20
    workers: dict[int, subprocess.Popen[str]] = {}

    def start() -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, redis.url, str(slots), str(TTL), f"tcp:127.0.0.1:{backend.port}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        workers[int(process.stdout.readline())] = process

    ended = threading.Event()
    answered, cut = [], []

    def come(number: int) -> None:
        while not ended.is_set():
            port = list(workers)[number % len(workers)]
            number += 1
            try:
                with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
                    client.sendall(b"x")
                    (answered if client.recv(1) == b"x" else cut).append(port)
            except OSError:
                cut.append(port)
                time.sleep(0.01)

    try:
        for _ in range(4):
            start()
        clients = [threading.Thread(target=come, args=(number,)) for number in range(60)]
        for client in clients:
            client.start()
        time.sleep(1)
        killed = workers.pop(next(iter(workers)))
        killed.kill()
        killed.wait()
        killed.stdout.close()
        start()
        stopped = next(iter(workers.values()))
        os.kill(stopped.pid, signal.SIGSTOP)
        time.sleep(TTL * 1.5)
        os.kill(stopped.pid, signal.SIGCONT)
        redis.ask(b"CLIENT", b"PAUSE", b"700")
        time.sleep(1)
        redis.ask(b"CLIENT", b"KILL", b"TYPE", b"normal")
        time.sleep(0.5)
        before = len(answered)
        redis.stop()
        redis.start(settle=False)
        began = monotonic()
        while len(answered) < before + 200:
            assert monotonic() - began < PATIENCE
            time.sleep(0.05)
        ended.set()
        for client in clients:
            client.join(PATIENCE)
        assert backend.maximum <= slots
        assert backend.maximum >= slots / 2
        assert len(answered) > 500
    finally:
        ended.set()
        for worker in workers.values():
            worker.kill()
            worker.wait()
            worker.stdout.close()
        backend.listening.close()
        redis.stop()


def test_two_programs_share_a_limit_by_their_command_lines(redis: Redis, tmp_path: Path) -> None:
    (tmp_path / "echoes.py").write_text(ECHO)
    command = ["--listen=tcp:0:interface=127.0.0.1", "--factory=echoes:factory", "--max-connections=1"]
    command += ["--name=programs", f"--shared={redis.url}"]
    with (
        running("connlimit", *command, cwd=tmp_path) as one,
        running("connlimit", *command, cwd=tmp_path) as other,
        socket.create_connection(("127.0.0.1", one.port()), PATIENCE) as first,
    ):
        first.sendall(b"hello")
        assert first.recv(10) == b"hello"
        with socket.create_connection(("127.0.0.1", other.port()), PATIENCE) as second:
            second.sendall(b"hello")
            second.settimeout(0.3)
            with pytest.raises(TimeoutError):
                second.recv(10)
            first.close()
            second.settimeout(PATIENCE)
            assert second.recv(10) == b"hello"
        assert one.terminate() == other.terminate() == 0


def test_an_endpoint_string_and_a_file_can_ask_for_it(tmp_path: Path) -> None:
    endpoint = serverFromString(
        reactor,
        r"connlimit:tcp:0:max_connections=7:limiter=x:shared=redis\://localhost?ttl=3&when_unreachable=local=2",
    )
    (limit,) = endpoint.limiter.limits
    assert (limit.name, limit._slots, limit.address.host) == ("x", 7, "localhost")
    assert (limit._ttl, limit._local) == (3, 2)
    path = tmp_path / "connlimit.toml"
    path.write_text(
        '[limiters.y]\nmax_connections = 8\nshared = "redis://localhost/2?ttl=3"\n'
        '[services.s]\nlisten = "tcp:0"\nforward = "tcp:localhost:1"\n'
    )
    assert read(path).limiters["y"].shared == "redis://localhost/2?ttl=3"


def test_a_file_that_is_read_again_changes_what_is_shared(redis: Redis, tmp_path: Path) -> None:
    (tmp_path / "echoes.py").write_text(ECHO)
    path = tmp_path / "connlimit.toml"

    def write(slots: int) -> None:
        path.write_text(
            f'[limiters.reloaded]\nmax_connections = {slots}\nshared = "{redis.url}?ttl={TTL}"\n'
            '[services.s]\nlisten = "tcp:0:interface=127.0.0.1"\nfactory = "echoes:factory"\n'
        )

    write(1)
    with running("connlimit", f"--config={path}", cwd=tmp_path) as program, ExitStack() as stack:
        port = program.port()

        def connect() -> socket.socket:
            client = socket.create_connection(("127.0.0.1", port), PATIENCE)
            client.sendall(b"hello")
            return stack.enter_context(client)

        one, other = connect(), connect()
        assert one.recv(10) == b"hello"
        other.settimeout(0.3)
        with pytest.raises(TimeoutError):
            other.recv(10)
        write(2)
        program.process.send_signal(signal.SIGHUP)
        other.settimeout(PATIENCE)
        assert other.recv(10) == b"hello"
        write(1)
        program.process.send_signal(signal.SIGHUP)
        program.wait_for(r"reloaded \S*toml(.|\n)*reloaded \S*toml")
        one.close()
        third = connect()
        third.settimeout(0.5)
        with pytest.raises(TimeoutError):
            third.recv(10)
        other.close()
        third.settimeout(PATIENCE)
        assert third.recv(10) == b"hello"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shared=redis://localhost"], "--shared needs --max-connections"),
        (
            ["--shared=nonsense", "--max-connections=5"],
            "--shared must name a Redis, such as redis://localhost,",
        ),
        (
            ["--shared=redis://", "--max-connections=5"],
            "--shared must name a Redis, such as redis://localhost:",
        ),
        (
            ["--shared=redis://x?tttl=0", "--max-connections=5"],
            "--shared can have the parameters password_file, ttl,",
        ),
        (["--shared=reddis://a:secret@host", "--max-connections=5"], "not 'reddis://***@host'"),
        (
            ["--shared-file=/none", "--max-connections=5"],
            "--shared-file must be a file with a URL in its first line, not '/none'",
        ),
        (["--shared-file=/none", "--shared=redis://x"], "--shared-file must be left out when --shared is"),
        (["--shared=redis://x?ttl=0", "--max-connections=5"], "ttl must be a time from 0.5 to 3600 seconds"),
    ],
)
def test_a_wrong_command_line_gets_one_sentence(arguments: list[str], words: str) -> None:
    assert words in failing("connlimit", "--listen=tcp:0", "--forward=tcp:localhost:1", *arguments)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"-NOAUTH Authentication required.\r\n",
        b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
        b"-READONLY You can't write against a read only replica.\r\n",
        b"$5\r\nhello\r\n",
        b"\x00\xff\x00\xff\r\n",
    ],
)
@ensureDeferred
async def test_what_is_no_usable_redis_serves_nobody_and_is_told_of_once(answer: bytes) -> None:
    strange = Answering(answer)
    limit = redis_limit.RedisLimit("x", 5, url=strange.url, ttl=TTL)
    with Log() as log:
        assert not limit.try_acquire(None)
        await until(lambda: limit._is_away)
        await until(lambda: failures(limit) >= 3)
        assert not limit.try_acquire(None)
    assert sum("cannot be used" in text for text in log.texts()) == 1
    await patiently(limit.close())
    strange.stop()


class Flooding(Answering):
    """
    Something that does not stop answering.

    :ivar sent: how many bytes of that it got rid of on each connection.
    """

    def __init__(self, answer: bytes, more: bytes) -> None:
        self._more = more * (100_000 // len(more))
        self.sent: list[int] = []
        super().__init__(answer)

    def _talk(self, client: socket.socket) -> None:
        self.sent.append(0)
        number = len(self.sent) - 1
        with suppress(OSError), client:
            client.recv(65536)
            client.sendall(self._answer)
            while True:
                self.sent[number] += client.send(self._more)


@pytest.mark.parametrize(
    ("answer", "more"),
    [
        (b"$900000000\r\n", b"x"),
        (b"*900000000\r\n", b":1\r\n"),
        (b"", b"*1\r\n"),
        (b"", b"+OK\r\n"),
        (b"", b"x"),
        (b"", b"x\r\n"),
    ],
)
@ensureDeferred
async def test_an_endless_answer_takes_no_memory(answer: bytes, more: bytes) -> None:
    endless = Flooding(answer, more)
    limit = redis_limit.RedisLimit("x", 5, url=endless.url, ttl=TTL)
    with Log() as log:
        assert not limit.try_acquire(None)
        await until(lambda: failures(limit) >= 3)
        await patiently(limit.close())
    assert sum("cannot be used" in text for text in log.texts()) == 1
    assert not [event for event in log.events if "log_failure" in event]
    # The kernel takes some, too.
    assert 0 < max(endless.sent) < 20_000_000
    endless.stop()


BROKEN = {
    "full": ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", "OOM"),
    "a replica": ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "READONLY"),
    "with a wrong password": (
        "CONFIG SET requirepass other",
        "AUTH other\r\nCONFIG SET requirepass secret",
        "WRONGPASS",
    ),
    "without the password that is demanded": (
        "CONFIG SET requirepass other",
        'AUTH other\r\nCONFIG SET requirepass ""',
        "NOAUTH",
    ),
    "with a password that is not demanded": (
        "PING",
        "CONFIG SET requirepass secret",
        "AUTH <password> called without any password configured",
    ),
    "hanging": (signal.SIGSTOP, signal.SIGCONT, "no answer within 0.5 s"),
}


@pytest.mark.parametrize("what", BROKEN)
@ensureDeferred
async def test_while_redis_cannot_be_used_all_wait_and_once_it_can_they_are_served(
    what: str, tmp_path: Path
) -> None:
    spoil, mend, words = BROKEN[what]
    redis = Redis(tmp_path).start(settle=False)
    url = redis.url
    if what.startswith("with a"):
        url = f"unix://:secret@{redis.socket}"

    def do(order: str | signal.Signals) -> None:
        if isinstance(order, str):
            assert redis.ask(order.encode()).startswith(b"+")
        else:
            os.kill(redis.process.pid, order)

    try:
        do(spoil)
        limit = redis_limit.RedisLimit("x", 5, url=url, ttl=TTL)
        limiter = Limiter(limits=[limit])
        with Log() as log:
            newcomer = NullConnection(None)
            assert not limiter.admission.serve_at_once(newcomer)
            limiter.admission.wait(newcomer)
            await until(lambda: limit._is_away and failures(limit) >= 2)
            assert limiter.waiting == 1
            do(mend)
            await until(lambda: limiter.active == 1)
        limiter.admission.finish(newcomer)
        await patiently(limit.close())
        # Logs of other tests may sum up meanwhile.
        complaint, relief = (text for text in log.texts() if text.startswith("limit x: "))
        assert complaint.startswith(f"limit x: Redis at {redis.socket} cannot be used: ")
        assert words in complaint
        assert relief == f"limit x: Redis at {redis.socket} is back"
        assert not [event for event in log.events if event["log_level"] is LogLevel.critical]
    finally:
        redis.stop()


@ensureDeferred
async def test_with_refuse_they_are_refused_from_the_end_of_the_lease_until_redis_is_back(
    tmp_path: Path,
) -> None:
    redis = Redis(tmp_path).start()
    limit = redis_limit.RedisLimit("x", 1, url=f"{redis.url}?ttl={TTL}&when_unreachable=refuse")
    limiter = Limiter(limits=[limit], refusal=Say(b"come back later"))
    try:
        async with listening(limiter) as (_, where):
            first = await connected(where)
            first.transport.write(b"x")
            await first.receives(b"x")
            second = await connected(where)
            await until(lambda: limiter.waiting == 1)
            redis.stop()
            await second.receives(b"come back later")
            await second.is_closed()
            assert monotonic() >= limit._ends
            newcomer = await connected(where)
            await newcomer.receives(b"come back later")
            await newcomer.is_closed()
            assert limiter.snapshot().refused["full"] == 2
            await first.close()
            redis.start(settle=False)
            await until(lambda: not limit.refuses())
            last = await connected(where)
            last.transport.write(b"y")
            await last.receives(b"y")
            await last.close()
        await patiently(limit.close())
    finally:
        redis.stop()


@asynccontextmanager
async def encrypted(redis: Redis, folder: Path) -> AsyncIterator[tuple[int, Path]]:
    """
    TLS before a Redis, by a certificate for localhost: the port, and the file with the certificate.
    """
    certificate = make_certificate(folder)
    relay = RelayFactory(UNIXClientEndpoint(reactor, str(redis.socket)), "Redis")
    endpoint = serverFromString(reactor, f"ssl:0:privateKey={certificate}:interface=127.0.0.1")
    port = await endpoint.listen(relay)
    try:
        yield port.getHost().port, certificate
    finally:
        await port.stopListening()


@ensureDeferred
async def test_tls_is_used_with_a_certificate_that_can_be_trusted(redis: Redis, tmp_path: Path) -> None:
    async with encrypted(redis, tmp_path) as (port, certificate):
        url = f"rediss://localhost:{port}?ssl_ca_certs={certificate}&ttl={TTL}"
        limit = redis_limit.RedisLimit("encrypted", 2, url=url)
        assert not limit.try_acquire(None)
        await until(lambda: limit.held)
        assert limit.try_acquire(None)
        await until(lambda: limit._link.hears(limit.channel))
        listed = await deferToThread(administer, url, "list")
        assert re.match("encrypted: [12] of its own setting held\n", listed.stdout)
        limit.release(None)
        await patiently(limit.close())


@pytest.mark.parametrize(
    ("host", "trusted", "words"),
    [
        ("localhost", False, "certificate verify failed"),
        ("127.0.0.1", True, "its certificate is for another host"),
    ],
)
@ensureDeferred
async def test_tls_is_not_used_with_another_certificate(
    redis: Redis, tmp_path: Path, host: str, trusted: bool, words: str
) -> None:
    async with encrypted(redis, tmp_path) as (port, certificate):
        query = f"ttl={TTL}&ssl_ca_certs={certificate}" if trusted else f"ttl={TTL}"
        limit = redis_limit.RedisLimit("x", 2, url=f"rediss://{host}:{port}?{query}")
        with Log() as log:
            assert not limit.try_acquire(None)
            await until(lambda: failures(limit) >= 3)
        assert not limit.held
        complaints = [text for text in log.texts() if text.startswith("limit ")]
        assert complaints == [f"limit x: Redis at {host}:{port} cannot be used: {words}"]
        await patiently(limit.close())


@pytest.mark.parametrize("how", ["killed", "demoted"])
@ensureDeferred
async def test_after_a_failover_the_limit_is_that_of_the_new_primary(how: str, tmp_path: Path) -> None:
    service = Service(tmp_path).start()
    try:
        with Log() as log:
            async with Members(service, 5, 2) as members:
                members.want(0, 5)
                await until(lambda: members.used() == [5, 0])
                assert service.primary.ask(b"WAIT 1 5000") == b":1"
                if how == "killed":
                    service.primary.stop()
                else:
                    await until(lambda: service.sentinel.ask(b"SENTINEL FAILOVER cache") == b"+OK")
                members.want(1, 3)
                await until(lambda: service.replica.info(b"role", b"replication") == b"master")
                await until(lambda: not any(limit._is_away for limit in members.limits))
                assert members.used() == [5, 0]
                members.limits[0].release(None)
                members.limits[0].release(None)
                await until(lambda: members.used() == [3, 2])
                name = members.limits[0].name
                listed = await deferToThread(administer, service.url, "list")
                assert f"{name}: 5 of its own setting held" in listed.stdout
        assert not [event for event in log.events if "log_failure" in event]
    finally:
        service.stop()


@ensureDeferred
async def test_sentinels_that_know_nothing_are_told_of_in_the_log(tmp_path: Path) -> None:
    service = Service(tmp_path).start()
    try:
        url = service.url.replace("cache", "mail")
        limit = redis_limit.RedisLimit("x", 5, url=f"{url}?ttl={TTL}")
        with Log() as log:
            assert not limit.try_acquire(None)
            await until(lambda: failures(limit) >= 3)
            await patiently(limit.close())
        (complaint,) = (text for text in log.texts() if "cannot be used" in text)
        assert complaint.startswith("limit x: Redis at mail of 127.0.0.1:")
        service.sentinel.stop()
    finally:
        service.stop()


@ensureDeferred
async def test_another_redis_gives_no_new_slots_before_all_have_said_what_they_hold(redis: Redis) -> None:
    async with Members(redis, 5, 2) as members:
        members.want(0, 2)
        await until(lambda: members.used() == [2, 0])
        # As if a replica had been promoted that has not heard of the other's slots.
        connection = await patiently(txredisapi.UnixConnection(str(redis.socket), reconnect=False))
        (key, _) = redis_limit.keys_of(members.limits[0].name)
        about = json.loads(await patiently(connection.hget(key, "about")))
        await patiently(connection.hdel(key, members.limits[0].member))
        await patiently(connection.hset(key, "about", json.dumps({**about, "run": "another"})))
        began = monotonic()
        members.want(1, 5)
        await until(lambda: members.used() == [2, 3])
        assert monotonic() - began >= TTL - 0.1
        await patiently(connection.disconnect())


@ensureDeferred
async def test_a_redis_with_a_password_is_used_with_it(tmp_path: Path) -> None:
    redis = Redis(tmp_path)
    try:
        redis.start(False, "--requirepass", "secret")
        limit = redis_limit.RedisLimit("x", 2, url=f"unix://:secret@{redis.socket}", ttl=TTL)
        assert not limit.try_acquire(None)
        await until(lambda: limit.held)
        assert limit.try_acquire(None)
        limit.release(None)
        await patiently(limit.close())
    finally:
        redis.stop()


@ensureDeferred
async def test_limits_are_listed_set_and_reset(redis: Redis) -> None:
    async with Members(redis, 3, 2) as members:
        name = members.limits[0].name
        members.want(0, 2)
        await until(lambda: members.used() == [2, 0])
        members.want(1, 2)
        await until(lambda: members.used() == [2, 1])
        listed = (await deferToThread(administer, redis.url, "list")).stdout
        assert f"{name}: 3 of its own setting held" in listed
        assert "asks for more" in listed
        assert (await deferToThread(administer, redis.url, "set", name, "4")).returncode == 0
        await until(lambda: members.used() == [2, 2])
        assert f"{name}: 4 of 4 held" in (await deferToThread(administer, redis.url, "list")).stdout
        assert (await deferToThread(administer, redis.url, "reset", name)).returncode == 0
        # Whoever has connections says so again.
        for limit in members.limits:
            limit._ask_soon(0)
        await until(lambda: sum(limit.held for limit in members.limits) >= 4)


def test_wrong_orders_get_one_sentence(redis: Redis, tmp_path: Path) -> None:
    for arguments, words in (
        (["set", "x", "many"], "N must be a whole number, 0 or more, not 'many'"),
        (["set", "x", "-1"], "N must be a whole number, 0 or more, not '-1'"),
    ):
        done = administer(redis.url, *arguments)
        assert done.returncode == 2
        assert words in done.stderr.splitlines()[-1]
    done = subprocess.run(
        [sys.executable, "-m", "connlimit.shared.admin", "--url", f"unix://{tmp_path}/none", "list"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1
    assert "cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


ADMINISTER = "from connlimit.shared.admin import main; main()"

WITHOUT_TXREDISAPI = """
import sys
sys.modules["txredisapi"] = None
from connlimit.shared.admin import main
main()
"""


@pytest.mark.parametrize(
    ("code", "arguments", "exit_code", "words"),
    [
        (WITHOUT_TXREDISAPI, ["--help"], 0, "usage: "),
        (WITHOUT_TXREDISAPI, ["--version"], 0, ""),
        (WITHOUT_TXREDISAPI, ["list"], 2, "this needs txredisapi: pip install 'connlimit[redis]'\n"),
        (ADMINISTER, [], 2, "the following arguments are required: COMMAND"),
        (ADMINISTER, ["lisst"], 2, "'lisst'"),
        (ADMINISTER, ["set", "web"], 2, "the following arguments are required: N"),
        (ADMINISTER, ["set", "web", "-1"], 2, "-1"),
        (ADMINISTER, ["set", "web", "many"], 2, "N must be a whole number, 0 or more, not 'many'"),
        (ADMINISTER, ["--url-file", "/none", "list"], 2, "--url-file must be a file with a URL in its first"),
        (ADMINISTER, ["--url", "redis://:secret", "list"], 2, "not 'redis://:***'"),
        (ADMINISTER, ["set", "", "1"], 2, "NAME must be that of a limit, not ''"),
        (ADMINISTER, ["reset", ""], 2, "NAME must be that of a limit, not ''"),
        (ADMINISTER, ["--url", "http://localhost", "list"], 2, "--url must name a Redis, such as redis://"),
        (
            ADMINISTER,
            ["--url", "redis://x?y=1", "list"],
            2,
            "--url can have the parameters password_file, ttl, ",
        ),
    ],
)
def test_its_command_line_is_carried_out_or_told_why_not_in_one_sentence(
    code: str, arguments: list[str], exit_code: int, words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == exit_code, done
    assert words in done.stdout + done.stderr
    if exit_code:
        assert done.stderr.startswith("connlimit-shared: ")
        assert len(done.stderr.splitlines()) == 1


#: Longer than any example takes.
LONG = 6000

QUESTIONS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 3), st.integers(0, 5)), max_size=12
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slots=st.integers(0, 6), questions=QUESTIONS)
def test_the_script_does_what_the_model_does(
    redis: Redis, slots: int, questions: list[tuple[int, int, int, int]]
) -> None:
    name = f"example {next(NUMBERS)}"
    members = [Asker(redis, name, slots) for _ in range(3)]
    now = 1_000_000.0
    for member in members:
        member.ask(0, now)
    # The limit is new, and gives slots when others would have been heard of.
    assert members[0].guarded
    now += 10
    held, asking = [0, 0, 0], []
    for member, in_use, spare, wanted in questions:
        # A member has no more in use than it was given, and keeps what it uses and perhaps some more.
        in_use = min(in_use, held[member])
        kept = min(held[member], in_use + spare)
        wanted = max(wanted, in_use)
        answer = members[member].ask(wanted, now, in_use=in_use, kept=kept)

        others = sum(held) - held[member]
        earlier = asking.index(member) if member in asking else len(asking)
        held[member] = max(kept, min(wanted, max(0, slots - others - earlier)))
        asks = held[member] < wanted and held[member] <= in_use
        if asks and member not in asking:
            asking.append(member)
        elif not asks and member in asking:
            asking.remove(member)
        assert answer == held[member]
        assert members[member].others == len([each for each in asking if each != member])
        assert sum(held) <= slots
