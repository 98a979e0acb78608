"""
UNIX sockets: who the peer is shows only with the transport, and a limiter decides as on any other socket.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from support.fakes import ApplicationError, RecordingFactory
from support.logs import Log
from support.sockets import all_connected, connected, listening, until
from twisted.internet.protocol import Factory, Protocol

from connlimit import Limiter
from connlimit._limiter.queue import Fair, Fifo
from connlimit.limits import PerKey
from connlimit.observers import LimiterObserver

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the kernel's word")

#: Settings for which it matters who the peer is.
KNOWING: dict[str, Callable[[], dict[str, Any]]] = {
    "max_per_peer": lambda: {"max_per_peer": 20},
    "fair": lambda: {"order": "fair"},
    "an order of one's own": lambda: {"order": lambda settings, peer: Fair(peer)},
    "exempt": lambda: {"exempt": lambda address: False},
    "a limit of one's own": lambda: {"limits": [PerKey(20, lambda address: address.uid)]},
}


class Counting(LimiterObserver):
    """
    Counts who waited.
    """

    waited = 0

    def waiting(self, limiter: Limiter, connection: object) -> None:
        self.waited += 1


@pytest.mark.parametrize("name", KNOWING)
@ensureDeferred
async def test_who_finds_a_slot_needs_no_place_in_the_queue_and_has_not_waited(
    name: str, tmp_path: Path
) -> None:
    counting = Counting()
    limiter = Limiter(20, max_waiting=0, observers=[counting], **KNOWING[name]())
    async with listening(limiter, f"unix:{tmp_path / 'socket'}") as (server, where):
        clients = await all_connected(where, 20)
        for client in clients:
            client.transport.write(b"hello")
            await client.receives(b"hello")
        snapshot = limiter.snapshot()
        assert (snapshot.active, snapshot.waits, sum(snapshot.refused.values())) == (20, 0, 0)
        assert snapshot.accepted == 20
        assert counting.waited == 0
        assert {address.uid for address in server.addresses} == {os.getuid()}
        over = await connected(where)
        await over.is_closed()
        assert limiter.snapshot().refused["full"] == 1


@ensureDeferred
async def test_a_user_can_be_exempt(tmp_path: Path) -> None:
    asked = []

    def is_root(address: Any) -> bool:
        asked.append(address.uid)
        return address.uid == os.getuid()

    limiter = Limiter(0, max_waiting=0, max_per_peer=1, exempt=is_root)
    async with listening(limiter, f"unix:{tmp_path / 'socket'}") as (_, where):
        for client in await all_connected(where, 3):
            client.transport.write(b"hello")
            await client.receives(b"hello")
        assert (limiter.snapshot().exempted, limiter.active, limiter.waiting) == (3, 0, 0)
        assert asked == [os.getuid()] * 3


@ensureDeferred
async def test_its_user_is_at_its_cap_and_waits_or_is_refused(tmp_path: Path) -> None:
    limiter = Limiter(10, max_per_peer=1, over_peer="refuse", refusal="say sorry")
    async with listening(limiter, f"unix:{tmp_path / 'socket'}") as (_, where):
        first, second = await all_connected(where, 2)
        await second.is_closed()
        assert second.received == b"sorry"
        limiter.over_peer = "wait"
        third = await connected(where)
        await until(lambda: limiter.waiting == 1)
        await first.close()
        third.transport.write(b"hello")
        await third.receives(b"hello")
        snapshot = limiter.snapshot()
        assert (snapshot.accepted, snapshot.waits, snapshot.refused["peer"]) == (3, 1, 1)


class Named(Protocol):
    """
    Tells what its transport is called.
    """

    def connectionMade(self) -> None:
        self.transport.write(f"{self.transport.logstr} {self.transport!r}".encode())
        self.transport.loseConnection()


@ensureDeferred
async def test_the_transport_is_called_as_without_a_limiter(tmp_path: Path) -> None:
    limiter = Limiter(1, max_per_peer=1)
    where = f"unix:{tmp_path / 'socket'}"
    async with listening(limiter, where, Factory.forProtocol(Named)) as (_, where):
        client = await connected(where)
        await client.is_closed()
        assert client.received == b"Named,0, <Named #0 on None>"  # as it is bare


@ensureDeferred
async def test_a_factory_that_builds_nothing_or_fails_closes_and_keeps_no_slot(tmp_path: Path) -> None:
    class Nothing(Factory):
        def buildProtocol(self, addr: object) -> None:
            return None

    class Failing(Factory):
        def buildProtocol(self, addr: object) -> None:
            raise ApplicationError

    for number, server in enumerate((Nothing(), Failing())):
        limiter = Limiter(1, max_per_peer=1)
        async with listening(limiter, f"unix:{tmp_path / str(number)}", server) as (_, where):
            with Log() as log:
                for client in await all_connected(where, 3):
                    await client.is_closed()
                await until(lambda limiter=limiter: limiter.snapshot().finished == 3)
            assert limiter.active == 0
            assert [event for event in log.events if event["log_level"].name == "critical"] == [
                event for event in log.events if "failed to build" in str(event["log_format"])
            ]


@ensureDeferred
async def test_a_protocol_that_fails_when_it_is_made_keeps_its_slot_until_its_end(
    tmp_path: Path,
) -> None:
    class Failing(Protocol):
        def connectionMade(self) -> None:
            raise ApplicationError

    limiter = Limiter(1, max_per_peer=5, max_waiting=0)
    async with listening(limiter, f"unix:{tmp_path / 'socket'}", Factory.forProtocol(Failing)) as (_, where):
        client = await connected(where)
        await until(lambda: limiter.active == 1)
        await client.close()
        await until(lambda: limiter.active == 0)
        assert limiter.snapshot().finished == 1


@ensureDeferred
async def test_nobody_looks_at_the_peer_and_the_protocol_is_built_where_twisted_asks_for_it(
    tmp_path: Path,
) -> None:
    connections = []

    class Building(RecordingFactory):
        def buildProtocol(self, addr: Any) -> Any:
            connections.append(sys._getframe(3).f_code.co_name)
            return super().buildProtocol(addr)

    limiter = Limiter(1, order=lambda settings, peer: Fifo())
    limiter.order = "fifo"
    async with listening(limiter, f"unix:{tmp_path / 'socket'}", Building()) as (_, where):
        await (await connected(where)).close()
        assert connections == ["doRead"]
