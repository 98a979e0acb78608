"""
The server of semaphores against the original one of Throttle.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench.cases.shared import redis_server
from bench.harness.processes import LOAD_CPU, Missing, Process, free_port, in_turn, missing, script
from bench.harness.results import Note, Result, comparison

_FILE = "[semaphores]\nA = 10\n"

_OURS, _STORED, _ORIGINAL = "connlimit-semaphores", "connlimit-semaphores --store", "throttle 0.4.1"


def run(quick: bool) -> Iterator[Result]:
    """
    Locks acquired and released in a second, one after the other over one connection.
    """
    rounds, seconds = (2, 0.1) if quick else (15, 0.4)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = folder / "throttle.toml"
        file.write_text(_FILE)
        servers = {_OURS: stack.enter_context(_ours(file))}
        try:
            servers[_STORED] = stack.enter_context(_ours(file, "--store", _redis(folder, stack)))
        except Missing as left_out:
            yield Note(str(left_out))
        try:
            servers[_ORIGINAL] = stack.enter_context(_original(file))
        except Missing as left_out:
            yield Note(str(left_out))
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {LOAD_CPU})
        stack.callback(os.sched_setaffinity, 0, own)
        reports = in_turn(rounds, {name: partial(_lock, each, seconds) for name, each in servers.items()})
        caption = (
            "Locks of a semaphore that are acquired and released, one after the other, over one connection"
        )
        yield comparison("semaphores", caption, "locks/s", reports, {}, subject=_OURS)


def _redis(folder: Path, stack: ExitStack) -> str:
    """
    The URL of a Redis that ends with the stack.

    :raises Missing: if there is none, and there need not be.
    """
    path = folder / "redis.sock"
    command = [redis_server(), "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    stack.callback(redis.wait)
    stack.callback(redis.kill)
    while not path.exists():
        time.sleep(0.01)
    return f"unix://{path}"


def _ours(file: Path, *arguments: str) -> Process:
    port = free_port()
    command = [sys.executable, script("twistd"), "-n", "--pidfile=", "connlimit-semaphores"]
    listen = f"tcp:{port}:interface=127.0.0.1"
    return Process([*command, "--listen", listen, "--config", str(file), *arguments], port=port)


def _original(file: Path) -> Process:
    """
    :raises Missing: if the package throttle-server is not installed, and need not be.
    """
    program = script("throttle")
    if not Path(program).exists():
        raise missing("throttle")
    port = free_port()
    return Process([program, "--port", str(port), "-c", str(file)], port=port)


def _lock(server: Process, seconds: float) -> dict[str, float]:
    """
    Acquire and release a lock again and again.
    """
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.connect()
    json_type = {"Content-Type": "application/json"}

    def ask(method: str, path: str, body: str | None = None) -> str:
        connection.request(method, path, body, json_type if body else {})
        answer = connection.getresponse()
        text = answer.read().decode()
        assert answer.status == 200, text
        return text

    peer = json.loads(ask("POST", "/new_peer", '{"expires_in": "1min"}'))
    done, cpu, began = 0, server.cpu(), time.perf_counter()
    while time.perf_counter() - began < seconds:
        ask("PUT", f"/peers/{peer}/A", "1")
        ask("DELETE", f"/peers/{peer}/A")
        done += 1
    took = time.perf_counter() - began
    report = {"rate": done / took, "seconds": took, "cpu": server.cpu() - cpu}
    ask("DELETE", f"/peers/{peer}")
    connection.close()
    return report
