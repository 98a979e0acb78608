"""
The slots that a parent lends to its workers: never more than there are, and none idle while one is lacking.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from connlimit._twistd.processes.lending import BorrowedLimit, Lender


class Worker:
    """
    A worker with its borrowed limit; what it and the lender tell each other arrives later, in order.

    :ivar waiting: how many connections wait for a slot.
    """

    def __init__(self, lender: Lender) -> None:
        self.waiting = 0
        self.inbox: deque[tuple[Any, ...]] = deque()
        self.outbox: deque[tuple[Any, ...]] = deque()
        self.lender = lender
        self.limit = BorrowedLimit(
            lambda: self.outbox.append((lender.ask, self)),
            lambda slots: self.outbox.append((lender.give_back, self, slots)),
        )
        self.limit.subscribe(self.serve)

    def lend(self, name: str, slots: int) -> None:
        self.inbox.append((self.limit.lent, slots))

    def recall(self, name: str, recalled: bool) -> None:
        self.inbox.append((self.limit.recall, recalled))

    def serve(self) -> None:
        while self.waiting and self.limit.try_acquire(None):
            self.waiting -= 1

    def arrive(self) -> None:
        self.waiting += 1
        self.serve()

    def finish(self) -> None:
        if self.limit.in_use:
            self.limit.release(None)
            self.serve()

    def deliver(self) -> bool:
        """
        Let one message of each direction arrive; return whether there was one.
        """
        found = False
        for box in (self.outbox, self.inbox):
            if box:
                act, *arguments = box.popleft()
                act(*arguments)
                found = True
        return found


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "finish", "deliver", "die", "slots"]),
        st.integers(0, 2),
        st.integers(0, 7),
    ),
    max_size=80,
)


@given(STEPS, st.integers(0, 7))
def test_slots_are_never_exceeded_and_never_idle_while_one_is_lacking(
    steps: list[tuple[str, int, int]], slots: int
) -> None:
    lender = Lender("all", slots, 3)

    def started() -> Worker:
        worker = Worker(lender)
        lender.join(worker)
        return worker

    workers = [started() for _ in range(3)]
    maximum = slots
    for what, number, new in steps:
        if what == "die":
            lender.leave(workers[number])
            workers[number] = started()
        elif what == "slots":
            slots = new
            # Those that are in use when a limit is lowered may end in their time.
            maximum = max(slots, sum(each.limit.in_use for each in workers), sum(lender.lent.values()))
            lender.set_slots(slots)
        else:
            getattr(workers[number], what)()
        assert sum(each.limit.in_use for each in workers) <= maximum
    while sum(each.deliver() for each in workers):
        pass
    in_use = sum(each.limit.in_use for each in workers)
    assert in_use <= maximum
    if any(each.waiting for each in workers):
        assert in_use >= slots
    for each in workers:
        assert lender.lent[each] == each.limit.held
