"""
What it takes until there is a limiter: to import it, to start the program, and to stop that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from bench.harness.processes import LOAD_CPU, SERVER_CPU, free_port, in_turn, script, settle
from bench.harness.results import Cell, Figure, Result, Table, at_most

# What is installed has been compiled, so what is imported from a clone may be, too.
_ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}
_ENVIRONMENT.pop("PYTHONDONTWRITEBYTECODE", None)

# What the modules that are given cost a process that has those of a Twisted server already.
_IMPORT = """
import json, os, resource, sys, time
from twisted.internet import endpoints, protocol, reactor

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

before, memory, began = set(sys.modules), resident(), time.process_time()
for module in sys.argv[1:]:
    __import__(module)
took, memory = time.process_time() - began, resident() - memory
new = sorted(set(sys.modules) - before)
print(json.dumps({"seconds": took, "bytes": memory, "modules": new}))
"""

# What Twisted itself needs is no dependency of ours.
_NEEDED = {
    "attr",
    "attrs",
    "automat",
    "connlimit",
    "constantly",
    "hyperlink",
    "incremental",
    "twisted",
    "zope",
}


def run(quick: bool) -> Iterator[Result]:
    """
    Import, start and stop.
    """
    rounds = 2 if quick else 21
    yield _imports(rounds)
    yield _programs(2 if quick else 9)


def _import(modules: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, *modules],
        capture_output=True,
        text=True,
        check=True,
        env=_ENVIRONMENT,
        preexec_fn=settle(SERVER_CPU),
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _imports(rounds: int) -> Result:
    found = _import(["connlimit"])["modules"]
    twisted = [module for module in found if module.split(".")[0] == "twisted"]
    tops = {module.split(".")[0] for module in found}
    foreign = sorted(tops - {"connlimit"} - _NEEDED - set(sys.stdlib_module_names) - {"_cffi_backend"})
    reports = in_turn(
        rounds,
        {
            "connlimit": partial(_import, ["connlimit"]),
            "what that needs of Twisted": partial(_import, twisted),
        },
    )
    columns = ("", "CPU, ms", "aim", "memory, MB", "packages besides Twisted's")
    table = Table(
        "start-import",
        "Importing, in a process that has imported Twisted's reactor, endpoints and protocol",
        columns,
    )

    def samples(what: str, scale: float) -> list[list[float]]:
        both = [[report[what] / scale for report in each] for each in reports.values()]
        return [*both, [all_of_it - part for all_of_it, part in zip(*both, strict=True)]]

    rows = zip((*reports, "above that"), samples("seconds", 1e-3), samples("bytes", 1e6), strict=True)
    for name, seconds, memory in rows:
        took = Figure.of(seconds, "{:.1f}")
        cells: list[Cell] = [name, took, "", Figure.of(memory, "{:.1f}"), ""]
        if name == "above that":
            cells[2], cells[4] = at_most(20).judge(took), ", ".join(foreign) or "none"
        table.rows.append(cells)
    return table


def _programs(rounds: int) -> Result:
    table = Table(
        "start-program",
        "From the command to the log line that tells the port, and from SIGTERM to the exit, while nobody is"
        " connected",
        ("", "ready, ms", "stopped, ms"),
    )
    where = "tcp:0:interface=127.0.0.1"
    backend = free_port()
    commands = {
        "twistd connlimit --forward": [
            "connlimit",
            "--listen",
            where,
            "--forward",
            f"tcp:127.0.0.1:{backend}",
            "--max-connections",
            "100",
        ],
        "twistd portforward": ["portforward", "--port", where, "--host", "127.0.0.1", "-d", str(backend)],
    }
    times = in_turn(rounds, {name: partial(_start, command) for name, command in commands.items()})
    for name, samples in times.items():
        ready, stopped = zip(*samples, strict=True)
        table.rows.append((name, Figure.of(ready), Figure.of(stopped)))
    return table


def _start(command: list[str]) -> tuple[float, float]:
    """
    Milliseconds until a program is ready, and until it has stopped.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        [script("twistd"), "--nodaemon", "--pidfile=", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_ENVIRONMENT,
        preexec_fn=settle(LOAD_CPU),
    )
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "starting on" in line:
                break
        else:
            raise RuntimeError(f"twistd {' '.join(command)} ended:\n{''.join(said)}")
        ready = time.perf_counter() - began
        time.sleep(0.1)  # it is told to stop when it is idle
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        process.wait(30)
        return ready * 1000, (time.perf_counter() - began) * 1000
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
