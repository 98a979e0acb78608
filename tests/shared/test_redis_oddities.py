"""
Shared limits with odd names, and with a Redis that answers oddly: it is said once, and nobody else is harmed.
"""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.logs import Log
from support.redis import TTL, Redis, command, questions
from support.redis_limits import Answering, Switch, administer, failures, processes_of_their_own, redis_limit
from support.sockets import patiently, until
from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from connlimit._system.since_boot import since_boot


def using(limit: object) -> object:
    """
    The limit, of which one slot is wanted.
    """
    limit.subscribe(lambda: limit.in_use or limit.try_acquire(None))
    assert not limit.try_acquire(None)
    return limit


async def over(*limits: object) -> None:
    """
    Let these limits end.
    """
    for limit in limits:
        limit._subscribers.clear()
        while limit.in_use:
            limit.release(None)
        await patiently(limit.close())


ODD_NAMES = [
    " ",
    "{",
    "}",
    "{}",
    "a}:lease",
    "*?[a-z]",
    "snow ☃ and \U0001f600",
    "nul \0 and line\r\n",
    "\x1b[31mred",
    "123",
    "x" * 20_000,
]


@ensureDeferred
async def test_a_name_can_be_any_text(settled_redis: Redis) -> None:
    pairs = {
        name: [using(redis_limit.RedisLimit(name, 1, url=settled_redis.url, ttl=10)) for _ in range(2)]
        for name in ODD_NAMES
    }
    for pair in pairs.values():
        await until(lambda pair=pair: any(limit.in_use for limit in pair))
        first, second = pair if pair[0].in_use else reversed(pair)
        await until(lambda second=second: second._queued and second._link.hears(second.channel))
        first._subscribers.clear()
        first.release(None)
        await until(lambda second=second: second.in_use)
    listed = (await deferToThread(administer, settled_redis.url, "list")).stdout
    for name in ODD_NAMES:
        shown = name if name.isprintable() else repr(name)
        assert f"{shown}: 1 of its own setting held\n" in listed
    assert not set("\x1b\0\r") & set(listed)
    odd = "snow ☃ and \U0001f600"
    assert (await deferToThread(administer, settled_redis.url, "set", odd, "2")).returncode == 0
    for limit in pairs[odd]:
        if not limit.in_use:
            using(limit)
    await until(lambda: all(limit.in_use for limit in pairs[odd]))
    assert (await deferToThread(administer, settled_redis.url, "reset", odd)).returncode == 0
    for pair in pairs.values():
        await over(*pair)


def test_a_name_that_is_no_text_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"\Aname must be a text .* UTF-8, not 'a\\udcff'\Z"):
        redis_limit.RedisLimit("a\udcff", 1, url="redis://localhost")
    done = administer("redis://localhost", "set", os.fsdecode(b"a\xff"), "1")
    assert done.returncode == 2
    assert done.stderr == (
        "connlimit-shared: NAME must be a text that can be written in UTF-8, not 'a\\udcff'\n"
    )


class Counting(Answering):
    """
    Something that gives the same answer to each question, and counts these.
    """

    count = 0

    def _talk(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            while data := client.recv(65536):
                for word in re.findall(rb"SELECT|EVAL", data):
                    self.count += word == b"EVAL"
                    client.sendall(b"+OK\r\n" if word == b"SELECT" else self._answer)


@pytest.mark.parametrize(
    "answer",
    [
        "LOADING Redis is loading the dataset in memory",
        "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
        "MISCONF Redis is configured to save RDB snapshots, but it is currently not able to persist on disk",
        "NOPERM this user has no permissions to run the 'evalsha' command",
        "NOSCRIPT No matching script. Please use EVAL.",
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "UNBLOCKED client unblocked via CLIENT UNBLOCK",
        "NOREPLICAS Not enough good replicas to write.",
        "ERR max number of clients reached",
        "ERR unknown command 'EVALSHA'",
    ],
)
@ensureDeferred
async def test_what_redis_refuses_with_is_said_once_and_it_is_tried_ever_less_often(answer: str) -> None:
    strange = Counting(f"-{answer}\r\n".encode())
    limit = redis_limit.RedisLimit("x", 5, url=strange.url, ttl=TTL, when_unreachable="local=1")
    with Log() as log:
        using(limit)
        await until(lambda: limit.in_use)
        await until(lambda: failures(limit) >= 4)
    assert [text.partition("used: ")[2] for text in log.texts()] == [answer[:200]]
    assert strange.count < 30
    await over(limit)
    strange.stop()


@ensureDeferred
async def test_answers_in_pieces_are_answers(settled_redis: Redis) -> None:
    class Pieces(Switch):
        def _copy(self, one: socket.socket, other: socket.socket) -> None:
            with suppress(OSError):
                while data := one.recv(7):
                    other.sendall(data)
                    time.sleep(0.0005)
            for each in (one, other):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    pieces = Pieces(settled_redis)
    with Log() as log:
        one, other = (using(redis_limit.RedisLimit("pieces", 1, url=pieces.url, ttl=10)) for _ in range(2))
        await until(lambda: one.in_use + other.in_use == 1)
        first, second = (one, other) if one.in_use else (other, one)
        await until(lambda: second._queued)
        first._subscribers.clear()
        first.release(None)
        await until(lambda: second.in_use)
    assert not log.texts()
    await over(one, other)
    pieces.stop()


@ensureDeferred
async def test_a_redis_that_accepts_and_never_answers_is_away(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        limit = redis_limit.RedisLimit("x", 5, url=url, ttl=TTL, when_unreachable="local=1")
        with Log() as log:
            using(limit)
            await until(lambda: limit.in_use)
            await until(lambda: failures(limit) >= 3)
        assert [text.partition("used: ")[2] for text in log.texts()] == ["no answer within 0.5 s"]
        await over(limit)


@pytest.mark.parametrize("database", ["16", "99999999999999999999"])
@ensureDeferred
async def test_a_database_that_there_is_not_is_said_once(database: str, redis: Redis) -> None:
    limit = redis_limit.RedisLimit("x", 5, url=f"{redis.url}?db={database}&ttl={TTL}")
    with Log() as log:
        using(limit)
        await until(lambda: failures(limit) >= 3)
    (said,) = log.texts()
    assert "cannot be used: ERR " in said
    await over(limit)


@ensureDeferred
async def test_a_redis_that_is_busy_with_somebody_elses_script_is_away_until_it_is_over(
    tmp_path: Path,
) -> None:
    redis = Redis(tmp_path).start(True, "--lua-time-limit", "100")
    try:
        limit = using(redis_limit.RedisLimit("x", 5, url=redis.url, ttl=TTL))
        await until(lambda: limit.in_use)
        with Log() as log, closing(socket.socket(socket.AF_UNIX)) as client:
            client.connect(str(redis.socket))
            client.sendall(command(b"EVAL", b"while true do end", b"0"))
            limit._ask_soon(0)
            await until(lambda: limit._is_away and since_boot() > limit._ends)
            limit.release(None)
            assert not limit.try_acquire(None)
            assert redis.ask(b"SCRIPT KILL") == b"+OK"
            await until(lambda: not limit._is_away and limit.in_use)
        assert ["is back" in text for text in log.texts()] == [False, True]
        await over(limit)
    finally:
        redis.stop()


@ensureDeferred
async def test_a_script_that_redis_has_forgotten_is_sent_again(settled_redis: Redis) -> None:
    limits = [redis_limit.RedisLimit(f"flush {at}", 1, url=settled_redis.url, ttl=10) for at in range(20)]
    with Log() as log:
        for limit in limits:
            using(limit)
            assert settled_redis.ask(b"SCRIPT FLUSH") == b"+OK"
        await until(lambda: all(limit.in_use for limit in limits))
    assert not log.texts()
    await over(*limits)


@ensureDeferred
async def test_a_redis_that_has_too_many_clients_is_away_and_found_again(tmp_path: Path) -> None:
    redis = Redis(tmp_path).start(True, "--maxclients", "4")
    with closing(socket.socket(socket.AF_UNIX)) as keeps, Log() as log:
        try:
            keeps.connect(str(redis.socket))
            keeps.sendall(b"CONFIG SET maxclients 1\r\n")
            keeps.recv(100)
            limit = using(redis_limit.RedisLimit("x", 5, url=redis.url, ttl=TTL))
            await until(lambda: failures(limit) >= 3)
            keeps.sendall(b"CONFIG SET maxclients 2\r\n")
            await until(lambda: limit.in_use)
            # There is no connection that hears, until there is.
            await deferLater(reactor, 0.5)
            assert not limit._link.hears(limit.channel)
            keeps.sendall(b"CONFIG SET maxclients 4\r\n")
            await until(lambda: limit._link.hears(limit.channel))
            await over(limit)
        finally:
            redis.stop()
    complaint, relief = log.texts()
    assert complaint.endswith("ERR max number of clients reached")
    assert relief.endswith(" is back")


@ensureDeferred
async def test_connections_that_redis_ends_when_they_are_idle_are_made_again_without_a_word(
    tmp_path: Path,
) -> None:
    redis = Redis(tmp_path).start(True, "--timeout", "1")
    try:
        limit = using(redis_limit.RedisLimit("x", 5, url=redis.url, ttl=10))
        await until(lambda: limit.in_use)
        with Log() as log:
            connection = limit._link.connection
            await until(lambda: limit._link.connection > connection)
            assert limit._link.connection <= connection + 3
            assert since_boot() < limit._ends
        assert not log.texts()
        await over(limit)
    finally:
        redis.stop()


@ensureDeferred
async def test_who_may_hear_from_now_on_does(tmp_path: Path) -> None:
    redis = Redis(tmp_path).start()
    try:
        rights = b"ACL SETUSER me on >secret resetchannels ~connlimit:* +@all -@dangerous +info "
        assert redis.ask(rights) == b"+OK"
        limit = using(redis_limit.RedisLimit("x", 1, url=f"unix://me:secret@{redis.socket}", ttl=TTL))
        with Log() as log:
            await until(lambda: limit.in_use and limit._link._is_deaf)
            assert redis.ask(b"ACL SETUSER me &connlimit:*") == b"+OK"
            await until(lambda: limit._link.hears(limit.channel))
        assert len(log.texts()) == 1
        await over(limit)
    finally:
        redis.stop()


@ensureDeferred
async def test_nothing_is_kept_of_limits_that_are_over(settled_redis: Redis) -> None:
    with processes_of_their_own():
        stays = using(redis_limit.RedisLimit("stays", 1, url=settled_redis.url, ttl=10))
    await until(lambda: stays.in_use and stays._link.hears(stays.channel))
    link = stays._link
    for at in range(6):
        limit = redis_limit.RedisLimit(f"passes {at}", 1, url=settled_redis.url, ttl=10)
        limit._link = link

        def leave(limit: object = limit, at: int = at) -> None:
            # While it is about to hear.
            assert limit.try_acquire(None)
            limit.release(None)
            limit._is_away = at % 2
            limit.close()

        limit.subscribe(leave)
        assert not limit.try_acquire(None)
        await until(lambda limit=limit: limit._closed and len(link._askers) == 1)
    await deferLater(reactor, 0.2)
    assert link._subscribed == {stays.channel, link.turns}
    assert set(link._hearers) == {stays.channel}
    assert set(link._askers) == {stays.member}
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(str(settled_redis.socket))
        # What is left of those that could not say that they leave ends by itself.
        client.sendall(command(b"KEYS", b"connlimit:{passes*"))
        assert client.recv(10_000).count(b":lease") == 3
        client.sendall(command(b"PTTL", redis_limit.keys_of("passes 1")[0].encode()))
        assert 0 < int(client.recv(100)[1:-2]) <= 300_000
        client.sendall(command(b"PUBSUB", b"CHANNELS", b"connlimit:{passes*"))
        assert client.recv(1000) == b"*0\r\n"
    await over(stays)


@pytest.mark.parametrize("each_way", [0.15, 0.3])
@ensureDeferred
async def test_a_lease_is_renewed_in_time_though_redis_is_far_away(
    each_way: float, settled_redis: Redis, proxied: Switch
) -> None:
    proxied.delay = each_way
    limit = redis_limit.RedisLimit(f"far {each_way}", 5, url=proxied.url, ttl=1)
    using(limit)
    await until(lambda: limit.in_use)
    with Log() as log:
        without, began, before = 0, since_boot(), questions(settled_redis)
        while since_boot() < began + 4:
            without += since_boot() >= limit._ends
            await deferLater(reactor, 0.01)
    assert not log.texts()
    assert not limit.outlived
    if each_way < 0.2:
        assert without <= 20
    assert questions(settled_redis) - before <= 4 / (2 * each_way) + 3
    proxied.delay = 0
    await over(limit)


@ensureDeferred
async def test_redis_is_reached_by_ipv6(tmp_path: Path) -> None:
    try:
        with closing(socket.create_server(("::1", 0), family=socket.AF_INET6)) as listening:
            port = listening.getsockname()[1]
    except OSError:
        pytest.skip("there is no IPv6")
    redis = Redis(tmp_path, port).start(True, "--bind", "::1")
    limit = using(redis_limit.RedisLimit("six", 1, url=f"redis://[::1]:{port}", ttl=10))
    await until(lambda: limit.in_use)
    await over(limit)
    redis.stop()


@ensureDeferred
async def test_members_with_different_limits_each_keep_their_own(settled_redis: Redis) -> None:
    few, many = (redis_limit.RedisLimit("differ", slots, url=settled_redis.url, ttl=10) for slots in (2, 5))
    served = {few: 0, many: 0}

    def serve(limit: object) -> None:
        while limit.try_acquire(None):
            served[limit] += 1

    for limit in (few, many):
        limit.subscribe(partial(serve, limit))
        serve(limit)
        await until(lambda limit=limit: served[limit])
    # The one that was told of fewer waits, and no slot is kept for it that it will not use.
    await until(lambda: served == {few: 2, many: 3} and few._others_ask)
    began = since_boot()
    few.release(None)
    await until(lambda: served[many] == 4)
    assert since_boot() - began < 0.5
    many._subscribers.clear()
    for _ in range(4):
        many.release(None)
    await until(lambda: few.in_use == 2)
    await over(few, many)


@ensureDeferred
async def test_a_process_that_was_busy_does_not_take_what_hears_for_dead(settled_redis: Redis) -> None:
    limit = using(redis_limit.RedisLimit("busy", 1, url=settled_redis.url, ttl=20))
    await until(lambda: limit.in_use and limit._link.hears(limit.channel))
    link = limit._link
    ear = link._ear
    await until(lambda: ear.pinged_at is None)
    link._listen()
    assert ear.pinged_at is not None
    time.sleep(3)  # the reactor has no turn meanwhile
    await until(lambda: ear.pinged_at is None or link._ear is not ear)
    assert link._ear is ear
    await over(limit)
