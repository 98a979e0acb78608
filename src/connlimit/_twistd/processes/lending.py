"""
A limit that the workers of one program share: their parent has the slots, and lends them.

A worker keeps the slots it was lent, so that it need not ask for each connection, until somebody lacks one:
then all give back what they do not use, now and as their connections end, and those who lack slots get one
each in the order in which they asked. What a worker held is free as soon as its process has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from zope.interface import implementer

from connlimit.interfaces import ILimit, IOccupant

#: More slots than there can be connections.
NO_LIMIT = 1 << 30


class Borrower(Protocol):
    """
    A worker, as the lender of one limit sees it.
    """

    def lend(self, name: str, slots: int) -> None:
        """
        Tell the worker that it has this number of slots more.
        """

    def recall(self, name: str, recalled: bool) -> None:
        """
        Tell the worker whether somebody lacks slots.
        """


class Lender:
    """
    All slots of a limit, and which worker has how many.

    :ivar lent: how many slots each worker has.
    """

    def __init__(self, name: str, slots: int | None, workers: int) -> None:
        """
        :param slots: how many there are in all; None for no limit.
        :param workers: among how many workers they are shared as long as nobody lacks any.
        """
        self.lent: dict[Borrower, int] = {}
        self._name = name
        self._workers = workers
        self._asking: dict[Borrower, None] = {}
        self._recalled = False
        self._is_departing = False
        self._slots = NO_LIMIT if slots is None else slots

    def depart(self, is_departing: bool) -> None:
        """
        Have the workers keep no more slots than they use, or as many as ever.
        """
        if self._is_departing != is_departing:
            self._is_departing = is_departing
            self._settle()

    def is_over(self) -> bool:
        """
        Whether nobody has a slot, nor lacks one.
        """
        return not self._asking and not any(self.lent.values())

    def set_slots(self, slots: int | None) -> None:
        """
        Change how many slots there are.
        """
        self._slots = NO_LIMIT if slots is None else slots
        for borrower in self.lent:
            self._lend_share(borrower)
        self._settle()

    def join(self, borrower: Borrower) -> None:
        """
        A worker has started; it gets its share of what is free.
        """
        self.lent[borrower] = 0
        if self._recalled:
            borrower.recall(self._name, True)
        self._lend_share(borrower)

    def ask(self, borrower: Borrower) -> None:
        """
        A worker lacks a slot.
        """
        self._asking[borrower] = None
        self._settle()

    def give_back(self, borrower: Borrower, slots: int) -> None:
        """
        A worker does not need some of its slots.
        """
        self.lent[borrower] -= slots
        self._settle()

    def leave(self, borrower: Borrower) -> None:
        """
        A worker has ended.
        """
        self.lent.pop(borrower, None)
        self._asking.pop(borrower, None)
        self._settle()

    def _free(self) -> int:
        return self._slots - sum(self.lent.values())

    def _lend_share(self, borrower: Borrower) -> None:
        if not self._asking and not self._is_departing:
            self._lend(borrower, min(self._free(), self._slots // self._workers - self.lent[borrower]))

    def _lend(self, borrower: Borrower, slots: int) -> None:
        if slots > 0:
            self.lent[borrower] += slots
            borrower.lend(self._name, slots)

    def _settle(self) -> None:
        while self._asking and self._free() > 0:
            borrower = next(iter(self._asking))
            del self._asking[borrower]
            self._lend(borrower, 1)
        recalled = self._is_departing or bool(self._asking) or self._free() < 0
        if recalled != self._recalled:
            self._recalled = recalled
            for borrower in self.lent:
                borrower.recall(self._name, recalled)


@implementer(ILimit)
class BorrowedLimit:
    """
    The slots that one worker has of a limit.

    :ivar in_use: how many of them its connections have.
    :ivar held: how many it was lent.
    """

    def __init__(self, ask: Callable[[], None], give_back: Callable[[int], None]) -> None:
        """
        :param ask: tells the lender that a slot is lacking.
        :param give_back: tells the lender that this number of slots is not needed.
        """
        self.in_use = 0
        self.held = 0
        self._ask = ask
        self._give_back = give_back
        self._has_asked = False
        self._recalled = False
        self._subscribers: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return "max_connections of all workers"

    def subscribe(self, callback: Callable[[], None]) -> None:
        self._subscribers.append(callback)

    def try_acquire(self, connection: IOccupant) -> bool:
        if self.in_use < self.held:
            self.in_use += 1
            return True
        if not self._has_asked:
            self._has_asked = True
            self._ask()
        return False

    def release(self, connection: IOccupant) -> None:
        self.in_use -= 1
        self._give_back_unused()

    def lent(self, slots: int) -> None:
        """
        The lender has lent this number of slots more.
        """
        self.held += slots
        self._has_asked = False
        for callback in self._subscribers:
            callback()
        self._give_back_unused()

    def recall(self, recalled: bool) -> None:
        """
        The lender tells whether somebody lacks slots.
        """
        self._recalled = recalled
        self._give_back_unused()

    def is_unused(self) -> bool:
        """
        Whether nothing is held, so that it can be forgotten.
        """
        return not self.held and not self.in_use

    def _give_back_unused(self) -> None:
        unused = self.held - self.in_use
        if self._recalled and unused > 0:
            self.held = self.in_use
            self._give_back(unused)
