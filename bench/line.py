"""
What it costs to arrive, to be served, to leave and to be refused, by how many wait and in which order.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock

from connlimit import Limiter
from connlimit._inert import Inert
from connlimit._line import ORDERS


class Waiting(Inert):
    """
    A connection with an address of its own.
    """

    number = 0

    def __init__(self) -> None:
        Waiting.number += 1
        number = Waiting.number
        host = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        super().__init__(IPv4Address("TCP", host, 1))


class Crowd:
    """
    A limiter with so many who wait, one of whom is served at a time.
    """

    def __init__(self, count: int, **settings: Any) -> None:
        self.clock = Clock()
        self.limiter = Limiter(1, clock=self.clock, **settings)
        self.count = count
        self.served: list[Waiting] = []
        self.waiting = [Waiting() for _ in range(count + 1)]
        for connection in self.waiting:
            self.arrive(connection)

    def arrive(self, connection: Waiting) -> None:
        if not self.limiter.serve_at_once(connection):
            self.limiter.wait(connection)

    def turn(self) -> None:
        (active,) = self.limiter._actives()
        self.limiter.finish(active)


def cost(act: Callable[[Any], None], on: list[Any]) -> float:
    """
    Microseconds for each, in the mean of all.
    """
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    for each in on:
        act(each)
    took = time.perf_counter() - began
    gc.enable()
    return took / len(on) * 1e6


def measure(count: int, acts: int, **settings: Any) -> dict[str, float]:
    """
    The cost of each event while about *count* wait.
    """
    choices = random.Random(1)
    crowd = Crowd(count, **settings)
    new = [Waiting() for _ in range(acts)]
    result = {"arrives": cost(crowd.arrive, new)}
    leaving = choices.sample(crowd.waiting[1:], acts)
    result["leaves"] = cost(crowd.limiter.depart, leaving)
    result["is served"] = cost(lambda _: crowd.turn(), list(range(acts)))
    crowd.limiter.max_waiting = 0
    result["is refused"] = cost(crowd.limiter.may_wait, [Waiting() for _ in range(acts)])
    return result


def run(quick: bool) -> Iterator[str]:
    """
    Microseconds for each event with a short and a long line, and their ratio.
    """
    few, many, acts, rounds = (100, 500, 50, 3) if quick else (100, 15_000, 90, 25)
    yield f"The line: cost of an event with {many} waiting, and how many times that with {few}"
    kinds: dict[str, dict[str, Any]] = {order: {"order": order} for order in ORDERS}
    kinds["10,000 peers"] = {"max_per_peer": 1}
    for kind, settings in kinds.items():
        short: dict[str, list[float]] = {}
        long: dict[str, list[float]] = {}
        for _ in range(rounds):
            for count, costs in ((few, short), (many, long)):
                for event, value in measure(count, acts, **settings).items():
                    costs.setdefault(event, []).append(value)
        figures = [
            f"{event} {statistics.median(long[event]):5.1f} us"
            f" {statistics.median(a / b for a, b in zip(long[event], short[event], strict=True)):5.2f} x"
            for event in long
        ]
        yield f"  {kind:12} " + "   ".join(figures)
    yield from departures(quick)


def departures(quick: bool) -> Iterator[str]:
    """
    How soon a departure is noticed, and what the process uses while nothing happens.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count, seconds = (200, 1) if quick else (min(15_000, hard * 3 // 4), 10)
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.line", str(count)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
        process.stdout.readline()
        before = cpu(process.pid)
        time.sleep(seconds)
        used = cpu(process.pid) - before
        delays = []
        for client in random.Random(1).sample(clients, 100):
            closed = time.monotonic()
            client.close()
            delays.append((float(process.stdout.readline()) - closed) * 1000)
        quartiles = statistics.quantiles(delays, n=4)
        yield (
            f"Departures, {count} waiting: noticed in {quartiles[1]:.2f} ms"
            f" ({quartiles[0]:.2f} to {quartiles[2]:.2f})"
        )
        yield f"  while nothing happens for {seconds} s: {used * 1000:.0f} ms of CPU"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def cpu(pid: int) -> float:
    """
    Seconds of CPU that a process has used (Linux).
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serve(count: int) -> None:
    """
    Be the server: print the port, then when all wait, then the time of each departure.
    """
    from twisted.internet import reactor
    from twisted.internet.endpoints import serverFromString
    from twisted.internet.protocol import Factory, Protocol

    from connlimit import LimitingEndpoint, _descriptors
    from connlimit.observers import LimiterObserver

    class Tell(LimiterObserver):
        def waiting(self, limiter: Limiter, connection: Any) -> None:
            if limiter.waiting == count:
                print("all wait", flush=True)

        def departed(self, limiter: Limiter, connection: Any, waited: float) -> None:
            print(time.monotonic(), flush=True)

    _descriptors.raise_limit()
    endpoint = serverFromString(reactor, "tcp:0:interface=127.0.0.1:backlog=4096")
    LimitingEndpoint(endpoint, Limiter(0, observers=[Tell()])).listen(
        Factory.forProtocol(Protocol)
    ).addCallback(lambda port: print(port.getHost().port, flush=True))
    reactor.run()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
