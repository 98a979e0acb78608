"""
Behind a load balancer the peer is the client that the PROXY header names.
"""

from __future__ import annotations

import socket
import struct

import pytest
from fakes import RecordingFactory
from pytest_twisted import ensureDeferred
from sockets import Client, connected, patiently, until
from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ServerEndpoint, serverFromString
from twisted.protocols.haproxy import proxyEndpoint

from connlimit import AfterHeader, Limiter, LimitingEndpoint, _proxied


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

    async def __aenter__(self) -> Behind:
        self.port = await self.endpoint.listen(self.server)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.port.stopListening()
        await patiently(self.limiter.drain(0))

    async def client(self, header: bytes) -> Client:
        client = await connected(f"tcp:127.0.0.1:{self.port.getHost().port}")
        client.transport.write(header)
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


@ensureDeferred
async def test_what_is_no_header_closes_the_connection() -> None:
    async with Behind("max_connections=1") as behind:
        client = await behind.client(b"GET / HTTP/1.0\r\n\r\n")
        await client.is_closed()
        assert behind.limiter.snapshot().accepted == 0


@pytest.mark.parametrize("beginning", [b"", b"PROXY TCP4 "])
@ensureDeferred
async def test_a_header_that_never_comes_is_not_waited_for_for_ever(
    beginning: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_proxied, "HEADER_TIMEOUT", 0.1)
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
    endpoint = LimitingEndpoint(AfterHeader(proxyEndpoint(tcp), reactor), limiter)
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
