"""
What memory a connection takes while it waits, beside a TCP limiter and inside TLS, and while it is idle.
"""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: Each way to hold an idle connection; the first is what the others are compared with.
WAYS = (
    "bare, idle",
    "limited, idle",
    "waiting",
    "bare TLS, not shaken hands",
    "waiting next to TCP, TLS inside",
    "waiting inside TLS",
)


def resident(process: subprocess.Popen[str]) -> int:
    """
    Bytes of memory that the process holds (Linux).
    """
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024


def measure(way: str, clients: int, certificate: str) -> float:
    """
    Bytes of the server's memory for each client.
    """
    command = [sys.executable, "-m", "bench.memory", way, certificate]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())

        def connect(count: int) -> list[socket.socket]:
            new = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
            process.stdout.readline()
            return new

        first = connect(clients // 4)  # what is made once is there after these
        before = resident(process)
        rest = connect(clients)
        after = resident(process)
        for client in first + rest:
            client.close()
        return (after - before) / clients
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def run(quick: bool) -> Iterator[str]:
    """
    Bytes per connection and ratios.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    clients = 200 if quick else min(5000, hard * 3 // 5)
    yield f"Memory of the server per connection, {clients} of them"
    with tempfile.TemporaryDirectory() as folder:
        certificate = str(Path(folder) / "server.pem")
        command = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
        done = subprocess.run(
            ["openssl", *command.split(), "-keyout", certificate, "-out", f"{certificate}.crt"],
            check=True,
            capture_output=True,
        )
        assert done.returncode == 0
        with open(certificate, "a") as file:
            file.write(Path(f"{certificate}.crt").read_text())
        first = 0.0
        for way in WAYS:
            size = measure(way, clients, certificate)
            first = first or size
            yield f"  {way:32} {size:7.0f} bytes  {size / first:5.2f} x"


def serve(way: str, certificate: str) -> None:
    """
    Be the server: print the port; then, for each number that is read, wait for so many more clients.
    """
    from twisted.internet import reactor, stdio
    from twisted.internet.endpoints import serverFromString
    from twisted.internet.protocol import Factory, Protocol
    from twisted.internet.ssl import DefaultOpenSSLContextFactory
    from twisted.protocols.basic import LineReceiver
    from twisted.protocols.tls import TLSMemoryBIOFactory

    from connlimit import Limiter, LimitingFactory, _descriptors

    _descriptors.raise_limit()

    class Echo(Protocol):
        def dataReceived(self, data: bytes) -> None:
            self.transport.write(data)

    limiter = Limiter(0 if "waiting" in way else None)
    factory = Factory.forProtocol(Echo)
    accepted = 0

    def count(factory: Factory) -> Factory:
        build = factory.buildProtocol

        def counting(address: object) -> object:
            nonlocal accepted
            accepted += 1
            return build(address)

        factory.buildProtocol = counting
        return factory

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

    serverFromString(reactor, where).listen(count(factory)).addCallback(
        lambda port: print(port.getHost().port, flush=True)
    )
    stdio.StandardIO(Orders())
    reactor.run()


if __name__ == "__main__":
    serve(*sys.argv[1:])
