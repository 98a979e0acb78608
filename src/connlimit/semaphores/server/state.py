"""
All semaphores and all peers, and what each operation does to them.

There is no I/O and no clock here: every operation is told the time, and the same operations at the same times
always lead to the same state. So a state can live in several processes at once, if they agree on the order.
What is due, such as the expiry of a peer, happens at its own time, however late the operation comes by which
that is noticed; so it does not matter which operation that is.

A lock is a count of one semaphore. A peer holds any number of locks and has at most one pending, which
stands in the semaphore's queue. Locks are granted in the order of the queue, from its head while it fits, so
that a large count is not overtaken by small ones. A peer may only take a lock of a lower level than all that
it holds, so that peers cannot wait for each other in a circle.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from connlimit.semaphores.server.records import (
    Lock,
    Peer,
    Rejected,
    Semaphore,
    never,
    unknown_peer,
    unknown_semaphore,
    wrong_count,
)

#: How many peers there can be, unless something else is said.
MAX_PEERS = 100_000

#: What changes nothing, and need not be carried out everywhere.
QUESTIONS = frozenset({"nothing", "is_acquired", "remainder"})


class State:
    """
    All semaphores and all peers.

    :ivar semaphores: the semaphores by name.
    :ivar peers: the peers by their numbers.
    :ivar settled: is told when a pending lock is pending no more, though its peer did not ask for that: the
        peer, the semaphore's name, and None if the lock was granted or else why it never will be.
    """

    def __init__(self) -> None:
        self.semaphores: dict[str, Semaphore] = {}
        self.peers: dict[int, Peer] = {}
        self.settled: Callable[[int, str, Rejected | None], None] = lambda peer, name, reason: None
        self._max_peers = MAX_PEERS
        self._grants_from = 0.0
        # When each peer expires at the earliest: an entry may be out of date, but none is missing.
        self._expiries: list[tuple[float, int]] = []
        self._operations: dict[str, Callable[..., Any]] = {
            name.removeprefix("do_"): getattr(self, name) for name in dir(self) if name.startswith("do_")
        }
        self._checks: dict[str, Callable[..., None]] = {
            name.removeprefix("_refuse_"): getattr(self, name)
            for name in dir(self)
            if name.startswith("_refuse_")
        }

    def apply(self, now: float, operation: str, arguments: Iterable[Any]) -> Any:
        """
        Carry out an operation, after everything that was due before it.

        :param now: the time in seconds, never less than at the operation before.
        :param operation: the name of one of the operations below.
        :return: what the operation returns.
        :raises Rejected: if the operation does.
        """
        expiries = self._expiries
        if self._grants_from or (expiries and expiries[0][0] <= now):
            self._let_happen(now)
        return self._operations[operation](now, *arguments)

    def refusal(self, operation: str, arguments: tuple[Any, ...]) -> Rejected | None:
        """
        Why an operation would be rejected and change nothing, as far as that can be told without doing it.
        """
        check = self._checks.get(operation)
        try:
            if check is not None:
                check(*arguments)
        except Rejected as error:
            return error
        return None

    def is_configured_as(self, semaphores: Mapping[str, tuple[int, int]], max_peers: int | None) -> bool:
        """
        Whether to configure that would change nothing.
        """
        configured = {
            name: (each.full_count, each.level)
            for name, each in self.semaphores.items()
            if each.is_configured
        }
        return configured == dict(semaphores) and max_peers in (None, self._max_peers)

    def next_event(self) -> float | None:
        """
        When something is due next, in seconds; None if nothing is.
        """
        if not self._expiries:
            return self._grants_from or None
        expiry = self._expiries[0][0]
        return min(expiry, self._grants_from) if self._grants_from else expiry

    # Operations

    def do_nothing(self, now: float) -> None:
        """
        Let happen what is due.
        """

    def do_configure(
        self, now: float, semaphores: Mapping[str, tuple[int, int]], max_peers: int | None
    ) -> None:
        """
        Have these semaphores from now on, each with a full count and a level, and a maximum number of peers.

        What is held stays held; what is pending and can never be granted any more is rejected.

        :param max_peers: None for as many as before.
        """
        if max_peers is not None:
            self._max_peers = max_peers
        for name, (full_count, level) in semaphores.items():
            semaphore = self.semaphores.setdefault(name, Semaphore(full_count))
            semaphore.full_count, semaphore.level, semaphore.is_configured = full_count, level, True
        for name, semaphore in list(self.semaphores.items()):
            semaphore.is_configured = name in semaphores
            for peer, lock in list(semaphore.queue.items()):
                if not semaphore.is_configured:
                    self._reject(peer, name, unknown_semaphore())
                elif lock.count > semaphore.full_count:
                    self._reject(peer, name, never(lock.count, semaphore.full_count))
            self._grant(now, name)

    def do_grace(self, now: float, seconds: float) -> None:
        """
        Grant nothing for a while, so that peers can restore what they hold.
        """
        self._grants_from = now + seconds

    def do_new_peer(self, now: float, peer: int, expires_in: float) -> bool:
        """
        Have a new peer.

        :return: False if its number is taken.
        """
        if peer in self.peers:
            return False
        self._check_room()
        self.peers[peer] = Peer(now + expires_in)
        self._note_expiry(peer)
        return True

    def do_heartbeat(self, now: float, peer: int, expires_in: float) -> None:
        """
        Let a peer expire at another time than it would.
        """
        who = self._peer(peer)
        expires = now + expires_in
        self.peers[peer] = Peer(expires, who.held, who.pending)
        if expires < who.expires:
            self._note_expiry(peer)

    def do_remove(self, now: float, peer: int) -> bool:
        """
        Release all that a peer has, and forget it.

        :return: False if there is no such peer.
        """
        if peer not in self.peers:
            return False
        self._remove(now, peer)
        return True

    def do_acquire(self, now: float, peer: int, name: str, count: int, expires_in: float | None) -> bool:
        """
        Acquire a lock, or have it pending.

        :param expires_in: if not None, the peer's new time until it expires, whatever else comes out.
        :return: whether it is acquired.
        """
        semaphore = self._semaphore(name)
        if count > semaphore.full_count:
            raise never(count, semaphore.full_count)
        if expires_in is not None:
            self.do_heartbeat(now, peer, expires_in)
        if count < 1:
            raise wrong_count(count)
        who = self._peer(peer)
        had = who.held.get(name) or semaphore.queue.get(peer)
        if had is not None:
            if had.count == count:
                return who.pending is None
            if had.count > count:
                raise Rejected(501, "Shrinking the count of an existing lock is currently not implemented.")
            raise _violation(semaphore.level, semaphore.level)
        if who.held:
            level = min(self.semaphores[each].level for each in who.held)
            if level <= semaphore.level:
                raise _violation(level, semaphore.level)
        if who.pending is not None:
            raise Rejected(409, "Already pending. Only one pendig lock per peer is allowed.")
        lock = Lock(count, now)
        if (
            semaphore.acquired + semaphore.pending + count <= semaphore.full_count
            and now >= self._grants_from
        ):
            self._hold(peer, name, lock)
            return True
        semaphore.queue[peer] = lock
        semaphore.pending += count
        self.peers[peer] = Peer(who.expires, who.held, name)
        return False

    def do_release(self, now: float, peer: int, name: str) -> None:
        """
        Release a peer's lock of one semaphore, held or pending, if it has one.
        """
        self._refuse_release(peer, name)
        self._release(now, peer, name)

    def do_is_acquired(self, now: float, peer: int) -> bool:
        """
        Whether a peer has no pending lock.
        """
        return self._peer(peer).pending is None

    def do_remainder(self, now: float, name: str) -> int:
        """
        How much of a semaphore is not held; less than 0 after peers restored more than there is.
        """
        semaphore = self._semaphore(name)
        return semaphore.full_count - semaphore.acquired

    def do_restore(self, now: float, peer: int, expires_in: float, acquired: Mapping[str, int]) -> None:
        """
        Have a peer with the locks that it says it holds, be there as much or not.
        """
        self._refuse_restore(peer, expires_in, acquired)
        if peer in self.peers:
            return
        self.peers[peer] = Peer(now + expires_in)
        self._note_expiry(peer)
        for name, count in acquired.items():
            self._hold(peer, name, Lock(count, now))

    # Why an operation is rejected, where that needs no more than a look

    def _refuse_heartbeat(self, peer: int, expires_in: float) -> None:
        self._peer(peer)

    def _refuse_acquire(self, peer: int, name: str, count: int, expires_in: float | None) -> None:
        semaphore = self._semaphore(name)
        if count > semaphore.full_count:
            raise never(count, semaphore.full_count)
        if peer not in self.peers:
            raise unknown_peer() if expires_in is not None or count >= 1 else wrong_count(count)

    def _refuse_release(self, peer: int, name: str) -> None:
        if name not in self.semaphores:
            raise unknown_semaphore()
        self._peer(peer)

    def _refuse_new_peer(self, peer: int, expires_in: float) -> None:
        if peer not in self.peers:
            self._check_room()

    def _refuse_restore(self, peer: int, expires_in: float, acquired: Mapping[str, int]) -> None:
        for name in acquired:
            self._semaphore(name)
        for count in acquired.values():
            if count < 1:
                raise wrong_count(count)
        known = self.peers.get(peer)
        if known is None:
            self._check_room()
        elif known.pending is not None or acquired != {name: lock.count for name, lock in known.held.items()}:
            raise Rejected(409, "Restore is not allowed to change existing peers.")

    # To be kept

    def records(self) -> Iterator[list[Any]]:
        """
        The state as it is now, piece by piece, each as JSON can say it.

        Operations can be carried out before all is read; it stays that of the moment of the call.
        """
        semaphores = [
            ["semaphore", name, each.full_count, each.level, each.is_configured]
            for name, each in self.semaphores.items()
        ]
        peers = list(self.peers.items())
        queues = [(name, list(each.queue.items())) for name, each in self.semaphores.items() if each.queue]
        return chain(
            [["state", self._max_peers, self._grants_from]],
            semaphores,
            (
                [
                    "peer",
                    number,
                    peer.expires,
                    *([name, lock.count, lock.since] for name, lock in peer.held.items()),
                ]
                for number, peer in peers
            ),
            (
                ["pending", number, name, lock.count, lock.since]
                for name, queue in queues
                for number, lock in queue
            ),
        )

    def add(self, record: list[Any]) -> None:
        """
        Have what a record of another state tells.
        """
        kind, *rest = record
        if kind == "state":
            self._max_peers, self._grants_from = rest
        elif kind == "semaphore":
            name, full_count, level, is_configured = rest
            self.semaphores[name] = Semaphore(full_count, level, is_configured=is_configured)
        elif kind == "peer":
            number, expires, *held = rest
            locks = {name: Lock(count, since) for name, count, since in held}
            self.peers[number] = Peer(expires, locks)
            for name, lock in locks.items():
                self.semaphores[name].acquired += lock.count
                self.semaphores[name].holders[number] = lock
        else:
            number, name, count, since = rest
            self.semaphores[name].queue[number] = Lock(count, since)
            self.semaphores[name].pending += count
            self.peers[number] = Peer(self.peers[number].expires, self.peers[number].held, name)

    def become(self, other: State) -> None:
        """
        Take over what another state has, which is not to be used any more.
        """
        pended = [(number, peer.pending) for number, peer in self.peers.items() if peer.pending is not None]
        self._max_peers, self._grants_from = other._max_peers, other._grants_from
        self.semaphores, self.peers = other.semaphores, other.peers
        for semaphore in self.semaphores.values():
            semaphore.holders = OrderedDict(sorted(semaphore.holders.items(), key=lambda each: each[1].since))
        self._rebuild_expiries()
        for number, name in pended:
            peer = self.peers.get(number)
            if peer is None:
                self.settled(number, name, unknown_peer())
            elif name in peer.held:
                self.settled(number, name, None)

    # Inside

    def _semaphore(self, name: str) -> Semaphore:
        semaphore = self.semaphores.get(name)
        if semaphore is None or not semaphore.is_configured:
            raise unknown_semaphore()
        return semaphore

    def _peer(self, peer: int) -> Peer:
        known = self.peers.get(peer)
        if known is None:
            raise unknown_peer()
        return known

    def _check_room(self) -> None:
        if len(self.peers) >= self._max_peers:
            raise Rejected(429, f"There are {self._max_peers} peers already, and there can be no more.")

    def _hold(self, peer: int, name: str, lock: Lock) -> None:
        semaphore, who = self.semaphores[name], self.peers[peer]
        semaphore.acquired += lock.count
        semaphore.holders[peer] = lock
        self.peers[peer] = Peer(who.expires, {**who.held, name: lock}, None)

    def _remove(self, now: float, peer: int) -> None:
        who = self.peers[peer]
        pending = who.pending
        if pending is not None:
            self._reject(peer, pending, unknown_peer())
            self._grant(now, pending)
        for name in who.held:
            self._release(now, peer, name)
        del self.peers[peer]

    def _release(self, now: float, peer: int, name: str) -> None:
        semaphore, who = self.semaphores[name], self.peers[peer]
        lock = semaphore.holders.pop(peer, None)
        if lock is not None:
            semaphore.acquired -= lock.count
            held = dict(who.held)
            del held[name]
            self.peers[peer] = Peer(who.expires, held, who.pending)
        elif who.pending == name:
            self._leave_queue(peer, name)
        self._grant(now, name)

    def _leave_queue(self, peer: int, name: str) -> None:
        semaphore, who = self.semaphores[name], self.peers[peer]
        semaphore.pending -= semaphore.queue.pop(peer).count
        self.peers[peer] = Peer(who.expires, who.held, None)

    def _reject(self, peer: int, name: str, reason: Rejected) -> None:
        self._leave_queue(peer, name)
        self.settled(peer, name, reason)

    def _grant(self, now: float, name: str) -> None:
        """
        Grant the locks at the head of the queue that fit.
        """
        semaphore = self.semaphores[name]
        while semaphore.queue and now >= self._grants_from:
            peer, lock = next(iter(semaphore.queue.items()))
            if semaphore.acquired + lock.count > semaphore.full_count:
                break
            self._leave_queue(peer, name)
            self._hold(peer, name, Lock(lock.count, now))
            self.settled(peer, name, None)
        if not semaphore.is_configured and not semaphore.acquired:
            del self.semaphores[name]

    def _let_happen(self, now: float) -> None:
        """
        Forget the peers whose time is over and end the grace, each at its own time, one after the other.
        """
        while True:
            at = self._expiries[0][0] if self._expiries else math.inf
            if self._grants_from and self._grants_from <= min(at, now):
                at, self._grants_from = self._grants_from, 0.0
                for name in list(self.semaphores):
                    self._grant(at, name)
            elif at <= now:
                _, peer = heapq.heappop(self._expiries)
                who = self.peers.get(peer)
                if who is not None and who.expires <= at:
                    self._remove(at, peer)
                elif who is not None:
                    heapq.heappush(self._expiries, (who.expires, peer))
            else:
                return

    def _note_expiry(self, peer: int) -> None:
        """
        Keep an entry for the peer that is not later than its expiry.
        """
        heapq.heappush(self._expiries, (self.peers[peer].expires, peer))
        if len(self._expiries) > 2 * len(self.peers) + 16:
            self._rebuild_expiries()

    def _rebuild_expiries(self) -> None:
        self._expiries = [(each.expires, number) for number, each in self.peers.items()]
        heapq.heapify(self._expiries)


def _violation(current: int, requested: int) -> Rejected:
    return Rejected(
        409,
        f"Lock hierachy violation. This may deadlock. The current lock level is {current} the\n"
        f"        requested lock level was {requested}.",
    )
