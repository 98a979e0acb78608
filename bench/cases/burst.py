"""
Everybody at once: how many of a crowd that connects in the same instant are refused, reset, or sent into a
retry, which costs a second, by the length of the kernel's backlog.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from bench.harness.processes import Load, Process, free_port, in_turn, raise_descriptor_limit, script
from bench.harness.results import Figure, Result, Table, at_most

_PATIENCE = 8.0  # seconds; long enough for a third attempt

_COLUMNS = (
    "clients",
    "server",
    "refused",
    "reset",
    "retried",
    "aim",
    "not answered",
    "last connected, ms",
    "last answered, ms",
)


def run(quick: bool) -> Iterator[Result]:
    """
    Crowds of several sizes, Twisted's own backlog and ours.
    """
    maximum = raise_descriptor_limit() * 3 // 4
    crowds = (1, 100) if quick else [crowd for crowd in (1, 100, 1000, 5000) if crowd <= maximum]
    rounds = 1 if quick else 3
    caption = "Clients that connect in one instant, send a byte, and wait for its echo"
    table = Table("burst", caption, _COLUMNS, named=2)
    with ExitStack() as stack:
        load = stack.enter_context(Load())
        serve = [sys.executable, "-m", "bench.harness.serve", "echo"]
        port = free_port()
        where = f"tcp:{port}:interface=127.0.0.1"
        twistd = [script("twistd"), "--nodaemon", "--pidfile=", "connlimit", "--listen", where]
        twistd += ["--factory", "bench.harness.serve:echo", "--max-connections", "10000"]
        servers = {
            "Twisted, its backlog of 50": stack.enter_context(Process([*serve, "bare", "50"])),
            "LimitingFactory, the same": stack.enter_context(Process([*serve, "connlimit", "50"])),
            "twistd connlimit": stack.enter_context(Process(twistd, port=port)),
        }
        for crowd in crowds:
            reports = in_turn(
                rounds,
                {
                    way: partial(load.run, "burst", server, clients=crowd, patience=_PATIENCE)
                    for way, server in servers.items()
                },
            )
            for way, each in reports.items():

                def figure(name: str, times: float = 1, each: list[dict[str, float]] = each) -> Figure:
                    return Figure.of([report[name] * times for report in each])

                retried = figure("retried")
                table.rows.append(
                    (
                        f"{crowd:,}",
                        way,
                        figure("refused"),
                        figure("reset"),
                        retried,
                        at_most(0).judge(retried) if way == "twistd connlimit" else "",
                        figure("unanswered"),
                        figure("last_connect", 1000),
                        figure("last_answer", 1000),
                    )
                )
    yield table
