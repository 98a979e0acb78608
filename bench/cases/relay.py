"""
A limited relay to another server, against relays that are made for nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack

from bench.harness.processes import CONNECTIONS, LOAD_CPU, MESSAGES, Job, Load, Missing, Process
from bench.harness.relays import COMMANDS, relay
from bench.harness.results import Note, Result, comparison

_BULK = Job("download", "Data from the backend, over 4 connections", {"connections": 4}, "MB/s", 1e6)

# Each job with the kind of backend that it needs.
_JOBS = {"bulk": (_BULK, "source"), "messages": (MESSAGES, "echo"), "connections": (CONNECTIONS, "echo")}


def run(quick: bool) -> Iterator[Result]:
    """
    Bytes, round trips and connections per second; the backend has the CPU of the load.
    """
    rounds, seconds = (1, 0.1) if quick else (9, 0.3)
    with ExitStack() as stack:
        load = stack.enter_context(Load())
        backends = {
            kind: stack.enter_context(
                Process([sys.executable, "-m", "bench.harness.backend", kind], LOAD_CPU)
            )
            for kind in ("echo", "source")
        }
        relays: dict[str, dict[str, tuple[Process]]] = {kind: {} for kind in backends}
        for name in COMMANDS:
            try:
                for kind, backend in backends.items():
                    relays[kind][name] = (stack.enter_context(relay(name, backend.port)),)
            except Missing as missing:
                yield Note(str(missing))
        for name, (job, kind) in _JOBS.items():
            reports = load.in_turn(job, rounds, relays[kind], seconds)
            yield comparison(f"relay-{name}", job.caption, job.unit, reports, {}, job.per_unit)
