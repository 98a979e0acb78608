"""
A job waits, runs and ends, in whichever order that happens.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from support.limiters import LimiterTestCase
from twisted.internet.address import IPv4Address
from twisted.internet.defer import (
    CancelledError,
    Deferred,
    ensureDeferred,
    fail,
    gatherResults,
    inlineCallbacks,
    succeed,
)
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from connlimit import Limiter, Refused
from connlimit.limits import Total
from connlimit.observers import LimiterObserver


class JobTestCase(LimiterTestCase):
    """
    A limiter, and jobs by the number.
    """

    def limited(self, *args: object, **settings: object) -> Limiter:
        self.begun: list[int] = []
        self.ends: list[Deferred[Any]] = []
        return super().limited(*args, **settings)

    def begin(self, count: int = 1, **how: Any) -> list[Deferred[Any]]:
        """
        Begin so many jobs that last until their entry of ``ends`` is fired.
        """
        numbers = range(len(self.ends), len(self.ends) + count)
        self.ends += [Deferred() for _ in numbers]
        return [ensureDeferred(self.body(number, **how)) for number in numbers]

    async def body(self, number: int, **how: Any) -> Any:
        async with self.limiter.slot(**how):
            self.begun.append(number)
            return await self.ends[number]

    def end(self, number: int) -> None:
        self.ends[number].callback(number)


class WaitingTests(JobTestCase):
    """
    Jobs stand in the queue.
    """

    def test_so_many_run_at_once_and_the_others_in_their_order(self) -> None:
        self.limited(2)
        results = self.begin(5)
        self.assertEqual(self.begun, [0, 1])
        self.assert_counts(active=2, waiting=3)
        self.end(1)
        self.assertEqual(self.begun, [0, 1, 2])
        self.assertEqual(self.successResultOf(results[1]), 1)
        for number in (0, 2, 3, 4):
            self.end(number)
        self.assertEqual(self.begun, [0, 1, 2, 3, 4])
        self.assert_counts(active=0, waiting=0, finished=5, waits=3)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_jobs_and_connections_share_one_queue(self) -> None:
        self.limited(1)
        client = self.connect()[0]
        self.begin()
        self.connect()
        self.begin()
        self.close(client)
        self.assertEqual((self.served(), self.begun), ([0], [0]))
        self.end(0)
        self.assertEqual((self.served(), self.begun), ([0, 1], [0]))
        self.close(self.clients[1])
        self.assertEqual(self.begun, [0, 1])
        self.end(1)

    def test_each_key_has_its_cap_and_does_not_hold_others_up(self) -> None:
        self.limited(max_per_peer=1)
        for key in ("a", "a", "b"):
            self.begin(key=key)
        self.assertEqual(self.begun, [0, 2])
        self.end(0)
        self.assertEqual(self.begun, [0, 2, 1])
        self.assertEqual(dict(self.limiter.admission.limits._peers.in_use()), {"a": 1, "b": 1})
        self.end(1)
        self.end(2)

    def test_the_key_can_be_a_client(self) -> None:
        self.limited(max_per_peer=1)
        client = self.connect()[0]
        self.begin(key=IPv4Address("TCP", client.address.host, 1))
        self.assertEqual(self.begun, [])
        self.close(client)
        self.assertEqual(self.begun, [0])
        self.end(0)

    def test_without_a_key_there_is_no_cap(self) -> None:
        self.limited(max_per_peer=1)
        self.begin(3)
        self.assertEqual(self.begun, [0, 1, 2])

    def test_they_stand_in_any_order(self) -> None:
        self.limited(1, order="lifo")
        self.begin(4)
        for number in (0, 3, 2, 1):
            self.end(number)
        self.assertEqual(self.begun, [0, 3, 2, 1])

    def test_they_take_a_slot_of_every_further_limit(self) -> None:
        total = Total(1)
        self.limited(5, limits=[total])
        self.begin(2)
        self.assertEqual((self.begun, total.in_use), ([0], 1))
        self.end(0)
        self.assertEqual(self.begun, [0, 1])
        self.end(1)
        self.assertEqual(total.in_use, 0)

    def test_a_raised_limit_runs_more_at_once(self) -> None:
        limiter = self.limited(0)
        self.begin(3)
        limiter.max_connections = 2
        self.assertEqual(self.begun, [0, 1])

    def test_it_may_run_in_the_body_of_another(self) -> None:
        limiter = self.limited(2)

        async def outer() -> str:
            async with limiter.slot(), limiter.slot():
                return f"{limiter.active} active"

        self.assertEqual(self.successResultOf(ensureDeferred(outer())), "2 active")
        self.assertEqual(limiter.active, 0)


class EndingTests(JobTestCase):
    """
    However a job ends, its slot is free and its place in the queue empty.
    """

    def test_an_exception_in_the_body_gives_the_slot_back(self) -> None:
        self.limited(1)
        results = self.begin(2)
        self.ends[0].errback(ZeroDivisionError())
        self.failureResultOf(results[0], ZeroDivisionError)
        self.assertEqual(self.begun, [0, 1])

    def test_one_that_is_cancelled_leaves_the_queue_at_once(self) -> None:
        self.limited(1)
        results = self.begin(3)
        results[1].cancel()
        self.failureResultOf(results[1], CancelledError)
        self.assert_counts(active=1, waiting=1, departed=1)
        self.end(0)
        self.assertEqual(self.begun, [0, 2])

    def test_one_that_is_cancelled_while_it_runs_gives_the_slot_back(self) -> None:
        self.limited(1)
        results = self.begin(2)
        results[0].cancel()
        self.failureResultOf(results[0], CancelledError)
        self.assertEqual(self.begun, [0, 1])
        self.assert_counts(active=1, waiting=0, finished=1)

    def test_one_whose_coroutine_is_closed_leaves_the_queue(self) -> None:
        limiter = self.limited(0)
        self.ends.append(Deferred())
        body = self.body(0)
        body.send(None)
        self.assertEqual(limiter.waiting, 1)
        body.close()
        self.assert_counts(waiting=0, departed=1)

    def test_its_own_time_out_is_the_earlier_of_two(self) -> None:
        self.limited(1, wait_timeout=10)
        _, patient, hasty = [*self.begin(2), *self.begin(1, timeout=5)]
        self.clock.advance(4.9)
        self.assertNoResult(hasty)
        self.clock.advance(0.1)
        refused = self.failureResultOf(hasty, Refused).value
        self.assertEqual((refused.reason, refused.retry_after), ("timeout", 1.0))
        self.assertEqual(str(refused), "timeout; try again in 1 s")
        self.assertNoResult(patient)
        self.clock.advance(5)
        self.failureResultOf(patient, Refused)
        self.assert_counts(active=1, waiting=0, refused={"timeout": 2})

    def test_own_time_outs_strike_in_their_order_whatever_that_of_arrival(self) -> None:
        self.limited(0)
        results = [self.begin(timeout=timeout)[0] for timeout in (3, 1, 2)]
        for number in (1, 2, 0):
            self.clock.advance(1)
            self.failureResultOf(results[number], Refused)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_time_out_of_zero_does_not_wait(self) -> None:
        self.limited(1)
        first, second = self.begin(2, timeout=0)
        self.assertNoResult(first)
        self.assertEqual(self.failureResultOf(second, Refused).value.reason, "timeout")
        self.assert_counts(active=1, waiting=0, refused={"timeout": 1})

    def test_a_time_out_does_not_strike_what_runs(self) -> None:
        self.limited(1)
        (result,) = self.begin(timeout=1)
        self.clock.advance(100)
        self.assertNoResult(result)

    def test_a_full_queue_and_a_cap_refuse_at_once(self) -> None:
        self.limited(2, max_per_peer=1, over_peer="refuse", max_waiting=1)
        results = [self.begin(key=key)[0] for key in ("a", "a", "b", "c", "d")]
        self.assertEqual(self.failureResultOf(results[1], Refused).value.reason, "peer")
        self.assertEqual(self.failureResultOf(results[4], Refused).value.reason, "full")
        self.assert_counts(active=2, waiting=1, refused={"full": 1, "peer": 1})

    def test_a_drain_refuses_who_waits_and_waits_for_who_runs(self) -> None:
        limiter = self.limited(1)
        running, waiting = self.begin(2)
        done = limiter.drain()
        self.assertEqual(self.failureResultOf(waiting, Refused).value.reason, "draining")
        self.assertNoResult(done)
        self.end(0)
        self.successResultOf(done)
        self.assertEqual(self.successResultOf(running), 0)

    def test_the_end_of_a_drain_cancels_what_run_has_begun_and_takes_back_the_slots_of_others(self) -> None:
        limiter = self.limited(2)
        inside = self.begin()[0]
        run = limiter.run(Deferred)
        done = limiter.drain(5)
        self.clock.advance(5)
        self.successResultOf(done)
        self.failureResultOf(run, CancelledError)
        self.assertNoResult(inside)
        self.assertEqual(limiter.active, 0)
        self.end(0)
        self.assertEqual(self.successResultOf(inside), 0)
        self.assert_counts(active=0, finished=2)

    def test_one_that_is_taken_and_forgotten_gives_its_slot_back(self) -> None:
        limiter = self.limited(1)
        self.successResultOf(limiter.slot().acquire())
        gc.collect()
        self.begin()
        self.assertEqual(self.begun, [0])
        self.assert_counts(active=1, finished=1, reclaimed=1)


class WaysTests(JobTestCase):
    """
    Coroutines, Deferreds, generators and plain functions.
    """

    def test_run_calls_whatever_can_be_called(self) -> None:
        limiter = self.limited(1)

        async def coroutine(value: int, more: int = 0) -> int:
            return value + more + limiter.active

        def plain(value: int, more: int = 0) -> int:
            return value + more + limiter.active

        def deferred(value: int, more: int = 0) -> Deferred[int]:
            return succeed(value + more + limiter.active)

        for f in (coroutine, plain, deferred):
            self.assertEqual(self.successResultOf(limiter.run(f, 1, more=2)), 4)
            self.assertEqual(limiter.active, 0)

    def test_run_passes_failures_on_and_gives_the_slot_back(self) -> None:
        limiter = self.limited(1)
        self.failureResultOf(limiter.run(lambda: 1 / 0), ZeroDivisionError)
        self.failureResultOf(limiter.run(fail, KeyError()), KeyError)
        self.assertEqual(limiter.active, 0)

    def test_what_run_has_begun_is_cancelled_with_its_result(self) -> None:
        limiter = self.limited(1)
        body: Deferred[None] = Deferred()
        for waits in (False, True):
            first = limiter.run(Deferred) if waits else None
            body = Deferred()
            result = limiter.run(lambda body=body: body)
            if first is not None:
                first.cancel()
                self.failureResultOf(first, CancelledError)
            result.cancel()
            self.failureResultOf(result, CancelledError)
            self.assertTrue(body.called)
            self.assertEqual(limiter.active, 0)

    def test_what_waits_to_run_is_never_called_if_it_is_cancelled(self) -> None:
        limiter = self.limited(0)
        result = limiter.run(self.fail)
        result.cancel()
        self.failureResultOf(result, CancelledError)
        limiter.max_connections = 1
        self.assert_counts(departed=1, active=0)

    def test_a_generator_acquires_and_releases(self) -> None:
        limiter = self.limited(1)
        running = self.begin()[0]

        @inlineCallbacks
        def work() -> Any:
            slot = yield limiter.slot(key="reports").acquire()
            try:
                return limiter.active
            finally:
                slot.release()

        result = work()
        self.assertNoResult(result)
        self.end(0)
        self.successResultOf(running)
        self.assertEqual(self.successResultOf(result), 1)
        self.assertEqual(limiter.active, 0)

    def test_to_release_what_is_not_held_does_nothing(self) -> None:
        limiter = self.limited(1)
        slot = self.successResultOf(limiter.slot().acquire())
        slot.release()
        slot.release()
        self.assert_counts(active=0, finished=1)
        self.successResultOf(slot.acquire())
        self.assertEqual(limiter.active, 1)

    def test_one_slot_is_for_one_use_at_a_time(self) -> None:
        limiter = self.limited(1)
        held, waiting = limiter.slot(), limiter.slot()
        held.acquire()
        result = waiting.acquire()
        for slot in (held, waiting):
            with self.assertRaisesRegex(RuntimeError, "taken or waited for already"):
                slot.acquire()
            with self.assertRaisesRegex(RuntimeError, "taken or waited for already"):
                slot.run(int)
        held.release()
        self.assertIs(self.successResultOf(result), waiting)

    def test_a_hundred_thousand_whose_bodies_do_not_wait_all_run(self) -> None:
        limiter = self.limited(1)
        slot = self.successResultOf(limiter.slot().acquire())
        ran: list[int] = []

        async def body(number: int) -> None:
            async with limiter.slot():
                ran.append(number)

        results = [
            ensureDeferred(body(number)) if number % 2 else limiter.run(ran.append, number)
            for number in range(100_000)
        ]
        slot.release()
        self.assertEqual(ran, list(range(100_000)))
        self.successResultOf(gatherResults(results))
        self.assert_counts(active=0, waiting=0, finished=100_001)

    def test_observers_hear_of_jobs_by_their_keys(self) -> None:
        heard: list[object] = []

        class Hears(LimiterObserver):
            def served(self, limiter: Any, connection: Any, waited: float) -> None:
                heard.append(str(connection.address))

        self.limited(1, observers=[Hears()])
        self.begin(key="reports")
        self.assertEqual(heard, ["reports"])


class WeightTests(JobTestCase):
    """
    A job may take several slots.
    """

    def test_it_takes_as_many_slots_as_it_weighs(self) -> None:
        limiter = self.limited(5)
        self.begin(weight=3)
        self.begin(3)
        self.assertEqual(self.begun, [0, 1, 2])
        self.assertFalse(limiter.has_room())
        self.assert_counts(active=3, waiting=1)
        self.assertEqual(limiter.limited_by(), "max_connections is 5")
        self.end(0)
        self.assertEqual(self.begun, [0, 1, 2, 3])
        self.assertTrue(limiter.has_room())

    def test_nobody_overtakes_the_first_that_waits_for_several(self) -> None:
        self.limited(3)
        self.begin(3)
        self.begin(weight=3)
        self.begin(2)
        self.end(0)
        self.end(1)
        self.begin()
        self.assertEqual(self.begun, [0, 1, 2])
        self.end(2)
        self.assertEqual(self.begun, [0, 1, 2, 3])
        self.end(3)
        self.assertEqual(self.begun, [0, 1, 2, 3, 4, 5, 6])

    def test_when_it_gives_up_those_behind_it_have_their_turn(self) -> None:
        self.limited(3)
        self.begin(1)
        heavy = self.begin(weight=3)[0]
        self.begin(1)
        self.assertEqual(self.begun, [0])
        heavy.cancel()
        self.failureResultOf(heavy, CancelledError)
        self.assertEqual(self.begun, [0, 2])
        heavy = self.begin(weight=3, timeout=5)[0]
        self.begin(1)
        self.clock.advance(5)
        self.failureResultOf(heavy, Refused)
        self.assertEqual(self.begun, [0, 2, 4])
        self.begin(weight=3, timeout=0)[0].addErrback(lambda failure: failure.trap(Refused))
        self.assertEqual(self.limiter.waiting, 0)

    def test_one_whose_key_is_at_its_cap_does_not_hold_others_up(self) -> None:
        self.limited(3, max_per_peer=1)
        self.begin(key="a", weight=1)
        self.begin(key="b")
        self.begin(key="a", weight=2)
        self.begin(key="c")
        self.assertEqual(self.begun, [0, 1, 3])
        self.end(0)
        self.assertEqual(self.begun, [0, 1, 3])
        self.end(1)
        self.assertEqual(self.begun, [0, 1, 3, 2])

    def test_more_than_there_are_is_an_error_at_once(self) -> None:
        limiter = self.limited(3)
        with self.assertRaisesRegex(ValueError, "weight must be at most max_connections, which is 3, not 4"):
            limiter.slot(weight=4)

    def test_if_there_are_never_enough_any_more_it_is_refused_at_its_turn(self) -> None:
        limiter = self.limited(4)
        self.begin(4)
        heavy = self.begin(weight=4)[0]
        self.begin()
        limiter.max_connections = 3
        self.end(0)
        self.end(1)
        self.assertEqual(self.failureResultOf(heavy, Refused).value.reason, "full")
        self.assertEqual(self.begun, [0, 1, 2, 3, 5])

    def test_it_waits_while_nobody_is_served(self) -> None:
        limiter = self.limited(0)
        heavy = self.begin(weight=4)[0]
        self.assertNoResult(heavy)
        limiter.max_connections = 4
        self.assertEqual(self.begun, [0])

    def test_where_there_is_no_limit_any_weight_is_served(self) -> None:
        limiter = self.limited()
        self.begin(weight=1000)
        self.assertEqual(self.begun, [0])
        limiter.max_connections = 1001
        self.begin(2)
        self.assertEqual(self.begun, [0, 1])

    def test_a_limit_that_is_changed_counts_what_it_holds(self) -> None:
        limiter = self.limited(4)
        self.begin(weight=3)
        limiter.reconfigure(max_connections=5, max_waiting=10)
        self.begin(3)
        self.assertEqual(self.begun, [0, 1, 2])

    def test_one_that_is_forgotten_gives_all_its_slots_back(self) -> None:
        limiter = self.limited(3)
        self.successResultOf(limiter.slot(weight=3).acquire())
        gc.collect()
        self.begin(4)
        self.assertEqual(self.begun, [0, 1, 2])
        self.assert_counts(reclaimed=1)

    def test_the_exempt_take_none(self) -> None:
        self.limited(3, exempt=lambda address: address is not None and str(address) == "admin")
        self.begin(weight=3, key="admin")
        self.begin(3)
        self.assertEqual(self.begun, [0, 1, 2, 3])
        self.end(0)
        self.begin()
        self.assertEqual(self.begun, [0, 1, 2, 3])

    def test_one_that_ends_by_an_observer_of_its_turn_holds_nothing(self) -> None:
        class Ends(LimiterObserver):
            def served(self, limiter: Any, connection: Any, waited: float) -> None:
                if connection.weight > 1:
                    connection.abort()

        limiter = self.limited(3, observers=[Ends()])
        self.begin(weight=3)
        self.begin(1)
        self.begin(weight=3)
        self.end(1)
        self.assertEqual(limiter.active, 0)
        self.begin(3)
        self.assertEqual(limiter.active, 3)

    def test_a_dry_run_counts_its_slots(self) -> None:
        limiter = self.limited(4, dry_run=True)
        self.begin(weight=3)
        self.begin(2)
        self.assertEqual(self.begun, [0, 1, 2])
        would = limiter.snapshot().dry_run
        self.assertEqual((would.active, would.waiting), (2, 1))
        self.end(0)
        would = limiter.snapshot().dry_run
        self.assertEqual((would.active, would.waiting), (2, 0))
        self.assertEqual(limiter.admission.dry_run.suggested_limit(), 5)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"weight": 0}, ValueError, "weight must be at least 1, not 0"),
        ({"weight": 1.5}, TypeError, "weight must be a whole number, not 1.5"),
        ({"weight": True}, TypeError, "weight must be a whole number, not True"),
        ({"timeout": -1}, ValueError, "timeout must be at least 0 seconds, not -1"),
        ({"timeout": float("nan")}, ValueError, "timeout must be at least 0 seconds, not nan"),
        ({"timeout": "5"}, TypeError, "timeout must be a number of seconds, not '5'"),
        ({"key": []}, TypeError, "unhashable"),
    ],
)
def test_what_is_wrong_is_said(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Limiter(5).slot(**wrong)


class AsyncioTests(SynchronousTestCase):
    """
    Tasks of asyncio take slots as coroutines of Twisted do.
    """

    def run_in_asyncio(self, main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return asyncio.run(asyncio.wait_for(main(), 30))

    def setUp(self) -> None:
        self.limiter = Limiter(1, clock=Clock())
        self.begun: list[int] = []

    async def body(self, number: int) -> int:
        async with self.limiter.slot():
            self.begun.append(number)
            await asyncio.sleep(0)
            return number

    def test_tasks_have_their_turns(self) -> None:
        async def main() -> list[int]:
            return await asyncio.gather(*(self.body(number) for number in range(100)))

        self.assertEqual(self.run_in_asyncio(main), list(range(100)))
        self.assertEqual(self.begun, list(range(100)))
        self.assertEqual(self.limiter.active, 0)

    def test_a_task_that_is_cancelled_leaves_the_queue(self) -> None:
        async def main() -> None:
            self.limiter.max_connections = 0
            task = asyncio.create_task(self.body(0))
            await asyncio.sleep(0)
            self.assertEqual(self.limiter.waiting, 1)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

        self.run_in_asyncio(main)
        self.assertEqual((self.limiter.waiting, self.limiter.snapshot().departed), (0, 1))

    def test_a_task_that_is_cancelled_when_its_turn_has_come_gives_the_slot_back(self) -> None:
        async def main() -> None:
            self.limiter.max_connections = 0
            task = asyncio.create_task(self.body(0))
            await asyncio.sleep(0)
            self.limiter.max_connections = 1
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task

        self.run_in_asyncio(main)
        self.assertEqual((self.begun, self.limiter.active), ([], 0))

    def test_a_task_is_refused(self) -> None:
        async def main() -> None:
            self.limiter.max_connections = 0
            task = asyncio.create_task(self.body(0))
            await asyncio.sleep(0)
            self.limiter.drain()
            with self.assertRaises(Refused):
                await task

        self.run_in_asyncio(main)
        gc.collect()

    def test_a_coroutine_of_twisted_may_be_begun_by_a_task(self) -> None:
        async def twisted_body() -> str:
            async with self.limiter.slot():
                return "served"

        async def main() -> None:
            held = self.limiter.slot()
            held.acquire()
            result = ensureDeferred(twisted_body())
            self.assertNoResult(result)
            held.release()
            self.assertEqual(self.successResultOf(result), "served")

        self.run_in_asyncio(main)
        self.assertEqual(self.limiter.active, 0)
