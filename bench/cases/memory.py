"""
What memory a connection takes while it waits, beside a TCP limiter and inside TLS, and while it is idle.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.harness.processes import Missing, Process, in_turn, program, raise_descriptor_limit
from bench.harness.results import Figure, Note, Result, Table, ratio

#: Each way to hold an idle connection; the first is what the others are compared with.
WAYS = (
    "bare, idle",
    "limited, idle",
    "waiting",
    "bare TLS, not shaken hands",
    "waiting next to TCP, TLS inside",
    "waiting inside TLS",
)


def resident(process: Process) -> int:
    """
    Bytes of memory that the process holds (Linux).
    """
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024


def measure(way: str, clients: int, certificate: str) -> float:
    """
    Bytes of the server's memory for each client.
    """
    with Process([sys.executable, "-m", "bench.cases.memory", way, certificate]) as process:

        def connect(count: int) -> list[socket.socket]:
            new = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(count)]
            process.tell(str(count))
            process.line()
            return new

        first = connect(clients // 4)  # what is made once is there after these
        before = resident(process)
        rest = connect(clients)
        after = resident(process)
        for client in first + rest:
            client.close()
        return (after - before) / clients


def run(quick: bool) -> Iterator[Result]:
    """
    Bytes per connection and ratios.
    """
    clients = 200 if quick else min(5000, raise_descriptor_limit() * 3 // 5)
    rounds = 1 if quick else 3
    table = Table(
        "memory", f"Memory of the server per connection, {clients:,} of them", ("", "bytes", "of bare, idle")
    )
    with tempfile.TemporaryDirectory() as folder:
        certificate = str(Path(folder) / "server.pem")
        command = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
        try:
            subprocess.run(
                [program("openssl"), *command.split(), "-keyout", certificate, "-out", f"{certificate}.crt"],
                check=True,
                capture_output=True,
            )
        except Missing as missing:
            yield Note(str(missing))
            ways = [way for way in WAYS if "TLS" not in way]
        else:
            with open(certificate, "a") as file:
                file.write(Path(f"{certificate}.crt").read_text())
            ways = list(WAYS)
        sizes = in_turn(rounds, {way: partial(measure, way, clients, certificate) for way in ways})
    for way in ways:
        times = "" if way == WAYS[0] else ratio(sizes[way], sizes[WAYS[0]], "{:.2f}")
        table.rows.append((way, Figure.of(sizes[way]), times))
    yield table


def serve(way: str, certificate: str) -> None:
    """
    Be the server: print the port; then, for each number that is read, wait for this number of clients more.
    """
    from twisted.internet import reactor, stdio
    from twisted.internet.endpoints import serverFromString
    from twisted.internet.protocol import Factory, Protocol
    from twisted.internet.ssl import DefaultOpenSSLContextFactory
    from twisted.protocols.basic import LineReceiver
    from twisted.protocols.tls import TLSMemoryBIOFactory

    from connlimit import Limiter, LimitingFactory
    from connlimit._system import descriptors

    descriptors.raise_limit()

    class Echo(Protocol):
        def dataReceived(self, data: bytes) -> None:
            self.transport.write(data)

    limiter = Limiter(0 if "waiting" in way else None)
    factory = Factory.forProtocol(Echo)
    accepted = 0

    class Counted:
        """
        Counts whom a factory is asked about.
        """

        def __init__(self, factory: object) -> None:
            self._factory = factory

        def __getattr__(self, name: str) -> object:
            return getattr(self._factory, name)

        def buildProtocol(self, address: object) -> object:
            nonlocal accepted
            accepted += 1
            return self._factory.buildProtocol(address)

    context = DefaultOpenSSLContextFactory(certificate, certificate)
    where = "tcp:0:interface=127.0.0.1:backlog=4096"
    if way.endswith("inside TLS") or way.startswith("bare TLS"):
        where = f"ssl:0:privateKey={certificate}:interface=127.0.0.1:backlog=4096"
    elif way.endswith("TLS inside"):
        factory = TLSMemoryBIOFactory(context, False, factory)
    if not way.startswith("bare"):
        factory = LimitingFactory(factory, limiter)

    class Orders(LineReceiver):
        delimiter = b"\n"
        wanted = 0

        def lineReceived(self, line: bytes) -> None:
            self.wanted += int(line)
            self.look()

        def look(self) -> None:
            if accepted < self.wanted:
                reactor.callLater(0.01, self.look)
            else:
                reactor.callLater(0.1, self.sendLine, b"here")

    serverFromString(reactor, where).listen(Counted(factory)).addCallback(
        lambda port: print(port.getHost().port, flush=True)
    )
    stdio.StandardIO(Orders())
    reactor.run()


if __name__ == "__main__":
    serve(*sys.argv[1:])
