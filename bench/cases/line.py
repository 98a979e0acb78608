"""
What it costs to arrive, to be served, to leave and to be refused, by how many wait and in which order.
"""

from __future__ import annotations

import gc
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from twisted.internet.address import IPv4Address
from twisted.internet.task import Clock

from bench.harness.processes import Process, in_turn, raise_descriptor_limit
from bench.harness.results import Figure, Result, Table, at_most, ratio
from connlimit import Limiter
from connlimit._limiter.queue import ORDERS
from connlimit._limiter.slots import NullConnection

#: What can happen to a connection.
EVENTS = ("is accepted", "leaves", "is served", "is refused")


class Waiting(NullConnection):
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
    A limiter with a number who wait, one of whom is served at a time.
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
        if not self.limiter.admission.serve_at_once(connection):
            self.limiter.admission.wait(connection)

    def turn(self) -> None:
        (active,) = self.limiter.admission.slots.connections()
        self.limiter.admission.finish(active)


def cost(act: Callable[[Any], None], on: list[Any]) -> float:
    """
    Microseconds for each, in the mean of all.
    """
    gc.collect()
    gc.disable()
    began = time.process_time()
    for each in on:
        act(each)
    took = time.process_time() - began
    gc.enable()
    return took / len(on) * 1e6


def measure(count: int, acts: int, **settings: Any) -> dict[str, float]:
    """
    The cost of each event while about *count* wait.
    """
    choices = random.Random(1)
    crowd = Crowd(count, **settings)
    new = [Waiting() for _ in range(acts)]
    result = {"is accepted": cost(crowd.arrive, new)}
    leaving = choices.sample(crowd.waiting[1:], acts)
    result["leaves"] = cost(crowd.limiter.admission.depart, leaving)
    result["is served"] = cost(lambda _: crowd.turn(), list(range(acts)))
    crowd.limiter.max_waiting = 0
    result["is refused"] = cost(crowd.limiter.admission.may_wait, [Waiting() for _ in range(acts)])
    return result


def run(quick: bool) -> Iterator[Result]:
    """
    Microseconds for each event with a short and a long queue, and their ratio; departures on real sockets.
    """
    counts, acts, rounds = ((100, 500), 50, 3) if quick else ((100, 1000, 15_000), 90, 17)
    few, many = f"{counts[0]:,}", f"{counts[-1]:,}"
    columns = ("order", "event", *(f"{count:,} wait" for count in counts), f"{many} to {few}", "aim")
    table = Table("line", "What an event costs, in microseconds, by how many wait", columns, named=2)
    kinds: dict[str, dict[str, Any]] = {order: {"order": order} for order in ORDERS}
    kinds[f"fifo, {many} peers"] = {"max_per_peer": 1}
    aim = at_most(1.2)
    for kind, settings in kinds.items():
        samples = in_turn(
            rounds,
            {str(count): partial(measure, count, acts, **settings) for count in counts},
        )
        for event in EVENTS:
            costs = {count: [sample[event] for sample in each] for count, each in samples.items()}
            times = ratio(costs[str(counts[-1])], costs[str(counts[0])], "{:.2f}")
            figures = [Figure.of(each, "{:.1f}") for each in costs.values()]
            table.rows.append((kind, event, *figures, times, aim.judge(times)))
    yield table
    yield _departures(quick)


def _departures(quick: bool) -> Result:
    """
    How soon a departure is noticed, and what the process uses while nothing happens.
    """
    maximum = raise_descriptor_limit() * 3 // 4
    counts, seconds = ((200,), 1) if quick else (tuple(c for c in (100, 1000, 15_000) if c <= maximum), 4)
    columns = ("waiting", "noticed after, ms", f"CPU in {seconds} s in which nothing happens, ms")
    table = Table("departures", "Clients that close their connection while they wait", columns)
    for count in counts:
        with Process([sys.executable, "-m", "bench.cases.line", str(count)]) as process:
            clients = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(count)]
            process.line()
            before = process.cpu()
            time.sleep(seconds)
            used = process.cpu() - before
            delays = []
            for client in random.Random(1).sample(clients, 100):
                closed = time.monotonic()
                client.close()
                delays.append((float(process.line()) - closed) * 1000)
            for client in clients:
                client.close()
            table.rows.append((f"{count:,}", Figure.of(delays, "{:.2f}"), Figure.of([used * 1000], "{:.1f}")))
    return table


def serve(count: int) -> None:
    """
    Be the server: print the port, then when all wait, then the time of each departure.
    """
    from twisted.internet import reactor
    from twisted.internet.endpoints import serverFromString
    from twisted.internet.protocol import Factory, Protocol

    from connlimit import LimitingEndpoint
    from connlimit._system import descriptors
    from connlimit.observers import LimiterObserver

    class Tell(LimiterObserver):
        def waiting(self, limiter: Limiter, connection: Any) -> None:
            if limiter.waiting == count:
                print("all wait", flush=True)

        def departed(self, limiter: Limiter, connection: Any, waited: float) -> None:
            print(time.monotonic(), flush=True)

    descriptors.raise_limit()
    endpoint = serverFromString(reactor, "tcp:0:interface=127.0.0.1:backlog=4096")
    LimitingEndpoint(endpoint, Limiter(0, observers=[Tell()])).listen(
        Factory.forProtocol(Protocol)
    ).addCallback(lambda port: print(port.getHost().port, flush=True))
    reactor.run()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
