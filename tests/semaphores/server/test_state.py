"""
What each operation does to semaphores and peers, held against a model that does it the slow way.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from connlimit.semaphores.server.records import Rejected
from connlimit.semaphores.server.state import State

FULL = {"A": (5, 0), "B": (5, 1), "C": (1, 2)}

PEERS = st.integers(1, 6)
NAMES = st.sampled_from([*FULL, "Z"])
COUNTS = st.integers(-1, 6)
SECONDS = st.sampled_from([0.0, 1.0, 5.0, 60.0])


def settled(state: State) -> list[tuple[int, str, str | None]]:
    """
    A list to which is added whatever the state tells of itself.
    """
    told: list[tuple[int, str, str | None]] = []
    state.settled = lambda peer, name, reason: told.append((peer, name, reason and str(reason)))
    return told


class Model:
    """
    Lists of locks, looked through from the beginning each time.
    """

    def __init__(self) -> None:
        self.expires: dict[int, float] = {}
        self.held: list[tuple[int, str, int]] = []
        self.queue: list[tuple[int, str, int]] = []

    def forget(self, peer: int) -> None:
        del self.expires[peer]
        self.held = [each for each in self.held if each[0] != peer]
        self.queue = [each for each in self.queue if each[0] != peer]

    def sweep(self, now: float) -> None:
        for peer in [peer for peer, expires in self.expires.items() if expires <= now]:
            self.forget(peer)
        for name, (full, _) in FULL.items():
            for entry in [each for each in self.queue if each[1] == name]:
                if sum(each[2] for each in self.held if each[1] == name) + entry[2] > full:
                    break
                self.queue.remove(entry)
                self.held.append(entry)


class StateMachine(RuleBasedStateMachine):
    """
    The same operations on a state and on its model.
    """

    @initialize()
    def begin(self) -> None:
        self.state = State()
        self.told = settled(self.state)
        self.model = Model()
        self.now = 1000.0
        self.restored = False
        self.do("configure", FULL, 100)

    def do(self, operation: str, *arguments: Any) -> Any:
        try:
            return self.state.apply(self.now, operation, list(arguments))
        except Rejected as error:
            return error.status
        finally:
            self.model.sweep(self.now)

    @rule(seconds=st.sampled_from([0.5, 3.0, 30.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds
        self.do("nothing")

    @rule()
    def it_is_dumped_and_loaded(self) -> None:
        other = State()
        for record in self.state.records():
            other.add(json.loads(json.dumps(record)))
        self.state = State()
        self.state.become(other)
        self.told = settled(self.state)

    @rule(peer=PEERS, seconds=SECONDS)
    def new_peer(self, peer: int, seconds: float) -> None:
        self.model.sweep(self.now)
        is_new = peer not in self.model.expires
        assert self.do("new_peer", peer, seconds) is is_new
        if is_new:
            self.model.expires[peer] = self.now + seconds

    @rule(peer=PEERS, seconds=SECONDS)
    def heartbeat(self, peer: int, seconds: float) -> None:
        self.model.sweep(self.now)
        assert self.do("heartbeat", peer, seconds) == (None if peer in self.model.expires else 400)
        if peer in self.model.expires:
            self.model.expires[peer] = self.now + seconds

    @rule(peer=PEERS)
    def remove(self, peer: int) -> None:
        self.model.sweep(self.now)
        assert self.do("remove", peer) is (peer in self.model.expires)
        if peer in self.model.expires:
            self.model.forget(peer)
            self.model.sweep(self.now)

    @rule(peer=PEERS, name=NAMES)
    def release(self, peer: int, name: str) -> None:
        self.model.sweep(self.now)
        right = None if name in FULL and peer in self.model.expires else 400
        assert self.do("release", peer, name) == right
        self.model.held = [each for each in self.model.held if each[:2] != (peer, name)]
        self.model.queue = [each for each in self.model.queue if each[:2] != (peer, name)]
        self.model.sweep(self.now)

    @rule(peer=PEERS, name=NAMES, count=COUNTS, seconds=st.none() | SECONDS)
    def acquire(self, peer: int, name: str, count: int, seconds: float | None) -> None:
        self.model.sweep(self.now)
        assert self.do("acquire", peer, name, count, seconds) == self.expected(peer, name, count, seconds)
        # What was asked for with no time left is gone with the next operation.

    def expected(self, peer: int, name: str, count: int, seconds: float | None) -> Any:
        model = self.model
        if name not in FULL:
            return 400
        full, level = FULL[name]
        if count > full:
            return 409
        if peer not in model.expires:
            return 400
        if seconds is not None:
            model.expires[peer] = self.now + seconds
        if count < 1:
            return 400
        pends = [each for each in model.queue if each[0] == peer]
        mine = [each for each in model.held + model.queue if each[:2] == (peer, name)]
        if mine:
            if mine[0][2] == count:
                return not pends
            return 501 if mine[0][2] > count else 409
        if any(FULL[each[1]][1] <= level for each in model.held if each[0] == peer) or pends:
            return 409
        demand = sum(each[2] for each in model.held + model.queue if each[1] == name)
        (model.held if demand + count <= full else model.queue).append((peer, name, count))
        return demand + count <= full

    @rule(peer=PEERS, acquired=st.dictionaries(NAMES, st.integers(0, 3)), seconds=SECONDS)
    def restore(self, peer: int, acquired: dict[str, int], seconds: float) -> None:
        model = self.model
        model.sweep(self.now)
        held = {name: count for each, name, count in model.held if each == peer}
        if any(name not in FULL or count < 1 for name, count in acquired.items()):
            right: int | None = 400
        elif peer in model.expires:
            pends = any(each[0] == peer for each in model.queue)
            right = None if held == acquired and not pends else 409
        else:
            right = None
            model.expires[peer] = self.now + seconds
            model.held += [(peer, name, count) for name, count in acquired.items()]
            self.restored = True
        before = list(model.held), dict(model.expires)
        try:
            self.state.apply(self.now, "restore", [peer, seconds, acquired])
            found = None
        except Rejected as error:
            found = error.status
        assert found == right
        assert before == (model.held, model.expires)

    @invariant()
    def both_know_the_same(self) -> None:
        if not hasattr(self, "state"):
            return
        self.do("nothing")
        held = {
            (peer, name, lock.count)
            for peer, who in self.state.peers.items()
            for name, lock in who.held.items()
        }
        assert held == set(self.model.held)
        for name, semaphore in self.state.semaphores.items():
            assert [(peer, name, lock.count) for peer, lock in semaphore.queue.items()] == [
                each for each in self.model.queue if each[1] == name
            ]
            assert semaphore.acquired == sum(each[2] for each in held if each[1] == name)
            assert semaphore.pending == sum(lock.count for lock in semaphore.queue.values())
            assert self.restored or semaphore.acquired <= semaphore.full_count
        assert {peer: each.expires for peer, each in self.state.peers.items()} == self.model.expires
        due = self.state.next_event()
        assert due is None or due <= min(self.model.expires.values(), default=due)
        assert len(self.state._expiries) <= 2 * len(self.state.peers) + 16


StateMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestStateMachine = StateMachine.TestCase


def make(max_peers: int = 100) -> State:
    state = State()
    state.apply(0, "configure", [FULL, max_peers])
    for peer in range(1, 5):
        state.apply(0, "new_peer", [peer, 60.0])
    return state


def test_those_whose_locks_are_granted_later_are_told_of_it_in_their_order() -> None:
    state = make()
    told = settled(state)
    assert state.apply(0, "acquire", [1, "A", 5, None])
    for peer, count in ((2, 2), (3, 3), (4, 1)):
        assert not state.apply(0, "acquire", [peer, "A", count, None])
    assert told == []
    state.apply(1, "release", [1, "A"])
    assert told == [(2, "A", None), (3, "A", None)]
    state.apply(2, "remove", [4])
    assert told[2:] == [(4, "A", "Unknown peer")]


def test_a_large_count_is_not_overtaken_by_small_ones() -> None:
    state = make()
    state.apply(0, "acquire", [1, "A", 3, None])
    assert not state.apply(0, "acquire", [2, "A", 5, None])
    assert not state.apply(0, "acquire", [3, "A", 1, None])
    state.apply(1, "release", [1, "A"])
    assert state.apply(1, "is_acquired", [2])
    assert not state.apply(1, "is_acquired", [3])


def test_the_departure_of_the_first_in_line_lets_the_next_have_what_fits() -> None:
    state = make()
    state.apply(0, "acquire", [1, "A", 3, None])
    state.apply(0, "acquire", [2, "A", 5, None])
    state.apply(0, "acquire", [3, "A", 1, None])
    state.apply(1, "remove", [2])
    assert state.apply(1, "is_acquired", [3])


def test_nothing_is_granted_during_the_grace_but_what_was_held_is_restored() -> None:
    state = make()
    state.apply(0, "grace", [30.0])
    assert not state.apply(1, "acquire", [1, "A", 2, None])
    state.apply(2, "restore", [9, 60.0, {"A": 4}])
    assert state.apply(2, "acquire", [9, "A", 4, None])
    assert state.next_event() == 30.0
    state.apply(30, "nothing", [])
    assert not state.apply(30, "is_acquired", [1])
    assert not state.apply(30, "acquire", [2, "A", 1, None])
    state.apply(31, "remove", [9])
    assert state.apply(31, "is_acquired", [1])
    assert state.apply(31, "is_acquired", [2])


def test_more_room_in_a_changed_configuration_is_granted_at_once() -> None:
    state = make()
    told = settled(state)
    state.apply(0, "acquire", [1, "C", 1, None])
    state.apply(0, "acquire", [2, "C", 1, None])
    state.apply(1, "configure", [{**FULL, "C": (2, 2)}, 100])
    assert told == [(2, "C", None)]


def test_what_can_never_be_granted_after_a_change_is_rejected_and_lets_the_others_pass() -> None:
    state = make()
    told = settled(state)
    state.apply(0, "acquire", [1, "A", 1, None])
    state.apply(0, "acquire", [2, "A", 5, None])
    state.apply(0, "acquire", [3, "A", 1, None])
    state.apply(1, "configure", [{**FULL, "A": (3, 0)}, 100])
    assert told == [
        (2, "A", "Lock can never be acquired. Lock asks for count 5 yet full count is only 3."),
        (3, "A", None),
    ]


def test_a_semaphore_that_is_taken_away_keeps_its_holders_until_they_release_it() -> None:
    state = make()
    told = settled(state)
    state.apply(0, "acquire", [1, "C", 1, None])
    state.apply(0, "acquire", [2, "C", 1, None])
    without = {name: FULL[name] for name in "AB"}
    state.apply(1, "configure", [without, 100])
    assert told == [(2, "C", "Unknown semaphore")]
    with pytest.raises(Rejected, match="Unknown semaphore"):
        state.apply(1, "acquire", [3, "C", 1, None])
    state.apply(2, "configure", [FULL, 100])
    assert not state.apply(2, "acquire", [3, "C", 1, None])
    state.apply(3, "configure", [without, 100])
    state.apply(4, "release", [1, "C"])
    assert "C" not in state.semaphores


def test_a_million_peers_take_no_more_memory_than_those_that_there_may_be() -> None:
    state = make(max_peers=1000)
    for peer in range(10, 1_000_010):
        with contextlib.suppress(Rejected):
            state.apply(0, "new_peer", [peer, 60.0])
    assert len(state.peers) == 1000
    for round_ in range(10_000):
        state.apply(0, "heartbeat", [1, 60.0 - round_ / 1000])
    assert len(state._expiries) < 3000


def test_a_larger_count_of_what_a_peer_has_violates_the_level_of_that_alone() -> None:
    state = make()
    state.apply(0, "acquire", [1, "B", 1, None])
    state.apply(0, "acquire", [1, "A", 1, None])
    with pytest.raises(Rejected, match=r"current lock level is 1 the\n +requested lock level was 1\."):
        state.apply(0, "acquire", [1, "B", 2, None])


def test_what_is_due_happens_at_its_own_time_whatever_it_is_noticed_by() -> None:
    def told(*times: float) -> list[object]:
        state = make()
        state.apply(0, "acquire", [1, "A", 5, 10.0])
        state.apply(0, "acquire", [2, "A", 5, 20.0])
        state.apply(0, "acquire", [3, "A", 5, None])
        for time in times:
            state.apply(time, "nothing", [])
        return list(state.records())

    assert told(25.0) == told(10.0, 25.0) == told(12.5, 19.0, 21.0, 25.0)


def test_a_picture_of_the_state_stays_while_the_state_goes_on() -> None:
    state = make()
    state.apply(0, "acquire", [1, "A", 5, None])
    state.apply(0, "acquire", [2, "A", 1, None])
    before, records = list(state.records()), state.records()
    state.apply(1, "remove", [1])
    state.apply(1, "heartbeat", [3, 5.0])
    state.apply(1, "configure", [{}, 5])
    assert list(records) == before
