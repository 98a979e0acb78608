"""
The load generator: clients on plain sockets and one epoll, which cost much less than the servers they load.

It reads jobs from its standard input, one JSON object per line, and answers each with a report.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: Seconds of each window that are not counted.
WARM_UP = 0.03

_PATIENCE = 60  # seconds

# What is received at once.
_BUFFER = bytearray(1 << 18)

# Linux's IP_BIND_ADDRESS_NO_PORT, which older Pythons do not name: the port is chosen by connect.
_BIND_ADDRESS_NO_PORT = 24

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: Sequence[int]) -> float:
    """
    Seconds of CPU that processes and their children have used (Linux).
    """
    used = 0.0
    all_pids = list(pids)
    while all_pids:
        pid = all_pids.pop()
        try:
            # What clock_getcpuclockid gives for the process: to the nanosecond, where /proc counts ticks.
            used += time.clock_gettime((~pid << 3) | 2)
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:  # it has ended
            continue
        used += sum(map(int, fields[13:15])) / _TICKS  # the children that have
        all_pids += map(int, children)
    return used


class Window:
    """
    The time in which a job counts what is done.

    :ivar end: when it is over.
    """

    def __init__(self, seconds: float, pids: Sequence[int]) -> None:
        self._pids = pids
        self.begins = time.perf_counter() + WARM_UP
        self.end = self.begins + seconds
        self._before: tuple[float, float, float] | None = None

    def is_over(self, done: float) -> bool:
        """
        Whether it is over.

        :param done: all that was done so far.
        """
        now = time.perf_counter()
        if self._before is None and now >= self.begins:
            self._before = now, done, cpu_seconds(self._pids)
        return now >= self.end

    def report(self, done: float) -> dict[str, float]:
        """
        What was done per second, and the CPU that the server used for it.
        """
        assert self._before is not None
        began, before, cpu = self._before
        seconds = time.perf_counter() - began
        return {
            "rate": (done - before) / seconds,
            "seconds": seconds,
            "cpu": cpu_seconds(self._pids) - cpu,
        }


def connect(port: int) -> socket.socket:
    """
    A client, connected to the port.
    """
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # None of our messages is larger, so no client ever waits to send.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    sock.setblocking(False)
    return sock


def messages(
    port: int, connections: int, size: int, seconds: float, pids: Sequence[int] = ()
) -> dict[str, float]:
    """
    Messages per second that an echo server returns, one at a time on each of the connections.
    """
    message = bytes(size)
    epoll = select.epoll()
    clients: dict[int, tuple[Callable[..., int], Callable[..., int]]] = {}
    missing: dict[int, int] = {}
    sockets = [connect(port) for _ in range(connections)]
    for sock in sockets:
        clients[sock.fileno()] = sock.recv_into, sock.send
        missing[sock.fileno()] = size
        epoll.register(sock, select.EPOLLIN)
        sock.send(message)
    done = 0
    window = Window(seconds, pids)
    while not window.is_over(done):
        for descriptor, _ in epoll.poll(1):
            receive, send = clients[descriptor]
            received = receive(_BUFFER)
            if received == 0:
                raise ConnectionResetError("the server has closed a connection")
            left = missing[descriptor] - received
            if left:
                missing[descriptor] = left
            else:
                missing[descriptor] = size
                done += 1
                send(message)
    report = window.report(done)
    for sock in sockets:
        sock.close()
    epoll.close()
    return report


def connections(port: int, at_once: int, seconds: float, pids: Sequence[int] = ()) -> dict[str, float]:
    """
    Connections per second, each of which lasts for one message and its answer.

    A number are open at a time; the oldest is waited for, which costs less than to be told of each.
    """
    where, message = ("127.0.0.1", port), b"a message of 20 byte"
    opened: deque[socket.SocketType] = deque()
    # A closed connection keeps its port for a second, so one address has not enough of them.
    sources = itertools.cycle([(f"127.0.0.{number}", 0) for number in range(2, 66)])
    done = 0
    window = Window(seconds, pids)
    while not window.is_over(done):
        # socket.socket would cost as much again as a part of the system calls.
        sock = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
        sock.bind(next(sources))
        sock.connect(where)
        sock.send(message)
        opened.append(sock)
        if len(opened) > at_once:
            sock = opened.popleft()
            if sock.recv_into(_BUFFER) == 0:
                raise ConnectionResetError("the server has closed a connection without an answer")
            sock.close()
            done += 1
    report = window.report(done)
    for sock in opened:
        sock.close()
    return report


def download(port: int, connections: int, seconds: float, pids: Sequence[int] = ()) -> dict[str, float]:
    """
    Bytes per second that come from a server that sends without an end.
    """
    epoll = select.epoll()
    sockets = {}
    for _ in range(connections):
        sock = connect(port)
        sockets[sock.fileno()] = sock
        epoll.register(sock, select.EPOLLIN)
    done = 0
    window = Window(seconds, pids)
    while not window.is_over(done):
        for descriptor, _ in epoll.poll(1):
            done += sockets[descriptor].recv_into(_BUFFER)
    report = window.report(done)
    for sock in sockets.values():
        sock.close()
    epoll.close()
    return report


def arrivals(
    port: int,
    rate: float,
    requests: int,
    seconds: float,
    warm_up: float,
    patience: float,
    pids: Sequence[int] = (),
) -> dict[str, Any]:
    """
    Clients that arrive at random, however many are still there (an open loop), from 16 addresses.

    Each sends some requests of a byte, one after the other, and closes; or goes away when an answer has
    taken longer than its *patience*. An answer is the time, in microseconds, that the server had the request.

    Reports of each answer when it came, how long it took from the request, and what it says; when each
    client came; when the first did, by the clock of all processes; and the CPU that the server used between
    the warm-up and the last arrival.
    """
    dice = random.Random(1)
    epoll = select.epoll()
    clients: dict[int, list[Any]] = {}  # by descriptor: socket, when it sent, answers missing
    queue: list[tuple[float, int, socket.socket]] = []  # who may have no patience left, in the order of time
    answers: list[tuple[float, float, float]] = []
    came: list[float] = []
    began = now = time.perf_counter()
    cpu: list[tuple[float, float]] = []  # the moment, and what had been used
    next_arrival, first = began, 0
    while now < began + seconds or clients:
        now = time.perf_counter()
        if len(cpu) < 2 and now >= began + (warm_up, seconds)[len(cpu)]:
            cpu.append((now, cpu_seconds(pids)))
        while next_arrival <= now and next_arrival < began + seconds:
            sock = socket.socket()
            sock.setblocking(False)
            sock.bind((f"127.0.0.{dice.randrange(2, 18)}", 0))
            sock.connect_ex(("127.0.0.1", port))
            clients[sock.fileno()] = [sock, next_arrival, requests, False]
            queue.append((next_arrival, sock.fileno(), sock))
            epoll.register(sock, select.EPOLLIN | select.EPOLLOUT)
            came.append(next_arrival - began)
            next_arrival += dice.expovariate(rate)
        while first < len(queue) and queue[first][0] + patience <= now:
            sent, descriptor, sock = queue[first]
            first += 1
            client = clients.get(descriptor)
            if client is not None and client[0] is sock and client[1] == sent:
                del clients[descriptor]
                sock.close()
        if first > 10_000:
            del queue[:first]
            first = 0
        for descriptor, event in epoll.poll(max(0.0, min(0.01, next_arrival - now))):
            client = clients[descriptor]
            sock, sent, left, connected = client
            try:
                if not connected and event & select.EPOLLOUT:
                    sock.send(b"?")
                    client[3] = True
                    epoll.modify(descriptor, select.EPOLLIN)
                    continue
                answer = sock.recv(64)
            except OSError:
                answer = b""
            now = time.perf_counter()
            if answer:
                answers.append((now - began, now - sent, int(answer) / 1e6))
                if left > 1:
                    client[1:3] = now, left - 1
                    queue.append((now, descriptor, sock))
                    sock.send(b"?")
                    continue
            del clients[descriptor]
            sock.close()
    epoll.close()
    (first_moment, before), (last_moment, after) = [*cpu, (now, cpu_seconds(pids))][:2]
    return {
        "answers": answers,
        "arrivals": came,
        "began": began,
        "cpu": after - before,
        "seconds": last_moment - first_moment,
    }


def burst(port: int, clients: int, patience: float, pids: Sequence[int] = ()) -> dict[str, Any]:
    """
    A number of clients that connect as fast as one process can, send a byte, and wait for it to come back.

    Reports how many were refused, reset or not answered at all, how many had to repeat their SYN (which takes
    the kernel a second), and when the last was connected and answered.
    """
    epoll = select.epoll()
    sockets: dict[int, list[Any]] = {}
    refused = reset = retried = answered = 0
    last_connect = last_answer = 0.0
    waiting = []
    for _ in range(clients):
        sock = socket.socket()
        sock.setblocking(False)
        waiting.append(sock)
    began = time.perf_counter()
    for sock in waiting:
        code = sock.connect_ex(("127.0.0.1", port))
        if code not in (0, errno.EINPROGRESS):
            refused += 1
            sock.close()
            continue
        sockets[sock.fileno()] = [sock, time.perf_counter(), False]
        epoll.register(sock, select.EPOLLIN | select.EPOLLOUT)
    while sockets and time.perf_counter() - began < patience:
        for descriptor, _ in epoll.poll(0.1):
            sock, tried, connected = sockets[descriptor]
            now = time.perf_counter()
            if not connected:
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error == 0:
                    sockets[descriptor][2] = True
                    retried += now - tried > 0.9
                    last_connect = now - began
                    sock.send(b"?")
                    epoll.modify(descriptor, select.EPOLLIN)
                    continue
                if error == errno.ECONNREFUSED:
                    refused += 1
                else:
                    reset += 1
            else:
                try:
                    answer = sock.recv(64)
                except OSError:
                    answer = b""
                if answer:
                    answered += 1
                    last_answer = now - began
                else:
                    reset += 1
            epoll.unregister(sock)
            del sockets[descriptor]
    unanswered = len(sockets)
    for sock in waiting:
        sock.close()
    epoll.close()
    return {
        "refused": refused,
        "reset": reset,
        "retried": retried,
        "answered": answered,
        "unanswered": unanswered,
        "last_connect": last_connect,
        "last_answer": last_answer,
    }


#: What can be asked for.
JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "arrivals": arrivals,
    "burst": burst,
    "connections": connections,
    "download": download,
    "messages": messages,
}


def main() -> None:
    """
    Do the jobs that come.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(0, flush=True)  # where a server prints its port
    for line in sys.stdin:
        job = json.loads(line)
        signal.alarm(_PATIENCE)  # a server that is stuck must not keep us for ever
        report = JOBS[job.pop("job")](**job)
        signal.alarm(0)
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
