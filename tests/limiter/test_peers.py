"""
What counts as one client, and who is exempt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.sockets import connected, listening, until
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress

from connlimit import Limiter
from connlimit._limiter.peers import Networks, UNIXPeer, exempt_or_none, peer_key
from connlimit.limits import Key


def at(host: str) -> object:
    return (IPv6Address if ":" in host else IPv4Address)("TCP", host, 5)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("192.0.2.77", "192.0.2.77"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.77", "192.0.2.77"),
        ("fe80::1%eth0", "fe80::/64"),
        ("not an address", "not an address"),
    ],
)
def test_a_peer_is_a_network(host: str, expected: str) -> None:
    assert peer_key((32, 64))(at(host)) == expected


def test_the_prefixes_can_be_chosen() -> None:
    peer = peer_key((24, 48))
    assert peer(at("192.0.2.77")) == "192.0.2.0/24"
    assert peer(at("2001:db8:1:2::5")) == "2001:db8:1::/48"


def test_a_unix_peer_is_a_user() -> None:
    peer = peer_key((32, 64))
    assert peer(UNIXPeer(b"/socket", 1000)) == 1000
    assert peer(UNIXAddress(b"/socket")) is None


def test_what_is_known_by_a_key_has_it_for_its_peer() -> None:
    peer = peer_key((32, 64))
    assert peer(Key("reports")) == "reports"
    assert peer(Key("192.0.2.77")) == peer(at("192.0.2.77"))


def test_a_unix_peer_is_the_address_that_it_has_without_a_limiter() -> None:
    peer, address = UNIXPeer(b"/socket", 1000), UNIXAddress(b"/socket")
    assert peer == address
    assert address == peer
    assert hash(peer) == hash(address)
    assert repr(peer) == repr(address)
    assert peer != UNIXAddress(b"/other")
    assert UNIXPeer(None, 1000) == UNIXAddress(None) == UNIXPeer(None, 1001)
    assert UNIXPeer(None, 1000) == UNIXPeer(None, 1000)
    assert UNIXPeer(None, 1000) != UNIXPeer(None, 1001)


def test_networks_say_who_is_in_them() -> None:
    exempt = exempt_or_none(["127.0.0.0/8", "::1", "2001:db8::/32"])
    assert [exempt(at(host)) for host in ("127.9.9.9", "::1", "2001:db8::1", "::ffff:127.0.0.1")] == [
        True
    ] * 4
    assert [exempt(at(host)) for host in ("128.0.0.1", "::2", "odd")] == [False] * 3
    assert exempt(UNIXAddress(b"/socket")) is False
    assert exempt == Networks(exempt.networks)
    assert exempt_or_none([]) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the kernel's word")
@ensureDeferred
async def test_connections_of_one_user_on_a_unix_socket_are_one_peer(tmp_path: Path) -> None:
    limiter = Limiter(10, max_per_peer=1)
    async with listening(limiter, f"unix:{tmp_path / 'socket'}") as (server, where):
        first, second = await connected(where), await connected(where)
        await until(lambda: (limiter.active, limiter.waiting) == (1, 1))
        assert server.addresses[0].uid == os.getuid()
        second.transport.write(b"hello")
        await first.close()
        await second.receives(b"hello")
        await second.close()
        await until(lambda: limiter.active == 0)
