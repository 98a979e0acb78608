"""
The slow page that shows how it works.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request

from support.clients import free_port
from support.fakes import FakeConnection
from support.patience import PATIENCE
from support.programs import running
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from connlimit import Limiter, LimitingFactory
from connlimit._twistd.targets import demonstration


class PageTests(SynchronousTestCase):
    """
    The page takes its time, and tells what happens.
    """

    def setUp(self) -> None:
        self.clock = Clock()
        self.limiter = Limiter(1, clock=self.clock)
        site = demonstration.site(self.limiter, self.clock)
        site.reactor = self.clock
        site.startFactory()
        self.addCleanup(site.stopFactory)
        self.factory = LimitingFactory(site, self.limiter)

    def ask(self, path: bytes = b"/", accept: bytes = b"*/*") -> FakeConnection:
        client = FakeConnection(self.clock).connect(self.factory)
        client.send(b"GET %s HTTP/1.1\r\nhost: x\r\naccept: %s\r\n\r\n" % (path, accept))
        self.clock.advance(0)
        return client

    def test_it_takes_its_time_and_then_lets_the_next_in(self) -> None:
        first, second = self.ask(), self.ask()
        self.assertNotIn(b"It was your turn", first.received)
        self.assertEqual(second.received, b"")
        self.clock.pump([0.5] * 4 + [0, 0])
        self.assertIn(b"It was your turn", first.received)
        self.assertIn(b"1 of 1 slots were in use", first.received)
        self.assertIn(b"1 connections waited", first.received)
        self.assertTrue(first.closed)
        self.clock.pump([0.5] * 4 + [0, 0])
        self.assertIn(b"It was your turn", second.received)

    def test_the_queue_is_drawn_while_the_page_is_made(self) -> None:
        self.limiter.max_connections = 2
        first = self.ask()
        self.ask()
        for _ in range(3):
            self.ask()
        self.clock.advance(0.5)
        self.assertIn(b'aria-label="1 served, 0 waiting"', first.received)
        self.assertIn(b'aria-label="2 served, 3 waiting"', first.received)
        self.assertIn(
            b'<i class="served"></i><i class="served"></i> ' + b'<i class="waits"></i>' * 3, first.received
        )

    def test_a_browser_gets_an_address_of_its_own_for_each_tab(self) -> None:
        places = []
        for _ in range(2):
            client = self.ask(accept=b"text/html,*/*")
            self.clock.advance(0)
            self.assertTrue(client.received.startswith(b"HTTP/1.1 303 "))
            self.assertIn(b"no-store", client.received)
            self.assertTrue(client.closed)
            places.append(re.search(rb"(?i)location: (\S+)", client.received)[1])
        self.assertNotEqual(*places)
        client = self.ask(places[0], accept=b"text/html,*/*")
        self.assertTrue(client.received.startswith(b"HTTP/1.1 200 "))

    def test_an_icon_takes_no_time(self) -> None:
        client = self.ask(b"/favicon.ico")
        self.clock.advance(0)
        self.assertTrue(client.received.startswith(b"HTTP/1.1 204 "))
        self.assertTrue(client.closed)

    def test_a_connection_that_is_kept_in_reserve_keeps_no_slot(self) -> None:
        FakeConnection(self.clock).connect(self.factory)
        self.assertEqual(self.limiter.active, 1)
        self.clock.pump([1, 0])
        self.assertEqual(self.limiter.active, 0)

    def test_without_a_limit_it_says_so(self) -> None:
        self.limiter.max_connections = None
        client = self.ask()
        self.clock.pump([0.5] * 4)
        self.assertIn(b"1 of any number of slots", client.received)

    def test_a_client_that_leaves_early_costs_nothing(self) -> None:
        client = self.ask()
        client.close()
        self.clock.advance(0)
        self.assertEqual(self.limiter.active, 0)
        self.assertEqual([call for call in self.clock.getDelayedCalls() if call.getTime() < 1], [])

    def test_what_is_shown_is_no_markup(self) -> None:
        self.patch(demonstration, "status_url", lambda status: 'http://x/"><script>')
        self.factory = LimitingFactory(demonstration.site(self.limiter, self.clock, "tcp:8081"), self.limiter)
        client = self.ask()
        self.assertIn(b'href="http://x/&quot;&gt;&lt;script&gt;"', client.received)

    def test_without_a_status_page_there_is_no_link(self) -> None:
        self.assertNotIn(b"The status page", self.ask().received)

    def test_hints_tell_where_to_look(self) -> None:
        first, watch, second = demonstration.hints([demonstration.LISTEN], demonstration.STATUS)
        self.assertIn("http://127.0.0.1:8081/", watch)
        self.assertIn("http://127.0.0.1:8080/", first)
        self.assertIn("curl", second)
        self.assertIn("%{http_code}", second)
        (only,) = demonstration.hints(["unix:/run/x"], None)
        self.assertIn("unix:/run/x", only)


def test_the_address_of_the_status_page_is_told_if_it_is_one_of_this_machine() -> None:
    for status, expected in (
        ("tcp:8081", "http://127.0.0.1:8081/"),
        ("tcp:8081:interface=127.0.0.1", "http://127.0.0.1:8081/"),
        ("tcp:8081:interface=0.0.0.0", "http://127.0.0.1:8081/"),
        ("tcp:8081:interface=192.0.2.1", None),
        ("tcp:0", None),
        ("unix:/run/x", None),
        (None, None),
    ):
        assert demonstration.status_url(status) == expected


def test_several_tabs_of_a_browser_are_served_two_at_a_time(browser: object) -> None:
    port, status = free_port(), free_port()
    command = [f"--listen=tcp:{port}:interface=127.0.0.1", f"--status=tcp:{status}"]
    with running("connlimit", *command) as program:
        program.wait_for("2 served at once")
        first = browser.current_window_handle
        browser.get(f"http://127.0.0.1:{status}/health")
        for _ in range(6):
            browser.execute_script(f"window.open('http://127.0.0.1:{port}/')")
        maximum = {"active": 0, "waiting": 0}
        began = time.monotonic()
        while (facts := look(status))["finished"] < 12 or facts["active"] or facts["waiting"]:
            assert time.monotonic() - began < PATIENCE, facts
            maximum = {name: max(value, facts[name]) for name, value in maximum.items()}
            time.sleep(0.05)
        assert maximum["active"] == 2
        assert maximum["waiting"] >= 2
        addresses = set()
        for handle in browser.window_handles:
            if handle != first:
                browser.switch_to.window(handle)
                text = browser.find_element("css selector", "body").text
                assert "It was your turn" in text
                assert "It is your turn" not in text
                assert text.count("slots were in use") == 1
                assert (
                    browser.find_element("link text", "The status page")
                    .get_attribute("href")
                    .endswith(f":{status}/")
                )
                addresses.add(browser.current_url)
                browser.close()
        browser.switch_to.window(first)
        assert len(addresses) == 6


def look(status: int) -> dict[str, int]:
    """
    What the status page tells of the only limiter.
    """
    with urllib.request.urlopen(f"http://127.0.0.1:{status}/status.json", timeout=PATIENCE) as answer:
        return json.load(answer)["limiters"][0]
