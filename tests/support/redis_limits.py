"""
Users of limits that are shared by Redis.
"""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from support.patience import PATIENCE
from support.redis import TTL, Redis, Service, command
from support.sockets import patiently

link = pytest.importorskip("connlimit._redis.link")
redis_limit = pytest.importorskip("connlimit.shared.redis_limit")

LEASE = Path(redis_limit.__file__).with_name("lease.lua").read_bytes()

#: What makes names of limits and members different.
NUMBERS = itertools.count()

#: A relay with a shared limit, as a process of its own: it prints its port.
WORKER = """
import sys
from twisted.internet import endpoints, protocol, reactor
from connlimit import Limiter, LimitingEndpoint
from connlimit._twistd.targets.relay import RelayFactory
from connlimit.shared import RedisLimit

url, slots, ttl, backend = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
limiter = Limiter(limits=[RedisLimit("workers", slots, url=url, ttl=ttl)])
relay = RelayFactory(endpoints.clientFromString(reactor, backend), "backend")
endpoint = endpoints.serverFromString(reactor, "tcp:0:interface=127.0.0.1:backlog=1000")
LimitingEndpoint(endpoint, limiter).listen(relay).addCallback(
    lambda port: print(port.getHost().port, flush=True))
reactor.run()
"""


class Members:
    """
    Several users of one limit, as if in several processes, and who of them has how many slots.
    """

    number = 0

    def __init__(self, redis: Redis | Service, slots: int, count: int, **settings: object) -> None:
        Members.number += 1
        self.limits = [
            redis_limit.RedisLimit(
                f"limit {Members.number}", slots, url=redis.url, **{"ttl": TTL, **settings}
            )
            for _ in range(count)
        ]
        self.wanted = [0] * count
        for index, limit in enumerate(self.limits):
            limit.subscribe(lambda index=index: self.serve(index))

    async def __aenter__(self) -> Members:
        return self

    async def __aexit__(self, *error: object) -> None:
        for limit in self.limits:
            await patiently(limit.close())

    def serve(self, index: int) -> None:
        while self.wanted[index] and self.limits[index].try_acquire(None):
            self.wanted[index] -= 1
            assert sum(self.used()) <= self.limits[0]._slots

    def want(self, index: int, count: int = 1) -> None:
        self.wanted[index] += count
        self.serve(index)

    def used(self) -> list[int]:
        return [limit.in_use for limit in self.limits]


class Backend:
    """
    An echo server that counts, independently, how many connections it has at once.
    """

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.port = self.listening.getsockname()[1]
        self.now = self.maximum = self.served = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self.now += 1
            self.maximum = max(self.maximum, self.now)
        with suppress(OSError), client:
            time.sleep(0.005)
            while data := client.recv(1000):
                # One less before the answer: who has it may close, and its slot be another's, before we know.
                with self._lock:
                    self.now -= 1
                    self.served += 1
                client.sendall(data)
                client.recv(1)
                return
        with self._lock:
            self.now -= 1


def failures(limit: object) -> int:
    """
    How often a limit was told in vain since it was answered last.
    """
    return limit._link._failures + limit._rejections


class Answering(threading.Thread):
    """
    Something that is no Redis, or one that refuses: it gives the same answer to everything.
    """

    def __init__(self, answer: bytes) -> None:
        super().__init__(daemon=True)
        self._answer = answer
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listening.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._talk, args=(client,), daemon=True).start()

    def _talk(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            while client.recv(65536):
                client.sendall(self._answer)

    def stop(self) -> None:
        self._listening.close()


def administer(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "connlimit.shared.admin", "--url", url, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def lease(redis: Redis, name: str, script: bytes = LEASE, **question: object) -> list[object]:
    """
    What the script answers.
    """
    keys = [key.encode() for key in redis_limit.keys_of(name)]
    words = [b"EVAL", script, b"2", *keys, json.dumps(question).encode()]
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.settimeout(PATIENCE)
        client.connect(str(redis.socket))
        client.sendall(command(*words))
        with client.makefile("rb") as answer:
            line = answer.readline().decode()
    assert line.startswith("+"), line
    *counts, run = line[1:-2].split(" ", 6)
    return [*map(int, counts), run]


def script(run: str = "one", uptime: int = 1_000_000) -> bytes:
    """
    The script as it runs in the Redis of this name, so many seconds after its start.
    """
    about = f"run_id:{run}\\r\\nuptime_in_seconds:{uptime}\\r\\n"
    return LEASE.replace(b"redis.pcall('INFO', 'server')", f"'{about}'".encode())


class Asker:
    """
    A member that asks as a process does, by a clock that the test sets.

    :ivar hears: whether it says that it hears whose turn it is.
    """

    def __init__(self, redis: Redis, name: str, slots: int, runs: bytes | None = None) -> None:
        self._redis, self._name, self._slots, self._script = redis, name, slots, runs or script()
        self.member = f"process-{next(NUMBERS)}#1"
        self.hears = False
        self._number = 0
        self._asked: float | None = None
        self.run = ""
        self.held = self.others = self.guarded = self.pause = self.too_many = 0

    def another(self, runs: bytes | None = None) -> Asker:
        """
        A new member of the same limit.
        """
        return Asker(self._redis, self._name, self._slots, runs or self._script)

    def ask(
        self,
        wanted: int,
        now: float,
        *,
        in_use: int = 0,
        kept: int | None = None,
        wall: float | None = None,
        age: float | None = None,
        outlived: int = 0,
    ) -> int:
        """
        Ask at a time by the member's clock, and at another by that of Redis.

        :return: how many slots it has now.
        """
        self._number += 1
        if age is None:
            age = -0.001 if self._asked is None else now - self._asked
        self._asked = now
        seconds = now if wall is None else wall
        clock = b"{%d,%d}" % (seconds, seconds % 1 * 1_000_000)
        self.held, self.others, self.guarded, self.pause, _, self.too_many, self.run = lease(
            self._redis,
            self._name,
            self._script.replace(b"redis.call('TIME')", clock),
            member=self.member,
            ttl=10_000,
            number=self._number,
            slots=self._slots,
            in_use=in_use,
            kept=max(in_use, self.held if kept is None else kept),
            wanted=wanted,
            more=False,
            run=self.run,
            age=round(age * 1000),
            same=True,
            hears=self.hears,
            own=0,
            outlived=outlived,
            leaves=False,
            channel=f"connlimit:{{{self._name}}}:room",
            turns="connlimit:turns:",
        )
        return self.held

    def forget(self) -> None:
        """
        Let Redis forget all that it knows of the limit.
        """
        with self._connected() as client:
            client.sendall(command(b"DEL", redis_limit.keys_of(self._name)[0].encode()))
            assert client.recv(100) == b":1\r\n"

    def about(self) -> dict[str, object]:
        """
        What Redis knows of all members.
        """
        with self._connected() as client:
            client.sendall(command(b"HGET", redis_limit.keys_of(self._name)[0].encode(), b"about"))
            return json.loads(client.recv(1000).split(b"\r\n")[1])

    @contextmanager
    def listening(self) -> Iterator[Callable[[], str]]:
        """
        Be connected, and hear the limit's channel and that of turns: what was heard can be asked for.
        """
        channels = f"connlimit:{{{self._name}}}:room", f"connlimit:turns:{self.member.partition('#')[0]}"
        with self._connected() as client:
            for channel in channels:
                client.sendall(command(b"SUBSCRIBE", channel.encode()))
                assert b"subscribe" in client.recv(1000)
            yield lambda: client.recv(1000).decode()

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.settimeout(PATIENCE)
            client.connect(str(self._redis.socket))
            yield client


class Switch(threading.Thread):
    """
    A name for the primary: a port that leads to one Redis, and from a moment on to another.
    """

    def __init__(self, redis: Redis) -> None:
        super().__init__(daemon=True)
        self._redis = redis
        self._pairs: list[tuple[socket.socket, socket.socket, list[threading.Thread]]] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listening.getsockname()[1]}"
        self.redis_url = redis.url
        self.delay = 0.0
        self._swallowed: set[socket.socket] = set()
        self.start()

    def run(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.socket(socket.AF_UNIX)
                with suppress(OSError):
                    server.connect(str(self._redis.socket))
                ways = ((client, server), (server, client))
                threads = [threading.Thread(target=self._copy, args=way, daemon=True) for way in ways]
                for thread in threads:
                    thread.start()
                self._pairs.append((client, server, threads))

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                if self.delay:
                    time.sleep(self.delay)
                if other not in self._swallowed:
                    other.sendall(data)
        for each in (one, other):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def swallow(self, port: int) -> None:
        """
        Let nothing more reach the client at this port.
        """
        for client, _, _ in self._pairs:
            if client.getpeername()[1] == port:
                self._swallowed.add(client)

    def swallow_all(self) -> None:
        """
        Let nothing more reach anybody.
        """
        for client, server, _ in self._pairs:
            self._swallowed |= {client, server}

    def to(self, redis: Redis) -> None:
        """
        Lead to another one from now on, and end all connections.
        """
        self._redis = redis
        pairs, self._pairs = self._pairs, []
        for client, server, threads in pairs:
            for each in (client, server):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(PATIENCE)
            client.close()
            server.close()

    def stop(self) -> None:
        self._listening.close()
        self.to(self._redis)


@contextmanager
def processes_of_their_own() -> Iterator[None]:
    """
    Limits that are made here use connections of their own, as if each was in another process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "_links", {})
        patch.setattr(link.Link, "to", classmethod(lambda cls, *where: cls(*where)))
        yield
