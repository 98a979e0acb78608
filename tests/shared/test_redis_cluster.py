"""
A real Redis Cluster of two nodes: the node that has the keys is used, the other is refused in one sentence.
"""

from __future__ import annotations

import random
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.logs import Log
from support.patience import PATIENCE
from support.redis import TTL, Redis, command
from support.redis_limits import administer, failures, redis_limit
from support.semaphores import ours
from support.sockets import patiently, until
from twisted.internet.threads import deferToThread

#: The slots of a cluster, half of which each node has.
SLOTS = 16384


def free_ports(count: int) -> set[int]:
    """
    Ports that are free, and so is the one of the cluster's own connections, 10,000 later.
    """
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(10_000, 20_000)
        with (
            suppress(OSError),
            closing(socket.create_server(("127.0.0.1", port))),
            closing(socket.create_server(("127.0.0.1", port + 10_000))),
        ):
            found.add(port)
    return found


def said(node: Redis, *words: str) -> str:
    """
    What a node answers.
    """
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.settimeout(PATIENCE)
        client.connect(str(node.socket))
        client.sendall(command(*(word.encode() for word in words)) + command(b"QUIT"))
        received = b""
        while not received.endswith(b"+OK\r\n") or received == b"+OK\r\n":
            data = client.recv(65536)
            if not data:
                break
            received += data
    return received.decode()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Redis, Redis]]:
    """
    The nodes of a cluster: the first has the lower half of the slots.
    """
    with ExitStack() as stack:
        made = []
        for at, port in enumerate(sorted(free_ports(2))):
            node = Redis(tmp_path_factory.mktemp("node"), port)
            stack.callback(node.stop)
            node.start(True, "--cluster-enabled", "yes", "--bind", "127.0.0.1")
            slots = range(at * SLOTS // 2, (at + 1) * SLOTS // 2)
            assert said(node, "CLUSTER", "ADDSLOTS", *map(str, slots)).startswith("+OK")
            made.append(node)
        one, other = made
        assert said(one, "CLUSTER", "MEET", "127.0.0.1", str(other.port)).startswith("+OK")
        began = time.monotonic()
        while not all("cluster_state:ok" in said(node, "CLUSTER", "INFO") for node in made):
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.05)
        yield one, other


def of(nodes: tuple[Redis, Redis], name: str) -> tuple[Redis, Redis]:
    """
    The node that has a limit, and that which has not.
    """
    slot = int(re.findall(r":(\d+)", said(nodes[0], "CLUSTER", "KEYSLOT", redis_limit.keys_of(name)[0]))[0])
    return nodes if slot < SLOTS // 2 else (nodes[1], nodes[0])


@ensureDeferred
async def test_the_node_that_has_a_limit_serves_it(nodes: tuple[Redis, Redis]) -> None:
    owner, _ = of(nodes, "web")
    one, other = (
        redis_limit.RedisLimit("web", 1, url=f"redis://127.0.0.1:{owner.port}", ttl=TTL) for _ in range(2)
    )
    for limit in (one, other):
        limit.subscribe(lambda limit=limit: limit.in_use or limit.try_acquire(None))
        assert not limit.try_acquire(None)
    await until(lambda: one.in_use + other.in_use == 1)
    first, second = (one, other) if one.in_use else (other, one)
    listed = await deferToThread(administer, f"redis://127.0.0.1:{owner.port}", "list")
    assert listed.stdout.startswith("web: 1 of its own setting held\n"), listed
    first._subscribers.clear()
    first.release(None)
    await until(lambda: second.in_use)
    second.release(None)
    await patiently(one.close())
    await patiently(other.close())


@ensureDeferred
async def test_a_limit_is_refused_at_once_by_the_node_that_has_it_not(nodes: tuple[Redis, Redis]) -> None:
    _, other = of(nodes, "web")
    limit = redis_limit.RedisLimit(
        "web", 1, url=f"redis://127.0.0.1:{other.port}", ttl=TTL, when_unreachable="local=1"
    )
    limit.subscribe(lambda: limit.in_use or limit.try_acquire(None))
    with Log() as log:
        began = time.monotonic()
        assert not limit.try_acquire(None)
        await until(lambda: limit._is_away)
        assert time.monotonic() - began < 1
        await until(lambda: limit.in_use)  # what `when_unreachable` says
        await until(lambda: failures(limit) >= 3)
    assert len(log.texts()) == 1
    assert re.fullmatch(
        rf"limit web: Redis at 127.0.0.1:{other.port} cannot be used: it is one of a Redis Cluster, and "
        r"another node has what is asked for \(MOVED \d+ 127.0.0.1:\d+\)",
        log.texts()[0],
    )
    limit.release(None)
    await patiently(limit.close())


@ensureDeferred
async def test_a_database_that_a_cluster_has_not_is_told_of(nodes: tuple[Redis, Redis]) -> None:
    limit = redis_limit.RedisLimit("web", 1, url=f"redis://127.0.0.1:{nodes[0].port}/1", ttl=TTL)
    with Log() as log:
        assert not limit.try_acquire(None)
        await until(lambda: failures(limit) >= 2)
    assert [text.partition("used: ")[2] for text in log.texts()] == [
        "ERR SELECT is not allowed in cluster mode"
    ]
    await patiently(limit.close())


def test_the_administration_says_which_node_has_a_limit(nodes: tuple[Redis, Redis]) -> None:
    owner, other = of(nodes, "web")
    for words in (["set", "web", "5"], ["reset", "web"]):
        assert administer(f"redis://127.0.0.1:{owner.port}", *words).returncode == 0
        done = administer(f"redis://127.0.0.1:{other.port}", *words)
        assert done.returncode == 1
        assert re.fullmatch(
            rf"connlimit-shared: Redis at 127.0.0.1:{other.port} cannot be used: it is one of a Redis "
            rf"Cluster, and another node has what is asked for \(MOVED \d+ 127.0.0.1:{owner.port}\)\n",
            done.stderr,
        )


def test_semaphores_are_kept_by_the_node_that_has_them_and_the_other_is_refused(
    nodes: tuple[Redis, Redis], tmp_path: Path
) -> None:
    owner, other = of(nodes, "semaphores")
    with ours(tmp_path, "--store", f"redis://127.0.0.1:{owner.port}") as server:
        peer = server.new_peer()
        assert server.acquire(peer, "C") == 200
    with ours(tmp_path, "--store", f"redis://127.0.0.1:{other.port}") as server:
        status, text = server.ask("POST", "/new_peer", {"expires_in": "5min"})
        assert status == 503
        assert f"another node has what is asked for (MOVED {text.rpartition('MOVED ')[2]}" in text
        assert f"127.0.0.1:{owner.port})" in text
        server.program.wait_for(f"Redis at 127.0.0.1:{other.port} cannot be used: it is one of a Redis")
        time.sleep(1.5)
        assert server.program.output.count("cannot be used") == 1
        assert "Traceback" not in server.program.output
