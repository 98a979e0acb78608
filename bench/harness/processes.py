"""
Real servers and a load on CPUs of their own, measured in turn.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import attrs

from bench.harness.load import cpu_seconds

_CPUS = sorted(os.sched_getaffinity(0))

#: The servers run here; with one CPU alone, everything does.
SERVER_CPU = _CPUS[0]

#: The load runs here.
LOAD_CPU = _CPUS[1 % len(_CPUS)]

K = TypeVar("K")
P = TypeVar("P", bound="Process")

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

#: Seconds after which something that must happen does not.
PATIENCE = 30.0


class Missing(Exception):
    """
    A real program that a comparison needs is not installed.
    """


def missing(name: str) -> Missing:
    """
    The exception for something that is not installed and need not be.

    :raises SystemExit: if it must be.
    """
    if os.environ.get("CONNLIMIT_REQUIRE_PROGRAMS"):
        raise SystemExit(f"bench: {name} is not installed, and CONNLIMIT_REQUIRE_PROGRAMS is set")
    return Missing(f"{name} is not installed, so what is compared with it is left out.")


def program(name: str) -> str:
    """
    The path of a real program.

    :raises Missing: if there is none, and there need not be.
    """
    # Where Debian has servers, which is not on everybody's path.
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if path is None:
        raise missing(name)
    return path


def script(name: str) -> str:
    """
    The path of a script that belongs to this Python.
    """
    return str(Path(sys.executable).parent / name)


def raise_descriptor_limit() -> int:
    """
    Let this process, and those it starts, have as many descriptors as may be; return how many.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def settle(cpu: int) -> Callable[[], None]:
    """
    What a new process does before it becomes a program: stay on a CPU, and end when this process does.
    """

    def settling() -> None:
        os.sched_setaffinity(0, {cpu})
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return settling


def free_port() -> int:
    """
    A port that nobody listens on.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Process:
    """
    A process with its children, on one CPU, as long as a context lasts.

    :ivar port: where it listens, given or, if it prints that, read from it.
    """

    def __init__(self, command: Sequence[str], cpu: int = SERVER_CPU, port: int | None = None) -> None:
        """
        :param port: where it is told to listen; if None, it prints the port itself.
        """
        raise_descriptor_limit()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if port is None else self._errors,
            stderr=self._errors,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=settle(cpu),
        )
        self.command = command
        self.port = int(self.line()) if port is None else port
        if port is not None:
            self._wait_for_port(port)

    def line(self) -> str:
        """
        The next line that it prints.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.end()
            raise RuntimeError(f"{' '.join(self.command)} ended:\n{self._said()}")
        return line

    def tell(self, line: str) -> None:
        """
        Give it a line.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def cpu(self) -> float:
        """
        Seconds of CPU that it has used.
        """
        return cpu_seconds([self.process.pid])

    def end(self) -> None:
        """
        End it and its children.
        """
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        self._errors.close()

    def _wait_for_port(self, port: int) -> None:
        began = time.monotonic()
        while self.process.poll() is None and time.monotonic() - began < PATIENCE:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.02)
        self.end()
        raise RuntimeError(f"{' '.join(self.command)} does not listen:\n{self._said()}")

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()


def server(kind: str, way: str) -> Process:
    """
    One of the servers of `bench.harness.serve`.
    """
    return Process([sys.executable, "-m", "bench.harness.serve", kind, way])


@attrs.frozen(eq=False)
class Job:
    """
    Something that servers are compared in.

    :ivar name: the job of `bench.harness.load`.
    :ivar caption: what it is.
    :ivar unit: what is counted in a second, a multiple of what the load counts.
    """

    name: str
    caption: str
    arguments: Mapping[str, Any]
    unit: str
    per_unit: float = 1


MESSAGES = Job(
    "messages",
    "Messages of 64 bytes, echoed one at a time on each of 50 connections",
    {"connections": 50, "size": 64},
    "messages/s",
)

CONNECTIONS = Job(
    "connections",
    "Connections that last for one message and its echo, 32 at a time",
    {"at_once": 32},
    "connections/s",
)


class Load(Process):
    """
    The load generator, `bench.harness.load`, which does one job after the other.
    """

    def __init__(self) -> None:
        super().__init__([sys.executable, "-m", "bench.harness.load"], LOAD_CPU)

    def run(self, job: str, target: Process, *behind: Process, **arguments: Any) -> dict[str, Any]:
        """
        Do one of the jobs of `bench.harness.load` and return what it reports.

        :param target: the server.
        :param behind: the servers behind it; what they use of the CPU is reported, too.
        """
        arguments["pids"] = [each.process.pid for each in (target, *behind)]
        self.tell(json.dumps({"job": job, "port": target.port, **arguments}))
        report: dict[str, Any] = json.loads(self.line())
        return report

    def in_turn(
        self, job: Job, rounds: int, servers: Mapping[str, Sequence[Process]], seconds: float
    ) -> dict[str, list[dict[str, Any]]]:
        """
        Do the job with each of the servers in turn, in windows of some seconds.

        :param servers: each server with those behind it.
        """
        arguments = {"seconds": seconds, **job.arguments}
        return in_turn(
            rounds, {way: partial(self.run, job.name, *each, **arguments) for way, each in servers.items()}
        )


def in_turn(rounds: int, ways: Mapping[K, Callable[[], Any]]) -> dict[K, list[Any]]:
    """
    Measure all ways in each round, every round beginning with another one.

    What else the machine does meanwhile falls on all of them alike.
    """
    names = list(ways)
    samples: dict[K, list[Any]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(ways[name]())
    return samples
