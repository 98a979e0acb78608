"""
What a shared limit does when Redis, its clock, the network or a process fails: nobody is served above it.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from support.logs import Log
from support.patience import PATIENCE
from support.redis import TTL, Redis, Service, questions
from support.redis_limits import (
    NUMBERS,
    WORKER,
    Answering,
    Asker,
    Backend,
    Switch,
    administer,
    failures,
    processes_of_their_own,
    redis_limit,
    script,
)
from support.sockets import patiently, until
from twisted.internet import reactor
from twisted.internet.defer import fail, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from connlimit._system.since_boot import since_boot

#: When the examples begin, by clocks that the tests set.
NOW = 1_000_000.0


def settled(redis: Redis, slots: int, count: int = 2) -> list[Asker]:
    """
    Members of a limit that is not new any more.
    """
    name = f"faults {next(NUMBERS)}"
    askers = [Asker(redis, name, slots) for _ in range(count)]
    for asker in askers:
        asker.ask(0, NOW - 2)
    assert askers[0].guarded
    return askers


def test_after_a_loss_of_memory_nobody_gets_more_until_all_were_heard(redis: Redis) -> None:
    one, other = settled(redis, 20)
    assert one.ask(20, NOW) == 20
    one.forget()
    assert other.ask(20, NOW + 1) == 0
    assert one.ask(20, NOW + 2, in_use=15) == 20
    assert other.ask(20, NOW + 9.9) == 0
    assert one.ask(15, NOW + 11.2, in_use=15, kept=15) == 15
    assert other.ask(20, NOW + 11.3) == 5


def test_a_newcomer_gets_nothing_after_a_loss_of_memory_while_somebody_listens(redis: Redis) -> None:
    one, other = settled(redis, 20)
    assert one.ask(20, NOW) == 20
    one.forget()
    newcomer = other.another()
    with one.listening():
        assert newcomer.ask(20, NOW + 1) == 0
        assert newcomer.guarded == 10_000
    assert newcomer.ask(20, NOW + 5) == 0


def test_a_limit_that_is_new_gives_slots_as_soon_as_others_would_have_been_heard_of(redis: Redis) -> None:
    (one,) = settled(redis, 20, 1)
    assert one.guarded == 1000
    assert one.ask(20, NOW) == 20
    # Nobody waits longer where another has been heard of.
    assert one.another().ask(1, NOW) == 0
    assert not one.another().guarded


def test_who_comes_back_from_another_redis_starts_the_guard(redis: Redis) -> None:
    one, other = settled(redis, 20)
    assert one.ask(5, NOW) == 5
    assert other.ask(5, NOW) == 5
    # Meanwhile another Redis, to which this one was never joined, has leased 20 slots.
    one.run = other.run = "id another"
    assert other.ask(20, NOW + 4, in_use=5) == 5
    assert other.guarded == 10_000
    assert one.ask(20, NOW + 5, in_use=15, kept=15) == 15
    # Who has not asked the other one since does not start it again.
    late = other.another()
    late.ask(0, NOW + 5.1)
    late.run = "id another"
    late.ask(0, NOW + 7, age=5)
    assert late.guarded == 7000
    # Who has, does.
    late.run = "id another"
    late.ask(0, NOW + 10, age=0.1)
    assert late.guarded == 10_000


def test_a_state_that_another_redis_wrote_starts_the_guard(redis: Redis) -> None:
    one, other = settled(redis, 20)
    assert one.ask(5, NOW) == 5
    newcomer = other.another(script("promoted"))
    assert newcomer.ask(20, NOW + 1) == 0
    assert newcomer.guarded == 10_000


@pytest.mark.parametrize(
    ("uptime", "guarded"), [(0, 10_000), (1, 10_000), (5, 6000), (11, 1000), (-3590, 10_000)]
)
def test_a_redis_that_was_started_a_moment_ago_gives_nothing(redis: Redis, uptime: int, guarded: int) -> None:
    # The uptime is in whole seconds, and up to one too long.
    asker = Asker(redis, f"faults {next(NUMBERS)}", 5, script(uptime=uptime))
    assert asker.ask(5, NOW) == 0
    assert asker.guarded == guarded
    assert asker.ask(5, NOW + guarded / 1000) == 5


@pytest.mark.parametrize("step", [-3600, -5, 3600, 60])
def test_a_clock_that_is_set_ends_no_lease_early_and_delays_nobody(redis: Redis, step: int) -> None:
    one, other = settled(redis, 20)
    assert one.ask(20, NOW) == 20
    assert other.ask(20, NOW + 1) == 0
    # Redis's clock is set.
    assert other.ask(20, NOW + 2, wall=NOW + 2 + step) == 0
    newcomer = other.another()
    with one.listening():
        assert newcomer.ask(20, NOW + 3, wall=NOW + 3 + step) == 0
    assert one.ask(20, NOW + 3.3, in_use=20, wall=NOW + 3.3 + step) == 20
    assert other.ask(20, NOW + 6, wall=NOW + 6 + step) == 0
    # One is not heard of any more: its lease ends in time, give or take what the clock is doubted.
    assert other.ask(20, NOW + 12.5, wall=NOW + 12.5 + step) == 0
    assert other.ask(20, NOW + 15.5, wall=NOW + 15.5 + step) == 20


def test_a_newcomer_ends_no_lease_by_a_clock_that_was_set_forward(redis: Redis) -> None:
    one, other = settled(redis, 20)
    assert one.ask(20, NOW) == 20
    newcomer = other.another()
    with one.listening():
        assert newcomer.ask(20, NOW + 1, wall=NOW + 3601) == 0
    assert one.ask(20, NOW + 3, in_use=20, wall=NOW + 3603) == 20
    # One is dead: nobody listens.
    last = other.another()
    assert last.ask(20, NOW + 15, wall=NOW + 3615) == 0
    assert last.guarded == 1000
    assert last.ask(20, NOW + 16, wall=NOW + 3616) == 20


def test_whose_turn_it_is_and_who_is_gone_loses_it(redis: Redis) -> None:
    one, second, third = settled(redis, 1, 3)
    assert one.ask(1, NOW) == 1
    with second.listening(), third.listening():
        second.hears = third.hears = True
        assert second.ask(1, NOW) == 0
        assert third.ask(1, NOW) == 0
    with third.listening() as heard:
        one.ask(0, NOW + 1, kept=0)
        assert third.member in heard()
        assert third.ask(1, NOW + 1) == 1


def test_who_does_not_ask_in_its_turn_loses_it(redis: Redis) -> None:
    one, stopped, third = settled(redis, 1, 3)
    assert one.ask(1, NOW) == 1
    with stopped.listening(), third.listening() as heard:
        stopped.hears = third.hears = True
        for asker in (stopped, third):
            assert asker.ask(1, NOW) == 0
        assert stopped.member in heard()
        one.ask(0, NOW + 1, kept=0)
        assert third.ask(1, NOW + 2) == 0
        assert one.ask(1, NOW + 4) == 0
        one.ask(0, NOW + 4.5, kept=0)
        assert third.member in heard()
        assert third.ask(1, NOW + 4.5) == 1
        third.ask(0, NOW + 5, kept=0)
        assert stopped.ask(1, NOW + 6) == 1


def test_one_of_those_who_wait_watches_for_leases_that_end_and_the_others_rarely_ask(redis: Redis) -> None:
    one, *waiting = settled(redis, 1, 11)
    assert one.ask(1, NOW) == 1
    with ExitStack() as listening:
        for asker in waiting:
            listening.enter_context(asker.listening())
            asker.hears = True
            assert asker.ask(1, NOW) == 0
        assert [asker.pause for asker in waiting] == [1000, *range(4000, 22_000, 2000)]
        # The one who watches may be stopped.
        assert waiting[5].ask(1, NOW + 2) == 0
        assert waiting[5].pause == 20_000
        assert waiting[5].ask(1, NOW + 3.5) == 0
        assert waiting[5].pause == 1000
        assert waiting[0].ask(1, NOW + 4) == 0
        assert waiting[0].pause == 20_000
    # All are killed but one, whose turn is not lost though it has not asked for longer than a lease.
    last = waiting[3]
    with last.listening() as heard:
        last.hears = True
        assert one.ask(0, NOW + 12, kept=0) == 0
        assert last.member in heard()
        assert last.ask(1, NOW + 12) == 1


def test_who_stops_to_wait_lets_another_watch(redis: Redis) -> None:
    one, watching, other, last = settled(redis, 1, 4)
    assert one.ask(1, NOW) == 1
    with watching.listening(), other.listening(), last.listening() as heard:
        for asker in (watching, other, last):
            asker.hears = True
            assert asker.ask(1, NOW) == 0
        assert watching.member in heard()
        assert watching.ask(0, NOW + 1) == 0
        assert last.member in heard()
        assert last.ask(1, NOW + 1) == 0
        assert last.pause == 1000
        assert other.ask(1, NOW + 1.5) == 0
        assert other.pause > 1000


def test_who_does_not_hear_this_redis_asks_each_second(redis: Redis) -> None:
    one, other = settled(redis, 1)
    assert one.ask(1, NOW) == 1
    other.hears = True  # as it believes
    for second in range(3):
        assert other.ask(1, NOW + second) == 0
        assert other.pause == 1000
    # Its turn is not lost, though nobody heard of it.
    one.ask(0, NOW + 3, kept=0)
    assert one.ask(1, NOW + 3.1) == 0
    assert other.ask(1, NOW + 3.5) == 1


def test_what_has_outlived_its_lease_is_counted_for_all_to_see(redis: Redis) -> None:
    one, other = settled(redis, 5)
    assert one.ask(5, NOW) == 5
    assert other.ask(5, NOW + 11) == 5
    one.ask(5, NOW + 12, in_use=5, outlived=5)
    assert one.too_many == 5
    assert one.others == 1  # what it does not use it gives back
    assert other.about()["outlived"] == 5


class Storm:
    """
    Processes that serve many clients by one limit, before a backend that counts them independently.
    """

    def __init__(self, url: str, slots: int = 20, processes: int = 3, clients: int = 45) -> None:
        self.url, self.slots = url, slots
        self.backend = Backend()
        self.workers: list[tuple[int, subprocess.Popen[str]]] = []
        self.served: list[float] = []
        self._ended = threading.Event()
        for _ in range(processes):
            self.start()
        self._clients = [threading.Thread(target=self._come, args=(at,)) for at in range(clients)]

    def start(self) -> None:
        where = f"tcp:127.0.0.1:{self.backend.port}"
        command = [sys.executable, "-c", WORKER, self.url, str(self.slots), str(TTL), where]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.workers.append((int(process.stdout.readline()), process))

    def _come(self, number: int) -> None:
        choose = random.Random(number)
        while not self._ended.is_set():
            try:
                with socket.create_connection(
                    ("127.0.0.1", choose.choice(self.workers)[0]), PATIENCE
                ) as client:
                    time.sleep(choose.uniform(0, 0.3))
                    client.sendall(b"x")
                    if client.recv(1) == b"x":
                        self.served.append(time.monotonic())
            except OSError:
                time.sleep(0.01)

    def __enter__(self) -> Storm:
        for client in self._clients:
            client.start()
        self.serves(100)
        return self

    def serves(self, count: int) -> None:
        """
        Wait until so many more are served.
        """
        began, before = time.monotonic(), len(self.served)
        while len(self.served) < before + count:
            assert time.monotonic() - began < PATIENCE
            time.sleep(0.02)

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        for _, process in self.workers:
            process.kill()
            process.wait()
            process.stdout.close()
        for client in self._clients:
            client.join(PATIENCE)
        self.backend.listening.close()

    def longest_gap(self, since: float) -> float:
        """
        For how long nobody was served, at most.
        """
        times = sorted(each for each in self.served if each >= since)
        return max(later - earlier for earlier, later in zip([since, *times], times, strict=False))


def flush(redis: Redis) -> None:
    assert redis.ask(b"FLUSHALL") == b"+OK"


def reset(redis: Redis) -> None:
    command = [sys.executable, "-m", "connlimit.shared.admin", "--url", redis.url, "reset", "workers"]
    subprocess.run(command, check=True, timeout=PATIENCE)


def evict(redis: Redis) -> None:
    assert redis.ask(b"CONFIG SET maxmemory-policy allkeys-random") == b"+OK"
    assert redis.ask(b"CONFIG SET maxmemory 1") == b"+OK"
    # Each command that takes memory evicts all keys first.
    redis.ask(b"SET x y")
    assert redis.ask(b"CONFIG SET maxmemory 0") == b"+OK"


def restart_late_in_a_second(redis: Redis) -> None:
    redis.stop()
    time.sleep((0.93 - time.time()) % 1)
    redis.start(settle=False)


def restart_with_its_data(redis: Redis) -> None:
    assert redis.ask(b"CONFIG SET appendonly yes") == b"+OK"
    while redis.info(b"aof_rewrite_in_progress", b"persistence") != b"0":
        time.sleep(0.02)
    redis.stop()
    redis.start(False, "--appendonly", "yes")
    assert redis.ask(b"EXISTS connlimit:{workers}:lease") == b":1"


@pytest.mark.parametrize("fault", [flush, reset, evict, restart_late_in_a_second, restart_with_its_data])
def test_nobody_is_served_above_the_limit_when_redis_forgets(
    fault: Callable[[Redis], None], tmp_path: Path
) -> None:
    redis = Redis(tmp_path).start()
    try:
        with Storm(redis.url) as storm:
            for _ in range(2):
                fault(redis)
                storm.start()  # somebody who knows nothing
                time.sleep(2 * TTL)
                storm.serves(50)
            assert storm.slots / 2 <= storm.backend.maximum <= storm.slots
    finally:
        redis.stop()


def test_nobody_is_served_above_the_limit_when_another_redis_takes_over_and_the_first_is_back(
    tmp_path: Path,
) -> None:
    for each in ("one", "other"):
        (tmp_path / each).mkdir()
    one, other = Redis(tmp_path / "one").start(), Redis(tmp_path / "other").start()
    switch = Switch(one)
    try:
        with Storm(switch.url) as storm:
            for redis in (other, one, other, one):
                switch.to(redis)
                time.sleep(random.uniform(0.5, 2 * TTL))
            storm.serves(50)
            assert storm.slots / 2 <= storm.backend.maximum <= storm.slots
    finally:
        switch.stop()
        one.stop()
        other.stop()


@ensureDeferred
async def test_a_primary_that_was_cut_off_serves_nobody_once_another_does_if_it_needs_a_replica(
    tmp_path: Path,
) -> None:
    for each in ("one", "other"):
        (tmp_path / each).mkdir()
    cut_off, promoted = Redis(tmp_path / "one"), Redis(tmp_path / "other")
    way = Switch(cut_off)
    try:
        cut_off.start(True, "--min-replicas-to-write", "1", "--min-replicas-max-lag", "1")
        promoted.start(False, "--replicaof", "127.0.0.1", way.url.rpartition(":")[2])
        while cut_off.info(b"min_slaves_good_slaves", b"replication") != b"1":
            await deferLater(reactor, 0.05)
        one = redis_limit.RedisLimit("cut", 5, url=cut_off.url, ttl=TTL)
        other = redis_limit.RedisLimit("cut", 5, url=promoted.url, ttl=TTL)
        one.subscribe(lambda: one.in_use or (one.try_acquire(None) and one.try_acquire(None)))
        with Log() as log:
            assert not one.try_acquire(None)
            await until(lambda: one.in_use == 2)
            began = since_boot()
            way.swallow_all()
            await until(lambda: one._is_away)
            assert since_boot() - began < 4
            # By now the sentinels may find that the primary is down.
            assert promoted.ask(b"REPLICAOF NO ONE") == b"+OK"
            served = []
            other.subscribe(
                lambda: other.try_acquire(None) and served.append((since_boot(), one._ends, one._room()))
            )
            assert not other.try_acquire(None)
            await until(lambda: served)
        ((now, ends, room),) = served
        assert now >= ends
        assert not room
        assert "NOREPLICAS" in log.texts()[0]
        other.release(None)
        await patiently(one.close())
        await patiently(other.close())
    finally:
        way.stop()
        cut_off.stop()
        promoted.stop()


def test_who_has_slots_goes_on_while_redis_is_restarted(tmp_path: Path) -> None:
    redis = Redis(tmp_path).start()
    try:
        with Storm(redis.url) as storm:
            began = time.monotonic()
            redis.stop()
            time.sleep(0.5)
            redis.start(settle=False)
            storm.serves(200)
            assert storm.longest_gap(began) < 0.3
            assert storm.slots / 2 <= storm.backend.maximum <= storm.slots
    finally:
        redis.stop()


def test_who_has_slots_goes_on_while_redis_hangs(tmp_path: Path) -> None:
    redis = Redis(tmp_path).start()
    try:
        with Storm(redis.url) as storm:
            began = time.monotonic()
            os.kill(redis.process.pid, signal.SIGSTOP)
            time.sleep(0.8)
            os.kill(redis.process.pid, signal.SIGCONT)
            storm.serves(100)
            assert storm.longest_gap(began) < 0.6
            assert storm.backend.maximum <= storm.slots
    finally:
        redis.stop()


@ensureDeferred
async def test_there_is_a_lease_though_redis_is_far_away(proxied: Switch) -> None:
    proxied.delay = 0.125  # each way
    limit = redis_limit.RedisLimit("far away", 5, url=proxied.url, ttl=1)
    served = []
    limit.subscribe(lambda: limit.try_acquire(None) and served.append(limit))
    with Log() as log:
        assert not limit.try_acquire(None)
        await until(lambda: served)
        ends = limit._ends
        await until(lambda: limit._ends > ends + 1)
        assert since_boot() < limit._ends
    assert not log.texts()
    await patiently(limit.close())


@ensureDeferred
async def test_a_connection_that_hears_nothing_any_more_is_made_anew(
    settled_redis: Redis, proxied: Switch
) -> None:
    one = redis_limit.RedisLimit("deaf", 1, url=proxied.url, ttl=30)
    other = redis_limit.RedisLimit("deaf", 1, url=proxied.redis_url, ttl=30)
    served = []
    one.subscribe(lambda: one.in_use or served or one.try_acquire(None))
    other.subscribe(lambda: other.try_acquire(None) and served.append(other))
    assert not one.try_acquire(None)
    await until(lambda: one.in_use == 1 and one._link.hears(one.channel))
    # What Redis says from now on is heard by nobody, though the connections stay.
    ear = one._link._ear
    proxied.swallow(ear.transport.getHost().port)
    began = since_boot()
    assert not other.try_acquire(None)
    await until(lambda: one._link._ear not in (None, ear) and one._link.hears(one.channel))
    assert since_boot() - began < 5
    one._subscribers.clear()
    one.release(None)
    await until(lambda: served)
    assert since_boot() - began < 7
    await patiently(one.close())
    other.release(None)
    await patiently(other.close())


@ensureDeferred
async def test_a_free_slot_is_given_back_within_a_second_though_nobody_is_told(settled_redis: Redis) -> None:
    one = redis_limit.RedisLimit("spare", 10, url=settled_redis.url, ttl=60)
    other = redis_limit.RedisLimit("spare", 10, url=settled_redis.url, ttl=60)
    for limit in (one, other):
        limit.heard = lambda message: None
    served = []
    one.subscribe(lambda: all(one.try_acquire(None) for _ in range(10)))
    other.subscribe(lambda: other.try_acquire(None) and served.append(other))
    assert not one.try_acquire(None)
    await until(lambda: one.in_use == 10 and not one._asking)
    one._subscribers.clear()
    for _ in range(9):
        one.release(None)
    assert one.held == 10
    began = since_boot()
    assert not other.try_acquire(None)
    await until(lambda: served)
    assert since_boot() - began < 4
    one.release(None)
    other.release(None)
    await patiently(one.close())
    await patiently(other.close())


@ensureDeferred
async def test_a_subscriber_that_raises_ends_nothing(redis: Redis) -> None:
    limit = redis_limit.RedisLimit("raising", 2, url=redis.url, ttl=TTL)
    served = []

    def fail() -> None:
        raise RuntimeError("a mistake")

    limit.subscribe(fail)
    limit.subscribe(lambda: limit.try_acquire(None) and served.append(limit))
    with Log() as log:
        assert not limit.try_acquire(None)
        await until(lambda: served)
        ends = limit._ends
        await until(lambda: limit._ends > ends + 1.5 * TTL)
    assert sum("a subscriber of limit raising failed" in text for text in log.texts()) == 1
    limit.release(None)
    await patiently(limit.close())


@pytest.mark.parametrize("rate", [2, 9, 1000])
@ensureDeferred
async def test_a_freed_slot_wakes_only_whose_turn_it_is(rate: int, settled_redis: Redis) -> None:
    with processes_of_their_own():
        members = [
            redis_limit.RedisLimit(f"crowd {rate}", 5, url=settled_redis.url, ttl=10) for _ in range(50)
        ]
    waiting, active, admitted = [3] * 50, [], 0

    def serve(at: int) -> None:
        nonlocal admitted
        while waiting[at] and members[at].try_acquire(None):
            waiting[at] -= 1
            admitted += 1
            active.append(at)
            assert len(active) <= 5

    async def admit(count: int, rate: int) -> None:
        began, goal = reactor.seconds(), admitted + count
        for number in range(count):
            await until(lambda: len(active) == 5)
            at = active.pop(0)
            waiting[at] += 1
            members[at].release(None)
            serve(at)
            await deferLater(reactor, max(0, began + (number + 1) / rate - reactor.seconds()))
        await until(lambda: admitted == goal)

    for at, member in enumerate(members):
        member.subscribe(partial(serve, at))
        serve(at)
    await until(lambda: len(active) == 5 and all(member._link.hears(member.channel) for member in members))
    await admit(150, 1000)  # until all have asked as those who hear
    asked = questions(settled_redis)
    count = min(300, 10 * rate)
    await admit(count, rate)
    per_admission = (questions(settled_redis) - asked) / count
    assert per_admission <= 3, per_admission
    waiting[:] = [0] * 50
    while active:
        members[active.pop()].release(None)
    for member in members:
        await patiently(member.close())


@ensureDeferred
async def test_who_waits_and_hears_nothing_any_more_asks_each_second(
    settled_redis: Redis, proxied: Switch
) -> None:
    with processes_of_their_own():
        one, other, third = (
            redis_limit.RedisLimit("no ear", 1, url=url, ttl=60)
            for url in (settled_redis.url, settled_redis.url, proxied.url)
        )
    for limit in (one, other, third):
        limit.subscribe(lambda limit=limit: limit.in_use or limit.try_acquire(None))
        assert not limit.try_acquire(None)
        await until(lambda limit=limit: limit._link.hears(limit.channel) and (limit.in_use or limit._queued))
    await deferLater(reactor, 0.1)
    # The last one does not watch. Now its connection that hears is lost for good.
    third._link._open = lambda protocol: fail(ConnectionRefusedError())
    third._link._ear.transport.abortConnection()
    question = third._question
    await until(lambda: third._question >= question + 3)
    one._subscribers.clear()
    other._subscribers.clear()
    other.try_acquire = lambda connection: False
    await patiently(other.close())
    began = since_boot()
    one.release(None)
    await until(lambda: third.in_use)
    assert since_boot() - began < 2
    third.release(None)
    await patiently(one.close())
    await patiently(third.close())


@ensureDeferred
async def test_who_has_nothing_to_ask_does_not(redis: Redis) -> None:
    limits = [redis_limit.RedisLimit(f"idle {at}", 5, url=redis.url, ttl=TTL) for at in range(20)]
    for limit in limits:
        limit.subscribe(partial(limit.try_acquire, None))
        assert not limit.try_acquire(None)
    await until(lambda: all(limit.in_use for limit in limits))
    for limit in limits:
        limit._subscribers.clear()
        while limit.in_use:
            limit.release(None)
    await until(lambda: not any(limit.held or limit._asking for limit in limits))
    asked = questions(redis)
    await deferLater(reactor, 3)
    assert questions(redis) - asked <= 0.1 * 3 * 20
    for limit in limits:
        await patiently(limit.close())


@ensureDeferred
async def test_thousands_of_limits_are_back_soon_after_a_restart(
    settled_redis: Redis, tmp_path: Path
) -> None:
    redis = Redis(tmp_path).start()
    limits = [redis_limit.RedisLimit(f"limit {at}", 5, url=redis.url, ttl=10) for at in range(4000)]
    try:
        for limit in limits:
            limit.subscribe(partial(limit.try_acquire, None))
            assert not limit.try_acquire(None)
        await until(lambda: all(limit.in_use for limit in limits))
        # Two connections, and that which asks.
        await until(lambda: int(redis.info(b"connected_clients", b"clients")) >= 3)
        assert int(redis.info(b"connected_clients", b"clients")) == 3
        redis.stop()
        await until(lambda: any(limit._is_away for limit in limits))
        redis.start(settle=False)
        began = since_boot()
        await until(lambda: not any(limit._is_away for limit in limits))
        assert since_boot() - began < 15
        assert all(since_boot() < limit._ends for limit in limits)
        with Log() as log:
            await patiently(gatherResults([limit.close() for limit in limits]))
        assert not log.texts()
    finally:
        await patiently(gatherResults([limit.close() for limit in limits]))
        redis.stop()


@pytest.mark.parametrize("more", [b"+info &connlimit:*", b"&connlimit:*", b""])
@ensureDeferred
async def test_a_user_without_dangerous_commands_is_enough(more: bytes, tmp_path: Path) -> None:
    redis = Redis(tmp_path).start()
    url = f"unix://me:secret@{redis.socket}"
    one, other = (redis_limit.RedisLimit("x", 1, url=url, ttl=TTL) for _ in range(2))
    try:
        allowed = b"resetchannels ~connlimit:* +@all -@dangerous " + more
        assert redis.ask(b"ACL SETUSER me on >secret " + allowed) == b"+OK"
        served = []
        other.subscribe(lambda: other.try_acquire(None) and served.append(other))
        one.subscribe(lambda: one.in_use or served or one.try_acquire(None))
        with Log() as log:
            assert not one.try_acquire(None)
            await until(lambda: one.in_use == 1)
            assert not other.try_acquire(None)
            await until(lambda: other._question >= 2)
            assert not served
            one._subscribers.clear()
            one.release(None)
            await until(lambda: served)
        assert [("sends no notifications" in text) for text in log.texts()] == [True] * (not more)
        listed = await deferToThread(administer, url, "list")
        assert "x: 1 of its own setting held" in listed.stdout
        other.release(None)
    finally:
        await patiently(gatherResults([one.close(), other.close()]))
        redis.stop()


@ensureDeferred
async def test_a_node_of_a_cluster_that_has_not_the_limit_is_refused_in_one_sentence() -> None:
    node = Answering(b"-MOVED 3999 127.0.0.1:6381\r\n")
    limit = redis_limit.RedisLimit("x", 5, url=node.url, ttl=TTL)
    with Log() as log:
        assert not limit.try_acquire(None)
        await until(lambda: failures(limit) >= 3)
    assert [text.partition("used: ")[2] for text in log.texts()] == [
        "it is one of a Redis Cluster, and another node has what is asked for (MOVED 3999 127.0.0.1:6381)"
    ]
    await patiently(limit.close())
    node.stop()


@ensureDeferred
async def test_reset_and_list_take_names_as_they_are(redis: Redis) -> None:
    limits = [redis_limit.RedisLimit(name, 5, url=redis.url, ttl=TTL) for name in ("a*", "ab", "semaphores")]
    keys = [redis_limit.keys_of(limit.name)[0].encode() for limit in limits]
    redis.ask(b"SET connlimit:{semaphores}:log 1")
    for limit in limits:
        limit.subscribe(partial(limit.try_acquire, None))
        assert not limit.try_acquire(None)
    await until(lambda: all(limit.in_use for limit in limits))
    listed = await deferToThread(administer, redis.url, "list")
    for limit in limits:
        assert f"\n{limit.name}: " in "\n" + listed.stdout
    for name in ("a*", "semaphores"):
        assert (await deferToThread(administer, redis.url, "reset", name)).returncode == 0
    assert redis.ask(b"EXISTS", keys[1], b"connlimit:{semaphores}:log") == b":2"
    assert redis.info_all("commandstats").count("cmdstat_keys") == 0
    for limit in limits:
        limit.release(None)
        await patiently(limit.close())
    redis.ask(b"DEL connlimit:{semaphores}:log")


@ensureDeferred
async def test_a_machine_that_was_suspended_has_no_lease_when_it_wakes(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = redis_limit.RedisLimit("suspended", 5, url=redis.url, ttl=TTL)
    limit.subscribe(lambda: limit.in_use or limit.try_acquire(None))
    assert not limit.try_acquire(None)
    await until(lambda: limit.in_use == 1 and limit.held > 1)
    # The clock that stands still meanwhile is that of the reactor's timers.
    monkeypatch.setattr(redis_limit, "since_boot", lambda: since_boot() + 60)
    assert not limit.try_acquire(None)
    with Log() as log:
        await until(lambda: limit.outlived)
    assert limit.outlived == 1
    assert log.texts() == [
        "limit suspended: connections that have outlived their lease: 1. They count again, and 0 more are "
        "served than there are slots"
    ]
    assert limit.try_acquire(None)
    limit._ask_soon(0)
    question = limit._question
    await until(lambda: limit._question > question and not limit._asking)
    listed = await deferToThread(administer, redis.url, "list")
    assert "of its own setting held, connections that have outlived their lease: 1\n" in listed.stdout
    assert ", 2 in use\n" in listed.stdout
    limit.release(None)
    limit.release(None)
    await patiently(limit.close())


@pytest.mark.parametrize("when_unreachable", ["hold", "local=2", "refuse"])
@ensureDeferred
async def test_who_has_leased_nothing_need_not_wait_for_the_end_of_a_lease(
    when_unreachable: str, settled_redis: Redis, tmp_path: Path
) -> None:
    redis = Redis(tmp_path).start()
    one, other = (
        redis_limit.RedisLimit("x", 3, url=redis.url, ttl=30, when_unreachable=when_unreachable)
        for _ in range(2)
    )
    one.subscribe(lambda: all(one.try_acquire(None) for _ in range(3)))
    served = []
    assert not one.try_acquire(None)
    await until(lambda: one.in_use == 3)
    other.subscribe(lambda: other.try_acquire(None) and served.append(since_boot()))
    assert not other.try_acquire(None)
    await until(lambda: other._queued)
    one._subscribers.clear()
    redis.stop()
    began = since_boot()
    if when_unreachable == "local=2":
        await until(lambda: len(served) == 2)
        assert 0.9 < served[0] - began < 3
        assert not other.try_acquire(None)
    elif when_unreachable == "refuse":
        await until(other.refuses)
        assert 0.9 < since_boot() - began < 3
        # Who has slots keeps them, and those who wait there wait for these.
        assert not one.refuses()
    else:
        await deferLater(reactor, 2)
        assert not served
        assert not other.refuses()
    one.release(None)
    assert one.try_acquire(None)
    assert one.in_use == 3
    assert not one.try_acquire(None)
    await patiently(one.close())
    await patiently(other.close())


@ensureDeferred
async def test_sentinels_with_a_password_are_asked_with_it(tmp_path: Path) -> None:
    service = Service(tmp_path).start()
    try:
        assert service.sentinel.ask(b"ACL SETUSER default on resetpass >guarded") == b"+OK"
        (tmp_path / "password").write_text("guarded\n")
        for parameters, may in (("", False), (f"&sentinel_password_file={tmp_path}/password", True)):
            limit = redis_limit.RedisLimit("x", 5, url=f"{service.url}?ttl={TTL}{parameters}")
            limit.subscribe(partial(limit.try_acquire, None))
            with Log() as log:
                assert not limit.try_acquire(None)
                await until(lambda limit=limit, may=may: limit.in_use if may else failures(limit) >= 2)
            assert any("NOAUTH" in text for text in log.texts()) is not may
            await patiently(limit.close())
    finally:
        service.stop()


@ensureDeferred
async def test_connections_that_are_killed_are_made_again_without_a_word(redis: Redis) -> None:
    limit = redis_limit.RedisLimit("killed", 2, url=redis.url, ttl=TTL)
    limit.subscribe(lambda: limit.in_use or limit.try_acquire(None))
    assert not limit.try_acquire(None)
    await until(lambda: limit.in_use and limit._link.hears(limit.channel))
    with Log() as log:
        for kind in (b"normal", b"pubsub"):
            connection, ear = limit._link.connection, limit._link._ear
            redis.ask(b"CLIENT KILL TYPE " + kind)
            await until(
                lambda connection=connection, ear=ear: (
                    (limit._link.connection > connection or limit._link._ear is not ear)
                    and limit._link.hears(limit.channel)
                )
            )
        assert limit.try_acquire(None)
    assert not log.texts()
    limit.release(None)
    limit.release(None)
    await patiently(limit.close())


def test_processes_that_were_forked_after_a_limit_was_made_have_names_of_their_own(tmp_path: Path) -> None:
    redis = Redis(tmp_path).start()
    code = """
import os, sys
from connlimit.shared import RedisLimit
limit = RedisLimit("forked", 6, url=sys.argv[1], ttl=1)
children = [os.fork() for _ in range(1)]
from twisted.internet import reactor
limit.subscribe(lambda: [limit.try_acquire(None) for _ in range(3 - limit.in_use)])
limit.try_acquire(None)
def look():
    if limit.in_use == 3:
        os.write(1, limit.member.encode() + bytes([10]))
        reactor.callLater(1, reactor.stop)
    else:
        reactor.callLater(0.05, look)
look()
reactor.run()
"""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, redis.url], capture_output=True, text=True, timeout=PATIENCE
        )
        members = done.stdout.split()
        assert len(members) == len(set(members)) == 2, done
    finally:
        redis.stop()
