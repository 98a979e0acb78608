"""
The log of a limiter.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sysconfig
from pathlib import Path

from support.limiters import LimiterTestCase
from support.logs import Log
from support.patience import PATIENCE
from twisted.logger import LogLevel
from zope.interface import implementer

from connlimit import ConnectionLog, Limiter, LimiterLog
from connlimit._twistd.processes.role import Alone
from connlimit._twistd.program import Program
from connlimit.interfaces import ILimit


@implementer(ILimit)
class Elsewhere:
    """
    A limit whose slots are asked for.
    """

    name = "web"

    def try_acquire(self, connection: object) -> bool:
        return False

    def release(self, connection: object) -> None: ...

    def subscribe(self, callback: object) -> None: ...


class LogTests(LimiterTestCase):
    """
    It tells of changes of state, however many connections there are.
    """

    def test_one_line_when_it_is_full_and_one_when_it_has_room_again(self) -> None:
        self.limited(2, max_waiting=3, log=True)
        with Log() as log:
            clients = self.connect(10)
            self.clock.advance(4)
            self.close(*clients)
            self.close(*self.connect())
        self.assertEqual(
            log.texts(),
            [
                "default: full: max_connections is 2, max_waiting is 3: 2 served, 3 waiting, 1 refused",
                "default: room again after 4.0 s: 3 waited, at most 3 at once, 5 were refused and 0 departed",
            ],
        )
        self.assertEqual([event["log_level"] for event in log.events], [LogLevel.warn, LogLevel.info])

    def test_a_wait_is_told_when_it_has_lasted_for_a_second(self) -> None:
        self.limited(2, log=True)
        with Log() as log:
            self.connect(5)
            self.clock.advance(0.9)
            self.assertEqual(log.texts(), [])
            self.clock.advance(0.1)
        self.assertEqual(log.texts(), ["default: full: max_connections is 2: 2 served, 3 waiting, 0 refused"])

    def test_short_waits_are_no_lines_and_are_summed_up_each_minute(self) -> None:
        self.limited(2, log=True)
        with Log() as log:
            for _ in range(240):
                clients = self.connect(5)
                self.clock.advance(0.125)
                self.close(*clients)
                self.clock.advance(0.125)
            self.connect(3)
        self.assertEqual(
            log.texts(),
            [
                "default: in the last 60 s full 240 times more, for 30.0 s in all: "
                "720 waited, at most 3 at once, 0 were refused and 0 departed"
            ],
        )

    def test_what_comes_and_goes_is_told_three_times_a_minute_and_then_summed_up(self) -> None:
        self.limited(1, max_waiting=0, log=True)
        refused = 0
        with Log() as log:
            for _ in range(100):
                clients = self.connect(3)
                refused += 2
                self.clock.advance(0.3)
                self.close(*clients)
                self.clock.advance(0.3)
            self.clock.advance(60)
        self.assertLess(len(log.texts()), 10)
        self.assertEqual(len([text for text in log.texts()[:6] if "full: max_connections is 1" in text]), 3)
        self.assertIn("full 97 times more", log.texts()[6])
        self.assertEqual(refused, sum(event.get("refused", 0) for event in log.events[1::2]) + 97 * 2)

    def test_one_that_lasts_when_enough_was_told_is_told_when_the_minute_is_over(self) -> None:
        self.limited(1, max_waiting=0, log=True)
        for _ in range(3):
            self.close(*self.connect(2))
        with Log() as log:
            clients = self.connect(2)
            self.clock.advance(59)
            self.assertEqual(log.texts(), [])
            self.clock.advance(1)
            self.close(*clients)
        self.assertEqual(len(log.texts()), 2)
        self.assertIn("full: max_connections is 1", log.texts()[0])
        self.assertIn("room again after 60.0 s: 0 waited, at most 0 at once, 1 were refused", log.texts()[1])

    def test_a_crowd_that_comes_again_and_again_while_it_is_full_is_one_story(self) -> None:
        self.limited(1, log=True)
        with Log() as log:
            first = self.connect(3)
            self.clock.advance(1)
            self.close(first[0])
            more = self.connect(3)
            self.clock.advance(1)
            self.close(*first, *more)
        self.assertEqual(len(log.texts()), 2)

    def test_nothing_is_left_to_be_done_when_there_is_room_again(self) -> None:
        self.limited(1, log=True)
        self.close(*self.connect(3))
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_connection_that_need_not_wait_is_not_observed(self) -> None:
        self.limited(2, log=True)
        self.assertEqual(self.limiter.admission.audience.of_served, ())
        self.assertEqual(self.limiter.admission.audience.of_finished, ())
        clients = self.connect(3)
        self.assertEqual(len(self.limiter.admission.audience.of_finished), 1)
        self.close(*clients)
        self.assertEqual(self.limiter.admission.audience.of_served, ())
        self.assertEqual(self.limiter.admission.audience.of_finished, ())

    def test_without_a_limit_it_says_nothing(self) -> None:
        self.limited(None, log=True)
        with Log() as log:
            self.close(*self.connect(5))
        self.assertEqual(log.texts(), [])

    def test_refusing_the_line_at_the_end_is_no_story(self) -> None:
        self.limited(0, log=True)
        with Log() as log:
            self.connect(3)
            self.limiter.drain(0)
            self.clock.advance(5)
            self.connect(3)
        self.assertEqual(log.texts(), [])

    def told(self, *connections: int, **settings: object) -> str:
        """
        What is told when clients of these networks come.
        """
        self.limited(**{"log": True, **settings})
        with Log() as log:
            for host in connections:
                self.connect(1, host=f"192.0.2.{host}")
            self.clock.advance(1)
        return log.texts()[0].partition("full: ")[2].rpartition(": ")[0]

    def test_the_peer_that_is_at_its_cap_is_told(self) -> None:
        self.assertEqual(
            self.told(1, 1, max_connections=100, max_per_peer=1), "max_per_peer is 1, of 192.0.2.1"
        )
        self.assertEqual(
            self.told(1, 1, 2, 2, 3, 3, max_connections=100, max_per_peer=1),
            "max_per_peer is 1, of 192.0.2.1 and 2 others",
        )
        self.assertEqual(
            self.told(1, 2, 2, max_connections=100, max_per_peer=1, over_peer="refuse"),
            "max_per_peer is 1, of 192.0.2.2",
        )

    def test_a_peer_at_its_cap_that_may_not_wait_is_told(self) -> None:
        self.assertEqual(
            self.told(1, 2, 2, max_connections=100, max_per_peer=1, max_waiting=0),
            "max_per_peer is 1, of 192.0.2.2, max_waiting is 0",
        )

    def test_with_a_peer_at_its_cap_and_all_slots_taken_that_is_told(self) -> None:
        self.assertEqual(self.told(1, 1, 2, 3, max_connections=2, max_per_peer=1), "max_connections is 2")

    def test_the_rate_is_told(self) -> None:
        self.assertEqual(self.told(1, 2, 3, 4, max_rate=0.5), "max_rate is 0.5 per second")

    def test_a_further_limit_is_told_by_its_name(self) -> None:
        self.assertEqual(self.told(1, max_connections=5, limits=[Elsewhere()]), "no slot from Elsewhere web")

    def test_a_limit_that_cannot_tell_its_name_harms_nobody(self) -> None:
        class Nameless(Elsewhere):
            def __repr__(self) -> str:
                raise ZeroDivisionError

        class Endless(Elsewhere):
            name = "x" * 1_000_000

        self.assertEqual(self.told(1, limits=[Nameless()]), "no slot from Nameless")
        self.assertEqual(len(self.told(1, limits=[Endless()])), len("no slot from ") + 100)

    def test_descriptors_that_run_short_are_told(self) -> None:
        self.limited(1, log=True)
        with Log() as log:
            self.limiter.admission.audience.tell("refused", None, "descriptors")
        self.assertIn("full: descriptors run short", log.texts()[0])

    def test_each_limiter_has_a_log_unless_it_is_told_otherwise(self) -> None:
        self.assertEqual([type(each) for each in Limiter(1).observers], [LimiterLog])
        self.assertEqual(Limiter(1, log=False).observers, ())
        own = LimiterLog()
        self.assertEqual(Limiter(1, observers=[own]).observers, (own,))

    def test_the_log_can_be_switched_off_and_on(self) -> None:
        self.limited(0, max_waiting=0, log=True)
        with Log() as log:
            self.limiter.log = False
            self.connect(3)
            self.assertEqual(log.texts(), ["default: log True -> False"])
            self.limiter.log = True
            self.connect(3)
        self.assertEqual(len(log.texts()), 2)
        self.assertIn("full: max_connections is 0, max_waiting is 0", log.texts()[1])

    def test_a_dry_run_does_not_log_what_would_be(self) -> None:
        self.limited(1, max_waiting=0, dry_run=True, log=True)
        with Log() as log:
            self.connect(5)
        self.assertEqual(log.texts(), [])

    def test_a_changed_setting_is_told(self) -> None:
        self.limited(1, log=True)
        with Log() as log:
            self.limiter.reconfigure(max_connections=5, order="lifo")
        self.assertEqual(log.texts(), ["default: max_connections 1 -> 5, order 'fifo' -> 'lifo'"])

    def test_each_connection_is_told_of_if_that_is_asked_for(self) -> None:
        self.limited(1, observers=[ConnectionLog()], max_waiting=1, exempt=["192.0.2.1"])
        with Log() as log:
            first, _, _ = self.connect(3)
            self.close(first)
            self.connect(1, host="192.0.2.1")
        for words in ("is served", "waits", "is refused (full)", "has finished", "is exempt and served"):
            self.assertTrue(any(text.endswith(words) for text in log.texts()), words)


class Parent(Alone):
    """
    A process whose workers serve.
    """

    serves = False


def test_each_limiter_of_a_program_is_logged_once_where_it_serves() -> None:
    for connections, role, expected in (
        (False, Alone(), [LimiterLog]),
        (True, Alone(), [LimiterLog, ConnectionLog]),
        (True, Parent(), []),
    ):
        limiter = Limiter(1)
        Program(0.0, connections, role).add_limiter(limiter)
        assert [type(each) for each in limiter.observers] == expected


def test_events_can_be_written_as_json() -> None:
    command = [str(Path(sysconfig.get_path("scripts")) / "twist"), "--log-format=json", "connlimit"]
    process = subprocess.Popen([*command, "--listen", "tcp:0:interface=127.0.0.1"], stdout=subprocess.PIPE)
    try:
        for line in process.stdout:
            event = json.loads(line.strip(b"\x1e"))
            if event["log_namespace"] == "connlimit.program":
                break
        assert "served at once" in event["log_flattened"]["budget!s:"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
