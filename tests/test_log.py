"""
The log of a limiter.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sysconfig
from pathlib import Path

from support import PATIENCE, Log
from test_limiter import LimiterTestCase
from twisted.logger import LogLevel

from connlimit._log import LimiterLog


class LogTests(LimiterTestCase):
    """
    It tells of changes of state, however many connections there are.
    """

    def test_one_line_when_it_is_full_and_one_when_it_has_room_again(self) -> None:
        self.limited(2, max_waiting=3, observers=[LimiterLog()])
        with Log() as log:
            clients = self.connect(10)
            self.clock.advance(4)
            self.close(*clients)
            self.close(*self.connect())
        self.assertEqual(
            log.texts(),
            [
                "default: full: 2 of 2 served",
                "default: room again after 4.0 s: 3 waited, at most 3 at once, 5 were refused and 0 departed",
            ],
        )
        self.assertEqual([event["log_level"] for event in log.events], [LogLevel.warn, LogLevel.info])

    def test_a_crowd_that_comes_again_and_again_while_it_is_full_is_one_story(self) -> None:
        self.limited(1, observers=[LimiterLog()])
        with Log() as log:
            first = self.connect(3)
            self.close(first[0])
            more = self.connect(3)
            self.close(*first, *more)
        self.assertEqual(len(log.texts()), 2)

    def test_without_a_limit_it_says_nothing(self) -> None:
        self.limited(None, observers=[LimiterLog()])
        with Log() as log:
            self.close(*self.connect(5))
        self.assertEqual(log.texts(), [])

    def test_a_changed_setting_is_told(self) -> None:
        self.limited(1, observers=[LimiterLog()])
        with Log() as log:
            self.limiter.reconfigure(max_connections=5, order="lifo")
        self.assertEqual(log.texts(), ["default: max_connections 1 -> 5, order 'fifo' -> 'lifo'"])

    def test_each_connection_is_told_of_if_that_is_asked_for(self) -> None:
        self.limited(1, observers=[LimiterLog(connections=True)], max_waiting=1, exempt=["192.0.2.1"])
        with Log() as log:
            first, _, _ = self.connect(3)
            self.close(first)
            self.connect(1, host="192.0.2.1")
        for words in ("is served", "waits", "is refused (full)", "has finished", "is exempt and served"):
            self.assertTrue(any(text.endswith(words) for text in log.texts()), words)


def test_events_can_be_written_as_json() -> None:
    command = [str(Path(sysconfig.get_path("scripts")) / "twist"), "--log-format=json", "connlimit"]
    process = subprocess.Popen([*command, "--listen", "tcp:0:interface=127.0.0.1"], stdout=subprocess.PIPE)
    try:
        for line in process.stdout:
            event = json.loads(line.strip(b"\x1e"))
            if event["log_namespace"] == "connlimit._program":
                break
        assert "served at once" in event["log_flattened"]["budget!s:"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
