"""
Instead of a proxy: a server that limits itself, against a bare one behind a proxy that limits, on one CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from bench.harness.processes import CONNECTIONS, MESSAGES, Job, Load, Missing, Process, server
from bench.harness.relays import relay
from bench.harness.results import Note, Result, at_least, comparison

_PROXIES = ("HAProxy", "nginx")

_LARGE = Job(
    "messages",
    "Messages of 64 KiB, echoed one at a time on each of 8 connections",
    {"connections": 8, "size": 1 << 16},
    "messages/s",
)

# How many times what a server behind HAProxy does is aimed at.
_JOBS = {"messages": (MESSAGES, 1.7), "connections": (CONNECTIONS, 2.3), "large": (_LARGE, 3)}


def run(quick: bool) -> Iterator[Result]:
    """
    Messages and connections per second of all processes together.
    """
    rounds, seconds = (1, 0.1) if quick else (11, 0.3)
    with ExitStack() as stack:
        load = stack.enter_context(Load())
        bare = stack.enter_context(server("echo", "bare"))
        # Each is a server with those behind it.
        servers: dict[str, tuple[Process, ...]] = {
            "connlimit": (stack.enter_context(server("echo", "connlimit")),),
            "bare": (bare,),
        }
        for name in _PROXIES:
            try:
                servers[f"bare behind {name}"] = (stack.enter_context(relay(name, bare.port)), bare)
            except Missing as missing:
                yield Note(str(missing))
        for name, (job, aim) in _JOBS.items():
            reports = load.in_turn(job, rounds, servers, seconds)
            aims = {"bare behind HAProxy": at_least(aim)}
            yield comparison(f"proxies-{name}", job.caption, job.unit, reports, aims)
