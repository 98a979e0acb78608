"""
Instead of a proxy: a server that limits itself, against a bare one behind a proxy that limits, on one CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from bench.processes import Load, Missing, Process, server
from bench.relays import relay
from bench.results import Note, Result, at_least, comparison

_PROXIES = ("HAProxy", "nginx")

# Of each job: its arguments, and how many times what a server behind HAProxy does is aimed at.
_JOBS: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "messages": (
        "messages",
        "Messages of 64 bytes, echoed one at a time on each of 50 connections",
        {"connections": 50, "size": 64},
        1.7,
    ),
    "connections": (
        "connections",
        "Connections that last for one message and its echo, 32 at a time",
        {"at_once": 32},
        2.3,
    ),
    "large": (
        "messages",
        "Messages of 64 KiB, echoed one at a time on each of 8 connections",
        {"connections": 8, "size": 1 << 16},
        3.0,
    ),
}


def run(quick: bool) -> Iterator[Result]:
    """
    Messages and connections per second of all processes together.
    """
    rounds, seconds = (1, 0.1) if quick else (15, 0.3)
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
        for name, (job, caption, arguments, aim) in _JOBS.items():
            reports = load.in_turn(job, rounds, servers, seconds=seconds, **arguments)
            aims = {"bare behind HAProxy": at_least(aim)}
            yield comparison(f"proxies-{name}", caption, f"{job}/s", reports, aims)
