"""
Who gets the connections of a port at which several processes accept.

``inherited`` is one socket that all have, and each accepts as many at a time as Twisted does; ``one by one``
is the same, but one at a time. With ``SO_REUSEPORT`` each has its own, and the kernel chooses one.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from bench.harness.results import Result, Table

WAYS = ("inherited", "one by one", "SO_REUSEPORT")
_WORKERS = 4
_AT_ONCE = 5

#: Seconds for which a connection is served.
_SERVED = 0.02


def opened(way: str, port: int = 0) -> socket.socket:
    """
    A listening socket.
    """
    new = socket.socket()
    new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if way == "SO_REUSEPORT":
        new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    new.bind(("127.0.0.1", port))
    new.listen(4096)
    new.setblocking(False)
    return new


class Workers:
    """
    Processes that each serve a few at once, and tell each client which of them it was.
    """

    def __init__(self, way: str) -> None:
        first = opened(way)
        self.port = first.getsockname()[1]
        sockets = [first] * _WORKERS
        if way == "SO_REUSEPORT":
            sockets[1:] = [opened(way, self.port) for _ in range(_WORKERS - 1)]
        self.processes = []
        for number in range(_WORKERS):
            given = sockets[number]
            command = [sys.executable, "-m", "bench.cases.workers", str(number), str(given.fileno()), way]
            self.processes.append(
                subprocess.Popen(command, pass_fds=[given.fileno()], stdout=subprocess.PIPE, text=True)
            )
        for each in set(sockets):
            each.close()
        for process in self.processes:
            assert process.stdout is not None
            process.stdout.readline()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


class Crowd:
    """
    Clients that all come at once.

    :ivar served: how many each worker has served.
    :ivar reset: how many connections were reset.
    :ivar seconds: how long each client that was served took.
    """

    def __init__(self, port: int, count: int) -> None:
        self.served: Counter[str] = Counter()
        self.reset = 0
        self.seconds: list[float] = []
        self._selector = selectors.DefaultSelector()
        self._began = time.perf_counter()
        for _ in range(count):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            self._selector.register(client, selectors.EVENT_READ)

    def left(self) -> int:
        """
        How many have no answer yet.
        """
        return len(self._selector.get_map())

    def follow(self, patience: float) -> None:
        """
        Read the answers until there is none for these seconds.
        """
        while self.left() and (ready := self._selector.select(patience)):
            for key, _ in ready:
                client: Any = key.fileobj
                try:
                    word = client.recv(10).decode()
                except OSError:
                    word = ""
                if word:
                    self.served[word] += 1
                    self.seconds.append(time.perf_counter() - self._began)
                else:
                    self.reset += 1
                self._selector.unregister(client)
                client.close()

    def close(self) -> None:
        """
        Let those who are left go away.
        """
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()


def run(quick: bool) -> Iterator[Result]:
    """
    How many connections each worker served of a crowd, and what became of them when one hung and died.
    """
    count, rounds = (60, 1) if quick else (400, 5)
    columns = ("way", "served by each worker", "all in, s", "unanswered while one hangs", "reset as it dies")
    caption = f"{count} clients at once at {_WORKERS} workers, each of which serves {_AT_ONCE} at once"
    table = Table("workers", caption, columns)
    for _ in range(rounds):
        for way in WAYS:
            with Workers(way) as workers, ExitStack() as stack:
                crowd = Crowd(workers.port, count)
                stack.callback(crowd.close)
                crowd.follow(5)
                spread = " ".join(str(crowd.served[str(number)]) for number in range(_WORKERS))
                seconds = f"{max(crowd.seconds):.2f}"

                hanging = workers.processes[0]
                os.kill(hanging.pid, signal.SIGSTOP)
                crowd = Crowd(workers.port, count)
                stack.callback(crowd.close)
                crowd.follow(1)
                left = crowd.left()
                hanging.kill()
                crowd.follow(1)
                table.rows.append((way, spread, seconds, str(left), str(crowd.reset)))
    table.rows.sort(key=lambda row: WAYS.index(str(row[0])))
    yield table


def serve(number: str, descriptor: int, way: str) -> None:
    """
    Be a worker.
    """
    from twisted.internet import reactor
    from twisted.internet.protocol import Factory, Protocol

    from connlimit import Limiter, LimitingFactory
    from connlimit._twistd.processes.inherited_ports import accept_one_by_one

    class Tell(Protocol):
        def connectionMade(self) -> None:
            reactor.callLater(_SERVED, self.tell)

        def tell(self) -> None:
            self.transport.write(number.encode())
            self.transport.loseConnection()

    limiter = Limiter(_AT_ONCE)
    factory = LimitingFactory(Factory.forProtocol(Tell), limiter)
    port = reactor.adoptStreamPort(descriptor, socket.AF_INET, factory)
    if way == "one by one":
        accept_one_by_one(port)
    reactor.callWhenRunning(print, "ready", flush=True)
    reactor.run()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
