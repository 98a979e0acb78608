"""
Semaphores, the peers that hold and want locks to them, and what each operation does to all that.

There is no I/O and no clock here: every operation is told the time, and the same operations at the same times
always lead to the same state. So a state can live in several processes at once, if they agree on the order.

A lock is a count of one semaphore. A peer holds any number of locks and has at most one pending, which
stands in the semaphore's line. Locks are granted in the order of the line, from its head while it fits, so
that a large count is not overtaken by small ones. A peer may only take a lock of a lower level than all that
it holds, so that peers cannot wait for each other in a circle.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs


class Rejected(Exception):
    """
    An operation that cannot be carried out, and has changed nothing but perhaps the peer's expiry.

    :ivar status: the HTTP status that says so.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _unknown_semaphore() -> Rejected:
    return Rejected(400, "Unknown semaphore")


def _unknown_peer() -> Rejected:
    return Rejected(400, "Unknown peer")


def _never(count: int, full_count: int) -> Rejected:
    return Rejected(
        409, f"Lock can never be acquired. Lock asks for count {count} yet full count is only {full_count}."
    )


@attrs.define
class Lock:
    """
    A count of a semaphore, held or pending.

    :ivar since: when it was acquired, or asked for, in seconds.
    """

    count: int
    since: float


@attrs.define
class Semaphore:
    """
    What one semaphore has.

    :ivar full_count: how much of it there is.
    :ivar acquired: how much of it is held.
    :ivar pending: how much of it is wanted by those in line.
    :ivar line: the pending locks by their peers, first come first.
    :ivar is_configured: False when it was taken out of the configuration and is still held.
    """

    full_count: int
    level: int = 0
    acquired: int = 0
    pending: int = 0
    line: OrderedDict[int, Lock] = attrs.field(factory=OrderedDict)
    is_configured: bool = True


@attrs.define
class Peer:
    """
    What one peer has.

    :ivar expires: when it is gone unless it is heard of, in seconds.
    :ivar held: its locks by the names of their semaphores.
    :ivar pending: the name of the semaphore in whose line it stands, or None.
    """

    expires: float
    held: dict[str, Lock] = attrs.field(factory=dict)
    pending: str | None = None


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
        self._max_peers = 0
        self._grants_from = 0.0
        # When each peer expires at the earliest: an entry may be out of date, but none is missing.
        self._expiries: list[tuple[float, int]] = []

    def apply(self, now: float, operation: str, arguments: list[Any]) -> Any:
        """
        Carry out an operation, after everything that was due before it.

        :param now: the time in seconds, never less than at the operation before.
        :param operation: the name of one of the operations below.
        :return: what the operation returns.
        :raises Rejected: if the operation does.
        """
        self._expire(now)
        return getattr(self, f"do_{operation}")(now, *arguments)

    def next_event(self) -> float | None:
        """
        When something is due next, in seconds; None if nothing is.
        """
        times = [self._expiries[0][0]] if self._expiries else []
        if self._grants_from:
            times.append(self._grants_from)
        return min(times, default=None)

    # Operations

    def do_nothing(self, now: float) -> None:
        """
        Let happen what is due.
        """

    def do_configure(self, now: float, semaphores: Mapping[str, tuple[int, int]], max_peers: int) -> None:
        """
        Have these semaphores from now on, each with a full count and a level, and no more than so many peers.

        What is held stays held; what is pending and can never be granted any more is rejected.
        """
        self._max_peers = max_peers
        for name, (full_count, level) in semaphores.items():
            semaphore = self.semaphores.setdefault(name, Semaphore(full_count))
            semaphore.full_count, semaphore.level, semaphore.is_configured = full_count, level, True
        for name, semaphore in list(self.semaphores.items()):
            semaphore.is_configured = name in semaphores
            for peer, lock in list(semaphore.line.items()):
                if not semaphore.is_configured:
                    self._reject(peer, name, _unknown_semaphore())
                elif lock.count > semaphore.full_count:
                    self._reject(peer, name, _never(lock.count, semaphore.full_count))
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
        self._add(now, peer, expires_in)
        return True

    def do_heartbeat(self, now: float, peer: int, expires_in: float) -> None:
        """
        Let a peer expire at another time than it would.
        """
        who = self._peer(peer)
        earlier = now + expires_in < who.expires
        who.expires = now + expires_in
        if earlier:
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
            raise _never(count, semaphore.full_count)
        if expires_in is not None:
            self.do_heartbeat(now, peer, expires_in)
        _check_count(count)
        who = self._peer(peer)
        had = who.held.get(name) or semaphore.line.get(peer)
        if had is not None and had.count == count:
            return who.pending is None
        if had is not None and had.count > count:
            raise Rejected(501, "Shrinking the count of an existing lock is currently not implemented.")
        # A lock of the same semaphore, of a smaller count, is as much in the way as one of its level.
        levels = [self.semaphores[each].level for each in who.held] + ([semaphore.level] if had else [])
        if levels and min(levels) <= semaphore.level:
            raise Rejected(
                409,
                f"Lock hierachy violation. This may deadlock. The current lock level is {min(levels)} the\n"
                f"        requested lock level was {semaphore.level}.",
            )
        if who.pending is not None:
            raise Rejected(409, "Already pending. Only one pendig lock per peer is allowed.")
        if (
            semaphore.acquired + semaphore.pending + count <= semaphore.full_count
            and now >= self._grants_from
        ):
            who.held[name] = Lock(count, now)
            semaphore.acquired += count
            return True
        semaphore.line[peer] = Lock(count, now)
        semaphore.pending += count
        who.pending = name
        return False

    def do_release(self, now: float, peer: int, name: str) -> None:
        """
        Release a peer's lock of one semaphore, held or pending, if it has one.
        """
        if name not in self.semaphores:
            raise _unknown_semaphore()
        self._peer(peer)
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
        for name in acquired:
            self._semaphore(name)
        for count in acquired.values():
            _check_count(count)
        known = self.peers.get(peer)
        if known is not None:
            if known.pending is None and {name: lock.count for name, lock in known.held.items()} == acquired:
                return
            raise Rejected(409, "Restore is not allowed to change existing peers.")
        who = self._add(now, peer, expires_in)
        for name, count in acquired.items():
            who.held[name] = Lock(count, now)
            self.semaphores[name].acquired += count

    # To be seen

    def facts(self, now: float) -> Iterator[dict[str, Any]]:
        """
        What there is to tell of each configured semaphore, sorted by name: counts, and seconds.
        """
        for name, semaphore in sorted(self.semaphores.items()):
            if semaphore.is_configured:
                first = next(iter(semaphore.line.values()), None)
                yield {
                    "name": name,
                    "full_count": semaphore.full_count,
                    "level": semaphore.level,
                    "acquired": semaphore.acquired,
                    "pending": semaphore.pending,
                    "longest_pending": max(0.0, now - first.since) if first else 0.0,
                }

    def holders(self, now: float, most: int) -> dict[str, list[dict[str, Any]]]:
        """
        Who holds each semaphore, how much of it, and since how many seconds; longest first, so many at most.
        """
        held: dict[str, list[tuple[float, int, int]]] = {}
        for number, peer in self.peers.items():
            for name, lock in peer.held.items():
                held.setdefault(name, []).append((lock.since, number, lock.count))
        return {
            name: [
                {"peer": number, "count": count, "for": max(0.0, now - since)}
                for since, number, count in heapq.nsmallest(most, locks)
            ]
            for name, locks in held.items()
        }

    def peer_facts(self, now: float) -> Iterator[dict[str, Any]]:
        """
        What each peer holds and wants, since how many seconds, and in how many it expires.
        """
        for number, peer in self.peers.items():
            pending = None
            if peer.pending is not None:
                lock = self.semaphores[peer.pending].line[number]
                pending = {"semaphore": peer.pending, "count": lock.count, "for": max(0.0, now - lock.since)}
            yield {
                "id": number,
                "acquired": {
                    name: {"count": lock.count, "for": max(0.0, now - lock.since)}
                    for name, lock in peer.held.items()
                },
                "pending": pending,
                "expires_in": max(0.0, peer.expires - now),
            }

    # To be kept

    def dump(self) -> dict[str, Any]:
        """
        The whole state, as JSON can say it.
        """
        return {
            "max_peers": self._max_peers,
            "grants_from": self._grants_from,
            "semaphores": {
                name: [each.full_count, each.level, each.is_configured]
                for name, each in self.semaphores.items()
            },
            "lines": {
                name: [[peer, lock.count, lock.since] for peer, lock in each.line.items()]
                for name, each in self.semaphores.items()
            },
            "peers": [
                [number, peer.expires, {name: [lock.count, lock.since] for name, lock in peer.held.items()}]
                for number, peer in self.peers.items()
            ],
        }

    def load(self, dumped: Mapping[str, Any]) -> None:
        """
        Become what a state was when it was dumped.
        """
        pended = {number: peer.pending for number, peer in self.peers.items() if peer.pending is not None}
        self._max_peers = dumped["max_peers"]
        self._grants_from = dumped["grants_from"]
        self.semaphores = {
            name: Semaphore(full_count, level, is_configured=is_configured)
            for name, (full_count, level, is_configured) in dumped["semaphores"].items()
        }
        self.peers = {}
        for number, expires, held in dumped["peers"]:
            self.peers[number] = Peer(expires, {name: Lock(*lock) for name, lock in held.items()})
            for name, (count, _) in held.items():
                self.semaphores[name].acquired += count
        for name, line in dumped["lines"].items():
            for number, count, since in line:
                self.semaphores[name].line[number] = Lock(count, since)
                self.semaphores[name].pending += count
                self.peers[number].pending = name
        self._rebuild_expiries()
        for number, name in pended.items():
            peer = self.peers.get(number)
            if peer is None:
                self.settled(number, name, _unknown_peer())
            elif name in peer.held:
                self.settled(number, name, None)

    # Inside

    def _semaphore(self, name: str) -> Semaphore:
        semaphore = self.semaphores.get(name)
        if semaphore is None or not semaphore.is_configured:
            raise _unknown_semaphore()
        return semaphore

    def _peer(self, peer: int) -> Peer:
        known = self.peers.get(peer)
        if known is None:
            raise _unknown_peer()
        return known

    def _add(self, now: float, peer: int, expires_in: float) -> Peer:
        if len(self.peers) >= self._max_peers:
            raise Rejected(429, f"There are {self._max_peers} peers already, and there can be no more.")
        added = self.peers[peer] = Peer(now + expires_in)
        self._note_expiry(peer)
        return added

    def _remove(self, now: float, peer: int) -> None:
        who = self.peers[peer]
        pending = who.pending
        if pending is not None:
            self._reject(peer, pending, _unknown_peer())
            self._grant(now, pending)
        for name in list(who.held):
            self._release(now, peer, name)
        del self.peers[peer]

    def _release(self, now: float, peer: int, name: str) -> None:
        semaphore, who = self.semaphores[name], self.peers[peer]
        lock = who.held.pop(name, None)
        if lock is not None:
            semaphore.acquired -= lock.count
        elif who.pending == name:
            who.pending = None
            semaphore.pending -= semaphore.line.pop(peer).count
        self._grant(now, name)

    def _reject(self, peer: int, name: str, reason: Rejected) -> None:
        self.peers[peer].pending = None
        self.semaphores[name].pending -= self.semaphores[name].line.pop(peer).count
        self.settled(peer, name, reason)

    def _grant(self, now: float, name: str) -> None:
        """
        Grant the locks at the head of the line that fit.
        """
        semaphore = self.semaphores[name]
        while semaphore.line and now >= self._grants_from:
            peer, lock = next(iter(semaphore.line.items()))
            if semaphore.acquired + lock.count > semaphore.full_count:
                break
            del semaphore.line[peer]
            semaphore.pending -= lock.count
            semaphore.acquired += lock.count
            self.peers[peer].held[name] = Lock(lock.count, now)
            self.peers[peer].pending = None
            self.settled(peer, name, None)
        if not semaphore.is_configured and not semaphore.acquired:
            del self.semaphores[name]

    def _expire(self, now: float) -> None:
        """
        Forget the peers whose time is over, and end the grace.
        """
        if self._grants_from and now >= self._grants_from:
            self._grants_from = 0.0
            for name in list(self.semaphores):
                self._grant(now, name)
        while self._expiries and self._expiries[0][0] <= now:
            _, peer = heapq.heappop(self._expiries)
            who = self.peers.get(peer)
            if who is None:
                continue
            if who.expires <= now:
                self._remove(now, peer)
            else:
                heapq.heappush(self._expiries, (who.expires, peer))

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


def _check_count(count: int) -> None:
    if count < 1:
        raise Rejected(400, f"Lock count must be a positive number. Found: {count}.")
