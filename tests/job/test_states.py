"""
Jobs of any weight, in any order of events: never more than the limits allow, nobody waits beside a slot.
"""

from __future__ import annotations

from typing import Any

import attrs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import Clock

from connlimit import Limiter, Refused

KEYS = st.sampled_from([None, "a", "b"])
CAPS = st.none() | st.integers(1, 3)
LIMITS = st.none() | st.integers(0, 6)


@attrs.define(eq=False)
class Run:
    """
    One job, as its caller sees it.

    :ivar state: ``waiting``, ``active`` or ``over``.
    """

    number: int
    weight: int
    key: str | None
    end: Deferred[None] = attrs.Factory(Deferred)
    state: str = "waiting"
    result: Any = None
    outcome: Any = None


class Jobs(RuleBasedStateMachine):
    """
    What callers do with a limiter, what its operator changes, and time.
    """

    @initialize(maximum=LIMITS, cap=CAPS, wait_timeout=st.none() | st.integers(1, 10))
    def start(self, maximum: int | None, cap: int | None, wait_timeout: int | None) -> None:
        self.clock = Clock()
        self.limiter = Limiter(maximum, max_per_peer=cap, wait_timeout=wait_timeout, clock=self.clock)
        self.runs: list[Run] = []

    def in_state(self, state: str) -> list[Run]:
        return [run for run in self.runs if run.state == state]

    def taken(self) -> int:
        return sum(run.weight for run in self.in_state("active"))

    def of_key(self, key: str) -> int:
        return sum(run.key == key for run in self.in_state("active"))

    def has_begun(self, run: Run) -> None:
        assert run.state == "waiting"
        run.state = "active"
        maximum, cap = self.limiter.max_connections, self.limiter.max_per_peer
        assert maximum is None or self.taken() <= maximum
        assert cap is None or run.key is None or self.of_key(run.key) <= cap

    def is_over(self, outcome: Any, run: Run) -> None:
        run.state, run.outcome = "over", outcome

    async def inside(self, run: Run, slot: Any, returns: bool) -> None:
        async with slot:
            self.has_begun(run)
            try:
                if not returns:
                    await run.end
            finally:
                run.state = "ending"

    def body(self, run: Run, returns: bool) -> Deferred[None] | None:
        self.has_begun(run)
        if returns:
            run.state = "ending"
            return None

        def ends(result: Any) -> Any:
            run.state = "ending"
            return result

        return run.end.addBoth(ends)

    @rule(
        weight=st.integers(1, 4),
        key=KEYS,
        timeout=st.none() | st.integers(0, 8),
        returns=st.booleans(),
        by_run=st.booleans(),
    )
    def begin(self, weight: int, key: str | None, timeout: int | None, returns: bool, by_run: bool) -> None:
        maximum = self.limiter.max_connections
        if maximum and weight > maximum:
            weight = maximum
        slot = self.limiter.slot(key=key, weight=weight, timeout=timeout)
        run = Run(len(self.runs), weight, key)
        self.runs.append(run)
        if by_run:
            run.result = slot.run(self.body, run, returns)
        else:
            run.result = ensureDeferred(self.inside(run, slot, returns))
        run.result.addBoth(self.is_over, run)

    @precondition(lambda self: self.in_state("active"))
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data: st.DataObject, fails: bool) -> None:
        run = data.draw(st.sampled_from(self.in_state("active")))
        if fails:
            run.end.errback(ZeroDivisionError())
        else:
            run.end.callback(None)
        assert run.state == "over"

    @precondition(lambda self: self.in_state("active") or self.in_state("waiting"))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        run = data.draw(st.sampled_from(self.in_state("active") + self.in_state("waiting")))
        run.result.cancel()
        assert run.state == "over"
        assert run.outcome.check(CancelledError)

    @rule(seconds=st.integers(1, 6))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule(maximum=LIMITS)
    def change_limit(self, maximum: int | None) -> None:
        self.limiter.max_connections = maximum

    @rule(cap=CAPS, order=st.sampled_from(["fifo", "fifo", "lifo", "fair"]))
    def change_others(self, cap: int | None, order: Any) -> None:
        self.limiter.reconfigure(max_per_peer=cap, order=order)

    @invariant()
    def counters_add_up(self) -> None:
        if not hasattr(self, "limiter"):
            return
        snapshot = self.limiter.snapshot()
        assert snapshot.active == len(self.in_state("active"))
        assert snapshot.waiting == len(self.in_state("waiting"))
        assert snapshot.accepted == len(self.runs)
        over = snapshot.finished + snapshot.departed + sum(snapshot.refused.values())
        assert over == len(self.in_state("over"))
        assert not self.in_state("ending")
        refused = [run for run in self.runs if run.state == "over" and is_refused(run)]
        assert len(refused) == sum(snapshot.refused.values())

    @invariant()
    def nobody_waits_beside_slots_that_it_could_have(self) -> None:
        if not hasattr(self, "limiter"):
            return
        maximum, cap, taken = self.limiter.max_connections, self.limiter.max_per_peer, self.taken()
        could = [
            run
            for run in self.in_state("waiting")
            if cap is None or run.key is None or self.of_key(run.key) < cap
        ]
        fits = [run for run in could if maximum is None or taken + run.weight <= maximum]
        if self.limiter.settings.order == "fifo":
            assert not could or could[0] not in fits
        else:
            # Whose turn it is, is for the order to say; but not everybody may fit.
            assert not could or len(fits) < len(could)

    def teardown(self) -> None:
        if not hasattr(self, "limiter"):
            return
        self.limiter.reconfigure(max_connections=100, max_per_peer=None)
        while active := self.in_state("active"):
            active[0].end.callback(None)
        assert all(run.state == "over" for run in self.runs)
        assert self.limiter.admission.slots.extra == 0
        assert not self.limiter.admission.slots.heavy
        assert not self.limiter.admission._weights
        self.clock.advance(0)
        pending = [call for call in self.clock.getDelayedCalls() if call.func.__name__ != "_minute_over"]
        assert not pending


def is_refused(run: Run) -> bool:
    return run.outcome is not None and run.outcome.check(Refused) is not None


TestJobs = Jobs.TestCase
TestJobs.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
