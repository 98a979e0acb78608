"""
Ten times as many requests as a server can answer: what that still does for anybody, bare and limited.

As a program it is the server: python -m bench.cases.overload WAY WORK LAST
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from bench.harness.processes import Load, Process, in_turn
from bench.harness.results import Curve, Figure, Plot, Result, Table, at_least, at_most, ratio

#: Seconds of CPU that a request takes.
COST = 0.004

#: How many connections a limited server serves at once, and how many may wait.
LIMIT, WAITING = 8, 100

#: Seconds after which a client gives up.
PATIENCE = 1.0

_OVERLOAD = 10

#: The limiter's settings in each way; None for a bare server.
WAYS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "fifo": {"order": "fifo"},
    "lifo": {"order": "lifo"},
    "fair": {"order": "fair"},
    "adaptive": {"order": "adaptive", "adaptive_target": 0.1, "adaptive_interval": 0.5},
    "fifo, stops accepting": {"order": "fifo"},
}

# A backlog as long as the queue where that is to hold the rest; else one that never fills.
_BACKLOGS = {"fifo, stops accepting": WAITING}

# How many requests a client makes on its connection.
_LAST = {"close": 1, "keep-alive": 10}

_CAPTIONS = {
    ("reactor", "close"): "Work in the reactor's thread, a connection for each request",
    ("reactor", "keep-alive"): "Work in the reactor's thread, ten requests on each connection",
    (
        "thread",
        "close",
    ): "Work in a thread that releases the interpreter's lock, a connection for each request",
}


class Run:
    """
    What one server did with one overload.
    """

    def __init__(self, report: dict[str, Any], told: dict[str, list[float]], warm_up: float) -> None:
        self.answers = report["answers"]
        # What comes when nobody new does is no overload any more.
        self.end = report["arrivals"][-1] if report["arrivals"] else warm_up
        self.served = [answer for answer in self.answers if warm_up <= answer[0] <= self.end]
        self.goodput = len(self.served) / (self.end - warm_up)
        self.by_cpu = self.goodput / (report["cpu"] / report["seconds"])
        began = report["began"]
        self.accepted = [moment - began for moment in told["accepted"]]
        self.finished = [moment - began for moment in told["finished"]]
        self.accept_delays = [
            accepted - arrived
            for arrived, accepted in zip(report["arrivals"], self.accepted, strict=False)
            if arrived >= warm_up
        ]
        self.offered = len(report["arrivals"]) / self.end if report["arrivals"] else 0.0


def run(quick: bool) -> Iterator[Result]:
    """
    What is answered, how soon, and what it costs those who are admitted.
    """
    seconds, warm_up, rounds = (0.6, 0.2, 1) if quick else (3.0, 1.0, 3)
    for (work, last), caption in _CAPTIONS.items():
        names = [way for way in WAYS if (way in ("bare", "fifo") if quick or work == "thread" else True)]
        with ExitStack() as stack:
            load = stack.enter_context(Load())
            runs = in_turn(
                rounds,
                {way: partial(_measure, load, way, work, last, seconds, warm_up) for way in names},
            )
        yield from _tables(work, last, caption, runs)


def _measure(load: Load, way: str, work: str, last: str, seconds: float, warm_up: float) -> tuple[float, Run]:
    """
    What a server can do in a second of CPU, and what it does with ten times that.
    """
    requests = _LAST[last]
    with Process([sys.executable, "-m", "bench.cases.overload", way, work, str(requests)]) as process:
        if requests == 1:
            report = load.run("connections", process, at_once=LIMIT, seconds=0.5)
        else:
            report = load.run("messages", process, connections=LIMIT, size=8, seconds=0.5)
        capacity = report["rate"] / (report["cpu"] / report["seconds"])
        process.tell("forget")
        process.line()
        report = load.run(
            "arrivals",
            process,
            rate=_OVERLOAD / COST / requests,
            requests=requests,
            seconds=seconds,
            warm_up=warm_up,
            patience=PATIENCE,
        )
        process.tell("report")
        return capacity, Run(report, json.loads(process.line()), warm_up)


def _milliseconds(samples: Sequence[Sequence[float]], percent: int) -> Figure | str:
    """
    A percentile in each run.
    """
    found = [
        statistics.quantiles(each, n=100, method="inclusive")[percent - 1] * 1000
        for each in samples
        if len(each) > 1
    ]
    return Figure.of(found, "{:,.1f}") if found else "nobody"


def _tables(work: str, last: str, caption: str, runs: dict[str, list[tuple[float, Run]]]) -> Iterator[Result]:
    name = f"overload-{work}-{last}"
    columns = (
        "",
        "accepted/s",
        "answered/s",
        "of what it can",
        "aim",
        "50 %, ms",
        "99 %, ms",
        "99 % from admission, ms",
        "aim",
        "99 % to be accepted, ms",
    )
    # What a request costs is what it takes where nobody waits.
    bounds = {
        way: round(LIMIT / statistics.median(capacity for capacity, _ in samples) * 1000, 1)
        for way, samples in runs.items()
    }
    table = Table(name, caption, columns)
    for way, samples in runs.items():
        each = [run for _, run in samples]
        limited = WAYS[way] is not None
        share = ratio([run.by_cpu for run in each], [capacity for capacity, _ in samples])
        admitted = _milliseconds([[answer[2] for answer in run.served] for run in each], 99)
        table.rows.append(
            (
                way,
                Figure.of([sum(0 <= moment <= run.end for moment in run.accepted) / run.end for run in each]),
                Figure.of([run.goodput for run in each]),
                share,
                at_least(0.98).judge(share) if limited else "",
                _milliseconds([[answer[1] for answer in run.served] for run in each], 50),
                _milliseconds([[answer[1] for answer in run.served] for run in each], 99),
                admitted,
                at_most(bounds[way]).judge(admitted) if limited and isinstance(admitted, Figure) else "",
                "" if "stops" in way else _milliseconds([run.accept_delays for run in each], 99),
            )
        )
    yield table
    yield Plot(
        name,
        f"{caption}: what is accepted, finished and answered in time, over time",
        "seconds",
        "per second",
        {way: _curves(samples[0][1]) for way, samples in runs.items()},
    )


def _curves(run: Run) -> dict[str, Curve]:
    width = 0.25

    def curve(moments: Sequence[float]) -> Curve:
        count = int(run.end / width)
        rates = [0.0] * count
        for moment in moments:
            if 0 <= moment < count * width:
                rates[int(moment / width)] += 1 / width
        return Curve([(number + 0.5) * width for number in range(count)], rates)

    return {
        "accepted": curve(run.accepted),
        "finished": curve(run.finished),
        "answered in time": curve([answer[0] for answer in run.answers]),
    }


def _iterations() -> int:
    """
    How many rounds of a hash take what a request takes.
    """
    tried = 2000
    took = []
    for _ in range(9):
        began = time.thread_time()
        hashlib.pbkdf2_hmac("sha256", b"work", b"", tried)
        took.append(time.thread_time() - began)
    return int(tried * COST / statistics.median(took))


def serve(way: str, work: str, requests: str) -> None:
    """
    Be the server: print the port, then, when that is asked, when connections were accepted and work was done.
    """
    from twisted.internet import reactor, stdio
    from twisted.internet.endpoints import serverFromString
    from twisted.internet.protocol import Factory, Protocol
    from twisted.internet.threads import deferToThread
    from twisted.protocols.basic import LineReceiver

    from connlimit import Limiter, LimitingEndpoint
    from connlimit._system import descriptors

    descriptors.raise_limit()
    iterations = _iterations()
    told: dict[str, list[float]] = {"accepted": [], "finished": []}

    def busy() -> None:
        hashlib.pbkdf2_hmac("sha256", b"work", b"", iterations)

    class Worker(Protocol):
        """
        Works for each request, and answers with the microseconds since the request could be worked for.
        """

        since: float | None = None

        def connectionMade(self) -> None:
            self.since = time.perf_counter()

        def dataReceived(self, data: bytes) -> None:
            since, self.since = self.since or time.perf_counter(), None
            if work == "thread":
                deferToThread(busy).addCallback(lambda _: self.answer(since))
            else:
                busy()
                self.answer(since)

        def answer(self, since: float) -> None:
            now = time.perf_counter()
            told["finished"].append(now)
            self.transport.write(b"%08d" % ((now - since) * 1e6))
            if requests == "1":
                self.transport.loseConnection()

    class Accepting:
        """
        What the port accepts, limited or not.
        """

        def __init__(self, endpoint: Any) -> None:
            self.endpoint = endpoint

        def listen(self, factory: Any) -> Any:
            return self.endpoint.listen(Noting(factory))

    class Noting:
        """
        Notes when a factory is asked.
        """

        def __init__(self, factory: Any) -> None:
            self._factory = factory

        def __getattr__(self, name: str) -> Any:
            return getattr(self._factory, name)

        def buildProtocol(self, address: object) -> object:
            told["accepted"].append(time.perf_counter())
            return self._factory.buildProtocol(address)

    class Orders(LineReceiver):
        delimiter = b"\n"

        def lineReceived(self, line: bytes) -> None:
            if line == b"report":
                self.sendLine(json.dumps(told).encode())
            else:
                self.sendLine(b"forgotten")
            for moments in told.values():
                moments.clear()

    endpoint = Accepting(
        serverFromString(reactor, f"tcp:0:interface=127.0.0.1:backlog={_BACKLOGS.get(way, 4096)}")
    )
    settings = WAYS[way]
    if settings is not None:
        limiter = Limiter(LIMIT, max_waiting=WAITING, wait_timeout=PATIENCE / 2, **settings)
        endpoint = LimitingEndpoint(endpoint, limiter, "stop-accepting" if "stops" in way else "refuse")
    factory = Factory.forProtocol(Worker)
    factory.noisy = False
    endpoint.listen(factory).addCallback(lambda port: print(port.getHost().port, flush=True))
    stdio.StandardIO(Orders())
    reactor.run()


if __name__ == "__main__":
    serve(*sys.argv[1:])
