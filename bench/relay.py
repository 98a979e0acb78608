"""
A limited relay to another server, against relays that are made for nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from bench.processes import LOAD_CPU, Load, Missing, Process
from bench.relays import COMMANDS, relay
from bench.results import Note, Result, comparison

# The backend's kind, the job, and what is counted by how many.
_JOBS: dict[str, tuple[str, str, str, dict[str, Any], str, float]] = {
    "bulk": (
        "source",
        "download",
        "Data from the backend, over 4 connections",
        {"connections": 4},
        "MB/s",
        1e6,
    ),
    "round-trips": (
        "echo",
        "messages",
        "Messages of 64 bytes to the backend and back, one at a time on each of 50 connections",
        {"connections": 50, "size": 64},
        "round trips/s",
        1,
    ),
    "connections": (
        "echo",
        "connections",
        "Connections that last for one message and its echo, 32 at a time",
        {"at_once": 32},
        "connections/s",
        1,
    ),
}


def run(quick: bool) -> Iterator[Result]:
    """
    Bytes, round trips and connections per second; the backend has the CPU of the load.
    """
    rounds, seconds = (1, 0.1) if quick else (12, 0.3)
    with ExitStack() as stack:
        load = stack.enter_context(Load())
        backends = {
            kind: stack.enter_context(Process([sys.executable, "-m", "bench.backend", kind], LOAD_CPU))
            for kind in ("echo", "source")
        }
        relays: dict[str, dict[str, tuple[Process]]] = {kind: {} for kind in backends}
        for name in COMMANDS:
            try:
                for kind, backend in backends.items():
                    relays[kind][name] = (stack.enter_context(relay(name, backend.port)),)
            except Missing as missing:
                yield Note(str(missing))
        for what, (kind, job, caption, arguments, unit, scale) in _JOBS.items():
            reports = load.in_turn(job, rounds, relays[kind], seconds=seconds, **arguments)
            yield comparison(f"relay-{what}", caption, unit, reports, {}, scale)
