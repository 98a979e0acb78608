"""
What would have happened.
"""

from __future__ import annotations

import attrs
from support.limiters import LimiterTestCase
from support.logs import Log

from connlimit._system import descriptors


class DryRunTests(LimiterTestCase):
    """
    A dry run serves everybody, and finds out what would have happened.
    """

    def test_everybody_is_served_and_the_waits_are_those_of_the_real_releases(self) -> None:
        self.limited(1, max_waiting=1, dry_run=True)
        first, second, third = self.connect(3)
        self.assert_counts(active=3, waiting=0, refused={})
        would = self.limiter.snapshot().dry_run
        self.assertEqual((would.active, would.waiting, would.refused["full"]), (1, 1, 1))
        self.clock.advance(2)
        self.close(first)
        would = self.limiter.snapshot().dry_run
        self.assertEqual((would.active, would.waiting, would.waits, would.wait_seconds), (1, 0, 1, 2.0))
        self.close(second, third)
        would = self.limiter.snapshot().dry_run
        self.assertEqual((would.active, would.finished), (0, 2))

    def test_who_ends_before_its_turn_would_have_departed(self) -> None:
        self.limited(1, dry_run=True)
        _, second = self.connect(2)
        self.close(second)
        self.assertEqual(self.limiter.snapshot().dry_run.departed, 1)

    def test_caps_of_peers_and_rates_are_not_in_force_either(self) -> None:
        self.limited(1, max_per_peer=1, max_rate=0.1, dry_run=True)
        self.connect(3)
        self.assert_counts(active=3, waiting=0)

    def test_when_it_is_over_the_limit_counts_who_is_there(self) -> None:
        self.limited(2, dry_run=True)
        there = self.connect(3)
        self.limiter.dry_run = False
        self.connect()
        self.assert_counts(active=3, waiting=1)
        self.close(*there[:2])
        self.assert_counts(active=2, waiting=0)
        self.assertIsNone(self.limiter.snapshot().dry_run)

    def test_the_suggested_limit_would_have_served_99_percent_at_once(self) -> None:
        self.limited(1, dry_run=True, log=False)
        with Log() as log:
            for _ in range(199):
                self.close(*self.connect())
            self.close(*self.connect(10))
            self.limiter.dry_run = False
        self.assertIn("with max_connections=8, 99 % would not have waited", log.texts()[-1])
        self.assertIn("of 209 connections, 9 would have waited", log.texts()[-2])

    def test_it_is_logged_once_a_minute_if_anything_happens(self) -> None:
        self.limited(1, dry_run=True)
        with Log() as log:
            self.close(*self.connect())
            self.clock.advance(60)
            self.clock.advance(600)
        self.assertEqual(len(log.texts()), 1)

    def test_all_settings_at_once_as_at_a_reload_leave_it_the_dry_run_that_it_is(self) -> None:
        limiter = self.limited(2, dry_run=True, wait_timeout=10)
        self.connect(10)
        limiter.reconfigure(**attrs.asdict(limiter.settings, recurse=False) | {"max_connections": 3})
        would = limiter.snapshot().dry_run
        self.assertEqual((would.active, would.waiting, would.dry_run), (3, 7, None))

    def test_a_changed_setting_is_tried_out_at_once(self) -> None:
        self.limited(1, dry_run=True)
        self.connect(2)
        self.assertEqual(self.limiter.snapshot().dry_run.waiting, 1)
        self.limiter.max_connections = 2
        self.assertEqual(self.limiter.snapshot().dry_run.waiting, 0)

    def test_who_would_wait_although_descriptors_run_short_would_be_refused(self) -> None:
        self.limited(1, dry_run=True)
        self.connect(2)
        self.patch(descriptors, "left_for_waiting", lambda kept: False)
        self.connect()
        self.assert_counts(active=3)
        would = self.limiter.snapshot().dry_run
        self.assertEqual((would.waiting, would.refused["descriptors"]), (1, 1))
