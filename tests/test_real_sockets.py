"""
A limited server and its clients on real sockets.
"""

from __future__ import annotations

import socket
import struct
import sys
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.fakes import RecordingFactory
from support.sockets import all_connected, connected, listening, patiently, until
from support.tls import talk_tls, wrap_server_tls
from twisted.internet import reactor, task
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.threads import deferToThread

from connlimit import Limiter
from connlimit._connection import delegating


@ensureDeferred
async def test_fifty_clients_that_send_at_once_are_served_in_order_two_at_a_time() -> None:
    limiter = Limiter(0)
    async with listening(limiter) as (server, where):
        clients = await all_connected(where, 50)
        for number, client in enumerate(clients):
            client.transport.write(b"hello %d\n" % number * 100)
        await until(lambda: limiter.waiting == 50)
        ports = [client.transport.getHost().port for client in clients]

        limiter.max_connections = 2
        for number, client in enumerate(clients):
            await client.receives(b"hello %d\n" % number * 100)
            assert limiter.active == 2 or number >= 48
            await client.close()
        await until(lambda: limiter.active == 0)
        assert server.most_live == 2
        assert [address.port for address in server.addresses] == ports
        snapshot = limiter.snapshot()
        assert (snapshot.accepted, snapshot.finished, snapshot.waiting) == (50, 50, 0)


@ensureDeferred
async def test_nothing_is_read_of_a_client_that_waits() -> None:
    limiter = Limiter(0)
    async with listening(limiter) as (server, where):
        client = await connected(where)
        sent = 0
        client.transport.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                sent += client.transport.socket.send(b"x" * 65536)
        await until(lambda: limiter.waiting == 1)
        assert server.events == []
        limiter.max_connections = 1
        await client.receives(b"x" * sent)


@ensureDeferred
async def test_a_cut_while_connections_are_active_ends_none_of_them() -> None:
    limiter = Limiter(3)
    async with listening(limiter) as (server, where):
        clients = await all_connected(where, 4)
        await until(lambda: limiter.waiting == 1)
        limiter.max_connections = 1
        for client in clients[:3]:
            client.transport.write(b"alive")
            await client.receives(b"alive")
        await clients[0].close()
        await clients[1].close()
        await until(lambda: limiter.active == 1)
        assert limiter.waiting == 1
        await clients[2].close()
        clients[3].transport.write(b"my turn")
        await clients[3].receives(b"my turn")


@ensureDeferred
async def test_two_ports_share_the_limit_of_one_limiter() -> None:
    limiter = Limiter(1)
    async with listening(limiter) as (one, first_port), listening(limiter) as (two, second_port):
        first = await connected(first_port)
        second = await connected(second_port)
        await until(lambda: limiter.waiting == 1)
        assert (len(one.live), len(two.live)) == (1, 0)
        await first.close()
        second.transport.write(b"hello")
        await second.receives(b"hello")
        assert (len(one.live), len(two.live)) == (0, 1)


@ensureDeferred
async def test_unix_sockets_are_limited_too(tmp_path: Path) -> None:
    limiter = Limiter(1)
    async with listening(limiter, f"unix:{tmp_path / 'socket'}") as (_, where):
        first, second = await all_connected(where, 2)
        second.transport.write(b"patience")
        await until(lambda: limiter.waiting == 1)
        await first.close()
        await second.receives(b"patience")


@ensureDeferred
async def test_over_the_end_of_the_line_clients_are_closed() -> None:
    limiter = Limiter(1, max_waiting=1)
    async with listening(limiter) as (_, where):
        clients = await all_connected(where, 3)
        await clients[2].is_closed()
        assert limiter.snapshot().refused["full"] == 1
        assert (limiter.active, limiter.waiting) == (1, 1)


@ensureDeferred
async def test_who_waits_too_long_is_closed() -> None:
    limiter = Limiter(0, wait_timeout=0.05)
    async with listening(limiter) as (_, where):
        client = await connected(where)
        client.transport.write(b"anybody there?")
        await client.is_closed()
        assert limiter.snapshot().refused["timeout"] == 1


@ensureDeferred
async def test_a_client_that_resets_its_connection_while_it_waits_makes_room_for_the_next() -> None:
    limiter = Limiter(1)
    async with listening(limiter) as (server, where):
        first = await connected(where)
        with socket.create_connection(("127.0.0.1", int(where.rpartition(":")[2]))) as reset:
            await until(lambda: limiter.waiting == 1)
            reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        third = await connected(where)
        await until(lambda: limiter.snapshot().departed == 1)
        await until(lambda: limiter.waiting == 1)
        await first.close()
        third.transport.write(b"next")
        await third.receives(b"next")
        assert limiter.snapshot().finished == 1


@pytest.mark.parametrize("place", ["inside TLS", "next to TCP"])
@ensureDeferred
async def test_tls_clients_wait_inside_tls_or_next_to_tcp(place: str, certificate: Path) -> None:
    pytest.importorskip("OpenSSL")
    from twisted.internet.ssl import DefaultOpenSSLContextFactory
    from twisted.protocols.tls import TLSMemoryBIOFactory

    context = DefaultOpenSSLContextFactory(str(certificate), str(certificate))
    tcp = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
    limiter, server = Limiter(1), RecordingFactory()
    if place == "inside TLS":
        manager = listening(limiter, wrap_server_tls(context, tcp), server)
    else:
        manager = listening(limiter, tcp, TLSMemoryBIOFactory(context, False, server))
    async with manager as (_, where):
        blocker = await connected(where)
        await until(lambda: limiter.active == 1)
        port = int(where.rpartition(":")[2])
        data = b"secret " * 30000
        talks = [deferToThread(talk_tls, port, certificate, data) for _ in range(3)]
        await until(lambda: limiter.waiting == 3)
        await blocker.close()
        for talk in talks:
            assert await patiently(talk) == data
        await until(lambda: limiter.active == 0)
        assert limiter.snapshot().waits == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the kernel's word")
@ensureDeferred
async def test_while_somebody_waits_the_longest_idle_is_closed() -> None:
    limiter = Limiter(2, idle_timeout=0.5)
    async with listening(limiter) as (_, where):
        idle, busy = await connected(where), await connected(where)
        await until(lambda: limiter.active == 2)
        talking = task.LoopingCall(busy.transport.write, b"x")
        talking.start(0.05)
        await task.deferLater(reactor, 1.2)
        assert limiter.active == 2  # nobody waits, so nobody is closed
        newcomer = await connected(where)
        newcomer.transport.write(b"hello")
        await newcomer.receives(b"hello")
        assert idle.is_lost
        assert not busy.is_lost
        assert limiter.snapshot().idle_closed == 1
        talking.stop()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the kernel's word")
@ensureDeferred
async def test_idle_keep_alive_clients_do_not_starve_the_line() -> None:
    web = pytest.importorskip("twisted.web.server")
    from twisted.web.static import Data

    limiter, page = Limiter(10, idle_timeout=0.3), Data(b"the page", "text/plain")
    page.isLeaf = True
    async with listening(limiter, server=web.Site(page)) as (_, where):
        clients = [await connected(where) for _ in range(100)]
        for client in clients:
            client.transport.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: all(b"the page" in client.received for client in clients))
        assert limiter.snapshot().idle_closed >= 80


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the kernel's word")
@ensureDeferred
async def test_an_idle_connection_that_does_not_close_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delegating, "QUIET", 0.2)
    limiter, server = Limiter(1, idle_timeout=0.3), RecordingFactory()
    async with listening(limiter, server=server) as (_, where):
        stuck = await connected(where)
        stuck.transport.pauseProducing()
        await until(lambda: server.live)
        server.live[0].transport.write(b"x" * 20_000_000)  # loseConnection waits until it is written
        newcomer = await connected(where)
        newcomer.transport.write(b"hello")
        await newcomer.receives(b"hello")
        stuck.transport.abortConnection()
