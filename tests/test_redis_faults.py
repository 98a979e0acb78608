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
from contextlib import suppress
from pathlib import Path

import pytest
from support import PATIENCE
from test_redis_limit import NUMBERS, TTL, WORKER, Asker, Backend, Redis, redis, script

__all__ = ["redis"]

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


class Switch(threading.Thread):
    """
    A name for the primary: a port that leads to one Redis, and from a moment on to another.
    """

    def __init__(self, redis: Redis) -> None:
        super().__init__(daemon=True)
        self._redis = redis
        self._pairs: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listening.getsockname()[1]}"
        self.delay = 0.0
        self.start()

    def run(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.socket(socket.AF_UNIX)
                with suppress(OSError):
                    server.connect(str(self._redis.socket))
                self._pairs += [client, server]
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                if self.delay:
                    time.sleep(self.delay)
                other.sendall(data)
        for each in (one, other):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def to(self, redis: Redis) -> None:
        """
        Lead to another one from now on, and end all connections.
        """
        self._redis = redis
        pairs, self._pairs = self._pairs, []
        for each in pairs:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self._listening.close()
        self.to(self._redis)


def flush(redis: Redis) -> None:
    assert redis.ask(b"FLUSHALL") == b"+OK"


def reset(redis: Redis) -> None:
    command = [sys.executable, "-m", "connlimit.shared_admin", "--url", redis.url, "reset", "workers"]
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


@pytest.mark.parametrize("fault", [flush, reset, evict, restart_late_in_a_second])
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
            assert storm.slots / 2 <= storm.backend.most <= storm.slots
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
            assert storm.slots / 2 <= storm.backend.most <= storm.slots
    finally:
        switch.stop()
        one.stop()
        other.stop()


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
            assert storm.slots / 2 <= storm.backend.most <= storm.slots
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
            assert storm.backend.most <= storm.slots
    finally:
        redis.stop()
