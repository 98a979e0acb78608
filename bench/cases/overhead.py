"""
What a limiter costs where it limits nothing: a server bare, limited, and behind Twisted's own policies.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet.protocol import Factory, Protocol

from bench.cases import life
from bench.harness.processes import (
    CONNECTIONS,
    LOAD_CPU,
    MESSAGES,
    SERVER_CPU,
    Load,
    Missing,
    Process,
    in_turn,
    program,
    server,
    settle,
)
from bench.harness.results import Cell, Figure, Note, Result, Table, at_least, at_most, comparison, ratio
from bench.harness.serve import WAYS

# How much of a bare server's rate is aimed at.
_JOBS = {MESSAGES: 0.99, CONNECTIONS: 0.97}


def run(quick: bool) -> Iterator[Result]:
    """
    Messages, connections and web requests per second, and the cost of a connection without sockets.
    """
    yield from _echo(quick)
    yield from _or_note(_http, quick)
    yield _in_memory(quick)
    yield from _or_note(_instructions, quick)


def _or_note(measure: Callable[[bool], Result], quick: bool) -> Iterator[Result]:
    try:
        yield measure(quick)
    except Missing as missing:
        yield Note(str(missing))


def _serves(process: Process) -> bool:
    """
    Whether a server echoes; one that fails to build a protocol leaves the connection open.
    """
    with socket.create_connection(("127.0.0.1", process.port), 3) as client:
        client.sendall(b"a message")
        try:
            return client.recv(9) == b"a message"
        except TimeoutError:
            return False


def _echo(quick: bool) -> Iterator[Result]:
    """
    An echo server, whose work is as little as can be.
    """
    # Two processes of one program differ by more than what is looked for, so each is started several times.
    starts, rounds, seconds = (1, 1, 0.1) if quick else (5, 3, 0.25)
    reports: dict[str, dict[str, list[Any]]] = {job.name: {} for job in _JOBS}
    broken: list[str] = []
    for _ in range(starts):
        with ExitStack() as stack:
            load = stack.enter_context(Load())
            started = {way: stack.enter_context(server("echo", way)) for way in WAYS if way not in broken}
            servers = {way: (process,) for way, process in started.items() if _serves(process)}
            broken += [way for way in started if way not in servers]
            for job in _JOBS:
                for way, samples in load.in_turn(job, rounds, servers, seconds).items():
                    reports[job.name].setdefault(way, []).extend(samples)
    for job, of_bare in _JOBS.items():
        # Any of the policies is a peer: what limits more must not cost more.
        aims = {way: at_least(of_bare if way == "bare" else 1) for way in servers}
        yield comparison(f"overhead-{job.name}", job.caption, job.unit, reports[job.name], aims)
    for way in broken:
        yield Note(f"{way} of this Twisted serves nobody, so it is left out.")


def _http(quick: bool) -> Result:
    """
    A web site, by requests on open connections.
    """
    wrk = program("wrk")
    rounds = 1 if quick else 5
    ways = ("bare", "connlimit", "ThrottlingFactory")

    def measure(process: Process) -> dict[str, float]:
        before = process.cpu()
        url = f"http://127.0.0.1:{process.port}/"
        done = subprocess.run(
            [wrk, "-t1", "-c32", "-d1s", url],
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=settle(LOAD_CPU),
        )
        found = re.search(r"(\d+) requests in ([\d.]+)s", done.stdout)
        assert found is not None, done.stdout
        seconds = float(found[2])
        return {"rate": int(found[1]) / seconds, "cpu": process.cpu() - before, "seconds": seconds}

    with ExitStack() as stack:
        servers = {way: stack.enter_context(server("site", way)) for way in ways}
        reports = in_turn(rounds, {way: partial(measure, process) for way, process in servers.items()})
    return comparison(
        "overhead-http",
        "Requests for a small page of twisted.web, by wrk, one at a time on each of 32 connections",
        "requests/s",
        reports,
        {"bare": at_least(0.99), "ThrottlingFactory": at_least(1)},
    )


def _in_memory(quick: bool) -> Result:
    """
    The time that a connection's life takes without its socket.
    """
    rounds, number = (3, 200) if quick else (40, 4000)
    lives = {way: life.life(wrap(Factory.forProtocol(Protocol))) for way, wrap in life.WAYS.items()}
    costs = in_turn(rounds, {way: partial(life.cost, live, number) for way, live in lives.items()})
    return _added_table(
        "overhead-in-memory",
        "A connection in memory: built, asked for its log prefix, connected, lost; microseconds",
        "microseconds",
        "{:.2f}",
        costs,
    )


def _instructions(quick: bool) -> Result:
    """
    The same in instructions, which no other program on the machine can change.
    """
    valgrind = program("valgrind")
    # The first connections warm the interpreter up; the difference of two counts leaves them out.
    counts = (200, 400) if quick else (1000, 3000)

    def count(job: tuple[str, int]) -> int:
        way, number = job
        command = [valgrind, "--tool=callgrind", "--callgrind-out-file=/dev/null"]
        command += [sys.executable, "-m", "bench.cases.life", way, str(number)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        found = re.search(r"Collected : (\d+)", done.stderr)
        assert found is not None, done.stderr
        return int(found[1])

    ways = ["connlimit"] if quick else list(life.WAYS)
    jobs = [(way, number) for way in ways for number in counts]
    with ThreadPoolExecutor(len({SERVER_CPU, LOAD_CPU})) as pool:
        found = dict(zip(jobs, pool.map(count, jobs), strict=True))
    costs = {way: (found[way, counts[1]] - found[way, counts[0]]) / (counts[1] - counts[0]) for way in ways}
    return _added_table(
        "overhead-instructions",
        "The same in instructions, counted by valgrind",
        "instructions",
        "{:,.0f}",
        {way: [cost] for way, cost in costs.items()},
    )


def _added_table(name: str, caption: str, unit: str, form: str, costs: dict[str, list[float]]) -> Table:
    """
    What each way costs, and what it adds to the bare one if that was measured, too.
    """
    aim = at_most(0.6)
    columns = ("", f"{unit} in all", "added to bare", "times what ThrottlingFactory adds", "aim")
    table = Table(name, caption, columns)
    added = {
        way: [cost - bare for cost, bare in zip(samples, costs["bare"], strict=True)]
        for way, samples in costs.items()
        if "bare" in costs and way != "bare"
    }
    for way, samples in costs.items():
        cells: list[Cell] = [way, Figure.of(samples, form), "", "", ""]
        if way in added:
            cells[2] = Figure.of(added[way], form)
        if way == "connlimit" and "ThrottlingFactory" in added:
            cells[3] = times = ratio(added[way], added["ThrottlingFactory"], "{:.2f}")
            cells[4] = aim.judge(times)
        table.rows.append(cells)
    return table
