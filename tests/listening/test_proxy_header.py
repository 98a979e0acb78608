"""
Behind a load balancer the peer is the client that the PROXY header names.
"""

from __future__ import annotations

import socket
import struct
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.applications import ECHO
from support.fakes import RecordingFactory
from support.logs import Log
from support.patience import PATIENCE
from support.programs import running
from support.sockets import Client, all_closed, connected, patiently, until
from twisted.internet import reactor, task
from twisted.internet.endpoints import TCP4ServerEndpoint, serverFromString
from twisted.protocols.haproxy import proxyEndpoint

from connlimit import Limiter, LimitingEndpoint, ProxyHeaderEndpoint
from connlimit._listening import proxy_header
from connlimit._system import descriptors


def v1(host: str) -> bytes:
    return f"PROXY TCP4 {host} 127.0.0.1 5 6\r\n".encode()


def v2(host: str) -> bytes:
    addresses = socket.inet_aton(host) + socket.inet_aton("127.0.0.1") + struct.pack(">HH", 5, 6)
    return b"\r\n\r\n\0\r\nQUIT\n" + struct.pack(">BBH", 0x21, 0x11, len(addresses)) + addresses


class Behind:
    """
    A limited server behind a balancer that the test plays.
    """

    def __init__(self, arguments: str) -> None:
        self.server = RecordingFactory()
        self.endpoint = serverFromString(reactor, f"connlimit:haproxy:tcp:0:interface=127.0.0.1:{arguments}")
        self.limiter = self.endpoint.limiter
        self.clients: list[Client] = []

    async def __aenter__(self) -> Behind:
        self.port = await self.endpoint.listen(self.server)
        return self

    async def __aexit__(self, *error: object) -> None:
        for client in self.clients:
            client.transport.abortConnection()
        await self.port.stopListening()
        await patiently(self.limiter.drain(0))
        await until(lambda: not proxy_header.awaited())

    async def client(self, header: bytes, source: str = "127.0.0.1") -> Client:
        client = await connected(f"tcp:127.0.0.1:{self.port.getHost().port}:bindAddress={source}")
        client.transport.write(header)
        self.clients.append(client)
        return client


@pytest.mark.parametrize("header", [v1, v2])
@ensureDeferred
async def test_clients_of_one_balancer_are_different_peers(header: object) -> None:
    async with Behind("max_per_peer=1") as behind:
        first, second = await behind.client(header("192.0.2.1")), await behind.client(header("192.0.2.1"))
        other = await behind.client(header("192.0.2.2") + b"other")
        await other.receives(b"other")
        await until(lambda: (behind.limiter.active, behind.limiter.waiting) == (2, 1))
        assert {address.host for address in behind.server.addresses} == {"192.0.2.1", "192.0.2.2"}
        await first.close()
        second.transport.write(b"second")
        await second.receives(b"second")


@pytest.mark.parametrize("header", [v1, v2])
@ensureDeferred
async def test_a_server_that_speaks_first_is_not_kept_waiting_for_data(header: object) -> None:
    async with Behind("max_connections=1") as behind:
        await behind.client(header("192.0.2.1"))
        await until(lambda: behind.server.events == ["made"])


@pytest.mark.parametrize("header", [v1, v2])
@ensureDeferred
async def test_a_header_may_come_in_pieces(header: object) -> None:
    async with Behind("max_connections=1") as behind:
        whole = header("192.0.2.1") + b"hello"
        client = await behind.client(whole[:17])
        client.transport.setTcpNoDelay(True)
        for byte in whole[17:]:
            client.transport.write(bytes([byte]))
        await client.receives(b"hello")


NO_HEADERS = [
    b"GET / HTTP/1.0\r\n\r\n",
    b"PROXY TCP4 192.0.2.1 127.0.0.1 five six\r\n",
    b"PROXY TCP4 \xff\xff 127.0.0.1 5 6\r\nhello",
    b"PROXY TCP4 nobody 127.0.0.1 5 6\r\nhello",
    b"PROXY TCP4 192.0.2.1 127.0.0.1 99999 6\r\nhello",
    b"PROXY UDP4 192.0.2.1 127.0.0.1 5 6\r\nhello",
    b"PROXY " + b"x" * 200,
    v2("192.0.2.1")[:13] + b"\x11\0\0",
    v2("192.0.2.1")[:13] + b"\xff\0\0hello",
]


@pytest.mark.parametrize("sent", NO_HEADERS)
@ensureDeferred
async def test_what_is_no_header_closes_the_connection(sent: bytes) -> None:
    with Log() as log:
        async with Behind("max_connections=1") as behind:
            for _ in range(20):
                client = await behind.client(sent)
                await client.is_closed()
            assert behind.limiter.snapshot().accepted == 0
            assert proxy_header.awaited() == 0
    (line,) = log.texts()
    assert line.endswith("is closed: what it sent is not a PROXY header")
    assert not [event for event in log.events if "log_failure" in event]


@ensureDeferred
async def test_a_header_that_dribbles_has_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_header, "HEADER_TIMEOUT", 0.3)
    async with Behind("max_connections=1") as behind:
        client = await behind.client(b"PROXY TCP4 ")
        client.transport.setTcpNoDelay(True)
        dribbled = 0
        while not client.is_lost:
            client.transport.write(b"1")
            dribbled += 1
            await task.deferLater(reactor, 0.02)
        assert 2 < dribbled < 50
        assert behind.limiter.snapshot().accepted == 0


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """
    How many headers can be awaited, which are few.
    """
    monkeypatch.setattr(descriptors.Share, "has_room", lambda self: self.taken < 4)
    return 4


@ensureDeferred
async def test_who_has_waited_longest_makes_room_for_others(few: int) -> None:
    async with Behind("max_connections=1") as behind:
        clients = []
        for _ in range(few + 10):
            clients.append(await behind.client(b"PROXY TCP4 "))
            await until(lambda: not clients[-1].transport.dataBuffer)
            await until(lambda: proxy_header.awaited() == min(few, len(clients)))
        await all_closed(clients[:10])
        assert not any(client.is_lost for client in clients[10:])
        good = await behind.client(v1("192.0.2.1") + b"hello")
        await good.receives(b"hello")


@ensureDeferred
async def test_one_balancer_cannot_take_the_places_of_another(few: int) -> None:
    async with Behind("max_connections=1") as behind:
        other = await behind.client(b"PROXY TCP4 ", source="127.0.0.2")
        await until(lambda: proxy_header.awaited() == 1)
        clients = [await behind.client(b"PROXY TCP4 ") for _ in range(20)]
        await all_closed(clients[:10])
        assert not other.is_lost
        other.transport.write(b"192.0.2.1 127.0.0.1 5 6\r\nhello")
        await other.receives(b"hello")


@ensureDeferred
async def test_many_good_headers_at_once_are_all_read(few: int) -> None:
    async with Behind("max_connections=100") as behind:
        address = ("127.0.0.1", behind.port.getHost().port)
        with ExitStack() as stack:
            # The reactor does not run meanwhile, so all are accepted before the first is read.
            for number in range(40):
                client = stack.enter_context(closing(socket.create_connection(address, PATIENCE)))
                client.sendall(v1(f"192.0.2.{number}"))
            await until(lambda: behind.limiter.active == 40)
        await until(lambda: behind.limiter.active == 0)
        assert proxy_header.awaited() == 0


def is_closed(client: socket.socket) -> bool:
    """
    Whether the server has closed the connection, in order or by a reset.
    """
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("places", [0, 1])
@ensureDeferred
async def test_inside_tls_those_without_a_place_are_closed_without_an_error(
    places: int, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors.Share, "has_room", lambda self: self.taken < places)
    monkeypatch.setattr(descriptors, "left_for_waiting", lambda: False)
    key = str(certificate).replace(":", r"\:")
    tls = serverFromString(reactor, f"ssl:0:interface=127.0.0.1:privateKey={key}")
    endpoint = LimitingEndpoint(ProxyHeaderEndpoint(proxyEndpoint(tls), reactor), Limiter())
    port = await endpoint.listen(RecordingFactory())
    with Log() as log, ExitStack() as stack:
        address = ("127.0.0.1", port.getHost().port)
        clients = [stack.enter_context(socket.create_connection(address, PATIENCE)) for _ in range(4)]
        for client in clients[: 4 - places]:
            await until(lambda client=client: is_closed(client))
        assert proxy_header.awaited() == places
        assert not log.failures()
    await port.stopListening()
    await until(lambda: not proxy_header.awaited())


def test_half_sent_headers_take_no_descriptors_from_good_clients(tmp_path: Path) -> None:
    (tmp_path / "echo_server.py").write_text(ECHO)
    with (
        running(
            "connlimit",
            *("--listen", "haproxy:tcp:0:interface=127.0.0.1"),
            *("--factory", "echo_server:factory", "--max-connections", "100"),
            cwd=tmp_path,
            ulimit="-n 256",
        ) as program,
        ExitStack() as stack,
    ):
        address = ("127.0.0.1", program.port())

        def connect(data: bytes) -> socket.socket:
            client = stack.enter_context(closing(socket.create_connection(address, PATIENCE)))
            client.sendall(data)
            return client

        for _ in range(5):
            for _ in range(60):
                connect(b"PROXY TCP4 ")
            for _ in range(3):
                assert connect(v1("192.0.2.1") + b"hello").recv(5) == b"hello"
        # No more than one line for each kind of end.
        assert program.output.count("PROXY header has not come") == 1
        assert "EMFILE" not in program.output


@pytest.mark.parametrize("beginning", [b"", b"PROXY TCP4 "])
@ensureDeferred
async def test_a_header_that_never_comes_is_not_waited_for_for_ever(
    beginning: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_header, "HEADER_TIMEOUT", 0.1)
    async with Behind("max_connections=1") as behind:
        client = await behind.client(beginning)
        await client.is_closed()
        assert behind.limiter.snapshot().accepted == 0


@ensureDeferred
async def test_a_refused_client_is_told_and_one_that_vanishes_is_forgotten() -> None:
    async with Behind(r"max_connections=0:max_waiting=0:refusal=smtp") as behind:
        vanishing = await behind.client(b"")
        await vanishing.close()
        client = await behind.client(v1("192.0.2.1"))
        await client.is_closed()
        assert client.received.startswith(b"421 ")
        assert not [call for call in reactor.getDelayedCalls() if "_give_up" in str(call)]


@ensureDeferred
async def test_a_waiting_client_is_served_with_its_own_address() -> None:
    async with Behind("max_connections=1") as behind:
        first = await behind.client(v1("192.0.2.1"))
        await until(lambda: behind.limiter.active == 1)
        second = await behind.client(v1("192.0.2.2") + b"early")
        await until(lambda: behind.limiter.waiting == 1)
        await first.close()
        await second.receives(b"early")
        assert behind.server.live[0].transport.getPeer().host == "192.0.2.2"


@ensureDeferred
async def test_in_code_the_same_is_put_together_of_twisteds_endpoint() -> None:
    limiter = Limiter(max_per_peer=1)
    tcp = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
    endpoint = LimitingEndpoint(ProxyHeaderEndpoint(proxyEndpoint(tcp), reactor), limiter)
    server = RecordingFactory()
    port = await endpoint.listen(server)
    clients = []
    for host in ("192.0.2.1", "192.0.2.2"):
        clients.append(await connected(f"tcp:127.0.0.1:{port.getHost().port}"))
        clients[-1].transport.write(v1(host) + b"hello")
        await clients[-1].receives(b"hello")
    assert [address.host for address in server.addresses] == ["192.0.2.1", "192.0.2.2"]
    await port.stopListening()
    await patiently(limiter.drain(0))
